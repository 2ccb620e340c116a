"""Training steps whose gradient is that of the mean loss over all targets, however the step is split into batches."""

from __future__ import annotations

import inspect
import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lit_llm.data.sampling import data_parallel_rank
from lit_llm.shards import local, total_norm

Loss = tuple[Float[Tensor, ""], Float[Tensor, ""]]
"""A loss summed over a batch's targets, and the number of targets (or the sum of their weights)."""

PART_SCALE = 1024.0
"""Divisor of summed losses until the targets of the step are counted; it keeps gradients in the range of fp16."""

SET_OFTEN = frozenset({"_current_fx_name", "loss_sums", "_sums_before", "_step_targets", "_parts_read", "grad_norm"})


class ExactSteps(LightningModule, ABC):
    """A LightningModule whose losses are summed and divided by the number of targets in the whole step.

    A step may consist of several micro-batches on several processes: eight batches of one row give the gradient of one
    batch of eight, whatever the rows' lengths, whereas Lightning averages the means of the micro-batches. The only
    exception is batch normalisation, whose statistics are of one micro-batch on one process. The gradient of the whole
    step is clipped, and freed as soon as the step is done. Losses accumulate on the device until they are read.

    Random numbers in a step (dropout, noise) depend only on the run's seed, the step, the micro-batch and the
    data-parallel rank, so a resumed run draws the same ones as an uninterrupted run.

    Attributes:
        loss_sums: Sum of the loss since the last report, and number of targets; a callback that undoes a step sets it.
        grad_norm: Norm of the last step's gradient; `None` if it is not clipped.
    """

    loss_sums: tuple[Tensor | float, Tensor | float]

    def __init__(self) -> None:
        super().__init__()
        self.grad_norm: Tensor | None = None
        self._step_targets: Tensor | float = 0.0
        self._seed: int | None = None
        self._parts_read = 0
        self.loss_sums = self._sums_before = (0.0, 0.0)

    @abstractmethod
    def loss(self, batch: Any) -> Loss:
        """The loss to minimise, summed over the batch's targets, and the number of targets."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Like torch's, but without its slow check for parameters if the name is in `SET_OFTEN`.

        One of them, `_current_fx_name`, is set by Lightning at every hook.
        """
        if name in SET_OFTEN:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # A step.

    def training_step(self, batch: Any, batch_idx: int) -> Float[Tensor, ""]:
        """The mean loss of this batch; if the step has several parts, the summed loss over `PART_SCALE`.

        `on_before_optimizer_step` then divides the gradient by the number of targets of the whole step.
        """
        if self._step_has_parts and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._begin_step()
        if self._parts_read == 0:
            self._sums_before = self.loss_sums
        self._seed_chance()
        total, targets = self.loss(batch)
        self.loss_sums = self.loss_sums[0] + total.detach(), self.loss_sums[1] + targets
        if not self._step_has_parts:
            return total / targets.clamp(min=1)
        self._step_targets = self._step_targets + targets
        return total / PART_SCALE

    def _begin_step(self) -> None:
        """Discards the counts of micro-batches that never completed a step; Lightning discards their gradients."""
        if not self._gradients_are_elsewhere:
            self._step_targets, self._parts_read = 0.0, 0

    def _seed_chance(self) -> None:
        if self._seed is None:  # `seed_everything` stores its argument in this variable
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        # Large odd factors decorrelate neighbouring steps and ranks; torch's CPU generator uses 32 bits of the seed.
        rank, _ = data_parallel_rank(self.trainer)
        where = self.trainer.global_step * 0x9E3779B1 + self._parts_read * 0x85EBCA77 + rank * 0xC2B2AE3D
        seed = (self._seed + where) % 2**32
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)
        self._parts_read += 1

    training_step.__signature__ = inspect.signature(training_step)  # cached: Lightning inspects it at every step

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turns the gradient of the scaled sum into the gradient of the mean over all targets of the step."""
        if not self._step_has_parts:
            return
        targets = self.trainer.strategy.reduce(self._step_targets, reduce_op="sum")
        self._step_targets = 0.0
        # Lightning has divided by the number of micro-batches, and data-parallel strategies average over processes.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        # (Tensor-parallel ranks read the same rows; repeating them in `targets` and in `world_size` cancels.)
        factor = PART_SCALE * parts / targets.clamp(min=1)
        if self._gradients_are_elsewhere:
            self.trainer.strategy.scale_gradients(factor)
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients := local(gradients):  # may be offloaded to the CPU
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Steps and frees the gradients at once: Lightning would keep them during the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        self._parts_read = 0
        self.optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Sets all gradients to `None`, like torch's, but without its profiler annotation, which costs more time."""
        if self._gradients_are_elsewhere:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    @property
    def _gradients_are_elsewhere(self) -> bool:
        """Whether the strategy keeps the gradients itself, and scales, clips and frees them (`zero`)."""
        return getattr(self.trainer.strategy, "owns_gradients", False)

    @property
    def _step_has_parts(self) -> bool:
        return self.trainer.accumulate_grad_batches > 1 or self.trainer.world_size > 1

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm, which it keeps for the logs, or by value.

        Lightning's own clipping refuses fused optimisers under bf16-mixed too, where no gradient is unscaled.

        Raises:
            ValueError: With a fused optimiser under 16-mixed, because it unscales gradients only after clipping.
        """
        if self._gradients_are_elsewhere:
            return
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if gradient_clip_val and scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                "trainer.gradient_clip_val must be None with a fused optimiser under 16-mixed, but is "
                f"{gradient_clip_val}; train in bf16-mixed, or set the optimiser's fused to false"
            )
        members = (p for group in optimizer.param_groups for p in group["params"]) if gradient_clip_val else ()
        gradients = [p.grad for p in members if p.grad is not None]
        if gradient_clip_algorithm == "value" and gradient_clip_val:
            torch._foreach_clamp_min_(local(gradients), -gradient_clip_val)
            torch._foreach_clamp_max_(local(gradients), gradient_clip_val)
        elif gradient_clip_val:
            self.grad_norm = total_norm(gradients)
            torch._foreach_mul_(local(gradients), (gradient_clip_val / (self.grad_norm + 1e-6)).clamp(max=1.0))

    # The training loss since the last report.

    @property
    def whole_loss_sums(self) -> tuple[Tensor | float, Tensor | float]:
        """`loss_sums` without the micro-batches of an unfinished step, because a resumed run reads them again."""
        return self._sums_before if self._parts_read else self.loss_sums

    def take_train_loss(self) -> float:
        """The mean loss over the targets since the last call; reading it waits for the device.

        NaN if there were no targets, for example because all steps were undone.

        Raises:
            FloatingPointError: When the loss is not finite.
        """
        loss_sum, target_sum = self._added(self.loss_sums)
        self.require_finite("train/loss", loss_sum / max(target_sum, 1.0))
        self.loss_sums = (0.0, 0.0)
        return loss_sum / target_sum if target_sum else math.nan

    def take_train_metrics(self) -> dict[str, float]:
        """Further metrics of the steps since the last call, by name; called after `take_train_loss`."""
        return {}

    def _added(self, sums: tuple[Tensor | float, Tensor | float]) -> list[float]:
        """A summed loss and its number of targets, each summed over all processes."""
        tensors = (torch.as_tensor(x, device=self.device).clone() for x in sums)
        return [float(self.trainer.strategy.reduce(x, reduce_op="sum")) for x in tensors]

    def require_finite(self, name: str, value: float) -> None:
        """Checks that a value is finite.

        Raises:
            FloatingPointError: When it is not; the message names the value and the step.
        """
        if not math.isfinite(value):
            has_checkpoint = Path(self.trainer.default_root_dir, "checkpoints", "last.ckpt").exists()
            way = "go on from the last good checkpoint with --ckpt_path last" if has_checkpoint else "start again"
            raise FloatingPointError(
                f"{name} must be finite, but is {value} at step {self.trainer.global_step}; lower the learning rate, "
                f"lengthen the warm-up or clip gradients, and {way}"
            )

    def require_numbers(self, predictions: Tensor) -> None:
        """Checks that predictions are finite.

        Raises:
            FloatingPointError: When one is not.
        """
        if not predictions.isfinite().all():
            raise FloatingPointError("predictions must be finite, but are not; take a checkpoint from before")
