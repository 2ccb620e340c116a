"""What a training step reaches: loss, tokens a second, share of the machine's peak, memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.batch import count_items
from lit_llm.data.sampling import data_parallel_rank
from lit_llm.shards import whole_shape


class Throughput(Callback):
    """Logs a run's vital signs every `log_every_n_steps` steps, straight to the loggers.

    Between those it adds two numbers a step and never waits for the device. `train/loss` is the mean since the last
    report. Time spent validating does not count.

    Attributes:
        latest: The last report.
        tokens: Tokens trained on so far (rows' items where the data has no tokens), over all processes and resumes.
        seconds: Time spent training, likewise.
        unit: What is counted, in short: `tok`, or `rows` of data that have no tokens.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.tokens = 0
        self.seconds = 0.0
        self.unit = "tok"
        self._new_tokens = self._begun_tokens = 0
        self._since = self._paused_at = 0.0
        self._reported_step = 0
        self._peak: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        dtype = torch.float32 if "32" in str(trainer.precision) else torch.bfloat16
        self._peak = peak_flops(pl_module.device, dtype)
        self._reported_step = trainer.global_step
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on with the clock."""
        self._since += time.perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts, and reports where it is time."""
        count = count_items(batch) * data_parallel_rank(trainer)[1]
        self._new_tokens += count
        self._begun_tokens = self._begun_tokens + count if trainer.fit_loop.epoch_loop._should_accumulate() else 0
        step = trainer.global_step
        if step == self._reported_step:
            return
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            self._report(trainer, pl_module, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the steps since the last report."""
        if self._new_tokens:
            self.tokens += self._new_tokens
            self.seconds += time.perf_counter() - self._since
            self._new_tokens = 0

    def _report(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        has_tokens = isinstance(batch, dict) and "input_ids" in batch
        self.unit = "tok" if has_tokens else "rows"
        loss = pl_module.take_train_loss()  # waits for the device, so the clock below is right
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self.tokens += self._new_tokens
        self.seconds += elapsed
        rate = self._new_tokens / elapsed
        self._new_tokens, self._reported_step = 0, trainer.global_step
        report = {
            **({} if math.isnan(loss) else {"train/loss": loss}),
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/tokens": float(self.tokens),
            "train/tokens_per_second": rate,
            "train/seconds": self.seconds,
            "train/memory_gib": peak_memory(pl_module.device) / 2**30,
        }
        report |= pl_module.take_train_metrics()
        if pl_module.grad_norm is not None:
            report["train/grad_norm"] = float(pl_module.grad_norm)
        flops = getattr(pl_module.network, "flops_per_token", None) if has_tokens else None
        # (They count the network's parameters, which DeepSpeed's third stage leaves empty.)
        if flops is not None and self._peak and all(p.shape == whole_shape(p) for p in pl_module.parameters()):
            report["train/mfu"] = rate * flops(batch["input_ids"].shape[1]) / (self._peak * trainer.world_size)
        self.latest = report
        for logger in trainer.loggers:
            logger.log_metrics(report, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What has been counted, the part not yet reported included, but no step that was begun: it is done again."""
        since = time.perf_counter() - self._since if self._new_tokens else 0.0
        return {"tokens": self.tokens + self._new_tokens - self._begun_tokens, "seconds": self.seconds + since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second that matrix products can reach on a device.

    Of an accelerator the maker's figure; of a CPU what a product of 1,024³ reaches here, since no table knows its
    cores, instructions and clock. `None` where neither is known.
    """
    if device.type != "cpu":
        flops = get_available_flops(device, dtype)
        return float(flops) if flops else None
    a = torch.randn(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: of the accelerator's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
