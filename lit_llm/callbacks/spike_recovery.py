"""Recovery from loss spikes: bad steps are undone, and a run that does not recover returns to an earlier state."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_llm.callbacks.last_checkpoint import settle
from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.ranges import require_at_least, require_range
from lit_llm.shards import local, total_norm
from lit_llm.wording import first_line

log = logging.getLogger(__name__)

ON_DEVICE = ("losses", "norms", "seen", "skipped", "run")
KEPT = (*ON_DEVICE, "rollbacks", "looked_at", "skipped_before", "good_at", "good_step")


class SpikeRecovery(Callback):
    """Undoes steps whose loss or gradient norm is not finite or far above the recent ones, and rolls back if needed.

    The decision and the undo happen on the device without synchronisation: weights, running statistics and optimiser
    state are copied before each step (which takes their memory once more) and restored after a bad one. This happens
    right after the optimiser step, so that other callbacks and weight averages only see good weights, whatever the
    order of the callbacks.
    The count of bad steps is read only every `log_every_n_steps` steps, or every `patience` steps if these are fewer.
    After `patience` bad steps in a row, weights and optimiser state are restored from `checkpoints/good.ckpt`; data and
    schedule continue from the current step, so batches read since then are not read again. That file is written every
    `window / 2` good steps, at a reading without new bad steps. A run without bad steps is bit for bit the same as
    without this callback. (Counters that an optimiser keeps outside of tensors are not undone.)

    A resumed run behaves like an uninterrupted one, except if a later `good.ckpt` has replaced that of the checkpoint.
    The later one is then removed, and a new one is written at the next reading without new bad steps. Roll-backs use
    that one until the uninterrupted run would write its next; a roll-back before it is written fails the run.

    Args:
        threshold: A step is bad if its loss or gradient norm is more than this many standard deviations above the mean
            of the window.
        window: Number of good steps to compare with; until half of them are seen, any finite value is accepted.
        patience: Number of consecutive bad steps after which the run rolls back.
        max_rollbacks: Maximum number of roll-backs; then the run fails.

    Attributes:
        skipped: Number of bad steps so far.
        rollbacks: Number of roll-backs so far.

    Raises:
        ValueError: When a value is out of range.
        FloatingPointError: When a roll-back is due but `max_rollbacks` is reached or there is no `good.ckpt`.

    Source:
        Skipped steps: Groeneveld et al., 2024, "OLMo", arXiv:2402.00838, and its `SkipStepOptimizer` (6 deviations, 128
        steps; implemented in the optimiser there). Roll-back and skipped data: Chowdhery et al., 2022, "PaLM",
        arXiv:2204.02311, section 5.1.
    """

    needs_plain_weights = True
    """Not for a strategy whose engine holds the weights or gradients itself (DeepSpeed)."""

    def __init__(self, threshold: float = 6.0, window: int = 128, patience: int = 20, max_rollbacks: int = 3) -> None:
        require_range("above 0", threshold=threshold)
        require_at_least(2, window=window)
        require_at_least(1, patience=patience)
        require_at_least(0, max_rollbacks=max_rollbacks)
        self.threshold, self.window, self.patience, self.max_rollbacks = threshold, window, patience, max_rollbacks
        self.losses = self.norms = torch.zeros(window)
        self.seen: Any = torch.zeros((), dtype=torch.long)
        self.skipped: Any = torch.zeros((), dtype=torch.long)
        self.run: Any = torch.zeros((), dtype=torch.long)
        self.rollbacks = 0
        self._fine: Tensor | None = None
        self._backup: list[tuple[Tensor, Tensor]] = []
        self._sums: tuple[Any, Any] | None = None
        self.looked_at = self.skipped_before = self.good_at = 0
        self.good_step: int | None = 0
        self._good_is_gone = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the statistics to the network's device, and checks which `good.ckpt` there is."""
        for name in ON_DEVICE:
            setattr(self, name, getattr(self, name).to(pl_module.device, copy=True))
        self.looked_at = min(self.looked_at, trainer.global_step)
        self._sums = None
        self._good_is_gone = not trainer.fast_dev_run and not self._has_good(trainer)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda optimizer, *_: self._undo(pl_module, optimizer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the loss sums before the step, and copies buffers that forward passes change, such as batch norm's."""
        if self._sums is None:
            self._sums = pl_module.loss_sums
            counted = [t for t in pl_module.buffers() if t.is_floating_point() or t.dim() == 0]
            self._backup = [(t, t.clone()) for t in counted]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decides on the device whether the step is good, and copies what it will change."""
        before, now = self._sums, pl_module.loss_sums
        targets = (now[1] - before[1]).clamp(min=1)
        loss = ((now[0] - before[0]) / targets).detach().float()
        members = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(p.grad for p in members).float()
        if trainer.accumulate_grad_batches > 1 or trainer.world_size > 1:
            norm = norm / targets  # the gradient is still of the summed loss
        fine = self._is_usual(loss, self.losses) & self._is_usual(norm, self.norms)
        if trainer.world_size > 1:  # all processes step, or none
            fine = trainer.strategy.reduce(fine.float(), reduce_op="sum") == trainer.world_size
        here = fine & (torch.arange(self.window, device=fine.device) == self.seen % self.window)
        self.losses = torch.where(here, loss, self.losses)
        self.norms = torch.where(here, norm, self.norms)
        self.seen += fine
        self.skipped += ~fine
        self.run = torch.where(fine, 0, self.run + 1)
        self._fine = fine
        state = [t for p in members for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        self._backup += [(t, t.detach().clone()) for t in local(members + state)]

    def _is_usual(self, value: Tensor, last: Tensor) -> Tensor:
        filled = torch.arange(self.window, device=last.device) < self.seen
        count = filled.sum().clamp(min=1)
        mean = (last * filled).sum() / count
        deviation = (((last - mean).square() * filled).sum() / count).sqrt()
        new = self.seen < max(2, self.window // 2)
        return value.isfinite() & (new | (value <= mean + self.threshold * deviation))

    @torch.no_grad()
    def _undo(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Undoes the step if it is bad."""
        fine = self._fine
        for new, old in self._backup:
            new.copy_(torch.where(fine.to(new.device), new, old.to(new.device)))
        copied = {id(new) for new, _ in self._backup}
        for values in optimizer.state.values():
            for t in local(t for t in values.values() if isinstance(t, Tensor)):  # made by this step
                if id(t) not in copied:
                    t.copy_(torch.where(fine.to(t.device), t, 0))
        now = pl_module.loss_sums
        pl_module.loss_sums = tuple(torch.where(fine, new, old) for new, old in zip(now, self._sums, strict=True))
        self._backup, self._sums = [], None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the number of bad steps every few steps, and rolls back if needed.

        Raises:
            FloatingPointError: When a roll-back is due but `max_rollbacks` is reached or there is no `good.ckpt`.
        """
        if self._fine is None:
            return
        if self._sums is not None:  # 16-mixed skips a step with an infinite gradient
            self._undo(pl_module, trainer.optimizers[0])
        self._fine = None
        step = trainer.global_step
        if step - self.looked_at >= min(trainer.log_every_n_steps, self.patience):
            self.looked_at = step
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        skipped, run, seen = torch.stack([self.skipped, self.run, self.seen]).tolist()
        if news := skipped - self.skipped_before:
            log.info(f"Step {trainer.global_step}: {news} steps with an outlying loss or gradient were skipped")
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_steps": float(skipped)}, step=trainer.global_step)
        self.skipped_before = skipped
        good = self._good(trainer)
        if run >= self.patience:
            self._go_back(trainer, pl_module, good)
        elif not news and not trainer.fast_dev_run:
            is_time = seen - self.good_at >= self.window // 2
            if is_time or self._good_is_gone:
                self.good_at, self.good_step = seen if is_time else self.good_at, trainer.global_step
                trainer.save_checkpoint(good)
                self._good_is_gone = False

    def _go_back(self, trainer: Trainer, pl_module: LightningModule, good: Path) -> None:
        step = trainer.global_step
        settle(trainer)
        if self.rollbacks >= self.max_rollbacks or not good.exists():
            raise FloatingPointError(
                f"train/loss must return within {self.patience} steps, but did not at step {step} after "
                f"{self.rollbacks} roll-backs; lower the learning rate, lengthen the warm-up or look at the data"
            )
        self.rollbacks += 1
        checkpoint = trainer.strategy.load_checkpoint(good)
        pl_module.agree_on_average(checkpoint)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        trainer.strategy.load_model_state_dict(checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate  # the schedule goes on
        self.run = torch.zeros_like(self.run)
        log.info(f"Step {step}: the loss did not recover; returning to step {checkpoint['global_step']}")

    def forget(self, trainer: Trainer) -> None:
        """Resets the statistics and removes `good.ckpt`: for a callback that changes the network.

        The next reading without new bad steps writes a new one.
        """
        settle(trainer)
        trainer.strategy.remove_checkpoint(self._good(trainer))
        self.seen, self.run = torch.zeros_like(self.seen), torch.zeros_like(self.run)
        self.good_at, self.good_step, self._good_is_gone = 1 - self.window // 2, 0, False

    def _has_good(self, trainer: Trainer) -> bool:
        """Whether `good.ckpt` is the one the run wrote last, if any; removes another, such as that of a later step."""
        good, step = self._good(trainer), 0
        if trainer.is_global_zero and good.exists():
            try:
                step = read_checkpoint(good, in_pieces=True)["global_step"]
            except (ValueError, OSError) as error:
                log.warning(f"There is no state to go back to until the next is written: {first_line(error)}")
                step = -1
        step = trainer.strategy.broadcast(step)
        if self.good_step is None:  # a checkpoint of an older version lacks it
            self.good_step = step if 0 < step <= trainer.global_step else 0
        if step not in (0, self.good_step):
            trainer.strategy.remove_checkpoint(good)
        return self.good_step in (0, step)

    @staticmethod
    def _good(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" / "good.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """The statistics of recent steps, the counts, and the step of the last `good.ckpt`."""
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state; if `window` has changed, keeps the newest values that fit."""
        older = {"looked_at": 0, "skipped_before": int(state_dict["skipped"]), "good_at": 0, "good_step": None}
        for name in KEPT:
            setattr(self, name, (older | state_dict)[name])
        if (before := len(self.losses)) != self.window:
            kept = min(int(self.seen), before, self.window)
            newest = torch.arange(int(self.seen) - kept, int(self.seen)) % before
            for name in ("losses", "norms"):
                last = getattr(self, name)[newest]
                setattr(self, name, torch.cat([last, last.new_zeros(self.window - kept)]))
            self.good_at -= int(self.seen) - kept
            self.seen = torch.full_like(self.seen, kept)
