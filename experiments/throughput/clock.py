"""Measures a training run: seconds per step, memory, and CPU use of other processes meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

DISTURBANCE = 0.12
"""Most cores that other processes may use during a step that counts."""


def others_seconds() -> float:
    """CPU seconds that other processes have used since the machine started; 0 without `/proc/stat`."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _waiting, interrupts, soft = map(int, stat.read_text().split(maxsplit=8)[1:8])
    busy = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


class Clock:
    """Records the time after each step, and writes the results as JSON after the last one.

    On a CPU, the speed is that of the median step, without steps that other processes disturbed. A GPU runs
    asynchronously, so there the clock synchronises with it only after the warm-up and after the last step, and the
    speed is the mean over the steps between.

    Args:
        path: File to write.
        steps: Number of steps of the run.
        warmup: Number of first steps that do not count.
        tokens_per_step: Number of tokens per step.
    """

    def __init__(self, path: str, steps: int, warmup: int, tokens_per_step: int) -> None:
        if warmup < 1 or steps < warmup + 2:
            raise ValueError(f"steps must be at least warmup + 2 with a warmup of 1 or more, but is {steps}, {warmup}")
        self.path, self.steps, self.warmup, self.tokens_per_step = Path(path), steps, warmup, tokens_per_step
        self.ticks: list[tuple[float, float]] = []
        self.losses: list[torch.Tensor] = []

    def tick(self, loss: torch.Tensor, network: torch.nn.Module) -> None:
        """Records a step; call it after each one."""
        if loss.is_cuda and len(self.ticks) in (self.warmup, self.steps - 1):
            torch.cuda.synchronize()
        self.ticks.append((time.perf_counter(), others_seconds()))
        self.losses.append(loss.detach())
        if len(self.ticks) == self.steps:
            self.path.write_text(json.dumps(self._found(loss.is_cuda, network)))

    def _found(self, cuda: bool, network: torch.nn.Module) -> dict[str, float | int | str]:
        ticks = self.ticks[self.warmup :]
        seconds = [now[0] - before[0] for before, now in itertools.pairwise(ticks)]
        others = [(now[1] - before[1]) / (now[0] - before[0]) for before, now in itertools.pairwise(ticks)]
        # The kernel counts CPU time in hundredths of a second, so short steps need a tolerance of that size.
        calm = [s for s, o in zip(seconds, others) if o < DISTURBANCE + 0.02 / s]
        mean = (ticks[-1][0] - ticks[0][0]) / len(seconds)
        step = mean if cuda else statistics.median(calm or seconds)
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "tokens_per_second": self.tokens_per_step / step,
            "mean_tokens_per_second": self.tokens_per_step / mean,
            "steps_counted": len(seconds) if cuda else len(calm or seconds),
            "disturbed": not cuda and not calm,
            "others_cores": (ticks[-1][1] - ticks[0][1]) / (ticks[-1][0] - ticks[0][0]),
            "peak_bytes": torch.cuda.max_memory_allocated()
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "loss": float(torch.stack(self.losses[-5:]).float().mean()),
            "parameters": sum(p.numel() for p in network.parameters()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if cuda else processor(),
        }


def processor() -> str:
    """Number of cores and name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()
