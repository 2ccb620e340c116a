"""An upper bound on the number of parameters."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.ranges import require_at_least
from lit_llm.shards import whole_shape


class ParameterBudget(Callback):
    """Refuses to train a network that is too large, for searches over architectures.

    Args:
        max_parameters: Maximum number of parameters; tied parameters count once.

    Raises:
        ValueError: When `max_parameters` is less than 1, or, at the start of training, the network has more parameters.
    """

    def __init__(self, max_parameters: int) -> None:
        require_at_least(1, max_parameters=max_parameters)
        self.max_parameters = max_parameters

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the parameters and refuses a network that has too many."""
        count = sum(whole_shape(p).numel() for p in pl_module.network.parameters())
        if count > self.max_parameters:
            raise ValueError(f"network must have at most {self.max_parameters:,} parameters, but has {count:,}")
