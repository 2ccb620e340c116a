import functools
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lit_llm.data.text import TextData
from lit_llm.data.tokenizer import train_t5_bpe
from lit_llm.models.pretrained_seq2seq import PretrainedSeq2Seq
from lit_llm.objectives.masking import noise_spans
from lit_llm.objectives.span_corruption import SpanCorruption
from tests.examples import T5
from tests.writing import exactly

TOKENS = train_t5_bpe(["ab"], 360)
SENTINELS = range(2, 102)


def objective(**options) -> SpanCorruption:
    made = SpanCorruption(functools.partial(PretrainedSeq2Seq, config=T5), vocab_size=len(TOKENS), **options)
    made.read_tokens_of(TOKENS)
    return made


def rows(batch: int = 50, seq: int = 128) -> dict[str, torch.Tensor]:
    ids = torch.randint(102, len(TOKENS), (batch, seq + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}


def put_together(read: list[int], written: list[int]) -> list[int]:
    """The row from which a source and a target were made."""
    spans: dict[int, list[int]] = {}
    for token in written[:-1]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    return [token for kept in read[:-1] for token in (spans[kept] if kept in SENTINELS else [kept])]


@pytest.mark.parametrize(("ratio", "span", "seq"), [(0.15, 3.0, 128), (0.5, 2.0, 33), (0.15, 1.0, 64), (0.9, 3.0, 20)])
def test_source_and_target_together_are_the_row(ratio: float, span: float, seq: int) -> None:
    batch = rows(seq=seq)
    found = objective(mask_ratio=ratio, mean_span=span).texts(batch, step=3)
    hidden = round(seq * ratio)
    spans = min(round(hidden / span), seq - hidden)
    assert found["input_ids"].shape == (50, seq - hidden + spans + 1)
    assert found["labels"].shape == (50, hidden + spans + 1)
    planned = objective(mask_ratio=ratio, mean_span=span).planned_texts(batch)
    assert {name: text.shape for name, text in planned.items()} == {name: text.shape for name, text in found.items()}
    assert set(found["input_ids"][:, -1].tolist()) | set(found["labels"][:, -1].tolist()) == {TOKENS.eos_token_id}
    for row, read, written in zip(batch["input_ids"], found["input_ids"], found["labels"], strict=True):
        assert put_together(read.tolist(), written.tolist()) == row.tolist()
        named = [[token for token in text.tolist() if token in SENTINELS] for text in (read, written)]
        assert named == [list(SENTINELS[:spans])] * 2


def test_spans_are_as_the_papers_code_has_them() -> None:
    hidden, first = noise_spans(torch.rand(2, 2000, 60), num_hidden=12, num_spans=4)
    assert set(hidden.sum(dim=1).tolist()) == {12}
    assert set(first.sum(dim=1).tolist()) == {4}
    assert not hidden[:, 0].any()
    assert hidden[:, -1].all()
    # Twelve tokens can be cut into four pieces in C(11, 3) equally likely ways; the first has length 1 in C(10, 2).
    lengths = torch.zeros(2000, 5).scatter_add_(1, first.cumsum(dim=1), hidden.float())[:, 1:]
    assert lengths.mean(dim=0).tolist() == pytest.approx([3.0] * 4, abs=0.25)
    assert (lengths == 1).float().mean(dim=0).tolist() == pytest.approx([45 / 165] * 4, abs=0.04)
    assert lengths.max() == 9 or lengths.max() == 8


def test_other_spans_are_left_out_at_each_step_but_the_same_in_each_evaluation() -> None:
    made, batch = objective(), rows(4)
    first, second, again, plain, plain_again = (made.texts(batch, step)["labels"] for step in (1, 2, 1, None, None))
    assert torch.equal(first, again)
    assert torch.equal(plain, plain_again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_what_fills_up_a_row_is_not_to_be_written() -> None:
    made, batch = objective(), rows(200)
    batch["input_ids"][:, :100] = 110
    batch["input_ids"][:, 100:] = 111
    batch["input_ids"][:, 0] = torch.arange(200) + 112  # makes all rows different
    full = made.texts(batch)["labels"]
    batch["labels"][:, 99:] = -100  # padding from token 100 on
    assert torch.equal(made.texts(batch)["labels"], full.masked_fill(full == 111, -100))
    assert {110, 111} <= set(full.flatten().tolist())


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    made = objective()
    made.configure_model()
    made.trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    batch = rows(4)
    total, targets = made.loss(batch)
    expected = made.network.model(**made.texts(batch, 0)).loss
    torch.testing.assert_close(total / targets, expected)
    made.measure(made.val_metric, batch)
    torch.testing.assert_close(made.val_metric.compute()["loss"], made.network.model(**made.texts(batch)).loss)


def fit(made: SpanCorruption, data: TextData, folder: Path) -> Trainer:
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}
    run = Trainer(accelerator="cpu", max_steps=2, default_root_dir=folder, limit_val_batches=2, **options)
    run.fit(made, data)
    return run


def test_it_trains_on_text(corpus: Path, tmp_path: Path) -> None:
    data = TextData(path=str(corpus), tokenizer="t5-bpe-360", seq_len=32, batch_size=4, validation_fraction=0.2)
    made = SpanCorruption(functools.partial(PretrainedSeq2Seq, config=T5))
    run = fit(made, data, tmp_path)
    run.validate(made, data, verbose=False)
    assert {"val/loss", "val/accuracy", "val/perplexity"} == run.callback_metrics.keys()
    assert made.network.config.eos_token_id == data.tokenizer.eos_token_id


def test_a_tokeniser_without_sentinels_is_refused(corpus: Path, tmp_path: Path) -> None:
    data = TextData(path=str(corpus), tokenizer="bytes", seq_len=32, batch_size=4, validation_fraction=0.2)
    message = (
        "data.tokenizer must have an end token and sentinels (<extra_id_0>, …) for SpanCorruption, but bytes has none; "
        "set it to t5-bpe-4096"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fit(SpanCorruption(functools.partial(PretrainedSeq2Seq, config=T5)), data, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, "model.mask_ratio must be in (0, 1), but is 1.0"),
        ({"mean_span": 0.5}, "model.mean_span must be at least 1, but is 0.5"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        objective(**options)


def test_a_row_of_more_spans_than_sentinels_is_refused() -> None:
    message = "data.seq_len must be short enough for the tokeniser's 100 sentinels, but is 3000, which has 150 spans"
    with pytest.raises(ValueError, match=exactly(message)):
        objective().texts(rows(1, 3000))


def test_there_is_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match=r"\Amodel must be an objective that predicts something of each row, but is "):
        objective().predict_step(rows(), 0)
