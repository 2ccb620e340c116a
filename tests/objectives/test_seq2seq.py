import csv
import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tokenizers import Regex, normalizers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lit_llm.data.seq2seq import Seq2SeqData
from lit_llm.data.tokenizer import train_t5_bpe
from lit_llm.models.llama import Llama
from lit_llm.models.pretrained_seq2seq import PretrainedSeq2Seq
from lit_llm.objectives.seq2seq import Seq2Seq
from tests.examples import T5
from tests.writing import exactly

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A data set of numbers and their names, repeated for training."""
    folder = tmp_path / "numbers"
    folder.mkdir()
    for split, times in (("train", 20), ("validation", 2)):
        rows = [f"{number},{name}" for number, name in enumerate(NUMBERS)] * times
        (folder / f"{split}.csv").write_text("\n".join(["source,target", *rows]) + "\n")
    return str(folder)


def network() -> functools.partial:
    return functools.partial(PretrainedSeq2Seq, config=T5 | {"d_model": 32})


def fitted(
    path: str, folder: Path, steps: int, max_target_len: int = 48, tokenizer: str = "t5-bpe-400", **options
) -> tuple[Trainer, Seq2Seq, Seq2SeqData]:
    data = Seq2SeqData(path=path, tokenizer=tokenizer, batch_size=16, max_target_len=max_target_len)
    adamw = functools.partial(torch.optim.AdamW, lr=0.01)
    made = Seq2Seq(network(), optimizer=adamw, max_new_tokens=6, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"check_val_every_n_epoch": None, "val_check_interval": 1000, "max_epochs": -1}
    run = Trainer(accelerator="cpu", max_steps=steps, default_root_dir=folder, **quiet)
    run.fit(made, data)
    return run, made, data


def test_it_learns_a_table_and_says_how_well_it_writes(numbers: str, tmp_path: Path) -> None:
    run, made, data = fitted(numbers, tmp_path, 80, num_generated=1000)
    run.validate(made, data, verbose=False)
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    names = {"loss", "perplexity", "accuracy", "exact_match", "rouge_l", "bleu", "chrf"}
    assert set(found) == {f"val/{name}" for name in names}
    written, wanted = [], []
    for batch in data.val_dataloader():
        written += made.write(batch)
        wanted += [row["target"] for row in data.texts("validation", batch["rows"].tolist())]
    exact = sum(mine == its for mine, its in zip(written, wanted, strict=True)) / len(wanted)
    assert found["val/exact_match"] == pytest.approx(exact)
    assert exact == 1.0
    total = nats = 0.0
    for batch in data.val_dataloader():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            count = (batch["labels"] != -100).sum().item()
            nats += made.network.eval().model(**inputs).loss.item() * count
            total += count
    assert found["val/loss"] == pytest.approx(nats / total, rel=1e-4)


def test_only_the_first_examples_are_written(numbers: str, tmp_path: Path, monkeypatch) -> None:
    run, made, data = fitted(numbers, tmp_path, 1, num_generated=5)
    rows = []
    write = made.write
    monkeypatch.setattr(made, "write", lambda batch: (rows.extend(batch["rows"].tolist()), write(batch))[1])
    for _ in range(2):
        rows.clear()
        run.validate(made, data, verbose=False)
        assert sorted(rows) == list(range(5))


@pytest.mark.parametrize(("split", "stage"), [("val", "validate"), ("test", "test")])
def test_what_is_written_is_held_against_whole_targets(split: str, stage: str, tmp_path: Path, monkeypatch) -> None:
    targets = {name: [f"{n} is a number of {name} of 20" for n in range(20)] for name in ("train", "val", "test")}
    for name, texts in targets.items():
        rows = [f"{number},{text}" for number, text in enumerate(texts)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["source,target", *rows]) + "\n")
    run, made, data = fitted(str(tmp_path), tmp_path, 1, max_target_len=4)
    monkeypatch.setattr(made, "write", lambda batch: [targets[split][row] for row in batch["rows"].tolist()])
    getattr(run, stage)(made, data, verbose=False)
    assert run.callback_metrics[f"{split}/exact_match"] == 1


def test_targets_are_held_against_as_the_tokeniser_reads_them(tmp_path: Path, monkeypatch) -> None:
    targets = [f"{n}  is a ﬁne number,\nof 20 <pad>" for n in range(20)]
    tokenizer = train_t5_bpe(targets * 2, 400)
    joined = [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]  # like T5's own tokeniser
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(joined)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        rows = [json.dumps({"source": str(n), "target": target}) for n, target in enumerate(targets)]
        (tmp_path / f"data/{name}.jsonl").write_text("\n".join(rows))
    options = {"max_target_len": 4, "tokenizer": str(tmp_path / "tokenizer")}
    run, made, data = fitted(str(tmp_path / "data"), tmp_path, 1, **options)
    before = data.tokenizer.backend_tokenizer.to_str()
    written = [f"{n} is a fine number, of 20 <pad>" for n in range(20)]
    monkeypatch.setattr(made, "write", lambda batch: [written[row] for row in batch["rows"].tolist()])
    run.validate(made, data, verbose=False)
    assert run.callback_metrics["val/exact_match"] == 1
    assert data.tokenizer.backend_tokenizer.to_str() == before


def test_label_smoothing_is_in_the_loss_and_not_in_the_metric(numbers: str, tmp_path: Path) -> None:
    _, made, data = fitted(numbers, tmp_path, 1, label_smoothing=0.3)
    batch = next(iter(data.val_dataloader()))
    texts = made.texts(batch)
    logits, labels = made.network(**texts).flatten(0, 1), texts["labels"].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    total, targets = made.loss(batch)
    torch.testing.assert_close(total / targets, expected)
    made.val_metric.reset()
    made.tell(made.val_metric.tokens, batch)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(made.val_metric.tokens.compute()["loss"], plain)


def test_a_network_that_only_reads_or_writes_is_refused() -> None:
    made = Seq2Seq(functools.partial(Llama, d_model=16, num_layers=1, num_heads=2), vocab_size=20)
    with pytest.raises(
        TypeError, match=exactly("model.network must be an encoder-decoder for Seq2Seq, but is a Llama")
    ):
        made.configure_model()


def test_longer_texts_to_write_than_the_network_has_positions_are_refused(numbers: str, tmp_path: Path) -> None:
    layers = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = {"model_type": "bart", "d_model": 8, "max_position_embeddings": 32, **layers}

    def validated(max_new_tokens: int) -> None:
        made = Seq2Seq(functools.partial(PretrainedSeq2Seq, config=config), max_new_tokens=max_new_tokens)
        run = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        data = Seq2SeqData(path=numbers, tokenizer="t5-bpe-400", max_source_len=32, max_target_len=32)
        run.validate(made, data, verbose=False)

    validated(32)
    message = "model.max_new_tokens must be at most the network's max_seq_len, 32, but is 33; lower it"
    with pytest.raises(ValueError, match=exactly(message)):
        validated(33)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "model.label_smoothing must be in [0, 1), but is 1.0"),
        ({"num_generated": 0}, "model.num_generated must be at least 1, but is 0"),
        ({"num_beams": 0}, "model.num_beams must be at least 1, but is 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        Seq2Seq(network(), **options)


def predictions(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_line_trains_exports_and_writes(lit_llm, numbers: str, tmp_path: Path) -> None:
    made = {"class_path": "lit_llm.models.pretrained_seq2seq.PretrainedSeq2Seq", "init_args": {"config": T5}}
    content = {
        "model": {"class_path": "lit_llm.objectives.seq2seq.Seq2Seq", "init_args": {"network": made}},
        "data": {
            "class_path": "lit_llm.data.seq2seq.Seq2SeqData",
            "init_args": {"path": numbers, "tokenizer": "t5-bpe-400", "batch_size": 16},
        },
        "trainer": {"max_steps": 3, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    outcome = lit_llm("fit", "--config", tmp_path / "x.yaml", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "val/chrf" in json.loads((tmp_path / "run/results.json").read_text())
    outcome = lit_llm("predict", "--run_dir", tmp_path / "run", "--model.max_new_tokens", "4")
    assert outcome.code == 0, outcome.err
    [shorter] = (tmp_path / "run/evaluations").iterdir()
    table = predictions(shorter)
    assert list(table[0]) == ["source", "target", "predicted"]
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    sources = [row["source"] for row in table]
    ids = tokenizer(sources, return_tensors="pt", padding=True)
    written = model.generate(**ids, max_new_tokens=4, do_sample=False)
    expected = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    assert [row["predicted"] for row in table] == expected
    again = {row["source"]: row["predicted"] for row in table}
    (tmp_path / "new.tsv").write_text("source\tnote\n7\tone\n3\ttwo\n1\tthree\n")
    words = ["--data.path", tmp_path / "new.tsv", "--model.max_new_tokens", "4"]
    outcome = lit_llm("predict", "--run_dir", tmp_path / "run", *words)
    assert outcome.code == 0, outcome.err
    [of_new] = set((tmp_path / "run/evaluations").iterdir()) - {shorter}
    table = predictions(of_new)
    assert [list(row.values()) for row in table] == [
        [n, note, again[n]] for n, note in zip("731", ["one", "two", "three"])
    ]
    assert list(table[0]) == ["source", "note", "predicted"]
    (tmp_path / "own_test.csv").write_text((Path(numbers) / "validation.csv").read_text())
    outcome = lit_llm("test", "--run_dir", tmp_path / "run", "--data.path", tmp_path / "own_test.csv")
    assert outcome.code == 0, outcome.err
    [of_own] = (tmp_path / "run/evaluations").glob("test-*")
    found = json.loads((of_own / "results.json").read_text())
    wanted = json.loads((tmp_path / "run/results.json").read_text())
    for metric in ("loss", "chrf"):  # the same rows as in the best validation
        assert found[f"test/{metric}"] == pytest.approx(wanted[f"best/val/{metric}"], rel=1e-5)
