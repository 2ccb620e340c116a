"""An exponential moving average of the weights, evaluated in place of the last weights."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.ranges import require_range


class WeightAverage(Callback):
    """Validates, tests and exports an exponential moving average of the weights, without affecting the training.

    The average is stored next to the network in each checkpoint, and sharded like the network. It starts from the
    initial weights, with a warm-up that forgets them soon: the decay at step t is at most `(1 + t) / (10 + t)`.
    Buffers, such as running statistics, are copied. It takes as much memory as the weights, frozen ones included.
    Cannot be combined with pruning, quantisation or low rank during training, DeepSpeed, or weights in 16 bits.

    Args:
        decay: Share of the average kept at each step, in [0, 1); it covers about the last `1 / (1 - decay)` steps.

    Raises:
        ValueError: When the decay is out of range, or the objective has its own average.

    Source:
        Polyak & Juditsky, 1992, doi:10.1137/0330046, average all steps; the exponential average with this warm-up is
        TensorFlow's `ExponentialMovingAverage(num_updates=…)`. Lightning's `EMAWeightAveraging` builds the network
        before its size is known from the data, and does not support sharding.
    """

    needs_plain_weights = True
    """Not for a strategy whose engine holds the weights or gradients itself (DeepSpeed)."""

    def __init__(self, decay: float = 0.999) -> None:
        require_range("in [0, 1)", decay=decay)
        self.decay = decay
        self._moved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Requests an average from the objective, before it builds its network."""
        if type(pl_module).averages:
            raise ValueError(
                f"trainer.callbacks must leave the average to {type(pl_module).__name__}, which evaluates its own, but "
                f"has a WeightAverage"
            )
        pl_module.averages = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Withdraws the request, so that the objective's next run starts without; the average itself stays."""
        pl_module.averages = type(pl_module).averages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the average to the network's weights, which may have been loaded after it was built."""
        self._moved_step = trainer.global_step
        if trainer.global_step == 0:
            pl_module.move_average(0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average after each optimiser step."""
        step = trainer.global_step
        if step != self._moved_step:
            self._moved_step = step
            pl_module.move_average(min(self.decay, (1 + step) / (10 + step)))
