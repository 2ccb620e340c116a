"""Training metrics: loss, tokens per second, model FLOPs utilisation (MFU), memory."""

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
from lit_llm.products import DTYPES, multiplies_bfloat16
from lit_llm.shards import whole_shape


class Throughput(Callback):
    """Logs loss, learning rate, throughput, MFU, memory and gradient norm every `log_every_n_steps` steps.

    Between reports it only counts tokens and never synchronises with the device. `train/loss` is the mean since the
    last report. Time spent in validation does not count.

    Attributes:
        latest: The last report.
        tokens: Tokens trained on so far (rows, for data without tokens), over all processes and resumed runs.
        seconds: Time spent training so far, over all resumed runs.
        unit: Unit of the counts: `tok`, or `rows` for data without tokens.
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
        dtype = DTYPES.get(str(trainer.precision).partition("-")[0], torch.bfloat16)
        is_fast = dtype.itemsize > 2 or (dtype == torch.bfloat16 and multiplies_bfloat16("cpu"))
        if pl_module.device.type == "cpu" and not is_fast:
            dtype = torch.float32  # the peak of a type that is only emulated would take long to measure
        self._peak = peak_flops(pl_module.device, dtype)
        self._reported_step = trainer.global_step
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restarts the clock."""
        self._since += time.perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts tokens, and reports if it is due."""
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
        loss = pl_module.take_train_loss()  # synchronises with the device, so the time below is right
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self.tokens += self._new_tokens
        self.seconds += elapsed
        rate = self._new_tokens / elapsed
        self._new_tokens, self._reported_step = 0, trainer.global_step
        group = trainer.optimizers[0].param_groups[0]
        report = {
            **({} if math.isnan(loss) else {"train/loss": loss}),
            "train/learning_rate": group["lr"] / group.get("unit", 1.0),
            "train/tokens": float(self.tokens),
            "train/tokens_per_second": rate,
            "train/seconds": self.seconds,
            "train/memory_gib": peak_memory(pl_module.device) / 2**30,
        }
        report |= pl_module.take_train_metrics()
        if pl_module.grad_norm is not None:
            report["train/grad_norm"] = float(pl_module.grad_norm)
        flops = getattr(pl_module.network, "flops_per_token", None) if has_tokens else None
        # Not with DeepSpeed's stage 3, which leaves parameters empty: FLOPs are counted from their shapes.
        if flops is not None and self._peak and all(p.shape == whole_shape(p) for p in pl_module.parameters()):
            report["train/mfu"] = rate * flops(batch["input_ids"].shape[1]) / (self._peak * trainer.world_size)
        self.latest = report
        for logger in trainer.loggers:
            logger.log_metrics(report, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The counts, including what is not yet reported, but not an incomplete step, which is repeated on resuming."""
        since = time.perf_counter() - self._since if self._new_tokens else 0.0
        return {"tokens": self.tokens + self._new_tokens - self._begun_tokens, "seconds": self.seconds + since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak floating-point operations per second of matrix products on a device.

    For an accelerator, the manufacturer's figure, or `None` if it is unknown. For a CPU, measured here with a product
    of 1,024 × 1,024 matrices, since no table covers its cores, instruction sets and clock.
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
    """Peak bytes so far: allocated on the accelerator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
