"""Regression: predict a value for each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_llm.adaptation import Adaptation
from lit_llm.metrics import RegressionMetrics
from lit_llm.objectives import heads
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.objective import Objective
from lit_llm.schedulers import Schedule


class Regression(Objective):
    """Minimises the squared error of each example's value.

    The bias of a new head starts at the mean of the training labels, because values may be far from 0.

    Logs `val/rmse`, `val/mae`, `val/pearson`, `val/spearman` and `val/loss` (mean squared error) over the whole split,
    and the same under `test/`. `predict` returns the value of each example.

    Args:
        network: Makes a network from the number of values per example, 1; a classifier with one class will do. Called
            with everything in a batch except `labels` and `rows` as keyword arguments, it returns the values. `None` is
            the network of `weights`.
        optimizer: Makes the optimiser from parameter groups; `None` is AdamW with a learning rate of 1e-3.
        schedule: Factor on the learning rates at each step; `None` is constant.
        decay_embeddings: Apply weight decay to embeddings too.
        weights: Weights to start from: a model directory, a run folder, a checkpoint file or a name on the hub.
        adaptation: Which parameters are trained, from when on and how fast; `None` trains all of them alike.
        num_targets: Values per example; must be 1.

    Raises:
        ValueError: When labels are classes, or `num_targets` is not 1.

    Source:
        Cer et al., 2017, "SemEval-2017 Task 1", arXiv:1708.00055, for correlation as the metric.
    """

    size_name: ClassVar[str] = "num_targets"
    monitor: ClassVar[tuple[str, str]] = ("val/pearson", "max")

    def __init__(
        self,
        network: Callable[..., nn.Module] | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        decay_embeddings: bool = False,
        weights: str | None = None,
        adaptation: Adaptation | None = None,
        num_targets: int = 1,
    ) -> None:
        super().__init__(network, optimizer, schedule, decay_embeddings, weights, adaptation)
        if num_targets != 1:
            raise ValueError(f"model.num_targets must be 1, but is {num_targets}")
        self.save_arguments()
        self.val_metric, self.test_metric = RegressionMetrics(), RegressionMetrics()

    def setup(self, stage: str) -> None:
        """Checks that the labels are values."""
        data = self.trainer.datamodule
        if getattr(data, "num_targets", None) is None and getattr(data, "num_classes", None) is not None:
            raise ValueError(
                "data must have numbers as labels for Regression, but has classes; set model to "
                "lit_llm.objectives.classification.Classification"
            )
        super().setup(stage)

    def build(self) -> None:
        """Makes the network; a new head starts at the mean of the training labels."""
        super().build()
        mean = getattr(self.trainer.datamodule, "mean_label", None) if self._fits else None
        if mean is not None:
            heads.start_at(self.network, mean)

    def values(self, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
        """The network's value of each example, in fp32."""
        return self.read(batch).float().squeeze(-1)

    def loss(self, batch: Mapping[str, Tensor]) -> Loss:
        """Squared error, summed over the examples, and their number."""
        error = self.values(batch) - batch["labels"]
        return error.square().sum(), error.new_tensor(len(error))

    def measure(self, metric: RegressionMetrics, batch: Mapping[str, Tensor]) -> None:
        """Adds the label and the predicted value of each example."""
        metric.update(preds=self.values(batch), target=batch["labels"])

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        """The predicted value of each row; see `callbacks.predictions`."""
        values = self.values(batch)
        self.require_numbers(values)
        return {"rows": batch.get("rows"), "values": values}
