"""How an objective's network is optimised: parameter groups, learning rates and an average of the weights."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from lit_llm.adaptation import Adaptation
from lit_llm.data.sampling import resume_epoch
from lit_llm.objectives.exact_steps import ExactSteps
from lit_llm.optimizers import parameter_groups
from lit_llm.schedulers import Constant, Schedule, step_at
from lit_llm.shards import local

log = logging.getLogger(__name__)


class Scheduled(ExactSteps):
    """Optimises groups of the network's parameters, each with its own learning rate and first step.

    Learning rates and first steps depend only on the config and the step, so a resumed run continues exactly.
    Optionally, an average of the weights is kept beside the network: a callback or a subclass sets `averages` and
    calls `move_average`.

    Args:
        optimizer: Makes the optimiser from parameter groups (`lit_llm.optimizers`); `None` is AdamW with a learning
            rate of 1e-3, betas 0.9 and 0.95, weight decay 0.1.
        schedule: Factor on the learning rates at each step; `None` is constant.
        decay_embeddings: Apply weight decay to embeddings (it is never applied to norms and biases).
        adaptation: Which parameters are trained, from which step on and with which learning rate; `None` trains all of
            them alike.

    Attributes:
        network: The network that is trained; `None` until it is built.
        average: A network with the average of its weights; `None` if none is kept.
    """

    averages: bool = False
    """Whether an average of the weights is kept, and evaluated and exported instead of the trained weights."""

    def __init__(
        self,
        optimizer: OptimizerCallable | None,
        schedule: Schedule | None,
        decay_embeddings: bool,
        adaptation: Adaptation | None,
    ) -> None:
        super().__init__()
        self.network: nn.Module | None = None
        self.average: nn.Module | None = None
        self.make_optimizer = optimizer
        self.schedule = schedule or Constant()
        self.decay_embeddings = decay_embeddings
        self.adaptation = adaptation
        self._waiting: list[dict[str, Any]] = []
        self._other_optimizer: str | None = None

    def new_optimizer(self) -> Optimizer:
        """Makes the optimiser from the groups of `optimizers.parameter_groups`, the adaptation and `beside`.

        Raises:
            ValueError: When it rejects an option or a group, or a parameter of the objective itself is in no group.
        """
        groups = parameter_groups(self.network, self.decay_embeddings)
        if self.adaptation is not None:
            groups = self.adaptation.groups(groups, self.network)
        if beside := list(self.beside.parameters()):
            groups.append({"params": beside, "role": "head"})
        self._require_grouped(groups)
        make = self.make_optimizer or functools.partial(AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        try:
            optimizer = make(groups)
        except ValueError as error:
            of_torch = str(error).startswith("Muon only supports")
            remedy = "; lit_llm.optimizers.Muon leaves the others to AdamW" if of_torch else ""
            raise ValueError(f"model.optimizer must be given what it takes, but is not: {error}{remedy}") from error
        if isinstance(optimizer, SparseAdam):
            raise ValueError("model.optimizer must take dense gradients, but is SparseAdam; take torch.optim.Adam")
        return optimizer

    def _require_grouped(self, groups: list[dict[str, Any]]) -> None:
        """Checks that each trainable parameter is in a group; those of the networks may be left out on purpose."""
        known = {id(p) for group in groups for p in group["params"]}
        known |= {id(p) for network in self.networks for p in network.parameters()}
        for name, p in self.named_parameters():
            if p.requires_grad and id(p) not in known:
                raise ValueError(
                    f"model.{name} must be in the network or in the objective's beside, to be optimised, but is in "
                    f"neither; return its module from the property beside, or set its requires_grad to false"
                )

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser and its learning-rate schedule, updated at each step."""
        optimizer = self.new_optimizer()
        optimizer.register_load_state_dict_pre_hook(self._require_same_form)
        scheduler = LambdaLR(optimizer, [self._factor_of(group) for group in optimizer.param_groups])
        # The config's values, kept because loading a checkpoint overwrites the groups with its own.
        self._configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        log.info(groups_table(optimizer))
        total, warmup = self.trainer.estimated_stepping_batches, self.schedule.warmup_steps
        if warmup > total / 2:
            cut = f"The warm-up of {warmup} steps is cut to half of the run's {total}"
            log.info(f"{cut}; few examples need more epochs")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def expect_optimizer(self, there: str | None, here: str | None) -> None:
        """Records the class of the checkpoint's optimiser if the config names another one.

        Args:
            there: Class path in the checkpoint; `None` is the default.
            here: Class path in the config; `None` is the default.
        """
        self._other_optimizer = (there or "torch.optim.AdamW") if there != here else None

    def _require_same_form(self, optimizer: Optimizer, stored: dict[str, Any]) -> None:
        """Checks that the state to load is of an optimiser of the same class with the same groups of parameters."""
        remedy = "a new run takes its weights with --model.weights"
        here, there = (
            [len(g["params"]) for g in groups] for groups in (optimizer.param_groups, stored["param_groups"])
        )
        if here != there:
            raise ValueError(
                f"model.adaptation must train what the checkpoint's optimiser has, groups of {there} tensors, but "
                f"trains groups of {here}; {remedy}"
            )
        other, kinds = self._other_optimizer, {kind.__name__ for kind in type(optimizer).__mro__}
        if other and stored["state"] and other.rpartition(".")[2] not in kinds:
            raise ValueError(
                f"model.optimizer must be that of the checkpoint, {other}, but is {type(optimizer).__name__}; {remedy}"
            )

    def _factor_of(self, group: dict[str, Any]) -> Callable[[int], float]:
        """Factor on a group's learning rate at each step: 0 before the group's first step, then schedule times rate."""
        total = self.trainer.estimated_stepping_batches
        rate, first = group.get("rate", 1.0), step_at(group.get("start", 0.0), total)
        return lambda step: rate * self.schedule.factor(step, total) if step >= first else 0.0

    def on_train_start(self) -> None:
        """Restores the config's hyper-parameters, which loading a checkpoint has overwritten; its state is kept."""
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        for group, configured in zip(optimizer.param_groups, self._configured, strict=True):
            group.update(configured)
            group["lr"] = configured["initial_lr"] * self._factor_of(configured)(self.trainer.global_step)
        scheduler.base_lrs = [configured["initial_lr"] for configured in self._configured]
        resume_epoch(self.trainer.fit_loop)
        self._waiting = [group for group in optimizer.param_groups if group.get("start")]
        self._wake(optimizer, self.trainer.global_step)

    @property
    def beside(self) -> nn.Module:
        """Modules that are trained with the network but not exported; none by default."""
        return nn.ModuleList()

    def _wake(self, optimizer: Optimizer, step: int) -> None:
        """Unfreezes the groups that are trained from this step on; groups that wait get no backward pass.

        With several processes they do get one, because the gradients to be exchanged are fixed beforehand;
        `on_before_optimizer_step` discards the result.
        """
        total = self.trainer.estimated_stepping_batches
        self._waiting = [group for group in self._waiting if step < step_at(group.get("start", 0.0), total)]
        if self.trainer.world_size > 1:
            return
        asleep = {id(group) for group in self._waiting}
        for group in optimizer.param_groups:
            if group.get("start"):
                for p in group["params"]:
                    p.requires_grad_(id(group) not in asleep)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Discards the gradients of groups that are not trained yet, then scales as in `ExactSteps`."""
        for group in self._waiting:
            for p in group["params"]:
                p.grad = None
        super().on_before_optimizer_step(optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Steps as in `ExactSteps`, then unfreezes the groups that are trained from the next step on."""
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        if self._waiting:
            self._wake(optimizer, self.trainer.global_step + 1)

    # The average of the weights.

    @property
    def _fits(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == "fit"

    def keep_average(self) -> None:
        """Makes the average if `averages` is set; otherwise a fit drops the average of an earlier one.

        Raises:
            ValueError: When weights are in 16 bits, too coarse for an average's small steps.
        """
        if self._fits and self.averages and "16-true" in str(self.trainer.precision):
            raise ValueError(
                f"trainer.precision must leave weights in 32 bits where they are averaged, but is "
                f"{self.trainer.precision}; take bf16-mixed"
            )
        if self.averages and self.average is None:
            self.average = copy.deepcopy(self.network).requires_grad_(False)
        elif self._fits and not self.averages:
            self.average = None

    @property
    def reading(self) -> nn.Module:
        """The network that reads batches now: the trained one in training mode, else `evaluated`."""
        return self.network if self.training else self.evaluated

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: the average if there is one, else the trained network."""
        return self.network if self.average is None else self.average

    @property
    def networks(self) -> list[nn.Module]:
        """The trained network and, if there is one, the average."""
        return [network for network in (self.network, self.average) if network is not None]

    @torch.no_grad()
    def move_average(self, decay: float) -> None:
        """Moves the average towards the weights; buffers, such as running statistics, are copied.

        Args:
            decay: Factor on the old average; the weights get `1 - decay`.
        """
        for network in self.networks:
            if hasattr(network, "reshard"):  # FSDP2: frees the gathered parameters, so that shards are averaged
                network.reshard()
        pairs = (local(network.parameters()) for network in (self.average, self.network))
        torch._foreach_lerp_(*pairs, 1 - decay)
        for mine, theirs in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mine.copy_(theirs)

    def agree_on_average(self, checkpoint: dict[str, Any]) -> None:
        """Adapts, in place, a checkpoint with an average to an objective without one, and the reverse.

        If only the objective has an average, it starts from the checkpoint's weights. If only the checkpoint has one,
        an evaluation loads it into the network, and a fit ignores it.
        """
        stored = checkpoint["state_dict"]
        weights = [name for name in stored if name.startswith("network.")]
        if self.average is not None and checkpoint.get("evaluated") != "average":
            stored.update({name.replace("network.", "average.", 1): stored[name] for name in weights})
        elif self.average is None and checkpoint.get("evaluated") == "average":
            if self._fits:
                log.info("Ignoring the checkpoint's weight average: the run has no WeightAverage")
            for name in weights:
                average = stored.pop(name.replace("network.", "average.", 1))
                stored[name] = stored[name] if self._fits else average


def groups_table(optimizer: Optimizer) -> str:
    """A table for the log: size, learning rate and weight decay of each parameter group, both in its `unit`, if any."""
    lines = [f"{type(optimizer).__name__}      tensors  parameters  learning rate  weight decay"]
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        later = f"  from {group['start']:.0%} on" if group.get("start") else ""
        unit = group.get("unit", 1.0)
        rate, decay = group["initial_lr"] * group.get("rate", 1.0) / unit, group.get("weight_decay", 0.0) * unit
        later += f"  in units of {unit:.3g}" if unit != 1 else ""
        lines.append(
            f"  {group.get('role', 'all'):<11}{len(group['params']):>6}{count:>12,}{rate:>15.3g}{decay:>14.3g}{later}"
        )
    return "\n".join(lines)
