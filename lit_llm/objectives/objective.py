"""The base class of all objectives: saves their arguments, evaluates the loss over a split, and logs metrics."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lit_llm.adaptation import Adaptation
from lit_llm.batch import inputs
from lit_llm.metrics import MeanLoss
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.features import FeatureCache, features_of
from lit_llm.objectives.network import Built
from lit_llm.recipes import described
from lit_llm.schedulers import Schedule


class Objective(Built):
    """What is minimised: a subclass defines `loss(batch)` and `size_name`, the data's property that sizes the network.

    The metric of a split is the mean of that loss, unless a subclass overrides `measure` and makes its own metrics.
    A training step minimises the mean over all targets of all micro-batches and processes (`ExactSteps`).

    Args:
        network: As in `Built`.
        optimizer: As in `Scheduled`.
        schedule: As in `Scheduled`.
        decay_embeddings: As in `Scheduled`.
        weights: Weights to start from instead of random ones: a model directory (ours or transformers'), a run folder,
            a checkpoint file or a name on the hub. Read only once, before the first step; resuming does not need it. A
            classifier's head is kept if it has the data's classes, matched by name; otherwise training makes a new one.
        adaptation: As in `Scheduled`.

    Raises:
        ValueError: When neither a network nor weights are given.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    """Metric that selects the best validation unless the data names one, and whether its `min` or `max` is best."""

    val_metric: Metric | MetricCollection
    test_metric: Metric | MetricCollection
    """Metrics accumulated over a split: the mean loss, or those that a subclass makes, at the latest in `build`."""

    def __init__(
        self,
        network: Callable[..., nn.Module] | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        decay_embeddings: bool = False,
        weights: str | None = None,
        adaptation: Adaptation | None = None,
    ) -> None:
        super().__init__(network, optimizer, schedule, decay_embeddings, adaptation)
        if network is None and weights is None:
            raise ValueError("model.network must be given where there are no model.weights to start from, but is None")
        self.save_arguments()
        self.val_metric, self.test_metric = MeanLoss(), MeanLoss()
        self._features: dict[RunningStage, FeatureCache] = {}

    def measure(self, metric: Any, batch: Any) -> dict[str, Tensor] | None:
        """Adds a batch to `val_metric` or `test_metric`: its loss by default. The value returned is for callbacks."""
        metric.update(*self.loss(batch))
        return None

    def planned_loss(self, batch: Any) -> Loss:
        """The loss of a batch without content, for a plan.

        A subclass whose loss needs the trainer or the values in the batch overrides it.
        """
        return self.loss(batch)

    def save_arguments(self) -> None:
        """Saves the constructor's arguments in the checkpoint, as plain values that are safe to load.

        A subclass with arguments of its own calls it again in its constructor. The command line passes plain values;
        objects passed in a notebook are saved as class paths and arguments.
        """
        self.save_hyperparameters(frame=inspect.currentframe().f_back)
        for name, value in self.hparams.items():
            self.hparams[name] = described(name, value)
        self.hparams.setdefault("_class_path", f"{type(self).__module__}.{type(self).__qualname__}")
        self.hparams.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")

    # Features of a frozen backbone.

    def on_train_start(self) -> None:
        """Starts as in `Scheduled`, then computes the features of a frozen backbone if the adaptation caches them."""
        super().on_train_start()
        if self.adaptation is not None and self.adaptation.cache_features:
            forward_context = self.trainer.precision_plugin.forward_context
            self._features = features_of(self.network, self.trainer.datamodule, forward_context)

    def forget_features(self) -> None:
        """Discards cached features: from here on the network reads the examples themselves.

        To be called when the data or the backbone change.
        """
        self._features = {}

    on_train_end = forget_features

    def read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The network's output for a batch, computed from cached features if there are any."""
        features = self._features.get(self.trainer.state.stage) if self._features else None
        network = self.reading
        return network(**inputs(batch)) if features is None else network.classify(features(batch["rows"]))

    # Measuring.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Objective:
        """Moves and casts the network. Metrics are only moved: in 16 bits, their sums would stall or overflow."""

        def moved(state: Tensor) -> Tensor:
            state = state.to(fn(state).device)
            # A metric created while the default dtype is 16 bits has 16-bit states.
            return state.float() if state.is_floating_point() and state.itemsize < 4 else state

        super()._apply(fn, recurse=False)
        for child in self.children() if recurse else ():
            child._apply(moved if any(isinstance(module, Metric) for module in child.modules()) else fn)
        return self

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Adds a batch to the validation metrics."""
        return self.measure(self.val_metric, batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Adds a batch to the test metrics."""
        return self.measure(self.test_metric, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the whole split."""
        self._report_split("val", self.val_metric)

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the whole split."""
        self._report_split("test", self.test_metric)

    def _report_split(self, split: str, metric: Metric | MetricCollection) -> None:
        found = metric.compute()
        if not isinstance(found, Mapping):  # a single metric is named after its class: `mean_squared_error`
            found = {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower(): found}
        self.report({f"{split}/{name}": value for name, value in found.items()})
        metric.reset()

    def report(self, metrics: dict[str, Tensor]) -> None:
        """Logs the metrics of a whole evaluation, for callbacks and, with the current step, for the loggers.

        Lightning itself would log those of a validation one step too early.
        """
        for name in {"val/loss", "test/loss"} & metrics.keys():
            self.require_finite(name, float(metrics[name]))
        self.log_dict(metrics, logger=False, sync_dist=True)
        # Outside a fit there is no step to log at.
        if self.trainer.global_step and not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                logger.log_metrics({name: float(v) for name, v in metrics.items()}, step=self.trainer.global_step)
