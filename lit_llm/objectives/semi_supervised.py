"""Semi-supervised classification: FixMatch and mean teacher, for few labelled and many unlabelled examples."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_llm.batch import inputs
from lit_llm.modes import evaluating
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.exact_steps import Loss


class SemiSupervised(Classification):
    """Adds a consistency loss on unlabelled examples to the cross-entropy of labelled ones.

    A *teacher* in evaluation mode predicts the class probabilities of an unlabelled example, unaugmented or weakly
    augmented (`batch["unlabelled"]`). The trained network is to predict the same for its strongly augmented version
    (`batch["unlabelled_strong"]`). Examples for which the teacher's confidence is below `threshold` have zero loss, and
    the mean is over all. Labels of these examples, if known, only serve to measure the teacher's accuracy.

    An exponential moving average of the weights is kept from the first step on. Validation, test, predictions and the
    exported model use it; a checkpoint has both, and a resumed run continues exactly.

    During training also logs `train/confident` (fraction of unlabelled examples above the threshold) and, if their
    labels are known, `train/pseudo_label_accuracy` (fraction of confident examples that the teacher classifies
    correctly).

    Args:
        args: As in `Classification`.
        threshold: Minimum probability of the teacher's most likely class for an unlabelled example to count, in [0, 1].
        unlabelled_weight: Factor on the loss of the unlabelled examples, at least 0.
        ramp_up_steps: Steps over which that factor rises to `unlabelled_weight`, as `exp(-5 (1 - x)²)` of the fraction
            `x` of them.
        decay: Decay of the weight average, in [0, 1); it covers about the last `1 / (1 - decay)` steps, or all steps as
            long as there are fewer.
        distribution_alignment: Scale the teacher's probabilities, class by class, by the ratio of the class's frequency
            among labelled examples to that of the teacher's recent predictions (a mean with `decay`), before comparing
            them with `threshold`. This keeps the teacher from assigning everything to one class. Use it if classes are
            as frequent among unlabelled examples as among labelled ones.
        kwargs: As in `Classification`; smoothing and weights apply to the labelled examples.

    Raises:
        ValueError: When a value is out of range, or a batch has no unlabelled examples.

    Source:
        Distribution alignment: Berthelot et al., 2020, "ReMixMatch", arXiv:1911.09785, section 3.1, which takes plain
        means for both frequencies, the teacher's over 128 batches.
    """

    averages = True

    def __init__(
        self,
        *args: Any,
        threshold: float = 0.95,
        unlabelled_weight: float = 1.0,
        ramp_up_steps: int = 0,
        decay: float = 0.99,
        distribution_alignment: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= threshold <= 1:
            raise ValueError(f"model.threshold must be in [0, 1], but is {threshold}")
        if not 0 <= decay < 1:
            raise ValueError(f"model.decay must be in [0, 1), but is {decay}")
        for name, value in {"unlabelled_weight": unlabelled_weight, "ramp_up_steps": ramp_up_steps}.items():
            if value < 0:
                raise ValueError(f"model.{name} must be at least 0, but is {value}")
        self.save_arguments()
        self.threshold, self.unlabelled_weight, self.ramp_up_steps = threshold, unlabelled_weight, ramp_up_steps
        self.decay, self.distribution_alignment = decay, distribution_alignment
        # Since the last report: confident examples, all examples, correct ones among the confident ones with a label,
        # all confident ones with a label.
        self.register_buffer("counts", torch.zeros(4))
        self._ddp_params_and_buffers_to_ignore = ["counts"]  # each process counts its own examples

    @property
    @abstractmethod
    def teacher(self) -> nn.Module:
        """The network that predicts the classes of unlabelled examples."""

    @abstractmethod
    def disagreement(
        self, taught: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, " batch"]:
        """Loss between the teacher's probabilities and the network's logits of each strongly augmented example."""

    def build(self) -> None:
        """Makes the network, and the running class frequencies for distribution alignment."""
        super().build()
        if self.distribution_alignment:  # one row for the labels, one for the teacher's probabilities
            num_classes = self.hparams[self.size_name]
            self.register_buffer("shares", torch.full((2, num_classes), 1 / num_classes))

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """The summed loss of the labelled examples plus, for each target, the weighted mean over unlabelled ones."""
        if "unlabelled" not in batch:
            raise ValueError(
                f"data must give unlabelled examples for {type(self).__name__}, but gives none; set "
                f"data.unlabelled_ratio, or take Classification"
            )
        total, targets = super().loss(batch)
        taught = self._taught(batch["unlabelled"])
        if self.distribution_alignment:
            taught = self._aligned(taught, batch["labels"])
        logits = self.network(**inputs(batch["unlabelled_strong"])).float()
        confident = taught.amax(dim=-1) >= self.threshold
        self._count(taught, confident, batch["unlabelled"].get("labels"))
        unlabelled = (self.disagreement(taught, logits) * confident).mean()
        return total + self.unlabelled_factor(self.global_step) * targets * unlabelled, targets

    def unlabelled_factor(self, step: int) -> float:
        """Factor on the loss of the unlabelled examples at a step."""
        if step >= self.ramp_up_steps:
            return self.unlabelled_weight
        return self.unlabelled_weight * math.exp(-5 * (1 - step / self.ramp_up_steps) ** 2)

    def _taught(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        teacher = self.teacher
        with evaluating(teacher), torch.no_grad():
            return teacher(**inputs(batch)).float().softmax(dim=-1)

    @torch.no_grad()
    def _aligned(
        self,
        taught: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " labelled"] | Float[Tensor, "labelled classes"],
    ) -> Float[Tensor, "batch classes"]:
        """Rescales the teacher's probabilities to the labels' class frequencies, updated with this batch first."""
        if labels.ndim == 1:
            labels = F.one_hot(labels, taught.shape[-1]).float()
        now = torch.stack([labels.mean(dim=0), taught.mean(dim=0)])
        if self._trainer is not None and self.trainer.world_size > 1:  # the same frequencies on all processes
            now = self.trainer.strategy.reduce(now, reduce_op="mean")
        self.shares.lerp_(now.to(self.shares.dtype), 1 - self.decay)
        known, said = self.shares.float()
        scaled = taught * known / said.clamp(min=1e-6)
        return scaled / scaled.sum(dim=-1, keepdim=True)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Steps, and moves the average of the weights."""
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        step = self.trainer.global_step + 1  # Lightning increments it after this hook
        self.move_average(min(self.decay, step / (step + 1)))

    # Training metrics of the unlabelled examples.

    @torch.no_grad()
    def _count(self, taught: Tensor, confident: Tensor, labels: Tensor | None) -> None:
        known = confident if labels is not None else torch.zeros_like(confident)
        right = known & (taught.argmax(dim=-1) == labels) if labels is not None else known
        self.counts += torch.stack(
            [confident.sum(), confident.new_ones(confident.shape).sum(), right.sum(), known.sum()]
        )

    def take_train_metrics(self) -> dict[str, float]:
        """Fraction of confident examples since the last call, and of correct ones among those with a label."""
        counts = self.trainer.strategy.reduce(self.counts.clone(), reduce_op="sum").tolist()
        self.counts.zero_()
        found = {"train/confident": counts[0] / max(counts[1], 1.0)}
        return found | ({"train/pseudo_label_accuracy": counts[2] / counts[3]} if counts[3] else {})


class FixMatch(SemiSupervised):
    """The network is its own teacher: its confident predictions are hard labels for the augmented examples.

    Arguments are those of `SemiSupervised`.

    Source:
        Sohn et al., 2020, "FixMatch", arXiv:2001.07685, eq. 3 and 4, with the threshold and weight of its table 4. Here
        pseudo-labels are made without dropout, in a separate forward pass, and the decay suits hundreds of steps rather
        than a million.

    Example:
        >>> model = FixMatch(torch.nn.Identity)
        >>> model.disagreement(torch.tensor([[0.99, 0.01]]), torch.zeros(1, 2))  # log 2
        tensor([0.6931])
    """

    @property
    def teacher(self) -> nn.Module:
        """The network itself."""
        return self.network

    def disagreement(
        self, taught: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, " batch"]:
        """Cross-entropy of the teacher's most likely class, in nats."""
        return F.cross_entropy(logits, taught.argmax(dim=-1), reduction="none")


class MeanTeacher(SemiSupervised):
    """The average of the weights is the teacher: the network is to predict the same probabilities.

    Arguments are those of `SemiSupervised`. Without a threshold, as in the paper, `ramp_up_steps` has to be large.

    Source:
        Tarvainen & Valpola, 2017, "Mean teachers are better role models", arXiv:1703.01780, section 2, with the ramp-up
        of its section 3. Here the consistency loss is on unlabelled examples only, only the student has dropout and
        strong augmentation, and squares are summed over classes. A threshold instead of a ramp-up: French et al., 2017,
        "Self-ensembling for visual domain adaptation", arXiv:1706.05208, section 3.2.

    Example:
        >>> model = MeanTeacher(torch.nn.Identity)
        >>> model.disagreement(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
        tensor([0.5000])
    """

    def __init__(
        self,
        *args: Any,
        threshold: float = 0.0,
        unlabelled_weight: float = 10.0,
        ramp_up_steps: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args, threshold=threshold, unlabelled_weight=unlabelled_weight, ramp_up_steps=ramp_up_steps, **kwargs
        )

    @property
    def teacher(self) -> nn.Module:
        """The average of the weights."""
        return self.average

    def disagreement(
        self, taught: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, " batch"]:
        """Squared difference of the probabilities, summed over classes; from 0 to 2."""
        return (logits.softmax(dim=-1) - taught).square().sum(dim=-1)
