"""A classifier from the command line: trained, reported, exported, resumed, used for predictions."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModelForSequenceClassification

from lit_llm.checkpoints import save_model
from lit_llm.data.tokenizer import train_bert_bpe
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from tests.examples import BERT, example
from tests.writing import REPOSITORY


@pytest.fixture
def config(tmp_path) -> str:
    """A run file with a data module of the tests."""
    network = {"class_path": "lit_llm.models.pretrained_classifier.PretrainedClassifier", "init_args": {"config": BERT}}
    content = {
        "model": {"class_path": "lit_llm.objectives.classification.Classification", "init_args": {"network": network}},
        "data": {"class_path": "tests.examples.Examples"},
        "trainer": {"max_steps": 4, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None},
        "checkpoint": {"monitor": "val/accuracy", "mode": "max"},
    }
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "classes.yaml")


def test_a_run_leaves_what_there_is_to_know_and_is_gone_on_with_and_asked(lit_llm, config, tmp_path) -> None:
    run = tmp_path / "run"
    outcome = lit_llm("fit", "--config", config, "--run_dir", run)
    assert outcome.code == 0, outcome.err
    results = json.loads((run / "results.json").read_text())
    wanted = {"accuracy", "precision", "recall", "f1", "mcc", "loss"}
    how_sure = {"count", "accuracy_low", "accuracy_high", "loss_low", "loss_high"}
    assert {name for name in results if name.startswith("test/")} == {f"test/{name}" for name in wanted | how_sure}
    assert results["test/accuracy_low"] <= results["test/accuracy"] <= results["test/accuracy_high"]
    assert results["test/count"] == 7
    assert {f"val/{name}" for name in wanted} | {f"best/val/{name}" for name in wanted} <= set(results)
    for picture in ("confusion_matrix.png", "learning_curve.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}

    for command in ("generate --prompt x", "evaluate --tasks task.yaml"):
        (tmp_path / "task.yaml").write_text("task: x")
        name, *words = command.replace("task.yaml", str(tmp_path / "task.yaml")).split()
        assert lit_llm(name, *words, "--model", run / "model").last_line == (
            f"lit-llm: error: model must be a causal language model, but {run / 'model'} is a PretrainedClassifier"
        )
    other = lit_llm("validate", "--run_dir", run, "--data.num_classes", "4")
    assert other.last_line == (
        "lit-llm: error: model.num_classes must be that of the checkpoint, 3, but is 4; take the data it was trained on"
    )

    outcome = lit_llm("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "results.json").read_text())["step"] == 6

    outcome = lit_llm("predict", "--run_dir", run, "--data.known", "false", "--data.test_labels", "false")
    assert outcome.code == 0, outcome.err
    [written] = (run / "evaluations").glob("predict-*/predictions.csv")
    with written.open(newline="") as file:
        table = list(csv.DictReader(file))
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    ids = torch.cat([example(row, None)["input_ids"] for row in range(7)])
    with torch.no_grad():
        probabilities = model(ids).logits.softmax(-1)
    found = [[float(line[f"p(class {index})"]) for index in range(3)] for line in table]
    torch.testing.assert_close(torch.tensor(found), probabilities, atol=1e-5, rtol=0)


def test_a_checkpoint_of_another_network_is_refused_in_one_line(lit_llm, config, tmp_path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.ckpt"
    assert lit_llm("fit", "--config", config, "--run_dir", run).code == 0
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["network"] = {"class_path": "lit_llm.models.lenet.LeNet", "init_args": {"channels": 1}, "size": 10}
    torch.save(checkpoint, other)
    for words in (["test"], ["predict"], ["fit", "--trainer.max_steps", "6"]):
        assert lit_llm(*words, "--run_dir", run, "--ckpt_path", other).last_line == (
            "lit-llm: error: model.network must be that of the checkpoint, lit_llm.models.lenet.LeNet, but is "
            "lit_llm.models.pretrained_classifier.PretrainedClassifier"
        )


def test_a_config_of_the_run_file_gives_way_to_a_path_when_a_flag_says_null(lit_llm, config, tmp_path) -> None:
    save_model(tmp_path / "start", PretrainedClassifier(3, config=BERT))
    words = [
        "--model.network.config",
        "null",
        "--model.network.path",
        tmp_path / "start",
        "--run_dir",
        tmp_path / "run",
    ]
    outcome = lit_llm("fit", "--config", config, *words)
    assert outcome.code == 0, outcome.err
    network = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["init_args"]["network"]
    assert network["init_args"]["config"] is None


@pytest.mark.parametrize("by", ["weights", "path"])
def test_a_run_has_the_tokeniser_of_what_it_started_from_ever_after(lit_llm, reviews, tmp_path, by) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--data.path", reviews]
    words += [
        "--data.max_seq_len",
        "32",
        "--data.batch_size",
        "4",
        "--trainer.max_steps",
        "2",
        "--test_after_fit",
        "false",
    ]
    network = ["--model.network.config", json.dumps({"model_type": "bert", **size}), "--data.tokenizer", "bert-bpe-300"]
    first, second = tmp_path / "first", tmp_path / "second"
    outcome = lit_llm("fit", *words, *network, "--run_dir", first)
    assert outcome.code == 0, outcome.err
    whole = ["--model.network", "null", "--model.weights", first / "model"]
    start = {"weights": whole, "path": ["--model.network.path", first]}[by]
    outcome = lit_llm("fit", *words, *start, "--run_dir", second)
    assert outcome.code == 0, outcome.err
    shutil.rmtree(first)  # the initial weights are no longer needed
    goes_on = [["fit", "--ckpt_path", "last", "--trainer.max_steps", "3"]] if by == "weights" else []
    for command in (["validate"], ["predict"], *goes_on):
        outcome = lit_llm(*command, "--run_dir", second)
        assert outcome.code == 0, outcome.err
        assert "The head is new" not in outcome.err
    if by == "path":
        outcome = lit_llm("validate", "--run_dir", second, "--model.network.path", tmp_path)
        assert f"model.network.path must be as in {second / 'config.yaml'}, {first}, where" in outcome.last_line
    assert (second / "model/tokenizer.json").is_file()
    assert json.loads((second / "model/tokenizer_config.json").read_text())["model_max_length"] == 32


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "PairClassifier",
            {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
        ),
        ("PretrainedClassifier", {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "pad_token_id": None}),
    ],
)
def test_what_a_config_does_not_say_of_tokens_is_known_in_an_evaluation_too(lit_llm, tmp_path, name, kind) -> None:
    """The ids of separator and padding, which the config of `path` may leave out."""
    lines = [
        f"some words {row},{'some' if row % 3 else 'other words that are longer'} {row},{row % 2}" for row in range(60)
    ]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(["first,second,label", *lines]))
    start, run = tmp_path / "start", tmp_path / "run"
    tokenizer = train_bert_bpe(lines, 300)
    save_model(start, PretrainedClassifier(2, config={**kind, "num_hidden_layers": 1, "vocab_size": 300}), tokenizer)
    content = json.loads((start / "config.json").read_text())
    known = {key: value for key, value in content.items() if key not in ("sep_token_id", "pad_token_id")}
    (start / "config.json").write_text(json.dumps(known))
    words = ["--model.network", f"lit_llm.models.pretrained_{'pooling' if 'Pair' in name else 'classifier'}.{name}"]
    words += ["--model.network.path", start, "--data.path", table, "--data.text", "first", "--data.text_pair", "second"]
    words += ["--data.validation_fraction", "0.3", "--trainer.max_steps", "3", "--trainer.val_check_interval", "3"]
    words += ["--trainer.precision", "32-true", "--data.batch_size", "4", "--test_after_fit", "false"]
    words += ["--model.optimizer.lr", "0.02", "--model.schedule.warmup_steps", "0"]
    config = REPOSITORY / "configs/finetuning/encoder_pairs.yaml"
    outcome = lit_llm("fit", "--config", config, *words, "--run_dir", run)
    assert outcome.code == 0, outcome.err
    fitted = json.loads((run / "results.json").read_text())["val/loss"]
    outcome = lit_llm("validate", "--run_dir", run)
    assert outcome.code == 0, outcome.err
    found = dict(line.split() for line in outcome.out.splitlines() if line.startswith("val/"))
    assert found["val/loss"] == f"{fitted:.4f}"


def test_weights_whose_classes_are_in_another_order_predict_by_their_names(lit_llm, tmp_path) -> None:
    lines = [f"some {('bad', 'good')[row % 2]} words {row},{('bad', 'good')[row % 2]}" for row in range(20)]
    size = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    network = PretrainedClassifier(2, config={**size, "num_hidden_layers": 1, "vocab_size": 300})
    network.class_names = ["good", "bad"]
    save_model(tmp_path / "start", network, train_bert_bpe(lines, 300))
    (tmp_path / "splits").mkdir()
    for name in ("alone.csv", "splits/train.csv", "splits/test.csv"):
        (tmp_path / name).write_text("\n".join(["text,label", *lines]))
    (tmp_path / "alone.csv").write_text("\n".join(["text", *(line.split(",")[0] for line in lines)]))
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--model.network", "null"]
    words += ["--model.weights", tmp_path / "start", "--data.max_seq_len", "16", "--trainer.precision", "32-true"]
    found = []
    for data in ("alone.csv", "splits"):
        outcome = lit_llm("predict", *words, "--data.path", tmp_path / data, "--run_dir", tmp_path / f"of_{data}")
        assert outcome.code == 0, outcome.err
        with (tmp_path / f"of_{data}/predictions.csv").open(newline="") as file:
            found.append([(line["predicted"], line["p(bad)"], line["p(good)"]) for line in csv.DictReader(file)])
    assert found[0] == found[1]


def test_a_labelled_table_of_ones_own_is_evaluated_whole_by_the_checkpoints_classes(lit_llm, reviews, tmp_path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--data.path", reviews]
    words += ["--model.network.config", json.dumps({"model_type": "bert", **size}), "--data.max_seq_len", "16"]
    words += ["--data.tokenizer", "bert-bpe-300", "--trainer.precision", "32-true", "--trainer.max_epochs", "2"]
    run, evaluations = tmp_path / "run", tmp_path / "run/evaluations"
    assert lit_llm("fit", *words, "--run_dir", run).code == 0
    folder = tmp_path / "other"
    folder.mkdir()
    lines = [f"words {row} of a kind,{('good', 'bad', 'good')[row % 3]}" for row in range(23)]
    for name in ("test.csv", "only_test.csv", "dev.csv"):
        (folder / name if name == "test.csv" else tmp_path / name).write_text("\n".join(["text,label", *lines]))

    found = []
    for command, data in (("test", folder), ("test", tmp_path / "only_test.csv"), ("validate", tmp_path / "dev.csv")):
        outcome = lit_llm(command, "--run_dir", run, "--data.path", data)
        assert outcome.code == 0, outcome.err
        [written] = evaluations.iterdir()
        results = json.loads((written / "results.json").read_text())
        shutil.rmtree(written)
        split = {"test": "test", "validate": "val"}[command]
        assert results[f"{split}/count"] == 23
        found.append([results[f"{split}/{metric}"] for metric in ("accuracy", "f1", "mcc", "loss")])
    assert found[0] == found[1] == pytest.approx(found[2])
    assert lit_llm("predict", "--run_dir", run).code == 0
    own = (run / "predictions.csv").read_text()
    assert lit_llm("predict", "--run_dir", run, "--data.path", folder).code == 0
    assert (run / "predictions.csv").read_text() == own
    [written] = evaluations.iterdir()
    with (written / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert found[0][0] == pytest.approx(sum(line["label"] == line["predicted"] for line in table) / 23)

    (tmp_path / "plain.csv").write_text("\n".join(["text,label", *lines]))  # may be the training data, moved
    outcome = lit_llm("test", "--run_dir", run, "--data.path", tmp_path / "plain.csv")
    assert "must hold a test split" in outcome.last_line
    for content, message in {
        "text,label\nx,good\ny,fair\n": "data.label must be one of 'bad', 'good' as in training, but 'label' is 'fair'",
        "text,label\nx,good\ny,\n": "label",
        "text,mark\nx,good\ny,bad\n": "data.label must be given where no column is called",
    }.items():
        (tmp_path / "only_test.csv").write_text(content)
        outcome = lit_llm("test", "--run_dir", run, "--data.path", tmp_path / "only_test.csv")
        assert outcome.code == 2
        assert message in outcome.last_line


def test_a_run_is_tested_on_its_classes_in_another_order_by_their_names(lit_llm, tmp_path) -> None:
    names = [("bad", "good")[row % 2] for row in range(60)]
    texts = [f"{name} words {row // 2}" for row, name in enumerate(names)]
    table = tmp_path / "x.csv"
    table.write_text("\n".join(["text,label", *map(",".join, zip(texts, names, strict=True))]))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    Dataset.from_dict({"text": texts, "label": names}, features).to_parquet(tmp_path / "x.parquet")
    size = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--data.path", table]
    words += [
        "--model.network.config",
        json.dumps({**size, "num_hidden_layers": 1}),
        "--data.tokenizer",
        "bert-bpe-300",
    ]
    words += ["--data.batch_size", "8", "--data.validation_fraction", "0.3", "--trainer.max_steps", "30"]
    words += ["--trainer.precision", "32-true", "--model.optimizer.lr", "0.02", "--model.schedule.warmup_steps", "0"]
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    fitted = json.loads((tmp_path / "run/results.json").read_text())["best/val/loss"]
    outcome = lit_llm("validate", "--run_dir", tmp_path / "run", "--data.path", tmp_path / "x.parquet")
    assert outcome.code == 0, outcome.err
    assert "The classes of the head are now" not in outcome.err
    found = dict(line.split() for line in outcome.out.splitlines() if line.startswith("val/"))
    assert found["val/loss"] == f"{fitted:.4f}"


def test_a_table_that_has_changed_is_evaluated_with_the_runs_tokens_and_is_said_to_be_why_a_run_cannot_go_on(
    lit_llm, reviews, tmp_path
) -> None:
    table = tmp_path / "x.csv"
    shutil.copy(reviews, table)
    size = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--data.path", table]
    words += ["--model.network.config", json.dumps({**size, "num_hidden_layers": 1})]
    words += ["--data.tokenizer", "bert-bpe-4000", "--data.test_fraction", "0.2", "--data.max_seq_len", "32"]
    words += ["--trainer.max_steps", "2", "--data.batch_size", "8", "--test_after_fit", "false"]
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    with table.open("a") as file:
        file.writelines(f'"quite another {chr(97 + n) * 5} text",{("bad", "good")[n % 2]}\n' for n in range(20))
    change = f"the train split of {table} had 60 rows then and has 80 now"
    before = (tmp_path / "run/results.json").read_text()
    for command in ("test", "predict"):
        outcome = lit_llm(command, "--run_dir", tmp_path / "run")
        assert outcome.code == 0, outcome.err
        assert f"Rows that the checkpoint was trained on may be in the test split, since {change}" in outcome.err
    assert (tmp_path / "run/results.json").read_text() == before
    outcome = lit_llm("fit", "--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert outcome.last_line == (
        f"lit-llm: error: data.path must hold the rows that the checkpoint was trained on to go on from it, but {change}; "
        f"put those back, or start a new run with --model.weights"
    )
