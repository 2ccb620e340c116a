import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from lit_llm.batch import IGNORE_INDEX
from lit_llm.metrics import (
    GeneratedText,
    LanguageModeling,
    RegressionMetrics,
    bootstrap_interval,
    classification_metrics,
)

ROWS, SEQ = 12, 9


def reference(nats: torch.Tensor, labels: torch.Tensor, num_bytes: torch.Tensor | None) -> dict[str, float]:
    counted = labels.numpy() != IGNORE_INDEX
    total = nats.numpy().astype(np.float64)[counted].sum()
    found = {"loss": total / counted.sum(), "perplexity": np.exp(total / counted.sum())}
    if num_bytes is not None:
        found["bits_per_byte"] = total / np.log(2) / num_bytes.numpy().astype(np.float64).sum()
    return found


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nats, labels, num_bytes = 3 * torch.rand(ROWS, SEQ), torch.randint(50, (ROWS, SEQ)), 40 * torch.rand(ROWS)
    for row in range(ROWS):
        labels[row, SEQ - row % 4 :] = IGNORE_INDEX
    return nats.masked_fill(labels == IGNORE_INDEX, 0.0), labels, num_bytes


def measured(data: tuple[torch.Tensor, ...], batches: list[list[int]]) -> dict[str, float]:
    metric = LanguageModeling()
    for rows in batches:
        metric.update(*(part[rows] for part in data))
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("with_bytes", [False, True])
def test_metrics_are_those_of_the_whole_in_numpy(data, with_bytes: bool) -> None:
    given = data if with_bytes else data[:2]
    assert measured(given, [list(range(ROWS))]) == pytest.approx(reference(*data[:2], data[2] if with_bytes else None))


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_neither_order_nor_batches_matter(data, size: int) -> None:
    order = torch.randperm(ROWS).tolist()
    batches = [order[start : start + size] for start in range(0, ROWS, size)]
    assert measured(data, batches) == pytest.approx(reference(*data), rel=1e-6)


def test_sums_do_not_lose_small_parts_in_large_ones() -> None:
    metric = LanguageModeling()
    labels = torch.zeros(1, 1, dtype=torch.long)
    metric.update(torch.full((1, 1), 1e9), labels)
    for _ in range(1000):
        metric.update(torch.full((1, 1), 1.0), labels)
    assert metric.nats.item() == 1e9 + 1000


def test_knowing_nothing_of_bytes_is_eight_bits_a_byte() -> None:
    metric = LanguageModeling()
    metric.update(torch.full((2, 5), math.log(256)), torch.zeros(2, 5, dtype=torch.long), torch.tensor([5.0, 5.0]))
    found = metric.compute()
    assert found["bits_per_byte"].item() == pytest.approx(8)
    assert found["perplexity"].item() == pytest.approx(256, rel=1e-5)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_each_source_is_measured_as_if_there_were_no_other(data, size: int) -> None:
    sources = torch.arange(ROWS) % 3 // 2 * 2  # none of the second source
    metric = LanguageModeling(["code", "prose", "talk"])
    for rows in torch.randperm(ROWS).split(size):
        metric.update(*(part[rows] for part in data), sources[rows])
    found = {name: value.item() for name, value in metric.compute().items()}
    expected = dict(reference(*data))
    for place, source in ((0, "code"), (2, "talk")):
        own = reference(*(part[sources == place] for part in data))
        expected |= {f"{source}/{name}": own[name] for name in ("loss", "bits_per_byte")}
    assert found == pytest.approx(expected, rel=1e-6)
    metric.reset()
    metric.update(*data)
    assert metric.compute().keys() == reference(*data).keys()


@pytest.mark.parametrize(
    ("written", "wanted", "rouge"),
    [
        ("Кошка сидит!", "кошка: сидит", 1.0),
        ("猫 坐 在 门 边", "猫 坐 在 门 上", 0.8),
        ("le café à Noël", "le cafe a Noel", 0.25),
        ("a snake_case name", "a snake case name", 1.0),
        ("no word of it", "some other text", 0.0),
    ],
)
def test_words_of_rouge_are_of_any_script(written: str, wanted: str, rouge: float) -> None:
    metric = GeneratedText()
    metric.tokens.update(torch.zeros(1), torch.ones(1, dtype=torch.bool))
    metric.update([written], [wanted])
    assert metric.compute()["rouge_l"].item() == pytest.approx(rouge)


@pytest.mark.parametrize(
    ("written", "wanted", "chrf"),
    [
        (["yes", "no"], ["yes", "no"], 1.0),
        (["one hundred"], ["one hundred"], 1.0),
        (["a"], ["abcd"], 5 * 0.5 * 0.125 / (4 * 0.5 + 0.125)),  # of single characters right, of words wrong
        (["the cat sat on the mat", "no"], ["the cat sat, on a mat.", "never"], None),
        (["", ""], ["yes", "no"], 0.0),
    ],
)
def test_chrf_is_sacrebleus_also_of_texts_that_are_too_short_for_some_orders(written, wanted, chrf) -> None:
    metric = GeneratedText()
    metric.update(written, wanted)
    found = metric.compute()["chrf"].item()
    if chrf is not None:
        assert found == pytest.approx(chrf)
    sacrebleu = pytest.importorskip("sacrebleu")
    assert 100 * found == pytest.approx(sacrebleu.corpus_chrf(written, [wanted], word_order=2).score)


def test_a_reset_metric_begins_anew(data) -> None:
    metric = LanguageModeling()
    metric.update(*data)
    metric.reset()
    metric.update(*(part[:3] for part in data))
    assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(reference(*(p[:3] for p in data)))


def batches_of(size: int, *columns: torch.Tensor):
    return zip(*(column.split(size) for column in columns), strict=True)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_classification_is_scikit_learns_of_the_whole_split(classes: int, size: int) -> None:
    target = torch.randint(classes - (classes > 2), (200,))  # the last of five never occurs
    preds = torch.where(torch.rand(200) < 0.6, target, torch.randint(classes - (classes > 2), (200,)))
    nats = torch.rand(200)
    found = classification_metrics(classes)
    for pred, truth, value in batches_of(size, preds, target, nats):
        found.update(preds=pred, target=truth, value=value)
    average = {"average": "binary" if classes == 2 else "macro"}
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(target, preds),
        "precision": sklearn.metrics.precision_score(target, preds, **average),
        "recall": sklearn.metrics.recall_score(target, preds, **average),
        "f1": sklearn.metrics.f1_score(target, preds, **average),
        "mcc": sklearn.metrics.matthews_corrcoef(target, preds),
        "loss": nats.double().mean().item(),
    }
    assert {name: value.item() for name, value in found.compute().items()} == pytest.approx(expected, abs=1e-6)


def test_always_the_same_class_has_no_correlation() -> None:
    found = classification_metrics(2)
    found.update(preds=torch.ones(6, dtype=torch.long), target=(torch.arange(6) > 1).long(), value=torch.ones(6))
    assert found.compute()["mcc"] == 0


def test_the_loss_of_classes_is_no_number_where_that_of_an_example_is_none() -> None:
    found, classes = classification_metrics(3), torch.arange(3)
    found.update(preds=classes, target=classes, value=torch.tensor([0.1, math.nan, 0.1]))
    assert found.compute()["loss"].isnan()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_regression_is_scipys_of_the_whole_split(size: int) -> None:
    target = torch.randint(11, (200,)) / 2
    preds = (target + torch.randn(200)).bfloat16()
    found = RegressionMetrics()
    for pred, truth in batches_of(size, preds, target):
        found.update(pred, truth)
    preds = preds.float()
    expected = {
        "rmse": sklearn.metrics.root_mean_squared_error(target, preds),
        "mae": sklearn.metrics.mean_absolute_error(target, preds),
        "pearson": scipy.stats.pearsonr(target, preds).statistic,
        "spearman": scipy.stats.spearmanr(target, preds).statistic,
        "loss": sklearn.metrics.mean_squared_error(target, preds),
    }
    assert {name: value.item() for name, value in found.compute().items()} == pytest.approx(expected, abs=1e-6)


def test_a_constant_correlates_with_nothing_and_what_is_no_number_is_seen_in_the_loss() -> None:
    for value, correlation in ((1.5, 0.0), (math.nan, math.nan)):
        found = RegressionMetrics()
        found.update(torch.full((4,), value), torch.arange(4.0))
        got = found.compute()
        assert got["pearson"].item() == pytest.approx(correlation, nan_ok=True)
        assert math.isnan(got["loss"]) == math.isnan(value)


def _add_a_half(rank: int, folder: str, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    classes, values = classification_metrics(3), RegressionMetrics()
    half = torch.arange(9)[rank * 4 : 4 + rank * 5]  # of unequal size
    classes.update(preds=half * half % 3, target=half % 3, value=half.float())
    values.update((half * half).float(), half.float())
    if rank == 0:
        found = {**classes.compute(), **{f"value {name}": value for name, value in values.compute().items()}}
        queue.put({name: value.item() for name, value in found.items()})
    else:
        classes.compute(), values.compute()
    torch.distributed.destroy_process_group()


def test_processes_are_counted_together(tmp_path) -> None:
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_add_a_half, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = queue.get(timeout=60)
    for worker in workers:
        worker.join()
    whole = torch.arange(9)
    classes, values = classification_metrics(3), RegressionMetrics()
    classes.update(preds=whole * whole % 3, target=whole % 3, value=whole.float())
    values.update((whole * whole).float(), whole.float())
    expected = {**classes.compute(), **{f"value {name}": value for name, value in values.compute().items()}}
    assert found == pytest.approx({name: value.item() for name, value in expected.items()})


def test_the_bootstrap_interval_is_that_of_the_normal_approximation_and_of_groups_the_same():
    chance = torch.Generator().manual_seed(3)
    hits = (torch.rand(20_000, generator=chance) < 0.7).double()
    low, high = bootstrap_interval(hits, torch.ones(20_000))
    half = 1.96 * (0.7 * 0.3 / 20_000) ** 0.5
    assert low == pytest.approx(hits.mean().item() - half, abs=0.2 * half)
    assert high == pytest.approx(hits.mean().item() + half, abs=0.2 * half)
    assert bootstrap_interval(hits, torch.ones(20_000)) == (low, high)
    few = bootstrap_interval(hits[:100], torch.ones(100))
    assert few[1] - few[0] > 8 * (high - low)


def test_an_interval_of_a_ratio_weighs_rows_by_their_tokens():
    low, high = bootstrap_interval(torch.tensor([10.0, 2.0]), torch.tensor([10.0, 2.0]))
    assert low == high == 1.0
