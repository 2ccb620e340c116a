"""Pruning during a run, by the scores of `compression.sparsity`, and training that keeps pruned weights zero."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lit_llm.callbacks.calibration import calibration_batches
from lit_llm.callbacks.changed_network import begin_anew, look_anew, require_one_network
from lit_llm.compression.compression import records_of
from lit_llm.compression.sparsity import (
    MASK,
    Magnitude,
    Movement,
    Sparsity,
    Zeros,
    add_masks,
    apply_masks,
    cubic,
    masked_layers,
    sparsity_of,
)
from lit_llm.ranges import require_at_least
from lit_llm.schedulers import step_at
from lit_llm.shards import local, part, whole

log = logging.getLogger(__name__)


class KeepZeros(Callback):
    """Continues training from a pruned model and keeps its zeros, whatever the optimiser does (momentum, weight decay).

    The masks are buffers next to the weights, saved in checkpoints; an exported model has none. Logs `train/sparsity`,
    the counted fraction of zeros, whenever the trainer logs.

    Args:
        layers: Patterns of layer names; `None` is all matrices inside blocks (`compression.patterns`).
    """

    needs_plain_weights = True
    """Not for a strategy whose engine holds the weights or gradients itself (DeepSpeed)."""

    def __init__(self, layers: list[str] | None = None) -> None:
        self.layers = layers
        self._logged_step = -1

    def prepare(self, network: nn.Module) -> None:
        """Adds the masks; a network loaded from a checkpoint already has them."""
        Zeros(self.layers).apply(network)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares the network.

        Raises:
            ValueError: When another network than the trained one is evaluated, or adapters are trained beside the
                weights.
        """
        require_one_network(pl_module, "pruned")
        if not masked_layers(pl_module.network):
            self.prepare(pl_module.network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Registers hooks that apply the masks after each optimiser step."""
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: apply_masks(pl_module.network))
        self._logged_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Masks the gradients of pruned weights, which would affect gradient clipping and Muon's orthogonalisation."""
        apply_masks(pl_module.network, gradients=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the sparsity."""
        step = trainer.global_step
        if step != self._logged_step and (step % trainer.log_every_n_steps == 0 or step == trainer.max_steps):
            self._logged_step = step
            for logger in trainer.loggers:
                logger.log_metrics({"train/sparsity": masked_sparsity(pl_module.network)}, step=step)


def masked_sparsity(network: nn.Module) -> float:
    """The fraction of zeros among the weights that have masks, counted."""
    return sparsity_of(network, list(masked_layers(network)))


class Pruning(KeepZeros):
    """Prunes gradually during training: the sparsity rises along a cubic curve, and the remaining weights adapt.

    The sparsity depends only on the step, and masks and accumulated scores are buffers of the network, so a resumed run
    continues exactly. Pruned weights stay pruned. Validations before the end of pruning do not count as the best; a run
    that stops before that warns.

    Suggested: begin after the learning-rate warm-up and leave the last third of the run to recover. With `start` equal
    to `end`, everything is pruned in one step.

    Args:
        method: Pruning method: how weights are scored, and the final sparsity.
        start: Fraction of the run after which pruning begins, in [0, 1].
        end: Fraction of the run after which the full sparsity is reached, in [`start`, 1].
        every_n_steps: Steps between two pruning updates.
        num_batches: Batches of training data for methods that need activations.

    Raises:
        ValueError: When a value is out of range.

    Source:
        Zhu & Gupta, 2017, "To prune, or not to prune", arXiv:1710.01878, eq. 1.
    """

    def __init__(
        self,
        method: Sparsity = Magnitude(),  # noqa: B008 (frozen)
        start: float = 0.1,
        end: float = 0.6,
        every_n_steps: int = 10,
        num_batches: int = 8,
    ) -> None:
        if not 0 <= start <= end <= 1:
            raise ValueError(f"start and end must be in order and in [0, 1], but are {start} and {end}")
        require_at_least(1, every_n_steps=every_n_steps, num_batches=num_batches)
        super().__init__(method.layers)
        self.method, self.start, self.end = method, start, end
        self.every_n_steps, self.num_batches = every_n_steps, num_batches
        self.finished = False
        self._pruned_step = -1

    def prepare(self, network: nn.Module) -> None:
        """Adds masks that keep everything at first."""
        form = {"names": list(self.method.chosen(network)), "scores": isinstance(self.method, Movement)}
        add_masks(network, **form)
        network.compression = [*records_of(network), self.method.described() | {"form": form}]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in `KeepZeros`."""
        super().on_train_start(trainer, pl_module)
        self._pruned_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """As in `KeepZeros`; also accumulates the scores of `Movement`."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if isinstance(self.method, Movement) and not self.finished:
            self.method.watch(masked_layers(pl_module.network))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prunes if it is due."""
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        if step != self._pruned_step and not self.finished:
            self._pruned_step = step
            first, last = max(1, step_at(self.start, total)), max(1, step_at(self.end, total))
            if step >= last or (step >= first and (step - first) % self.every_n_steps == 0):
                progress = 1.0 if step >= last else (step - first) / (last - first)
                self._prune(trainer, pl_module.network, cubic(progress, self.method.final))
                look_anew(trainer, pl_module)
            if step >= last:
                self.finished = True
                begin_anew(trainer, pl_module)
                log.info(f"Pruned to a sparsity of {masked_sparsity(pl_module.network):.4f}")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @torch.no_grad()
    def _prune(self, trainer: Trainer, network: nn.Module, sparsity: float) -> None:
        layers = masked_layers(network)
        batches = calibration_batches(trainer, self.num_batches) if self.method.needs_batches else []
        masks = {name: getattr(layer, MASK) for name, layer in layers.items()}
        kept = {name: whole(mask) for name, mask in masks.items()}
        for name, mask in self.method.masks(self.method.scores(network, layers, batches), sparsity, kept).items():
            # Processes calibrate on different batches, so the first one's mask is used by all.
            mask = trainer.strategy.broadcast(mask) if trainer.world_size > 1 else mask
            local([masks[name]])[0].copy_(part(mask, masks[name]))
        apply_masks(network)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if the run ended before pruning was complete."""
        if not self.finished:
            log.warning(f"The run stopped at step {trainer.global_step}, before pruning was complete")

    def state_dict(self) -> dict[str, Any]:
        """Whether pruning is complete; the masks are in the network."""
        return {"finished": self.finished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores whether pruning is complete."""
        self.finished = state_dict["finished"]
