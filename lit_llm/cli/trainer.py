"""Lightning's trainer with a precision that suits the device."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator, XLAAccelerator

from lit_llm.products import multiplies_bfloat16

log = logging.getLogger(__name__)

Precision = Literal["auto"] | _PRECISION_INPUT


class RunTrainer(Trainer):
    """Lightning's trainer, whose precision can be `auto`.

    Args:
        accelerator: As Lightning's.
        precision: As Lightning's, or auto: bf16-mixed on a GPU or CPU with instructions for bfloat16, else 32-true
            (on other CPUs, bfloat16 is many times slower).
        **others: As Lightning's.
    """

    def __init__(
        self, *, accelerator: str | Accelerator = "auto", precision: Precision | None = None, **others: Any
    ) -> None:
        if precision == "auto":
            precision = suited_precision(accelerator)
        super().__init__(accelerator=accelerator, precision=precision, **others)


def suited_precision(accelerator: str | Accelerator) -> Literal["bf16-mixed", "32-true"]:
    """The precision that `auto` stands for on an accelerator."""
    if accelerator in ("auto", "gpu"):
        found = torch.accelerator.current_accelerator(check_available=True)
        accelerator = found.type if found else "tpu" if XLAAccelerator.is_available() else "cpu"
    if isinstance(accelerator, str) and multiplies_bfloat16(accelerator):
        return "bf16-mixed"
    if accelerator == "cpu":
        log.info("Computes in float32, since this CPU has no instructions for bfloat16")
    return "32-true"
