"""Runs over several processes equal those of one process: losses, interchangeable checkpoints, model."""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._pytree import tree_flatten

from lit_llm.callbacks.metrics_csv import read_metrics
from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.checkpoints import load_model
from tests.processes import run
from tests.writing import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.processes]

CONFIGS = REPOSITORY / "configs"
NETWORKS = {
    # Together they have all kinds of biases and norms, an untied head and a tied one.
    "llama": ["lit_llm.models.llama.Llama", "--model.network.qk_norm", "true"],
    "gpt2": ["lit_llm.models.gpt2.GPT2", "--model.network.max_seq_len", "64"],
}
PROCESSES = {
    "ddp": 2,
    "fsdp": 2,
    "fsdp_offload": 2,
    "tensor_parallel": 2,
    "sequence_parallel": 2,
    "fsdp_tensor_parallel": 4,
}
READERS = {
    "ddp": 2,
    "fsdp": 2,
    "fsdp_offload": 2,
    "tensor_parallel": 1,
    "sequence_parallel": 1,
    "fsdp_tensor_parallel": 2,
}
"""Number of processes that read different rows."""

ADAM = [
    "--model.optimizer",
    "torch.optim.AdamW",
    "--model.optimizer.lr",
    "0.01",
    "--model.optimizer.weight_decay",
    "0.1",
    "--model.optimizer.eps",  # large, so that gradients that are only rounding errors do not make full steps
    "1e-4",
]
SHORT = [
    *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"),
    *("--trainer.precision", "32-true", "--trainer.num_sanity_val_steps", "0", "--trainer.gradient_clip_val", "1.0"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def decoder(name: str, texts: Path) -> list[object]:
    options = [*("--config", CONFIGS / "pretraining/llama_stdlib.yaml"), "--model.network", *NETWORKS[name]]
    options += ["--model.network.d_model", "32", "--model.network.num_layers", "2", "--model.network.num_heads", "2"]
    options += ["--data.path", texts, "--data.tokenizer", "bytes", "--data.seq_len", "32"]
    return [*options, "--data.validation_fraction", "0.1", "--data.test_fraction", "0.1", *SHORT]


def over(name: str) -> list[object]:
    """The overlay of a strategy, further overlays after a `+`, and a global batch of four rows."""
    first = name.split("+")[0]
    batch = ["--data.batch_size", 4 // READERS.get(first, 1)]
    if name == "one":
        return batch
    overlays = [word for overlay in name.split("+") for word in ("--config", CONFIGS / f"strategy/{overlay}.yaml")]
    return [*batch, *overlays, "--trainer.devices", PROCESSES[first]]


def fit(folder: Path, *runs: tuple[str, str, list[object]]) -> None:
    """Trains each run under its strategy, in a folder with its name."""
    commands = [
        (PROCESSES.get(strategy.split("+")[0], 1), ["fit", *words, *over(strategy), "--run_dir", folder / name])
        for name, strategy, words in runs
    ]
    for (name, *_), ended in zip(runs, run(*commands), strict=True):
        assert not any(ended.codes), f"{name}: {ended.codes}\n{ended.err}"


def assert_same_losses(one: Path, other: Path, rel: float = 2e-5, padded: bool = False) -> None:
    """`padded`: batches are padded to their longest row, so that smaller batches have fewer tokens."""
    mine, theirs = (read_metrics(path / "metrics.csv") for path in (one, other))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    names = {"train/loss", "train/grad_norm", "train/confident"} | ({"train/tokens"} if not padded else set())
    names |= {n for row in mine for n in row if n.startswith("val/")}
    for left, right in zip(mine, theirs, strict=True):
        for name in names:
            assert (name in left) == (name in right), name
            assert right.get(name, 0.0) == pytest.approx(left.get(name, 0.0), rel=rel, abs=1e-6), (name, left["step"])


def assert_same_model(one: Path, other: Path) -> None:
    mine, theirs = (dict(load_model(path)[0].named_parameters()) for path in (one / "model", other / "model"))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_decoder_has_the_losses_and_the_model_of_one_process(network, texts, tmp_path):
    words = [*decoder(network, texts), *ADAM, "--trainer.accumulate_grad_batches", 2]
    words += ["--model.network.activation_checkpointing", "true"]
    fit(tmp_path, *((name, name, words) for name in ("one", *PROCESSES)))
    for name in PROCESSES:
        assert_same_losses(tmp_path / "one", tmp_path / name)
        assert_same_model(tmp_path / "one", tmp_path / name)
        tests = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", name)]
        assert tests[1]["test/loss"] == pytest.approx(tests[0]["test/loss"], rel=1e-5)


def test_a_checkpoint_goes_on_under_any_strategy_and_number_of_processes(texts, tmp_path):
    """With Muon, to include its momentum; the tolerance is larger, since its steps are computed in bfloat16."""
    words = decoder("llama", texts)
    moves = [("one", "fsdp_tensor_parallel"), ("fsdp_tensor_parallel", "one"), ("fsdp", "tensor_parallel")]
    moves += [("tensor_parallel", "ddp"), ("ddp", "fsdp")]
    fit(tmp_path, *((name, name, words) for name in ("one", *READERS) if name != "fsdp_offload"))
    longer = [*words, "--trainer.max_steps", 6, "--ckpt_path", "last"]
    onward = [(f"{start}-{end}", end, longer) for start, end in [*moves, ("one", "one")]]
    for name, *_ in onward:
        shutil.copytree(tmp_path / name.split("-")[0], tmp_path / name)
    fit(tmp_path, *onward)
    for name, *_ in onward:
        assert_same_losses(tmp_path / "one-one", tmp_path / name, rel=1e-3)
        assert len(read_metrics(tmp_path / name / "metrics.csv")) == 6


@pytest.mark.parametrize("network", NETWORKS)
def test_what_lies_between_products_and_the_loss_are_shared_by_two_and_four_devices(network, texts, tmp_path):
    words = [*decoder(network, texts), *ADAM, "--model.network.num_heads", 4, "--data.mask_documents", "true"]
    words += ["--model.label_smoothing", "0.1", "--model.z_loss", "0.001"]
    four = ["--trainer.devices", 4, "--trainer.strategy.tensor_parallel_size", 4]
    pairs = f"fsdp_tensor_parallel+sequence_parallel{SHARDED}"
    fit(tmp_path, ("one", "one", words), ("two", "sequence_parallel", words), ("pairs", pairs, words))
    [ended] = run((4, ["fit", *words, *over("sequence_parallel"), *four, "--run_dir", tmp_path / "four"]))
    assert ended.codes == [0] * 4, ended.err
    for name in ("two", "pairs", "four"):
        assert_same_losses(tmp_path / "one", tmp_path / name)
        assert_same_model(tmp_path / "one", tmp_path / name)
    longer = [*words, "--trainer.max_steps", 6, "--ckpt_path", "last"]
    moves = [("one", "one"), ("one", "sequence_parallel"), ("pairs", "one"), ("two", pairs)]
    onward = [(f"{start}-{end}", end, longer) for start, end in moves]
    for name, *_ in onward:
        shutil.copytree(tmp_path / name.split("-")[0], tmp_path / name)
    fit(tmp_path, *onward)
    for name, *_ in onward:
        assert_same_losses(tmp_path / "one-one", tmp_path / name, rel=1e-4)


SHARDED = "+sharded_checkpoints"


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Compares the last checkpoints bit for bit."""
    mine, theirs = (read_checkpoint(path / "checkpoints/last.ckpt") for path in (one, other))
    for name in ("state_dict", "optimizer_states", "global_step"):
        left, right = (tree_flatten(state[name]) for state in (mine, theirs))
        assert left[1] == right[1], name
        for a, b in zip(left[0], right[0], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_a_checkpoint_in_shares_is_that_of_one_process_and_goes_on_anywhere(texts, tmp_path):
    words = decoder("llama", texts)
    both = f"fsdp{SHARDED}+async_checkpoints"
    runs = [("one", "one"), ("gathered", "fsdp"), ("shares", both), ("four", f"fsdp_tensor_parallel{SHARDED}")]
    runs += [("four_gathered", "fsdp_tensor_parallel")]
    fit(tmp_path, *((name, strategy, words) for name, strategy in runs))
    assert len(list((tmp_path / "shares/checkpoints/last.shares").glob("*/*.pt"))) == 2
    assert len(list((tmp_path / "four/checkpoints/last.shares").glob("*/*.pt"))) == 4
    assert_same_checkpoint(tmp_path / "gathered", tmp_path / "shares")
    assert_same_checkpoint(tmp_path / "four_gathered", tmp_path / "four")
    assert_same_model(tmp_path / "gathered", tmp_path / "shares")
    moves = [("one", "one"), ("one", both), ("shares", "one"), ("shares", "ddp"), ("shares", "fsdp_tensor_parallel")]
    moves += [("gathered", "fsdp"), ("shares", both), ("four", f"fsdp{SHARDED}")]
    longer = [*words, "--trainer.max_steps", 6, "--ckpt_path", "last"]
    onward = [(f"{start}-{end}", end, longer) for start, end in moves]
    for name, *_ in onward:
        shutil.copytree(tmp_path / name.split("-")[0], tmp_path / name)
    fit(tmp_path, *onward)
    for name, *_ in onward:
        assert_same_losses(tmp_path / "one-one", tmp_path / name, rel=1e-3)
    assert_same_checkpoint(tmp_path / "gathered-fsdp", tmp_path / f"shares-{both}")
    for command in ("test", "validate"):
        [ended] = run(
            (1, [command, "--run_dir", tmp_path / "shares", "--trainer.devices", 1, "--trainer.strategy", "auto"])
        )
        assert ended.codes == [0], ended.err
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("gathered", "shares")]
    assert results[1]["test/loss"] == pytest.approx(results[0]["test/loss"], rel=1e-6)


class KilledWhileSaving(Callback):
    """Kills the second process when it has written half of its shard of the third checkpoint."""

    def on_train_start(self, trainer, pl_module):
        write, saves = torch.save, itertools.count(1)

        def half(values, path, **options):
            if trainer.global_rank == 1 and next(saves) == 3:
                Path(path).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            write(values, path, **options)

        torch.save = half


@pytest.mark.parametrize("more", ["", "+async_checkpoints"])
def test_where_a_process_dies_while_it_writes_its_share_the_last_checkpoint_is_there(texts, tmp_path, more):
    words = [*decoder("llama", texts), "--checkpoint.every_n_steps", "1", "--trainer.val_check_interval", "4"]
    strategy = f"fsdp{SHARDED}{more}"
    dies = ["--trainer.callbacks+", "tests.cli.test_strategies.KilledWhileSaving"]
    [ended] = run((2, ["fit", *words, *over(strategy), *dies, "--run_dir", tmp_path / "run"]))
    assert ended.codes[1] == -signal.SIGKILL
    assert ended.codes[0] not in (0, -signal.SIGALRM), ended.err
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == 2
    partial = shutil.copytree(tmp_path / "run", tmp_path / "partial") / "checkpoints"
    lost = next((partial / "last.shares").glob("*/00001-of-00002.pt"))
    for path in (partial / "last.shares").glob("*/00001-of-00002.pt"):
        path.unlink()
    fit(tmp_path, ("run", strategy, [*words, "--ckpt_path", "last"]), ("whole", strategy, words))
    assert_same_losses(tmp_path / "whole", tmp_path / "run")
    assert [path.name for path in last.parent.iterdir() if path.name.startswith(".")] == []
    assert len(list((last.parent / "last.shares").iterdir())) == 1
    [ended] = run((2, ["fit", *words, *over(strategy), "--run_dir", tmp_path / "partial", "--ckpt_path", "last"]))
    assert ended.codes == [2, 2]
    assert (
        f"lit-llm: error: ckpt_path must be a whole checkpoint, but {partial / 'last.ckpt'} lacks its share"
        in ended.err
    )
    assert lost.name in ended.err


def examples(reviews: Path) -> list[object]:
    data = ["--data.path", reviews, "--data.tokenizer", "bert-bpe-300", "--data.validation_fraction", "0.2"]
    data += ["--data.max_seq_len", "64"]
    network = "lit_llm.models.pretrained_classifier.PretrainedClassifier"
    options = ["--model.network", network, "--model.network.config", json.dumps(BERT), *SHORT]
    return [
        "--config",
        CONFIGS / "finetuning/encoder_docmatch.yaml",
        "--data",
        "lit_llm.data.glue.GLUEData",
        *data,
        *options,
    ]


def test_a_decoder_of_transformers_has_the_losses_and_the_samples_of_one_process(texts, tmp_path):
    network = "lit_llm.models.pretrained.PretrainedCausalLM"
    words = ["--config", CONFIGS / "pretraining/llama_stdlib.yaml", "--model.network", network, *ADAM, *SHORT]
    words += ["--model.network.config", json.dumps(LLAMA), "--data.path", texts, "--data.tokenizer", "bytes"]
    words += ["--data.seq_len", "32", "--data.validation_fraction", "0.1", "--data.test_fraction", "0.1"]
    fit(tmp_path, *((name, name, words) for name in ("one", "fsdp")))
    assert_same_losses(tmp_path / "one", tmp_path / "fsdp")
    assert_same_model(tmp_path / "one", tmp_path / "fsdp")
    one, other = ((tmp_path / name / "samples.txt").read_text() for name in ("one", "fsdp"))
    assert one == other


def test_other_objectives_have_the_losses_of_one_process(texts, reviews, chats, pictures, tmp_path):
    masked = ["--config", CONFIGS / "pretraining/modernbert_stdlib.yaml", "--data.path", texts, *ADAM]
    masked += ["--model.network.config.hidden_size", "32", "--model.network.config.intermediate_size", "32"]
    masked += ["--data.tokenizer", "bert-bpe-300", "--data.seq_len", "32", "--data.validation_fraction", "0.1", *SHORT]
    adapted = [*examples(reviews), "--config", CONFIGS / "adaptation/lora.yaml"]
    averaged = [*examples(reviews), "--model", "lit_llm.objectives.semi_supervised.MeanTeacher"]
    averaged += ["--data.labels_per_class", "8", "--data.unlabelled_ratio", "1"]
    aligned = [*averaged, "--model.distribution_alignment", "true", "--model.threshold", "0.501"]
    images = ["--config", CONFIGS / "pretraining/cnn_digits.yaml", "--data.path", pictures]
    images += [
        "--data.validation_fraction",
        "0.2",
        "--data.image_size",
        "8",
        "--model.network",
        CONFIGS / "models/vit_400k.yaml",
        *SHORT,
    ]
    runs = {"masked": masked, "classes": examples(reviews), "adapted": adapted, "averaged": averaged, "images": images}
    runs["aligned"] = aligned
    whole = [(f"{name}-{on}", on, words) for name, words in runs.items() for on in ("one", "fsdp")]
    fit(tmp_path, *whole, ("aligned-ddp", "ddp", aligned))
    for name in runs:
        padded = name not in ("masked", "images")
        assert_same_losses(tmp_path / f"{name}-one", tmp_path / f"{name}-fsdp", padded=padded)
    assert_same_losses(tmp_path / "aligned-one", tmp_path / "aligned-ddp", padded=True)
    confident = [row.get("train/confident") for row in read_metrics(tmp_path / "aligned-one/metrics.csv")]
    assert any(confident)
    assert (tmp_path / "adapted-fsdp/adapter/adapter_config.json").exists()


def test_convolutions_have_the_losses_of_one_process_and_their_norms_those_of_ddp(pictures, tmp_path):
    """Batch normalisation uses the rows of each process; evaluations use the statistics of the checkpoint."""
    words = ["--config", CONFIGS / "pretraining/cnn_digits.yaml", "--data.path", pictures, *SHORT]
    words += ["--data.validation_fraction", "0.2", "--data.test_fraction", "0.2", "--data.image_size", "8"]
    words += ["--model.network"]
    plain = [*words, "lit_llm.models.cnn.CNN", "--model.network.dropout", 0, "--model.network.channel_dropout", 0]
    normed = [*words, "lit_llm.models.lenet.LeNet", "--model.network.width", 4]
    fit(tmp_path, *((f"plain-{on}", on, plain) for on in ("one", "fsdp")))
    fit(tmp_path, *((f"normed-{on}", on, normed) for on in ("ddp", "fsdp")))
    for one, other in (("plain-one", "plain-fsdp"), ("normed-ddp", "normed-fsdp")):
        assert_same_losses(tmp_path / one, tmp_path / other)
        assert_same_model(tmp_path / one, tmp_path / other)
        tests = [json.loads((tmp_path / run / "results.json").read_text()) for run in (one, other)]
        assert tests[1]["test/loss"] == pytest.approx(tests[0]["test/loss"], rel=1e-5)


def test_an_encoder_decoder_writes_what_it_writes_in_one_process(tmp_path):
    """Also if only one of the processes has rows to generate for."""
    rows = [f"{'long ' * (row % 9)}source {row},{'a' * (row % 3 + 1)} target {row}" for row in range(60)]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(["source,target", *rows]))
    network = "lit_llm.models.pretrained_seq2seq.PretrainedSeq2Seq"
    words = ["--config", CONFIGS / "finetuning/t5_docstrings.yaml", "--data.path", table, "--data.tokenizer"]
    words += ["t5-bpe-400", "--data.validation_fraction", "0.3", "--data.test_fraction", "0.1", *SHORT]
    words += ["--model.weights", "null", "--model.network", network, "--model.network.config", json.dumps(T5)]
    words += ["--model.num_generated", "3", "--model.max_new_tokens", "6"]
    fit(tmp_path, *((name, name, words) for name in ("one", "ddp", "fsdp")))
    assert "val/rouge_l" in read_metrics(tmp_path / "one/metrics.csv")[-1]
    for name in ("ddp", "fsdp"):
        assert_same_losses(tmp_path / "one", tmp_path / name, padded=True)


def test_masks_hold_and_go_on_where_weights_are_shared_out(texts, tmp_path):
    words = [*decoder("llama", texts), *ADAM, "--config", CONFIGS / "compression/pruning.yaml"]
    runs = [(f"{on}", on, words) for on in ("one", "fsdp", "fsdp_tensor_parallel")]
    fit(tmp_path, *runs)
    shutil.copytree(tmp_path / "fsdp", tmp_path / "onward")
    fit(tmp_path, ("onward", "one", [*words, "--trainer.max_steps", "5", "--ckpt_path", "last"]))
    for name in ("fsdp", "fsdp_tensor_parallel"):
        assert_same_losses(tmp_path / "one", tmp_path / name, rel=1e-4)
    for name in ("one", "fsdp", "fsdp_tensor_parallel", "onward"):
        assert read_metrics(tmp_path / name / "metrics.csv")[-1]["train/sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_an_average_is_cut_as_the_weights_are_and_goes_on_anywhere(texts, tmp_path):
    words = [*decoder("llama", texts), *ADAM, "--config", CONFIGS / "strategy/weight_average.yaml"]
    names = ("one", "ddp", "fsdp", "fsdp_tensor_parallel")
    fit(tmp_path, *((name, name, words) for name in names), ("shares", f"fsdp{SHARDED}", words))
    for start, end in (("shares", "one"), ("one", "fsdp"), ("one", "one")):
        shutil.copytree(tmp_path / start, tmp_path / f"{start}-{end}")
    longer = [*words, "--trainer.max_steps", "6", "--ckpt_path", "last"]
    fit(
        tmp_path,
        *((f"{start}-{end}", end, longer) for start, end in (("shares", "one"), ("one", "fsdp"), ("one", "one"))),
    )
    for one, *others in ((*names, "shares"), ("one-one", "shares-one", "one-fsdp")):
        for other in others:
            assert_same_losses(tmp_path / one, tmp_path / other, rel=1e-4)
            assert_same_model(tmp_path / one, tmp_path / other)
    assert "average.lm_head.weight" in read_checkpoint(tmp_path / "shares-one/checkpoints/last.ckpt")["state_dict"]
    # The checkpoint can be evaluated without the callback that keeps the second network.
    found = ["validate", *decoder("llama", texts), *over("fsdp"), "--run_dir", tmp_path / "evaluated"]
    [ended] = run((2, [*found, "--ckpt_path", tmp_path / "one/checkpoints/last.ckpt"]))
    assert not any(ended.codes), ended.err


def test_a_strategy_that_cannot_be_is_refused_in_one_line(texts, reviews, tmp_path):
    few, rows = tmp_path / "few", reviews.read_text().splitlines(keepends=True)
    few.mkdir()
    for name, lines in (("train", rows), ("validation", rows[:2])):
        (few / f"{name}.csv").write_text("".join(lines))
    words = [*decoder("llama", texts), "--trainer.strategy", "lit_llm.strategies.Sharded"]
    lstm = [*words, "--model.network", CONFIGS / "models/lstm_5m.yaml"]
    refused = {
        "tensor_parallel_size must divide the number of devices, 2, but is 3": [
            *words,
            "--trainer.strategy.tensor_parallel_size",
            "3",
        ],
        "tensor_parallel_size must divide the network's num_heads, 3, but is 2": [
            *words,
            *("--trainer.strategy.tensor_parallel_size", "2"),
            *("--model.network.num_heads", "3", "--model.network.d_model", "48"),
        ],
        "tensor_parallel_size must be 1 for a network whose blocks do not say how they are cut, but is 2 for a LSTM": [
            *lstm,
            "--trainer.strategy.tensor_parallel_size",
            "2",
        ],
        "sequence length must be a multiple of tensor_parallel_size, 2, for sequence_parallel, but is 31; set data.seq_l": [
            *decoder("llama", texts),
            *("--config", CONFIGS / "strategy/sequence_parallel.yaml", "--data.seq_len", "31"),
        ],
        "trainer.sync_batchnorm must be false without a GPU, but is true": [
            *("--config", CONFIGS / "pretraining/cnn_digits.yaml", *SHORT),
            *("--config", CONFIGS / "strategy/ddp.yaml", "--trainer.sync_batchnorm", "true"),
        ],
        "trainer.devices must leave each process a row to evaluate, but 2 processes would share 1": [
            *examples(few),
            *("--config", CONFIGS / "strategy/ddp.yaml", "--data.batch_size", "2"),
        ],
        "trainer.strategy must keep the weights whole on each device to quantise them, but shares them out": [
            *decoder("llama", texts),
            *("--config", CONFIGS / "strategy/fsdp.yaml", "--config", CONFIGS / "compression/qat_int4.yaml"),
        ],
    }
    commands = [
        (2, ["fit", *w, "--trainer.devices", 2, "--run_dir", tmp_path / str(n)]) for n, w in enumerate(refused.values())
    ]
    differing = [*decoder("llama", texts), *over("ddp"), "--trainer.max_steps", "1{rank}", "--run_dir", tmp_path / "x"]
    refused["trainer.max_steps must be the same in all processes, but is 11 in process 1 where process 0 has 10"] = []
    commands.append((2, ["fit", *differing]))
    for line, ended in zip(refused, run(*commands), strict=True):
        assert ended.codes == [2, 2], ended.err
        assert f"lit-llm: error: {line}" in ended.err
        assert "Traceback" not in ended.err


def test_the_commands_of_the_readme_run_several_processes(texts, tmp_path):
    """With Lightning's launcher and with torchrun."""
    text = (REPOSITORY / "README.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if "--trainer.devices 2" in line]
    assert [words[0] for words in commands] == ["lit-llm", "torchrun"]
    small = decoder("llama", texts)[2:]
    for words in commands:
        python = {"lit-llm": ["-m", "lit_llm"], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
        where = words.index("--run_dir") + 1
        words[where] = str(tmp_path / words[where])
        started(sys.executable, *python, *words[1:], *small, "--data.batch_size", 2)
    assert_same_losses(*(tmp_path / "runs" / name for name in ("two", "torchrun")), rel=1e-3)


def started(*words: object, **environment: str) -> subprocess.CompletedProcess:
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [str(word) for word in words],
        env=surroundings | environment,
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        timeout=400,
    )


class TakenAway(Callback):
    """The cluster sends SIGTERM to one of the processes after two steps; the others learn of it from that one."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


SRUN = """#!{python}
# As many processes as a node has tasks, with what SLURM tells each; the highest exit code.
import os, subprocess, sys
count = int(os.environ["SLURM_NTASKS_PER_NODE"])
about = {{"SLURM_NTASKS": count, "SLURM_NODEID": 0, "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "test"}}
def start(rank):
    task = about | {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank}}
    words = [sys.executable, "-m", "lit_llm", *sys.argv[sys.argv.index("lit-llm") + 1 :]]
    return subprocess.Popen(words, env={{**os.environ, **{{name: str(value) for name, value in task.items()}}}})
sys.exit(max(process.wait() for process in [start(rank) for rank in range(count)]))
"""


def test_a_job_of_slurm_that_is_taken_away_is_queued_again_and_goes_on(texts, tmp_path):
    for name, content in (
        ("srun", SRUN.format(python=sys.executable)),
        ("scontrol", '#!/bin/bash\necho "$@" >> queue'),
    ):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(random.randrange(20000, 29999)), "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    words = [
        *decoder("llama", texts),
        *over("fsdp")[:-2],
        "--trainer.callbacks+",
        "tests.cli.test_strategies.TakenAway",
    ]
    call = f"cd {tmp_path} && PATH={tmp_path}/bin:$PATH exec bash {CONFIGS}/strategy/slurm.sh"
    with pytest.raises(subprocess.CalledProcessError) as ended:
        started("bash", "-c", call + ' "$@"', "bash", *words, **job)
    assert ended.value.returncode == 130, ended.value.stderr
    assert (tmp_path / "queue").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    run = tmp_path / "runs/slurm" / job["SLURM_JOB_ID"]
    assert read_metrics(run / "metrics.csv")[-1]["step"] == 2
    started("bash", "-c", call, **job)
    assert read_metrics(run / "metrics.csv")[-1]["step"] == 4
    assert (run / "model/config.json").exists()
