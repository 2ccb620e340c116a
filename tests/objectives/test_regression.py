from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from sklearn import metrics
from torch.utils.data import DataLoader

from lit_llm.adaptation import GradualUnfreezing, HeadOnly, LoRA
from lit_llm.checkpoints import save_model
from lit_llm.data.glue import GLUEData
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_pooling import MeanClassifier, PairClassifier
from lit_llm.objectives.heads import output_layer
from lit_llm.objectives.regression import Regression
from lit_llm.optimizers import Muon
from tests.examples import BERT, Examples, example, together
from tests.objectives.test_classification import trainer
from tests.writing import exactly

NETWORK = functools.partial(PretrainedClassifier, config=BERT)


def test_it_learns_and_its_metrics_are_those_of_all_examples_whatever_the_batches(tmp_path: Path) -> None:
    made, data = Regression(NETWORK, functools.partial(torch.optim.AdamW, lr=0.01)), Examples(None)
    trainer(tmp_path, max_steps=20, max_epochs=-1).fit(made, datamodule=data)
    run = trainer(tmp_path)
    run.validate(made, datamodule=data, verbose=False)
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    whole = together([example(row, None) for row in range(100, 111)])
    with torch.no_grad():
        values = made.eval().values(whole).numpy()
    truth = whole["labels"].numpy()
    expected = {
        "val/rmse": metrics.root_mean_squared_error(truth, values),
        "val/mae": metrics.mean_absolute_error(truth, values),
        "val/pearson": stats.pearsonr(truth, values).statistic,
        "val/spearman": stats.spearmanr(truth, values).statistic,
        "val/loss": metrics.mean_squared_error(truth, values),
    }
    assert found == pytest.approx(expected, abs=1e-5)
    assert found["val/pearson"] > 0.3


@pytest.mark.parametrize("kind", [PretrainedClassifier, MeanClassifier])
def test_values_have_more_digits_than_the_precision_of_the_products(kind: type, tmp_path: Path) -> None:
    made = Regression(functools.partial(kind, config=BERT))
    batches = trainer(tmp_path, precision="bf16-mixed").predict(made, datamodule=Examples(None))
    values = torch.cat([batch["values"] for batch in batches])
    assert (values != values.bfloat16().float()).any()


def test_labels_keep_their_digits_where_the_network_is_in_16_bits(tmp_path: Path) -> None:
    made, data, read = Regression(NETWORK), Examples(None), []
    loss = made.loss
    made.loss = lambda batch: read.append(batch["labels"]) or loss(batch)
    batches = [batch | {"labels": 1900 + batch["rows"] + 0.5} for batch in data.train_dataloader()]
    data.train_dataloader = lambda: DataLoader(batches, batch_size=None)
    trainer(tmp_path, max_steps=3, precision="bf16-true").fit(made, datamodule=data)
    assert next(made.network.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(read), 1900.5 + torch.arange(24), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [PretrainedClassifier, MeanClassifier])
def test_a_new_head_starts_at_the_mean_label_and_one_that_has_learnt_where_it_is(kind: type, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\n".join(["text,label", *(f"a {'bcd'[n % 3]},{1900.5 + n}" for n in range(24))]))
    table = {"path": str(tmp_path / "x.csv"), "batch_size": 8, "max_seq_len": 16, "validation_fraction": 0.0}
    data = GLUEData(**table, tokenizer="bert-bpe-300")

    def first_said(**given: Any) -> tuple[Regression, float]:
        made = Regression(optimizer=functools.partial(torch.optim.SGD, lr=0.0), **given)
        trainer(tmp_path, max_steps=1).fit(made, datamodule=data)
        with torch.no_grad():
            return made, made.eval().values(next(iter(data.train_dataloader()))).mean().item()

    made, said = first_said(network=functools.partial(kind, config=BERT))
    assert said == pytest.approx(1912, abs=2)
    last = output_layer(made.network)
    torch.nn.init.constant_(last.bias, 5.0)
    torch.nn.init.constant_(last.weight, 0.02)
    save_model(tmp_path / "model", made.network, data.tokenizer)
    made, said = first_said(weights=str(tmp_path / "model"))
    assert said == pytest.approx(5, abs=2)
    assert (output_layer(made.network).weight == last.weight).all()


def test_a_new_head_of_images_starts_at_the_mean_label_though_its_bias_is_not_0(tmp_path: Path) -> None:
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    pixels = {"pixel_values": torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    data = Examples(None)
    data.mean_label, data.std_label = 250_000.0, 100.0
    data.train_dataloader = lambda: DataLoader([pixels | {"labels": torch.full((8,), 250_000.0)}], batch_size=None)
    first = functools.partial(PretrainedClassifier, config=config)
    first(3).model.save_pretrained(tmp_path / "three")
    first(1).model.save_pretrained(tmp_path / "one")
    for network, is_new in (
        (first, True),
        (functools.partial(PretrainedClassifier, path=str(tmp_path / "three")), True),
        (functools.partial(PretrainedClassifier, path=str(tmp_path / "one")), False),
    ):
        made = Regression(network, functools.partial(torch.optim.SGD, lr=0.0))
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(made, datamodule=data)
        assert (output_layer(made.network).bias.item() == 250_000) is is_new


def priced(folder: Path, scale: float, shift: float) -> GLUEData:
    labels = (scale * (2 * (n % 3) + (n % 5)) + shift for n in range(32))
    texts = (f"a {'bcd'[n % 3]} {'efghi'[n % 5]}" for n in range(32))
    (folder / "x.csv").write_text("\n".join(["text,label", *map("{},{}".format, texts, labels)]))
    table = {"path": str(folder / "x.csv"), "batch_size": 8, "max_seq_len": 16, "validation_fraction": 0.0}
    return GLUEData(**table, tokenizer="bert-bpe-300")


def priced_as(scale: float, shift: float, folder: Path, made: Regression, **options: Any) -> torch.Tensor:
    data = priced(folder, scale, shift)
    trainer(folder, max_steps=10, max_epochs=-1, gradient_clip_val=1.0, **options).fit(made, datamodule=data)
    rows = data.ordered_dataloader("train")
    with torch.no_grad():
        said, truth = (torch.cat(found) for found in zip(*((made.eval().values(b), b["labels"]) for b in rows)))
    return torch.stack([said - shift, truth - shift]) / scale


ADAM = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize(
    ("kind", "optimizer", "adaptation", "options"),
    [
        (PretrainedClassifier, ADAM, None, {"accumulate_grad_batches": 2}),
        (MeanClassifier, ADAM, HeadOnly(), {}),
        (MeanClassifier, ADAM, LoRA(rank=2), {}),
        (MeanClassifier, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01), None, {}),
        (PairClassifier, functools.partial(Muon, weight_decay=0.1), GradualUnfreezing(), {}),
    ],
)
@pytest.mark.slow
def test_labels_of_any_scale_are_learnt_alike(
    kind: type, optimizer: Any, adaptation: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    network = functools.partial(kind, config=BERT)
    found = []
    for scale, shift in ((1.0, 0.0), (1000.0, 5000.0), (0.001, -0.002)):
        torch.manual_seed(0)
        made = Regression(network, optimizer, adaptation=adaptation)
        found.append(priced_as(scale, shift, tmp_path, made, **options))
    said, truth = found[0]
    assert (said - truth).square().mean() < 0.995 * truth.var(correction=0)
    for other, _ in found[1:]:
        torch.testing.assert_close(other, said, rtol=0, atol=0.02)


def test_predictions_are_values_of_rows(tmp_path: Path) -> None:
    made = Regression(NETWORK)
    [first, second] = trainer(tmp_path).predict(made, datamodule=Examples(None))
    assert first["values"].shape == (4,)
    assert second["rows"].tolist() == [4, 5, 6]


def test_more_than_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match=exactly("model.num_targets must be 1, but is 2")):
        Regression(NETWORK, num_targets=2)
