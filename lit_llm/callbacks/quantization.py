"""Quantisation-aware training, by the methods of `compression.quantization`."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.callbacks.changed_network import begin_anew, require_one_network
from lit_llm.compression.compression import records_of
from lit_llm.compression.quantization import FakeQuantized, Int4WeightOnly, Quantization, freeze_scales
from lit_llm.schedulers import step_at
from lit_llm.shards import is_shared_out

log = logging.getLogger(__name__)


class QuantizationAwareTraining(Callback):
    """Trains with quantised weights from a given step on; the exported model stores them as integers.

    The delay lets the weights nearly converge first; frozen scales let them settle. Both depend only on the step, and
    their results are in the network and its record, so a resumed run continues exactly. Validations without
    quantisation do not count as the best.

    Suggested: begin with trained weights and a tenth of their learning rate, `delay` 0 to 0.2, `freeze` 0.8.

    Args:
        method: Target format of the weights: `Int4WeightOnly` or `Int8DynamicInt4`.
        delay: Fraction of the run after which weights are quantised, in [0, 1).
        freeze: Fraction of the run after which scales are frozen, in [`delay`, 1]; 1 for never.

    Raises:
        ValueError: When a value is out of range, or the method does not support quantisation-aware training.

    Source:
        Jacob et al., 2017, arXiv:1712.05877, section 3.1 (delay); Krishnamoorthi, 2018, arXiv:1806.08342, section 3.2.
    """

    needs_plain_weights = True
    """Not for a strategy whose engine holds the weights or gradients itself (DeepSpeed)."""

    def __init__(
        self,
        method: Quantization = Int4WeightOnly(),  # noqa: B008 (frozen)
        delay: float = 0.0,
        freeze: float = 0.8,
    ) -> None:
        if not 0 <= delay < 1 or not delay <= freeze <= 1:
            raise ValueError(f"delay must be in [0, 1) and freeze from it to 1, but are {delay} and {freeze}")
        self.fake, self.delay, self.freeze = FakeQuantized.by(method), delay, freeze
        _ = self.fake.method

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the run can be quantised.

        Raises:
            ValueError: When another network than the trained one is evaluated, adapters are trained beside the
                weights, or the weights are sharded.
        """
        require_one_network(pl_module, "quantised")
        if is_shared_out(pl_module.parameters()):
            raise ValueError(
                "trainer.strategy must keep the weights whole on each device to quantise them, but shares them out; "
                "take configs/strategy/ddp.yaml"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts quantisation at once if there is no delay."""
        self._follow(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts quantisation or freezes the scales if it is due."""
        self._follow(trainer, pl_module)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network, step, total = pl_module.network, trainer.global_step, trainer.estimated_stepping_batches
        own = [record for record in records_of(network) if record["class_path"].endswith(".FakeQuantized")]
        if not own and step_at(self.delay, total) <= step < total:
            self.fake.apply(network)
            begin_anew(trainer, pl_module)
            log.info(f"Weights are quantised from step {step} on, by {self.fake.class_path.rpartition('.')[2]}")
        elif own and not own[0]["form"]["frozen"] and step_at(self.freeze, total) <= step < total:
            freeze_scales(network)
            log.info(f"Scales are frozen from step {step} on")
