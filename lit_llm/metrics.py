"""Metrics over whole data sets, kept as running sums, and bootstrap intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import (
    Accuracy,
    F1Score,
    MeanAbsoluteError,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    Precision,
    Recall,
    SpearmanCorrCoef,
)
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.functional.text.rouge import rouge_score
from torchmetrics.text import BLEUScore, CHRFScore

from lit_llm.batch import IGNORE_INDEX

BETWEEN_WORDS = re.compile(r"[\W_]+")

CONFIDENCE = 0.95
"""Confidence level of the intervals: the fraction of the resamples that lies within one."""

RESAMPLES = 1000
"""Number of bootstrap resamples per interval."""

MAX_GROUPS = 4096
"""Maximum number of draws per resample."""


class MeanLoss(Metric):
    """Mean over all targets of a loss that comes as sums over batches; `compute` returns `loss`.

    Example:
        >>> metric = MeanLoss()
        >>> metric.update(torch.tensor(3.0), torch.tensor(2.0)); metric.update(torch.tensor(1.0), torch.tensor(2.0))
        >>> metric.compute()["loss"].item()
        1.0
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "targets"):
            self.add_state(name, torch.zeros((), dtype=_wide()), dist_reduce_fx="sum")

    def update(self, total: Float[Tensor, ""], targets: Float[Tensor, ""]) -> None:
        """Adds a batch: its loss summed over the targets, and the number of targets."""
        self.total += total.detach()
        self.targets += targets

    def compute(self) -> dict[str, Tensor]:
        """The mean, in the loss's own unit."""
        return {"loss": (self.total / self.targets).float()}


class LanguageModeling(Metric):
    """Loss, perplexity and bits per byte of a language model.

    `compute` returns `loss` (nats per token, at least 0; `log(vocab)` for a uniform prediction), `perplexity` (its
    exponential) and, if the data counts the bytes that its labels stand for, `bits_per_byte` (the same total per byte
    of text, in bits, so it is comparable between tokenisers; 8 for a uniform prediction of bytes). Sums are kept in
    double precision if the device supports it, and cover all processes.

    Args:
        sources: Names of the sources of a mixture. For each source that had rows, `compute` also returns
            `<source>/loss` and, if bytes are counted, `<source>/bits_per_byte`.

    Example:
        >>> metric = LanguageModeling()
        >>> metric.update(torch.full((1, 4), math.log(2)), torch.zeros(1, 4, dtype=torch.long), torch.tensor([8.0]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'loss': 0.693, 'perplexity': 2.0, 'bits_per_byte': 0.5}
    """

    full_state_update = False

    def __init__(self, sources: Sequence[str] = ()) -> None:
        super().__init__()
        self.sources = tuple(sources)
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=_wide()), dist_reduce_fx="sum")
            if sources:
                self.add_state(f"{name}_of", torch.zeros(len(sources), dtype=_wide()), dist_reduce_fx="sum")

    def update(
        self,
        nats: Float[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        num_bytes: Float[Tensor, " batch"] | None = None,
        sources: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Adds a batch: the cross-entropy of each label in nats, the labels, and each row's byte count and source."""
        self.nats += nats.sum(dtype=self.nats.dtype)
        self.tokens += (labels != IGNORE_INDEX).sum()
        if num_bytes is not None:
            self.bytes += num_bytes.sum(dtype=self.bytes.dtype)
        if sources is not None and self.sources:
            each = (sources[:, None] == torch.arange(len(self.sources), device=sources.device)).to(self.nats.dtype)
            self.nats_of += nats.sum(dim=1, dtype=each.dtype) @ each
            self.tokens_of += (labels != IGNORE_INDEX).sum(dim=1, dtype=each.dtype) @ each
            if num_bytes is not None:
                self.bytes_of += num_bytes.to(each.dtype) @ each

    def compute(self) -> dict[str, Tensor]:
        """The metrics so far."""
        loss = self.nats / self.tokens
        metrics = {"loss": loss, "perplexity": loss.exp()}
        if self.bytes > 0:
            metrics["bits_per_byte"] = self.nats / self.bytes / math.log(2)
        for place, source in enumerate(self.sources):
            if self.tokens_of[place] > 0:
                metrics[f"{source}/loss"] = self.nats_of[place] / self.tokens_of[place]
            if self.bytes_of[place] > 0:
                metrics[f"{source}/bits_per_byte"] = self.nats_of[place] / self.bytes_of[place] / math.log(2)
        return {name: value.float() for name, value in metrics.items()}


class TokenPrediction(Metric):
    """Loss, perplexity and accuracy of predicted tokens: masked tokens, or those of a target text.

    `compute` returns `loss` (nats per token; `log(vocab)` for a uniform prediction), `perplexity` (its exponential) and
    `accuracy` (the fraction of labels that are the most probable token). Sums are kept in double precision if the
    device supports it, and cover all processes.

    Example:
        >>> metric = TokenPrediction()
        >>> metric.update(torch.full((4,), math.log(2)), torch.tensor([True, True, True, False]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'loss': 0.693, 'perplexity': 2.0, 'accuracy': 0.75}
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "hits", "tokens"):
            self.add_state(name, torch.zeros((), dtype=_wide()), dist_reduce_fx="sum")

    def update(self, nats: Float[Tensor, " n"], hits: Bool[Tensor, " n"]) -> None:
        """Adds labels: the cross-entropy of each in nats, and whether it is the most probable token."""
        self.nats += nats.sum(dtype=self.nats.dtype)
        self.hits += hits.sum()
        self.tokens += len(hits)

    def compute(self) -> dict[str, Tensor]:
        """The metrics so far."""
        loss = self.nats / self.tokens
        metrics = {"loss": loss, "perplexity": loss.exp(), "accuracy": self.hits / self.tokens}
        return {name: value.float() for name, value in metrics.items()}


class GeneratedText(Metric):
    """Metrics of text generation: of tokens predicted after the true prefix (`tokens`), and of generated texts.

    `compute` returns the metrics of `TokenPrediction` and, if any process added texts, `exact_match` (the fraction
    equal to their reference), `rouge_l` (mean F1 of the longest common subsequence of lower-case words), `bleu` (over
    the whole corpus, n-grams of up to 4 words) and `chrf` (n-grams of up to 6 characters and up to 2 words, as far as
    texts are that long); each from 0 to 1. Words of `rouge_l` are runs of letters and digits of any script, those of
    `bleu` are separated by white space; for scripts that do not separate words, such as Chinese, `chrf` is more
    informative.

    Source:
        Lin, 2004, "ROUGE"; Papineni et al., 2002, "BLEU"; Popović, 2017, "chrF++"; computed by torchmetrics, whose
        default ROUGE words, of a to z and digits only, are replaced.

    Example:
        >>> metric = GeneratedText()
        >>> metric.tokens.update(torch.zeros(2), torch.ones(2, dtype=torch.bool))
        >>> metric.update(["the cat sat on the mat", "no"], ["the cat sat on a mat", "no"])
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items() if name[0] in "er"}
        {'exact_match': 0.5, 'rouge_l': 0.92}
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = TokenPrediction()
        # torchmetrics' own ROUGE metric needs the same number of texts in every process.
        self.exact, self.rouge, self.bleu, self.chrf = MeanMetric(), MeanMetric(), BLEUScore(), ChrF()

    def update(self, written: list[str], wanted: list[str]) -> None:
        """Adds generated texts and their references."""
        self.exact.update([float(mine == its) for mine, its in zip(written, wanted, strict=True)])
        options = {"rouge_keys": "rougeL", "normalizer": lambda text: BETWEEN_WORDS.sub(" ", text.lower())}
        scores = [rouge_score(mine, its, **options) for mine, its in zip(written, wanted, strict=True)]
        self.rouge.update([score["rougeL_fmeasure"] for score in scores])
        self.bleu.update(written, [[text] for text in wanted])
        self.chrf.update(written, [[text] for text in wanted])

    def compute(self) -> dict[str, Tensor]:
        """The metrics so far."""
        written = {"exact_match": self.exact, "rouge_l": self.rouge, "bleu": self.bleu, "chrf": self.chrf}
        found = {name: metric.compute() for name, metric in written.items()}  # collective: in every process
        return self.tokens.compute() | ({} if found["exact_match"].isnan() else found)

    def reset(self) -> None:
        """Resets all metrics, `tokens` included."""
        super().reset()
        for metric in self.children():
            metric.reset()


class ChrF(CHRFScore):
    """Corpus-level chrF++ as in sacrebleu: averaged over the n-gram orders that occur in both sides.

    torchmetrics averages over all orders, so even perfect short texts score below 1.

    Example:
        >>> metric = ChrF()
        >>> metric.update(["yes", "no"], [["yes"], ["no"]])
        >>> metric.compute()
        tensor(1.)
    """

    def compute(self) -> Tensor:
        """The score of all texts so far, from 0 to 1."""
        scores = []  # precision and recall of each order
        for kind, orders in (("char", self.n_char_order), ("word", self.n_word_order)):
            for n in range(1, orders + 1):
                sides = ("matching", "preds", "target")
                both, mine, its = (getattr(self, f"total_{side}_{kind}_{n}_grams") for side in sides)
                if mine > 0 and its > 0:
                    scores.append(torch.stack([both / mine, both / its]))
        precision, recall = torch.stack(scores).mean(dim=0) if scores else torch.zeros(2)
        weighted = self.beta**2 * precision + recall
        return (1 + self.beta**2) * precision * recall / weighted if weighted > 0 else weighted


def classification_metrics(num_classes: int) -> MetricCollection:
    """Metrics of a classifier, over all examples of a split and all processes.

    These are `accuracy`, `precision`, `recall` and `f1` (fractions; the last three are of the second class if there are
    two, otherwise the mean over the classes that occur), `mcc` (Matthews correlation coefficient, -1 to 1; 0 for random
    or constant predictions) and `loss` (nats per example; `log(num_classes)` for a uniform prediction). `update` takes
    `preds` and `target` (class indices) and `value` (the loss of each example).

    Source:
        Matthews, 1975; Gorodkin, 2004, for more than two classes.

    Example:
        >>> metrics = classification_metrics(2)
        >>> metrics.update(preds=torch.tensor([1, 1, 0]), target=torch.tensor([1, 0, 0]), value=torch.ones(3))
        >>> {name: round(value.item(), 3) for name, value in sorted(metrics.compute().items())}
        {'accuracy': 0.667, 'f1': 0.667, 'loss': 1.0, 'mcc': 0.5, 'precision': 0.5, 'recall': 1.0}
    """
    task = {"task": "multiclass", "num_classes": num_classes, "validate_args": False}
    each = {"task": "binary", "validate_args": False} if num_classes == 2 else {**task, "average": "macro"}
    metrics = {
        "accuracy": Accuracy(**task, average="micro"),
        "precision": Precision(**each),
        "recall": Recall(**each),
        "f1": F1Score(**each),
        "mcc": Matthews(num_classes, validate_args=False),
        "loss": MeanMetric(nan_strategy="disable"),  # by default, NaN losses are left out
    }
    return MetricCollection(metrics).set_dtype(_wide())


class Matthews(MulticlassConfusionMatrix):
    """Matthews correlation coefficient, -1 to 1; 0 if the labels or the predictions are constant.

    It agrees with scikit-learn's `matthews_corrcoef`, which GLUE uses; torchmetrics' own is above 0 in the constant
    case.

    Source:
        Gorodkin, 2004, "Comparing two K-category assignments by a K-category correlation coefficient", eq. 8.
    """

    def compute(self) -> Tensor:
        """The correlation so far."""
        counts = super().compute().to(_wide())
        total, true, predicted = counts.sum(), counts.sum(dim=1), counts.sum(dim=0)
        together = counts.trace() * total - true @ predicted
        apart = ((total**2 - predicted @ predicted) * (total**2 - true @ true)).sqrt()
        return torch.where(apart > 0, together / apart.clamp(min=1e-12), 0.0)


class RegressionMetrics(MetricCollection):
    """Metrics of a regression, over all examples of a split and all processes.

    These are `rmse` and `mae` (in the labels' unit), `pearson` and `spearman` (correlation of values and of ranks, -1
    to 1; 0 if either side is constant) and `loss` (mean squared error). `update` takes `preds` and `target`.

    Example:
        >>> metrics = RegressionMetrics()
        >>> metrics.update(preds=torch.tensor([1.0, 2.0, 5.0]), target=torch.tensor([1.0, 3.0, 4.0]))
        >>> {name: round(value.item(), 3) for name, value in sorted(metrics.compute().items())}
        {'loss': 0.667, 'mae': 0.667, 'pearson': 0.891, 'rmse': 0.816, 'spearman': 1.0}
    """

    def __init__(self) -> None:
        metrics = {
            "rmse": MeanSquaredError(squared=False),
            "mae": MeanAbsoluteError(),
            "pearson": PearsonCorrCoef(),
            "spearman": SpearmanCorrCoef(),
            "loss": MeanSquaredError(),
        }
        super().__init__(metrics)
        self.set_dtype(_wide())

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch of predicted values and labels."""
        super().update(preds=preds.to(_wide()), target=target.to(_wide()))

    def compute(self) -> dict[str, Tensor]:
        """The metrics so far."""
        found = super().compute()
        undefined = 0.0 if found["loss"].isfinite() else math.nan
        return found | {name: found[name].nan_to_num(undefined) for name in ("pearson", "spearman")}


def bootstrap_interval(totals: Float[Tensor, " n"], weights: Float[Tensor, " n"]) -> tuple[float, float]:
    """Percentile bootstrap interval of the weighted mean `totals.sum() / weights.sum()`.

    Each resample draws as many examples as there are, with replacement; the interval holds the middle `CONFIDENCE` of
    the resamples. More than `MAX_GROUPS` examples are first summed into that many random groups, which are drawn
    instead: the variance is the same, and it takes about 0.1 s for any number of examples. The seed is fixed, so equal
    arguments give an equal interval.

    Args:
        totals: Each example's part of the numerator: 1 or 0 for an accuracy, a row's nats for a loss.
        weights: Each example's part of the denominator: 1, or a row's number of tokens.

    Source:
        Efron, 1979, "Bootstrap Methods: Another Look at the Jackknife"; the percentile interval.

    Example:
        >>> low, high = bootstrap_interval(torch.tensor([1.0, 0.0] * 200), torch.ones(400))
        >>> round(low, 2), round(high, 2)
        (0.45, 0.55)
    """
    chance = torch.Generator().manual_seed(0)
    pairs = torch.stack([totals.double(), weights.double()], dim=1)
    if len(pairs) > MAX_GROUPS:
        group = torch.arange(len(pairs))[torch.randperm(len(pairs), generator=chance)] % MAX_GROUPS
        pairs = pairs.new_zeros(MAX_GROUPS, 2).index_add_(0, group, pairs)
    drawn = torch.stack(
        [pairs[torch.randint(len(pairs), (len(pairs),), generator=chance)].sum(dim=0) for _ in range(RESAMPLES)]
    )
    rest = (1 - CONFIDENCE) / 2
    low, high = (drawn[:, 0] / drawn[:, 1]).quantile(torch.tensor([rest, 1 - rest]).double()).tolist()
    return low, high


def _wide() -> torch.dtype:
    """Data type of the sums: double precision, except where MPS, which lacks it, is available."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64
