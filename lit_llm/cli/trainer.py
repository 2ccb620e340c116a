"""Lightning's trainer with a precision that suits the device."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.fabric.utilities.device_parser import _select_auto_accelerator
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator

from lit_llm.products import multiplies_bfloat16

log = logging.getLogger(__name__)

Precision = Literal["auto"] | _PRECISION_INPUT


class RunTrainer(Trainer):
    """Lightning's trainer, whose precision can be `auto`; warns of 16 bits on a CPU that only emulates them.

    Args:
        precision: 64-true, 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true, …, or auto: bf16-mixed on a GPU, or a CPU
            under Linux, with instructions for bfloat16, else 32-true.
        **others: As Lightning's.
    """

    def __init__(self, *, precision: Precision | None = None, **others: Any) -> None:
        if precision == "auto":
            precision = suited_precision(others.get("accelerator", "auto"))
        super().__init__(precision=precision, **others)
        is_fast = self.precision.startswith("bf16") and multiplies_bfloat16("cpu")
        if "16" in self.precision and isinstance(self.accelerator, CPUAccelerator) and not is_fast:
            log.warning(
                f"trainer.precision is {self.precision}, for which this CPU has no known instructions; without them, "
                f"32-true is many times faster"
            )


def suited_precision(accelerator: str | Accelerator) -> Literal["bf16-mixed", "32-true"]:
    """The precision that `auto` stands for on an accelerator."""
    kind = _select_auto_accelerator() if accelerator == "auto" else accelerator
    kind = "cuda" if kind == "gpu" else kind
    if kind == "cuda" and _IS_INTERACTIVE and torch.cuda.device_count() > 1:
        log.info("Computes in float32: to ask GPUs for bfloat16 here would keep a notebook from using several")
        return "32-true"
    if isinstance(kind, str) and multiplies_bfloat16(kind):
        return "bf16-mixed"
    if kind == "cpu":
        log.info("Computes in float32, since this CPU has no known instructions for bfloat16")
    return "32-true"
