"""The precision `auto`: bfloat16 only where a device has instructions for it."""

from __future__ import annotations

import pytest
import torch
import yaml

from lit_llm.cli import trainer


@pytest.mark.parametrize(
    ("accelerator", "found", "fast", "precision"),
    [
        ("cpu", None, {"cpu"}, "bf16-mixed"),
        ("cpu", None, set(), "32-true"),
        ("cpu", "cuda", {"cuda"}, "32-true"),
        ("auto", "cuda", {"cuda"}, "bf16-mixed"),
        ("gpu", "cuda", {"cpu"}, "32-true"),  # a GPU older than bfloat16
        ("auto", "mps", {"cpu"}, "32-true"),
        ("auto", "cpu", {"cpu"}, "bf16-mixed"),
        ("auto", "tpu", {"cpu", "cuda"}, "32-true"),  # Lightning has no bf16-mixed there
    ],
)
def test_the_precision_auto_is_that_of_the_device(monkeypatch, accelerator, found, fast, precision):
    monkeypatch.setattr(trainer, "_select_auto_accelerator", lambda: found)
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda kind: kind in fast)
    assert trainer.suited_precision(accelerator) == precision


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_precision_auto_is_kept_as_what_it_came_to(lit_llm, tiny, tmp_path, monkeypatch, fast, precision):
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda kind: fast)
    words = [*tiny, "--trainer.accelerator", "cpu", "--trainer.precision", "auto", "--trainer.max_steps", "1"]
    done = lit_llm("fit", *words, "--run_dir", tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["precision"] == precision
    assert ("Computes in float32, since this CPU" in done.out + done.err) != fast


@pytest.mark.parametrize(("count", "precision"), [(1, "bf16-mixed"), (2, "32-true")])
def test_several_gpus_in_a_notebook_are_not_asked_for_bfloat16_since_their_processes_are_forked(
    monkeypatch, count, precision
):
    monkeypatch.setattr(trainer, "_IS_INTERACTIVE", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda kind: True)
    assert trainer.suited_precision("gpu") == precision


@pytest.mark.parametrize(
    ("precision", "fast", "warned"),
    [("bf16-mixed", True, False), ("bf16-true", False, True), ("16-true", True, True), ("32-true", False, False)],
)
def test_a_precision_that_a_cpu_emulates_is_warned_of(monkeypatch, caplog, precision, fast, warned):
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda kind: fast)
    trainer.RunTrainer(accelerator="cpu", precision=precision, logger=False)
    message = (
        f"trainer.precision is {precision}, for which this CPU has no known instructions; without them, 32-true is "
        f"many times faster"
    )
    assert (message in caplog.messages) is warned
