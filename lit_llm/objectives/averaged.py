"""A network that learns, and where one is wanted an average of its weights that is evaluated in its place."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from lit_llm.objectives.exact_steps import ExactSteps
from lit_llm.shards import local

log = logging.getLogger(__name__)


class Averaged(ExactSteps):
    """Steps of a network, beside which an average of its weights may be kept: who wants one says so, and moves it.

    Attributes:
        network: The one that learns; `None` until it is built.
        average: A network whose weights are the average of that one's; `None` where none is kept.
    """

    averages: bool = False
    """Whether an average of the weights is kept beside the network, to be evaluated and exported in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module | None = None
        self.average: nn.Module | None = None

    @property
    def _fits(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == "fit"

    def keep_average(self) -> None:
        """Makes the average, where one is wanted, and leaves one behind that nobody moves any more.

        Raises:
            ValueError: When the weights are too coarse for an average's small steps.
        """
        if self._fits and self.averages and "16-true" in str(self.trainer.precision):
            raise ValueError(
                f"trainer.precision must leave weights in 32 bits where they are averaged, but is "
                f"{self.trainer.precision}; take bf16-mixed"
            )
        if self.averages and self.average is None:
            self.average = copy.deepcopy(self.network).requires_grad_(False)
        elif self._fits and not self.averages:  # of an earlier fit: nobody moves it
            self.average = None

    @property
    def reading(self) -> nn.Module:
        """The network that reads batches now: in training the one that learns, else the one that is evaluated."""
        return self.network if self.training else self.evaluated

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: the average of the one that learns, where there is one."""
        return self.network if self.average is None else self.average

    @property
    def networks(self) -> list[nn.Module]:
        """The one that learns, and its average."""
        return [network for network in (self.network, self.average) if network is not None]

    @torch.no_grad()
    def move_average(self, decay: float) -> None:
        """Moves the average towards the weights; what is none, as running statistics are, is copied.

        Args:
            decay: What remains of the average.
        """
        for network in self.networks:
            if hasattr(network, "reshard"):  # by FSDP2: what it was read with is no longer needed whole
                network.reshard()
        pairs = (local(network.parameters()) for network in (self.average, self.network))
        torch._foreach_lerp_(*pairs, 1 - decay)
        for mine, theirs in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mine.copy_(theirs)

    def agree_on_average(self, checkpoint: dict[str, Any]) -> None:
        """Has a checkpoint's weights and average be those that there are here.

        An average begins as the weights of a checkpoint without one. Where there is none here, the network takes a
        checkpoint's average to be evaluated, and leaves it out to learn on.
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
