"""Classification: which of a few classes an example is of."""

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
from lit_llm.schedulers import Schedule


class Classification(Objective):
    """Minimises the cross-entropy of each example's class: of texts, of images, of whatever the network reads.

    Logs `val/accuracy`, `val/precision`, `val/recall`, `val/f1`, `val/mcc` and `val/loss` (nats per example, neither
    weighted nor smoothed) over the whole split; the same under `test/`. `predict` gives each example's probabilities.

    Args:
        network: Makes a classifier from the number of classes. Called with everything in a batch except `labels` and
            `rows` as keyword arguments, it returns logits. `None` is the network of `weights`.
        optimizer: As in `Objective`.
        schedule: As in `Objective`.
        decay_embeddings: As in `Objective`.
        weights: As in `Objective`.
        adaptation: As in `Objective`.
        num_classes: Number of classes of the network; `None` is that of the data.
        label_smoothing: Probability spread over all classes, in [0, 1); 0.1 is usual.
        class_weights: `balanced` weights each example by the inverse of its class's share of the training split, so
            that all classes count equally; the loss, smoothed or not, is the weighted sum over the sum of weights. Not
            beside the data's `balance_classes`, which does the same by drawing.

    Raises:
        ValueError: When a value is out of range, labels are real numbers, nothing says how often classes occur, or the
            data balance them already.

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
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing must be in [0, 1), but is {label_smoothing}")
        self.save_arguments()
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def setup(self, stage: str) -> None:
        """Takes the number of classes from the data."""
        data = self.trainer.datamodule
        if getattr(data, "num_classes", None) is None and getattr(data, "num_targets", None) is not None:
            raise ValueError(
                "data must have classes as labels for Classification, but has real numbers; set model to "
                "lit_llm.objectives.regression.Regression, or write classes as whole numbers (1, not 1.0)"
            )
        super().setup(stage)

    def build(self) -> None:
        """Makes the network, and tells it, to be trained or of `weights`, the classes' names.

        They exclude each other, which it is told, too.
        """
        reads_weights = self.hparams.get("weights") is not None
        super().build()
        if getattr(self.network, "multi_label", False):
            self.network.multi_label = False
        if self._fits or reads_weights:
            self._name_classes()
        self.val_metric, self.test_metric = (classification_metrics(self.hparams["num_classes"]) for _ in range(2))
        # Whole numbers: others would be rounded to the precision of the network.
        self.register_buffer("count_of_class", self._count_of_class(self._data), persistent=False)

    def on_validation_start(self) -> None:
        """Tells the network the classes' names, now that a checkpoint has said in which order the data have them.

        A trained network that is evaluated as it stands keeps its own: those of other data may be in another order.
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
        """What an example of each class counts, in fp32; `None` where all count alike."""
        if self.count_of_class is None:
            return None
        counts = self.count_of_class.float()
        return counts.max() / counts  # 1 at least, so that a sum of weights is never taken for none

    def logits(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """What the network says of each example, in fp32."""
        return self.read(batch).float()

    def loss(self, batch: Mapping[str, Tensor]) -> Loss:
        """Cross-entropy in nats, summed over the examples with their weights, and the sum of those.

        Labels are classes, or of each example a probability of each class (`batch classes`), as mixed images have.
        """
        logits, labels, smoothing = self.logits(batch), batch["labels"], self.label_smoothing
        if self.count_of_class is None:
            total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            return total, total.new_tensor(len(labels))
        weights = self.weights_of(batch)
        total = F.cross_entropy(logits, labels, weight=self.weight_of_class, reduction="sum")
        if smoothing:  # (torch's own gives each other class's part that class's weight, and so a rare one all of it.)
            total = torch.lerp(total, -(weights * logits.log_softmax(dim=-1).mean(dim=-1)).sum(), smoothing)
        return total, weights.sum()

    def weights_of(self, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
        """What each example counts; of mixed images the mean weight of what they are mixed of."""
        labels, weight = batch["labels"], self.weight_of_class
        if weight is None:
            return torch.ones(len(labels), device=labels.device)
        return (labels * weight).sum(dim=-1) if labels.is_floating_point() else weight[labels]  # (`@` would be rounded)

    def measure(self, metric: MetricCollection, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds each example's class, predicted class and nats."""
        logits, labels = self.logits(batch), batch["labels"]
        predicted, nats = logits.argmax(dim=-1), F.cross_entropy(logits, labels, reduction="none")
        metric.update(preds=predicted, target=labels, value=nats)
        return {"predicted": predicted, "labels": labels, "nats": nats}

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        """The probabilities of each row; see `callbacks.predictions`."""
        probabilities = self.logits(batch).softmax(dim=-1)
        self.require_numbers(probabilities)
        return {"rows": batch.get("rows"), "probabilities": probabilities}
