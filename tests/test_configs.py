"""Every shipped config says what it is, follows the conventions, and runs for two steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lit_llm.checkpoints import save_model
from lit_llm.cli.sweep_file import read_sweep
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.models.lenet import LeNet
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_seq2seq import PretrainedSeq2Seq
from tests.examples import BERT, T5
from tests.images import tree
from tests.writing import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
RUNS = [path for path in CONFIGS if path.parent.name in ("pretraining", "finetuning")]
ADAPTATIONS = [path for path in CONFIGS if path.parent.name == "adaptation"]
OVERLAYS = [path for path in CONFIGS if path.parent.name in ("logging", "strategy")]
OVERLAYS = [path for path in OVERLAYS if "strategy:" not in path.read_text()]  # in tests/cli/test_strategies.py
OVERLAYS += [path for path in CONFIGS if path.parent.name == "compression" and not path.stem.startswith("chain_")]

SWEEPS = [path for path in CONFIGS if path.parent.name == "sweeps"]
CHAINS = [path for path in CONFIGS if path.stem.startswith("chain_")]


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix()


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_it_says_first_what_it_is_and_stays_short(path):
    lines = path.read_text().splitlines()
    assert re.match(r"# \w.{30,}", lines[0])
    assert len(lines) <= 40


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_it_writes_no_value_that_the_data_decides(path):
    assert not re.search(r"^\s*(vocab_size|num_classes):", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_file_states_what_it_reaches(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert re.search(r"\d\.\d+ (bits per byte|nats)|(accuracy|MCC) (of )?0\.\d+", head)
    assert re.search(r"\d+ (s|seconds|minutes)\b", head)


def test_pairs_and_a_task_replace_one_another_whole(lit_llm):
    run, data = REPOSITORY / "configs/finetuning/encoder_docmatch.yaml", REPOSITORY / "configs/data"
    words = ["fit", "--config", run, "--data", data / "sst2.yaml"]
    found = []
    for more in ([], ["--data", data / "docmatch.yaml"]):
        outcome = lit_llm(*words, *more, "--print_config")
        assert outcome.code == 0, outcome.err
        init_args = yaml.safe_load(outcome.out)["data"]["init_args"]
        found.append((init_args["task"], init_args["path"]))
    assert found == [("sst2", None), (None, "stdlib-docmatch")]


@pytest.mark.parametrize("path", [*OVERLAYS, *ADAPTATIONS], ids=name)
def test_an_overlay_adds_to_the_callbacks_and_does_not_replace_them(path):
    trainer = yaml.safe_load(path.read_text()).get("trainer", {})
    assert "callbacks" not in trainer


SPLITS = ["--data.validation_fraction", "0.1", "--data.test_fraction", "0"]
TOKENIZERS = {"MaskedLM": "bert-bpe-300", "SpanCorruption": "t5-bpe-400", "Seq2Seq": "t5-bpe-400"}
EXAMPLES = ["--data.tokenizer", "bert-bpe-300", "--data.validation_fraction", "0.1", "--data.max_seq_len", "64"]


@pytest.fixture
def small(tmp_path, tiny_llama, texts, chats):
    """Options that give a run file little data, and small weights if it starts from weights."""

    def options(path: Path) -> list[object]:
        content, init_args = path.read_text(), yaml.safe_load(path.read_text())["model"]["init_args"]
        if "VisionData" in content:
            found = ["--data.path", tree(tmp_path / "images", {"a": 40, "b": 40}, side=28), *SPLITS]
            if "weights" in init_args:
                save_model(tmp_path / "start", LeNet(2))
                found += ["--model.weights", tmp_path / "start"]
            return found
        if "encoder_" not in path.stem:
            tokenizer = next((spec for kind, spec in TOKENIZERS.items() if f".{kind}\n" in content), "bytes")
            of_pairs = "Seq2SeqData" in content
            found = ["--data.path", chats if of_pairs or "InstructionData" in content else texts, *SPLITS]
            found += ["--data.tokenizer", tokenizer, *([] if of_pairs else ["--data.seq_len", "64"])]
            if "weights" in init_args:
                started = PretrainedSeq2Seq(600, config=T5), None
                save_model(
                    tmp_path / "start", *(started if of_pairs else (tiny_llama(vocab_size=257), byte_tokenizer()))
                )
                found += ["--model.weights", tmp_path / "start"]
            return found
        lines = [f"{row} {'good' if row % 2 else 'bad'},{'yes' if row % 2 else 'no'}" for row in range(60)]
        (tmp_path / "table.csv").write_text("\n".join(["text,label", *lines]))
        found = ["--data.path", tmp_path / "table.csv", *EXAMPLES]
        if isinstance(init_args["network"], dict):  # not a file that describes the network completely
            save_model(
                tmp_path / "start", PretrainedClassifier(3, config=BERT | {"vocab_size": 300, "num_hidden_layers": 3})
            )
            found += ["--model.network.path", tmp_path / "start"]
        return found

    return options


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_file_takes_two_steps(lit_llm, small, tmp_path, path):
    outcome = lit_llm(
        "fit",
        "--config",
        path,
        *small(path),
        "--data.batch_size",
        "2",
        "--trainer.max_steps",
        "2",
        "--trainer.limit_val_batches",
        "1",
        "--run_dir",
        tmp_path / "run",
    )
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run/model/config.json").exists()


# The tests' type checks cannot be compiled: tests/callbacks/test_compile.py runs that overlay.
@pytest.mark.parametrize("path", [path for path in OVERLAYS if path.stem != "compile"], ids=name)
def test_an_overlay_takes_two_steps_on_the_main_run(lit_llm, tiny, tmp_path, monkeypatch, path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wide = ["--model.network.d_model", "64"]  # divisible by the group size
    outcome = lit_llm("fit", *tiny, *wide, "--config", path, "--trainer.max_steps", "2", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("path", ADAPTATIONS, ids=name)
def test_a_way_to_fine_tune_takes_two_steps_on_an_encoder(lit_llm, small, tmp_path, path):
    base = REPOSITORY / "configs/finetuning/encoder_docmatch.yaml"
    options = ["--data.batch_size", "2", "--trainer.max_steps", "2", "--run_dir", tmp_path / "run"]
    outcome = lit_llm("fit", "--config", base, "--config", path, *small(base), *options)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run/model/config.json").exists()
    assert (tmp_path / "run/adapter/adapter_config.json").exists() == ("lora" in path.stem or "dora" in path.stem)


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_a_trial_of_a_sweep_takes_two_steps(lit_llm, small, tmp_path, monkeypatch, path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    plan = read_sweep(path)
    assert plan.run_cap
    assert "configs/logging/wandb.yaml" in plan.command[0]  # for `wandb agent`
    run = Path(plan.command[0][plan.command[0].index("--config") + 1])
    short = {"data.batch_size": 2, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    words = plan.words({parameter.key: parameter.extremes()[0] for parameter in plan.parameters} | short)
    bounds = ["--trainer.limit_val_batches", "1", "--test_after_fit", "false"]
    outcome = lit_llm("fit", *words, *bounds, "--run_dir", tmp_path / "run", *small(run))
    assert outcome.code == 0, outcome.err
    assert f"best/{plan.metric}" in json.loads((tmp_path / "run/results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_a_chain_compresses_what_its_run_file_makes(lit_llm, small, tmp_path, path):
    run = (path.parent / yaml.safe_load(path.read_text())["evaluate"]).resolve()
    options = ["--data.batch_size", "2", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
    words = [*small(run), *options]
    assert lit_llm("fit", "--config", run, *words, "--run_dir", tmp_path / "run").code == 0
    chain = yaml.safe_load(path.read_text())
    for stage in chain["stages"]:
        stage["floor"] = 0.0
        stage |= {"fit": str((path.parent / stage["fit"]).resolve())} if "fit" in stage else {}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain | {"evaluate": str(run), "repeats": 2}))
    where = ["--config", tmp_path / "chain.yaml", "--model", tmp_path / "run/model", "--out", tmp_path / "out"]
    outcome = lit_llm("compress", *where, *words)
    assert outcome.code == 0, outcome.err
    sizes = [row["bytes"] for row in json.loads((tmp_path / "out/report.json").read_text())["stages"]]
    assert len(sizes) == len(chain["stages"]) + 1
    assert sizes[-1] < sizes[0] / 8


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name in ("models", "data")], ids=name)
def test_a_part_can_take_its_place_in_the_main_run(lit_llm, tiny, path):
    key = "--model.network" if path.parent.name == "models" else "--data"
    outcome = lit_llm("fit", *tiny[:2], key, path, "--print_config")
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load(outcome.out)
    part = config["model"]["init_args"]["network"] if key == "--model.network" else config["data"]
    assert part["class_path"] == yaml.safe_load(path.read_text())["class_path"]
