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
        ("auto", None, {"cpu"}, "bf16-mixed"),
        ("tpu", None, {"cpu", "cuda"}, "32-true"),  # Lightning has no bf16-mixed there
    ],
)
def test_the_precision_auto_is_that_of_the_device(monkeypatch, accelerator, found, fast, precision):
    device = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda kind: kind in fast)
    assert trainer.suited_precision(accelerator) == precision


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_precision_auto_is_kept_as_what_it_came_to(lit_llm, tiny, tmp_path, monkeypatch, fast, precision):
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda kind: fast)
    words = [*tiny, "--trainer.accelerator", "cpu", "--trainer.precision", "auto", "--trainer.max_steps", "1"]
    done = lit_llm("fit", *words, "--run_dir", tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["precision"] == precision
    assert ("Computes in float32, since this CPU" in done.out + done.err) != fast
