from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import lit_llm.cli.compress as command
from lit_llm.checkpoints import load_model, save_model
from lit_llm.cli.chain_file import Chain
from lit_llm.compression.integers import Quantized
from lit_llm.compression.quantization import Int8WeightOnly
from lit_llm.compression.structured import Neurons
from lit_llm.data.tokenizer import byte_tokenizer
from tests.writing import REPOSITORY

RUN = str(REPOSITORY / "configs/pretraining/llama_stdlib.yaml")
STUDENT = {
    "model": "lit_llm.objectives.distillation.CausalLMDistillation",
    "model.teacher": "{original}",
    "model.network.d_model": 16,
    "model.network.num_layers": 1,
    "model.network.num_heads": 2,
    "model.network.d_ff": 24,
}
TRAINER = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.precision", "32-true"]
PRUNE = {"name": "pruned", "class_path": "lit_llm.compression.sparsity.Wanda"}
MAGNITUDE = {"name": "sparse", "class_path": "lit_llm.compression.sparsity.Magnitude"}
NEURONS = {"name": "narrow", "class_path": "lit_llm.compression.structured.Neurons", "init_args": {"sparsity": 0.5}}
QUANTIZE = {
    "name": "int8",
    "class_path": "lit_llm.compression.quantization.Int8WeightOnly",
    "init_args": {"layers": ["*"]},
}
RECOVER = {
    "name": "recovered",
    "fit": RUN,
    "options": {
        "model.weights": "{previous}",
        "model.network": None,
        "trainer.callbacks+": {"class_path": "lit_llm.callbacks.pruning.KeepZeros"},
    },
}


@pytest.fixture
def llama(tmp_path, tiny_llama):
    save_model(tmp_path / "llama", tiny_llama(vocab_size=257), byte_tokenizer())
    return tmp_path / "llama"


@pytest.fixture
def chain(tmp_path, texts, llama, lit_llm):
    """Runs a chain of stages on a small data set."""

    def call(*stages, out="out", model=llama, more=(), **settings):
        content = {"evaluate": RUN, "metric": "val/bits_per_byte", "repeats": 2, "calibration_batches": 2}
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump({**content, "stages": list(stages), **settings}))
        data = ["--data.path", texts, "--data.tokenizer", "bytes", "--data.seq_len", "32", "--data.batch_size", "4"]
        splits = ["--data.validation_fraction", "0.1", "--data.test_fraction", "0.1"]
        where = ["--config", path, "--model", model, "--out", tmp_path / out]
        return lit_llm("compress", *where, *data, *splits, *TRAINER, *more)

    return call


def test_a_chain_distils_prunes_and_quantises_and_says_what_it_cost(chain, tmp_path, llama, lit_llm):
    outcome = chain({"name": "distilled", "fit": RUN, "options": STUDENT}, PRUNE, QUANTIZE)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    stages = report["stages"]
    assert [row["name"] for row in stages] == ["original", "distilled", "pruned", "int8"]
    wanted = {
        "name",
        "metric",
        "parameters",
        "nonzero",
        "bytes",
        "latency_ms_p50",
        "latency_ms_p95",
        "throughput",
        "peak_memory",
        "seconds",
    }
    assert all(wanted <= row.keys() for row in stages)
    sizes = [row["parameters"] for row in stages]
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3]
    assert stages[2]["nonzero"] < stages[1]["nonzero"]
    assert stages[3]["bytes"] < stages[2]["bytes"] / 2
    assert report["command"].startswith("lit-llm compress --config")
    table = (tmp_path / "out/report.md").read_text()
    assert "| distilled |" in table
    assert table in outcome.out
    assert "p50 and p95 are the median and the 95th percentile of 2 answers" in table
    assert report["repeats"] == 2
    assert (tmp_path / "out/pareto.png").stat().st_size > 5000
    network, tokenizer = load_model(tmp_path / "out/model")
    assert isinstance(network.embed_tokens, Quantized)
    assert len(tokenizer) == 257
    words = lit_llm("generate", "--model", tmp_path / "out/model", "--prompt", "the", "--max_new_tokens", 3)
    assert words.code == 0, words.err


@pytest.mark.slow
def test_a_chain_that_was_killed_goes_on_where_it_stopped(chain, tmp_path, monkeypatch):
    options = RECOVER["options"] | {"checkpoint.every_n_steps": 2}
    stages = [PRUNE, RECOVER | {"options": options}]
    crash = '--trainer.callbacks+={"class_path": "tests.cli.test_resume.Crash", "init_args": {"step": 3}}'
    real = command._command

    def killed(name, words):
        return real(name, [*words, crash] if name == "fit" else words)

    monkeypatch.setattr(command, "_command", killed)
    with pytest.raises(RuntimeError, match="crash"):
        chain(*stages)
    made = tmp_path / "out/stages/01-pruned/model/model.safetensors"
    before = made.stat().st_mtime_ns
    calls = []
    monkeypatch.setattr(command, "_command", lambda name, words: (calls.append((name, words)), real(name, words))[1])
    outcome = chain(*stages)
    assert outcome.code == 0, outcome.err
    assert made.stat().st_mtime_ns == before
    [fit] = [words for name, words in calls if name == "fit"]
    assert fit[-2:] == ["--ckpt_path", "last"]
    assert json.loads((tmp_path / "out/stages/02-recovered/results.json").read_text())["step"] == 4
    zeros = [row["nonzero"] for row in json.loads((tmp_path / "out/report.json").read_text())["stages"]]
    assert zeros[0] > zeros[2] == zeros[1]  # pruned weights stay zero
    calls.clear()
    assert chain(*stages).code == 0
    assert [name for name, _ in calls] == ["validate"]  # loads the data to measure latency on


def test_a_chain_with_one_more_stage_goes_on_from_what_there_is(chain, tmp_path):
    assert chain(PRUNE, floor=0.1).code == 0
    measured = tmp_path / "out/stages/00-original/measured.json"
    made = tmp_path / "out/stages/01-pruned/model/model.safetensors"
    before = [path.stat().st_mtime_ns for path in (measured, made)]
    leftover = tmp_path / "out/stages/02-int8/metrics.csv"  # from training that was killed before its first checkpoint
    leftover.parent.mkdir()
    leftover.write_text("step\n")
    outcome = chain(PRUNE, QUANTIZE, floor=0.0)
    assert outcome.code == 0, outcome.err
    assert [path.stat().st_mtime_ns for path in (measured, made)] == before
    assert not leftover.exists()
    names = [row["name"] for row in json.loads((tmp_path / "out/report.json").read_text())["stages"]]
    assert names == ["original", "pruned", "int8"]
    assert chain(PRUNE).code == 0  # a shorter chain reports the stages it has
    kept, pruned = (tmp_path / "out" / name / "model.safetensors" for name in ("model", "stages/01-pruned/model"))
    assert kept.read_bytes() == pruned.read_bytes()
    assert (tmp_path / "out/stages/02-int8/model").is_dir()
    assert chain(PRUNE, QUANTIZE).code == 0


def test_a_chain_goes_on_where_its_folder_was_moved(chain, tmp_path):
    assert chain(PRUNE, out="first").code == 0
    (tmp_path / "first").rename(tmp_path / "second")
    outcome = chain(PRUNE, QUANTIZE, out="second")
    assert outcome.code == 0, outcome.err
    stages = json.loads((tmp_path / "second/report.json").read_text())["stages"]
    assert stages[1]["model"] == str(tmp_path / "second/stages/01-pruned/model")


def test_who_interrupts_a_stage_is_told_to_run_the_chain_again(chain, tmp_path):
    interrupt = {"class_path": "tests.cli.test_resume.Interrupt", "init_args": {"batch": 1}}
    outcome = chain(RECOVER | {"options": RECOVER["options"] | {"trainer.callbacks+": interrupt}})
    assert (outcome.code, outcome.last_line) == (130, "Stopped: run the same command again to resume.")
    assert "lit-llm fit" not in outcome.err
    assert (tmp_path / "out/stages/01-recovered/checkpoints/last.ckpt").is_file()


def test_a_chain_that_is_tested_goes_on_too(chain):
    for stages in ([PRUNE], [PRUNE], [PRUNE, QUANTIZE]):
        outcome = chain(*stages, split="test", metric="bits_per_byte")
        assert outcome.code == 0, outcome.err


def test_a_chain_refuses_stages_that_another_made(chain, tmp_path):
    assert chain(QUANTIZE).code == 0
    outcome = chain(NEURONS)
    assert outcome.last_line == (
        f"lit-llm: error: --out must be a new folder or one of this chain, but stage 01-int8 of {tmp_path / 'out'} is of "
        f"another chain; name another, or delete the folders of that stage and those after it"
    )
    outcome = chain(QUANTIZE, more=["--data.seq_len", "16"])
    assert "but stage 01-int8 of" in outcome.last_line
    assert "is of another model or data" in outcome.last_line
    shutil.rmtree(tmp_path / "out/stages/01-int8")
    assert chain(NEURONS).code == 0


def test_a_chain_notices_that_its_model_has_changed_but_not_where_it_lies(chain, tmp_path, llama, tiny_llama):
    assert chain(QUANTIZE).code == 0
    llama.rename(tmp_path / "moved")
    outcome = chain(QUANTIZE, model=tmp_path / "moved")
    assert outcome.code == 0, outcome.err
    save_model(llama, tiny_llama(vocab_size=257, d_ff=16), byte_tokenizer())
    outcome = chain(QUANTIZE)
    assert outcome.code == 2
    assert "is of another model or data" in outcome.last_line


def test_a_chain_notices_that_a_run_file_was_edited_but_not_its_comments(chain, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    stages = [PRUNE, RECOVER | {"fit": [RUN, str(overlay)]}]
    overlay.write_text("trainer: {log_every_n_steps: 2}")
    assert chain(*stages).code == 0
    overlay.write_text("# Edited.\ntrainer: {log_every_n_steps: 2}")
    assert chain(*stages).code == 0
    assert chain(PRUNE).code == 0
    overlay.write_text("trainer: {log_every_n_steps: 1}")
    assert "but stage 02-recovered of" in chain(*stages).last_line


def test_a_chain_leaves_alone_what_is_no_chains(chain, tmp_path, llama):
    before = (llama / "model.safetensors").read_bytes()
    (tmp_path / "run").mkdir()
    llama.rename(tmp_path / "run/model")
    outcome = chain(QUANTIZE, out="run", model=tmp_path / "run")
    assert outcome.last_line == (
        f"lit-llm: error: --out must be a new folder or one of a chain, but {tmp_path / 'run'} holds model; name another"
    )
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before


def test_a_stage_that_cannot_be_made_ends_the_chain_with_the_one_before(chain, tmp_path):
    outcome = chain(QUANTIZE, NEURONS)
    assert outcome.code == 2
    assert outcome.last_line.endswith("has been factorised or quantised, which is for afterwards")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [row["name"] for row in report["stages"]] == ["original", "int8"]
    assert report["stopped"] == "narrow cannot be made: the chain ends with int8"
    assert (tmp_path / "out/model/config.json").is_file()


def frequencies(texts) -> torch.Tensor:
    counts = torch.full((257,), 0.1)
    for path in texts.glob("*.txt"):
        counts += torch.bincount(torch.tensor(byte_tokenizer().encode(path.read_text())), minlength=257)
    return (counts / counts.sum()).log()


def test_a_chain_stops_where_a_floor_is_crossed_and_keeps_the_last_good_one(chain, tmp_path, texts, llama, tiny_llama):
    network = tiny_llama(vocab_size=257)
    with torch.no_grad():  # a unigram model: the head alone gives the log-frequency of each byte
        for p in network.parameters():
            p.fill_(1.0 if p is network.embed_tokens.weight or p.ndim == 1 else 0.0)
        network.lm_head.weight.copy_(frequencies(texts)[:, None].expand(-1, 32) / 32)
    shutil.rmtree(llama)
    save_model(llama, network, byte_tokenizer())
    head = {"sparsity": 0.9, "layers": ["lm_head"]}
    ruin = {"name": "ruined", "class_path": "lit_llm.compression.sparsity.Magnitude", "init_args": head}
    outcome = chain(QUANTIZE | {"init_args": {"layers": ["embed_tokens"]}}, ruin, NEURONS, floor=0.9)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["stages"][2]["metric"] > report["stages"][0]["metric"] / 0.9
    assert [(row["name"], row["kept"]) for row in report["stages"]] == [
        ("original", True),
        ("int8", True),
        ("ruined", False),
    ]
    assert "which crosses its floor of 0.9: the chain ends with int8" in outcome.err
    assert report["stopped"] in (tmp_path / "out/report.md").read_text()
    kept, bad = (tmp_path / "out" / name / "model.safetensors" for name in ("model", "stages/02-ruined/model"))
    assert (
        kept.read_bytes() == (tmp_path / "out/stages/01-int8/model/model.safetensors").read_bytes() != bad.read_bytes()
    )


def test_what_was_compressed_before_is_measured_from_there(chain, tmp_path, llama):
    network, tokenizer = load_model(llama)
    Neurons(0.5).apply(network)
    save_model(llama, network, tokenizer)
    outcome = chain(NEURONS)
    assert outcome.code == 0, outcome.err
    assert f"{llama} has already been compressed, by Neurons; scores are relative to that" in outcome.err
    sizes = [row["parameters"] for row in json.loads((tmp_path / "out/report.json").read_text())["stages"]]
    assert sum(p.numel() for p in network.parameters()) == sizes[0] > sizes[1]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"class_path": "lit_llm.compression.sparsity.Magnitude", "init_args": {"sparsity": 1.0}}, "sparsity must be in [0, 1), but is 1.0"),
        ({"class_path": "lit_llm.compression.sparsity.Magnitude", "init_args": {"layers": ["none.*"]}}, "but 'none.*' matches none"),
        ({"class_path": "lit_llm.compression.low_rank.SVD", "init_args": {"rank": 1000}}, "rank must be "),
        ({"class_path": "torch.nn.Linear"}, "compression must name methods of compression, but names torch.nn.Linear"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_line(chain, stage, message):
    outcome = chain(stage)
    assert outcome.code == 2, outcome.err
    assert message in outcome.last_line
    assert " but " in outcome.last_line


def test_a_calibration_without_batches_is_refused(chain):
    outcome = chain(PRUNE, calibration_batches=0)
    assert outcome.last_line == "lit-llm: error: calibration_batches must be at least 1 for Wanda, but is 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "many"}, "sparsity must be a number, but is many (init_args of lit_llm.compression.sparsity.Magnitude)"),
        ({"layers": 3}, "layers must be a list, but is 3 (init_args of lit_llm.compression.sparsity.Magnitude)"),
        ({"ratio": 0.5}, "ratio must be an option, but is none (init_args of lit_llm.compression.sparsity.Magnitude)"),
    ],
)  # fmt: skip
def test_an_argument_that_its_method_does_not_take_is_refused(chain, tmp_path, arguments, message):
    outcome = chain(PRUNE, MAGNITUDE | {"init_args": arguments})
    assert outcome.last_line == f"lit-llm: error: {message}"
    assert not (tmp_path / "out").exists()


def test_a_metric_that_is_not_measured_is_refused_after_one_batch_and_can_be_corrected(chain, tmp_path, monkeypatch):
    calls, real = [], command._command
    monkeypatch.setattr(command, "_command", lambda name, words: (calls.append(words), real(name, words))[1])
    outcome = chain(MAGNITUDE, metric="val/accuracy")
    assert outcome.last_line.startswith("lit-llm: error: metric must be one that is measured (val/bits_per_byte, ")
    [words] = calls
    assert words[-1] == "--trainer.limit_val_batches=1"
    outcome = chain(MAGNITUDE, metric="val/loss")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [row["metric_name"] for row in report["stages"]] == ["val/loss", "val/loss"]


@pytest.mark.parametrize(
    ("metric", "name", "mode"),
    [(None, "brier", "min"), ("brier", "brier", "min"), ("val/loss", "loss", "min"), ("accuracy", "accuracy", "max")],
)
def test_whether_less_of_the_headline_is_better_says_who_names_it(metric, name, mode):
    evaluator = command._Evaluator(Chain([], [], "test", metric), Path("out"), Path("model"), [])
    evaluator._cli = SimpleNamespace(datamodule=None, model=SimpleNamespace(monitor=("val/brier", "min")))
    found = {"test/brier": 0.1, "test/loss": 0.2, "test/accuracy": 0.9}
    assert evaluator._headline(found) == (f"test/{name}", mode)


def test_layers_that_are_quantised_already_are_refused_before_anything_is_measured(chain, tmp_path, llama):
    network, tokenizer = load_model(llama)
    Int8WeightOnly(["*"]).apply(network)
    save_model(llama, network, tokenizer)
    outcome = chain(MAGNITUDE)
    assert outcome.last_line == (
        "lit-llm: error: network must have layers of real weights to compress, but those of a Llama are quantised "
        "already; start from the model before that, and quantise last"
    )
    assert not (tmp_path / "out").exists()


def test_channels_of_a_network_without_convolutions_are_refused_before_anything_is_measured(chain, tmp_path):
    outcome = chain({"class_path": "lit_llm.compression.structured.Channels"})
    assert outcome.last_line == (
        "lit-llm: error: network must have convolutions to take channels out of, but a Llama has none; transformers have "
        "Neurons, Heads and Blocks"
    )
    assert not (tmp_path / "out").exists()
