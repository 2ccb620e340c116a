"""An average of the weights that a run had, in place of the last ones."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class WeightAverage(Callback):
    """Validates, tests and exports an exponential moving average of the weights, without affecting the training.

    The average lies beside the network, in each checkpoint, cut among devices as the network is. It begins with the
    weights that the run begins with, and forgets those soon: after step t it keeps at most `(1 + t) / (10 + t)` of
    itself. What is no parameter, as running statistics are, is copied. It takes the memory of the weights once more,
    of frozen ones as well. Not together with pruning, quantisation or low rank during training, DeepSpeed, or weights
    in 16 bits.

    Args:
        decay: Share of the average kept at each step, in [0, 1); it covers about the last `1 / (1 - decay)` steps.

    Raises:
        ValueError: When the decay is out of range, or the objective has an average of its own.

    Source:
        Polyak & Juditsky, 1992, doi:10.1137/0330046, averaged all steps; exponentially, with this warm-up:
        TensorFlow's `ExponentialMovingAverage(num_updates=…)`. Lightning's `EMAWeightAveraging` builds the network
        before the data has said its size, and knows no sharding.
    """

    needs_plain_weights = True
    """Not for a strategy whose engine keeps weights or gradients of its own."""

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), but is {decay}")
        self.decay = decay
        self._moved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks the objective to keep an average, before it builds its network."""
        if type(pl_module).averages:
            raise ValueError(
                f"trainer.callbacks must leave the average to {type(pl_module).__name__}, which evaluates its own, but "
                f"has a WeightAverage"
            )
        pl_module.averages = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The next run of this objective asks for itself; what was averaged stays."""
        pl_module.averages = type(pl_module).averages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average begins as the network, whatever that was given since it was built."""
        self._moved_step = trainer.global_step
        if trainer.global_step == 0:
            pl_module.move_average(0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the average, after each optimiser step."""
        step = trainer.global_step
        if step != self._moved_step:
            self._moved_step = step
            pl_module.move_average(min(self.decay, (1 + step) / (10 + step)))
