"""Low-rank factorisation during a run, by the methods of `compression.low_rank`."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lit_llm.callbacks.calibration import calibration_batches
from lit_llm.callbacks.changed_network import begin_anew, require_one_network
from lit_llm.callbacks.pruning import KeepZeros
from lit_llm.callbacks.quantization import QuantizationAwareTraining
from lit_llm.compression.low_rank import SVD
from lit_llm.compression.patterns import chosen_layers
from lit_llm.ranges import require_at_least, require_range
from lit_llm.schedulers import step_at

log = logging.getLogger(__name__)


class LowRank(Callback):
    """Factorises matrices once, at a given step, and continues training: the rest of the run is the recovery.

    Checkpoints record what was factorised, so a resumed run continues exactly. Earlier validations do not count as the
    best. The optimiser keeps its state for the other parameters; the factors start without state, and factors of
    frozen layers are frozen.

    Args:
        method: Factorisation method.
        start: Fraction of the run after which matrices are factorised, in [0, 1]; 0 is before the first step.
        num_batches: Batches of training data for methods that need activations.

    Raises:
        ValueError: When a value is out of range, or several processes train.
    """

    needs_plain_weights = True
    """Not for a strategy whose engine holds the weights or gradients itself (DeepSpeed)."""

    def __init__(self, method: SVD = SVD(), start: float = 0.0, num_batches: int = 8) -> None:  # noqa: B008 (frozen)
        require_range("in [0, 1]", start=start)
        require_at_least(1, num_batches=num_batches)
        self.method, self.start, self.num_batches = method, start, num_batches
        self.finished = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the run can be factorised.

        Raises:
            ValueError: When several processes train, another network than the trained one is evaluated, adapters are
                trained beside the weights, or another callback prunes a layer, or quantises it before.
        """
        if trainer.world_size > 1:
            raise ValueError(f"trainer.devices must be 1 where matrices are factorised, but is {trainer.world_size}")
        require_one_network(pl_module, "factorised")
        if not self.finished:
            self._require_layers_of_its_own(trainer, pl_module.network)

    def _require_layers_of_its_own(self, trainer: Trainer, network: nn.Module) -> None:
        """Refuses callbacks whose masks or quantisers would be lost with the layers that carry them."""
        own, total = self.method.chosen(network), trainer.estimated_stepping_batches
        now = step_at(self.start, total), trainer.callbacks.index(self)
        for place, other in enumerate(trainer.callbacks):
            prunes, name = isinstance(other, KeepZeros), type(other).__name__
            layers = chosen_layers(network, other.layers) if prunes else {}
            if isinstance(other, QuantizationAwareTraining) and (step_at(other.delay, total), place) < now:
                layers = other.fake.method.chosen(network)
            if not (shared := [layer for layer in layers if layer in own]):
                continue
            if prunes:
                raise ValueError(
                    f"trainer.callbacks must prune other layers than they factorise, but {name} and "
                    f"{type(self).__name__} both have {shared[0]}; choose their layers, or run one after the other"
                )
            raise ValueError(
                f"trainer.callbacks must factorise a layer before they quantise it, but {name} begins with {shared[0]} "
                f"before {type(self).__name__}; set its delay above {self.start}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Factorises before the first step if `start` is 0."""
        self._factorize(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Factorises if it is due."""
        self._factorize(trainer, pl_module)

    def _factorize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.finished or trainer.global_step < step_at(self.start, trainer.estimated_stepping_batches):
            return
        batches = calibration_batches(trainer, self.num_batches) if self.method.needs_batches else []
        before = sum(p.numel() for p in pl_module.network.parameters())
        groups = trainer.optimizers[0].param_groups
        waiting = [group for group in groups if not any(p.requires_grad for p in group["params"])]
        _let_learn(waiting, True)  # factors must also join groups that are unfrozen later
        self.method.apply(pl_module.network, batches)
        after = sum(p.numel() for p in pl_module.network.parameters())
        give_new_parameters(trainer.optimizers[0], pl_module.configure_optimizers()["optimizer"])
        _let_learn(waiting, False)
        self.finished = True
        begin_anew(trainer, pl_module)
        log.info(f"Factorised: {after:,} parameters instead of {before:,}")

    def state_dict(self) -> dict[str, Any]:
        """Whether the factorisation is done; its form is recorded in the network."""
        return {"finished": self.finished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores whether it is done."""
        self.finished = state_dict["finished"]


def _let_learn(groups: list[dict[str, Any]], learn: bool) -> None:
    for group in groups:
        for p in group["params"]:
            p.requires_grad_(learn)


def give_new_parameters(optimizer: Optimizer, fresh: Optimizer) -> None:
    """Gives an optimiser the parameters of a fresh one, and drops its state for parameters that are gone."""
    for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group["params"] = new["params"]
    learnt = {p for group in optimizer.param_groups for p in group["params"]}
    for p in [p for p in optimizer.state if p not in learnt]:
        del optimizer.state[p]
