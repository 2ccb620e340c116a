"""Classification: predict the class of each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lit_llm.adaptation import Adaptation
from lit_llm.metrics import classification_metrics
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.objective import Objective
from lit_llm.ranges import require_range
from lit_llm.schedulers import Schedule


class Classification(Objective):
    """Minimises the cross-entropy of each example's class; examples are texts, images or whatever the network reads.

    Logs `val/accuracy`, `val/precision`, `val/recall`, `val/f1`, `val/mcc` and `val/loss` (nats per example, neither
    weighted nor smoothed) over the whole split, and the same under `test/`. `predict` returns the probabilities of each
    example.

    Args:
        network: Makes a classifier from the number of classes. Called with everything in a batch except `labels` and
            `rows` as keyword arguments, it returns logits. `None` is the network of `weights`.
        optimizer: Makes the optimiser from parameter groups; `None` is AdamW with a learning rate of 1e-3.
        schedule: Factor on the learning rates at each step; `None` is constant.
        decay_embeddings: Apply weight decay to embeddings too.
        weights: Weights to start from: a model directory, a run folder, a checkpoint file or a name on the hub.
        adaptation: Which parameters are trained, from when on and how fast; `None` trains all of them alike.
        num_classes: Number of classes of the network, at least that of the data; `None` is that of the data.
        label_smoothing: Probability spread evenly over all classes, in [0, 1); 0.1 is usual.
        class_weights: `balanced` weights each example by the inverse frequency of its class in the training split, so
            that all classes count equally; the loss is the weighted mean, with label smoothing too. Cannot be combined
            with the data's `balance_classes`, which does the same by sampling.

    Raises:
        ValueError: When a value is out of range, labels are real numbers, the data has no class counts for the weights,
            or it balances the classes already.

    Source:
        Szegedy et al., 2015, arXiv:1512.00567, section 7 (smoothing); King & Zeng, 2001, "Logistic Regression in Rare
        Events Data", section 4 (weights).
    """

    size_name: ClassVar[str] = "num_classes"
    monitor: ClassVar[tuple[str, str]] = ("val/accuracy", "max")

    def __init__(
        self,
        network: Callable[..., nn.Module] | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        decay_embeddings: bool = False,
        weights: str | None = None,
        adaptation: Adaptation | None = None,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: Literal["balanced"] | None = None,
    ) -> None:
        super().__init__(network, optimizer, schedule, decay_embeddings, weights, adaptation)
        require_range("in [0, 1)", "model.", label_smoothing=label_smoothing)
        self.save_arguments()
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def setup(self, stage: str) -> None:
        """Takes the number of classes from the data, whose labels must be classes."""
        data = self.trainer.datamodule
        if getattr(data, "num_classes", None) is None and getattr(data, "num_targets", None) is not None:
            raise ValueError(
                "data must have classes as labels for Classification, but has real numbers; set model to "
                "lit_llm.objectives.regression.Regression, or write classes as whole numbers (1, not 1.0)"
            )
        super().setup(stage)

    def build(self) -> None:
        """Makes the network, as one whose classes exclude each other, and the metrics and class weights.

        Also sets the network's class names, if it is trained or comes from `weights`.
        """
        reads_weights = self.hparams.get("weights") is not None
        super().build()
        if getattr(self.network, "multi_label", False):
            self.network.multi_label = False
        if self._fits or reads_weights:
            self._name_classes()
        self.val_metric, self.test_metric = (classification_metrics(self.hparams["num_classes"]) for _ in range(2))
        # Counts rather than weights: casting the module to 16 bits does not round integers.
        self.register_buffer("count_of_class", self._count_of_class(self._data), persistent=False)

    def on_validation_start(self) -> None:
        """Sets the network's class names in the data's order, which a checkpoint may have changed.

        A network evaluated without a checkpoint keeps its own names, because other data may have another order.
        """
        if self._fits or self.trainer.ckpt_path:
            self._name_classes()

    on_test_start = on_predict_start = on_validation_start

    def _name_classes(self) -> None:
        names = getattr(self._data, "class_names", None)
        if names and hasattr(self.network, "class_names"):
            self.network.class_names = [*names, *(f"LABEL_{i}" for i in range(len(names), self.hparams["num_classes"]))]

    def _count_of_class(self, data: Any) -> Int[Tensor, " classes"] | None:
        if self.class_weights is None or not self._fits:
            return None
        if getattr(data, "balance_classes", False):
            raise ValueError(
                f"model.class_weights must be None where data.balance_classes is true, which balances the classes "
                f"already, but is {self.class_weights}; set one of the two"
            )
        counts = getattr(data, "class_counts", None)
        if counts is None:
            raise ValueError("data must say its class_counts for model.class_weights, but does not")
        return torch.tensor([*counts, *[0] * (self.hparams["num_classes"] - len(counts))]).clamp(min=1)

    @property
    def weight_of_class(self) -> Float[Tensor, " classes"] | None:
        """Weight of an example of each class, in fp32; `None` without weights."""
        if self.count_of_class is None:
            return None
        counts = self.count_of_class.float()
        return counts.max() / counts  # at least 1, so that clamping the sum of weights to 1 never changes it

    def logits(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """The network's logits of each example, in fp32."""
        return self.read(batch).float()

    def loss(self, batch: Mapping[str, Tensor]) -> Loss:
        """Weighted sum of the cross-entropy in nats over the examples, and the sum of the weights (1 each by default).

        Labels are class indices, or probabilities of each class (`batch classes`), as for mixed images.
        """
        logits, labels, smoothing = self.logits(batch), self._targets(batch), self.label_smoothing
        if self.count_of_class is None:
            total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            return total, total.new_tensor(len(labels))
        weights = self.weights_of(batch)
        total = F.cross_entropy(logits, labels, weight=self.weight_of_class, reduction="sum")
        if smoothing:  # (torch's own weights the smoothed part of each class by that class, so rare ones dominate it.)
            total = torch.lerp(total, -(weights * logits.log_softmax(dim=-1).mean(dim=-1)).sum(), smoothing)
        return total, weights.sum()

    def _targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The labels; probabilities are padded with zeros for classes that only the network has."""
        labels = batch["labels"]
        return F.pad(labels, (0, self.hparams["num_classes"] - labels.shape[-1])) if labels.ndim > 1 else labels

    def weights_of(self, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
        """Weight of each example; for mixed images the mean weight of the classes mixed."""
        labels, weight = self._targets(batch), self.weight_of_class
        if weight is None:
            return torch.ones(len(labels), device=labels.device)
        return (labels * weight).sum(dim=-1) if labels.is_floating_point() else weight[labels]  # (autocast rounds `@`)

    def measure(self, metric: MetricCollection, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds the label, the predicted class and the nats of each example."""
        logits, labels = self.logits(batch), batch["labels"]
        predicted, nats = logits.argmax(dim=-1), F.cross_entropy(logits, labels, reduction="none")
        metric.update(preds=predicted, target=labels, value=nats)
        return {"predicted": predicted, "labels": labels, "nats": nats}

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        """The probabilities of each row; see `callbacks.predictions`."""
        probabilities = self.logits(batch).softmax(dim=-1)
        self.require_numbers(probabilities)
        return {"rows": batch.get("rows"), "probabilities": probabilities}
