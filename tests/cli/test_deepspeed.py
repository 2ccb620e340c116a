"""Runs under DeepSpeed's ZeRO equal those of one process, resume exactly, and export one model directory."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from lit_llm.callbacks.metrics_csv import read_metrics
from lit_llm.checkpoint_files import read_checkpoint
from tests.cli.test_strategies import ADAM, CONFIGS, SHORT, assert_same_losses, assert_same_model, decoder
from tests.processes import run

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.processes]

ON_CPU = ["--trainer.strategy.class_path", "tests.deepspeed_on_cpu.DeepSpeedOnCPU"]


def over(name: str) -> list[object]:
    """The overlay of a stage on two processes, or one process with the same global batch."""
    if name == "one":
        return ["--data.batch_size", 4, "--trainer.devices", 1, "--trainer.strategy", "auto"]
    overlay = ["--config", CONFIGS / f"strategy/deepspeed_{name}.yaml"]
    return [*overlay, *ON_CPU, "--data.batch_size", 2, "--trainer.devices", 2]


def fit(folder: Path, *runs: tuple[str, str, list[object]]) -> None:
    commands = [(1 if on == "one" else 2, ["fit", *w, *over(on), "--run_dir", folder / name]) for name, on, w in runs]
    for (name, *_), ended in zip(runs, run(*commands), strict=True):
        assert not any(ended.codes), f"{name}: {ended.codes}\n{ended.err}"


@pytest.mark.parametrize("stages", [["zero1", "zero3"], ["zero2_offload", "zero3_offload"]])
def test_a_decoder_has_the_losses_and_the_model_of_one_process(texts, tmp_path, stages):
    words = [*decoder("llama", texts), *ADAM, "--trainer.accumulate_grad_batches", 2]
    words += ["--model.network.activation_checkpointing", "true", "--trainer.gradient_clip_val", 0.5]
    fit(tmp_path, *((name, name, words) for name in ("one", *stages)))
    assert min(row["train/grad_norm"] for row in read_metrics(tmp_path / "one/metrics.csv")) > 0.5  # so 0.5 clips
    for name in stages:
        assert_same_losses(tmp_path / "one", tmp_path / name)
        assert_same_model(tmp_path / "one", tmp_path / name)
        tests = [json.loads((tmp_path / path / "results.json").read_text()) for path in ("one", name)]
        assert tests[1]["test/loss"] == pytest.approx(tests[0]["test/loss"], rel=1e-5)


def test_targets_count_the_same_where_processes_and_micro_batches_have_differently_many(texts, tmp_path):
    words = ["--config", CONFIGS / "pretraining/modernbert_stdlib.yaml", "--data.path", texts, *ADAM]
    words += ["--model.network.config.hidden_size", "32", "--model.network.config.intermediate_size", "32"]
    words += ["--data.tokenizer", "bert-bpe-300", "--data.seq_len", "32", "--data.validation_fraction", "0.1", *SHORT]
    words += ["--trainer.accumulate_grad_batches", 2, "--test_after_fit", "false"]
    fit(tmp_path, *((name, name, words) for name in ("one", "zero1", "zero2", "zero3")))
    for name in ("zero1", "zero2", "zero3"):
        assert_same_losses(tmp_path / "one", tmp_path / name)


def test_in_bfloat16_losses_are_those_of_one_process_up_to_its_rounding(texts, tmp_path):
    words = [*decoder("llama", texts), *ADAM, "--trainer.precision", "bf16-mixed", "--test_after_fit", "false"]
    fit(tmp_path, *((name, name, words) for name in ("one", "zero2", "zero3")))
    one, *others = (read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "zero2", "zero3"))
    for other in others:
        assert [row["train/loss"] for row in other] == pytest.approx([row["train/loss"] for row in one], rel=1e-4)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_goes_on_bit_for_bit_and_others_read_its_weights(texts, tmp_path, stage):
    words = [*decoder("llama", texts), *ADAM, "--model.schedule", "lit_llm.schedulers.Constant"]
    words += ["--model.schedule.warmup_steps", "0", "--test_after_fit", "false"]
    longer = [*words, "--trainer.max_steps", 6]
    last = ["--ckpt_path", "last"]
    fit(tmp_path, ("whole", stage, longer), ("cut", stage, words))
    shutil.copytree(tmp_path / "cut", tmp_path / "onward")
    fit(tmp_path, ("onward", stage, [*longer, *last]))
    whole, onward = (read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "onward"))
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert [row.get(name) for row in whole] == [row.get(name) for row in onward], name
    shares = tmp_path / "onward/checkpoints/last.shares"
    assert len([path for path in shares.iterdir() if path.is_dir()]) == 1
    damaged = shutil.copytree(tmp_path / "cut", tmp_path / "damaged")
    file = next((damaged / "checkpoints/last.shares").glob("*/zero_pp_rank_1_*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    commands = [
        (1, ["validate", *words, *over("one"), "--run_dir", tmp_path / "onward"]),
        (2, ["validate", *words, *over(stage), "--run_dir", tmp_path / "onward"]),
        (1, ["fit", *longer, *over("one"), *last, "--run_dir", tmp_path / "cut"]),
        (2, ["fit", *longer, *over(stage), *last, "--run_dir", damaged]),
    ]
    one, two, refused, broken = run(*commands)
    best = min(row["val/loss"] for row in onward if "val/loss" in row)
    for ended in (one, two):
        assert not any(ended.codes), ended.err
        found = float(re.search(r"val/loss\s+([\d.]+)", ended.err)[1])
        assert found == pytest.approx(best, abs=2e-4)
    assert refused.codes == [2]
    assert f"but is by DeepSpeed's ZeRO {stage[-1]} on 2 devices; a new run takes its weights" in refused.err
    assert broken.codes == [2, 2]
    assert f"lit-llm: error: ckpt_path must be a whole checkpoint, but {file} is damaged" in broken.err
    assert "Traceback" not in refused.err + broken.err


def test_where_a_process_dies_while_it_writes_the_last_checkpoint_is_there(texts, tmp_path):
    words = [*decoder("llama", texts), *ADAM, "--checkpoint.every_n_steps", "1", "--trainer.val_check_interval", "4"]
    dies = ["--trainer.callbacks+", "tests.cli.test_strategies.KilledWhileSaving"]
    [ended] = run((2, ["fit", *words, *over("zero2"), *dies, "--run_dir", tmp_path / "run"]))
    assert ended.codes[1] == -signal.SIGKILL
    assert ended.codes[0] not in (0, -signal.SIGALRM), ended.err
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == 2
    fit(tmp_path, ("run", "zero2", [*words, "--ckpt_path", "last"]), ("whole", "zero2", words))
    assert_same_losses(tmp_path / "whole", tmp_path / "run")
    assert len([path for path in (last.parent / "last.shares").iterdir() if path.is_dir()]) == 1
