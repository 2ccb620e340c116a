"""Regression: predict a value for each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_llm.adaptation import Adaptation
from lit_llm.metrics import RegressionMetrics
from lit_llm.objectives import heads
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.objective import Objective
from lit_llm.schedulers import Schedule
from lit_llm.shards import local


class Regression(Objective):
    """Minimises the squared error of each example's value.

    Labels of any scale are learnt as if they were standardised, while weights, losses and metrics keep their unit. The
    gradient is that of the squared error over the variance of the training labels. The output layer is optimised in
    units of their standard deviation: its gradients and learning rate are multiplied by it, and its weight decay is
    divided by it, which has the effect of a factor on the output. A new output layer starts at the mean of the labels,
    and its weights are multiplied by the standard deviation. With DeepSpeed, whose engine owns the gradients, those of
    the output layer stay, which changes what is clipped, and steps of optimisers that are not invariant to their scale.

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
        self.unit = 1.0

    def setup(self, stage: str) -> None:
        """Checks that the labels are values, and takes the unit of the steps from those of the training split."""
        data = self.trainer.datamodule
        if getattr(data, "num_targets", None) is None and getattr(data, "num_classes", None) is not None:
            raise ValueError(
                "data must have numbers as labels for Regression, but has classes; set model to "
                "lit_llm.objectives.classification.Classification"
            )
        super().setup(stage)
        self.unit = (getattr(data, "std_label", None) if self._fits else None) or 1.0

    def build(self) -> None:
        """Makes the network; a new output layer starts at the mean of the training labels, in their unit."""
        from_weights, from_start = self.hparams.get("weights") is not None, self._start is not None
        super().build()
        mean = getattr(self.trainer.datamodule, "mean_label", None) if self._fits else None
        if mean is not None:
            is_new = not from_weights and getattr(self.network, "head_is_new", not from_start)
            heads.start_at(self.network, mean, self.unit, is_new)

    def new_optimizer(self) -> Optimizer:
        """Makes the optimiser; the output layer is in groups of its own, with their `unit`."""
        optimizer, layer = super().new_optimizer(), heads.output_layer(self.network)
        if layer is None or self.unit == 1.0:
            return optimizer
        output, groups = set(layer.parameters()), []
        for group in optimizer.param_groups:
            below, within = ([p for p in group["params"] if (p in output) is inside] for inside in (False, True))
            scaled = {"lr": group["lr"] * self.unit, "unit": self.unit}
            if "weight_decay" in group:
                scaled["weight_decay"] = group["weight_decay"] / self.unit
            groups += [{**group, "params": below}] if below else []
            groups += [{**group, **scaled, "params": within}] if within else []
        optimizer.param_groups = groups
        return optimizer

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """As in `ExactSteps`, in units of the labels' variance."""
        return super().training_step(batch, batch_idx) / self.unit**2

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """As in `Scheduled`; then gives the output layer its gradient in units of the labels' standard deviation."""
        super().on_before_optimizer_step(optimizer)
        for group in optimizer.param_groups if not self._gradients_are_elsewhere else ():
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients and "unit" in group:
                torch._foreach_mul_(local(gradients), group["unit"])

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
