"""Results on an accelerator equal those on a CPU; skipped without an accelerator (`make device` simulates one)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.generation import generate
from lit_llm.models.attention import attend
from tests.cli.test_resume import losses
from tests.writing import REPOSITORY

DEVICE = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "none"
REAL = pytest.mark.skipif(DEVICE == "simulated", reason="needs a real accelerator")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "none", reason="needs an accelerator")]

ON_CPU = ["--trainer.accelerator", "cpu"]
ON_DEVICE = ["--trainer.accelerator", DEVICE, "--trainer.devices", "1"]


@pytest.fixture
def plain(lit_llm, tiny, tmp_path) -> dict[int, float]:
    """The losses of a run on the CPU."""
    outcome = lit_llm("fit", *tiny, *ON_CPU, "--test_after_fit", "false", "--run_dir", tmp_path / "cpu")
    assert outcome.code == 0, outcome.err
    return losses(tmp_path / "cpu")


def strategy(name: str) -> list[str]:
    return ["--config", str(REPOSITORY / f"configs/strategy/{name}.yaml")]


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(strategy("compile"), marks=REAL),
        pytest.param(strategy("fsdp"), marks=REAL),
        ["--model.network.activation_checkpointing", "true"],
    ],
)
def test_losses_are_those_of_a_cpu(lit_llm, tiny, tmp_path, plain, more):
    outcome = lit_llm("fit", *tiny, *more, *ON_DEVICE, "--test_after_fit", "false", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert losses(tmp_path / "run") == pytest.approx(plain, abs=1e-3)


def test_a_run_that_was_cut_goes_on_as_one_that_was_not(lit_llm, tiny, tmp_path):
    words = [*tiny, *ON_DEVICE, "--trainer.max_steps", "12", "--checkpoint.every_n_steps", "5"]
    words += ["--test_after_fit", "false"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--trainer.callbacks+=tests.cli.test_resume.Crash")
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


class NoWaiting(Callback):
    """Makes torch raise an error if a training step after the first synchronises with the device."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Turns the error on."""
        if batch_idx:
            torch.get_device_module(DEVICE).set_sync_debug_mode("error")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Turns the error off."""
        torch.get_device_module(DEVICE).set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--trainer.precision", "bf16-mixed"],
        strategy("spike_recovery"),
        strategy("weight_average"),
        ["--trainer.gradient_clip_val", "1.0", "--trainer.accumulate_grad_batches", "2"],
        ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.fused", "true"],
    ],
)
def test_a_step_never_waits_for_the_device(lit_llm, tiny, tmp_path, more):
    words = [*tiny, *ON_DEVICE, "--trainer.log_every_n_steps", "100", "--test_after_fit", "false", *more]
    words += ["--trainer.callbacks+=tests.gpu.test_accelerator.NoWaiting", "--run_dir", tmp_path / "run"]
    try:
        outcome = lit_llm("fit", *words)
    finally:
        torch.get_device_module(DEVICE).set_sync_debug_mode("default")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_half_precision_is_that_of_a_cpu(masked, kv_heads):
    q, k, v = torch.randn(2, 4, 16, 8), torch.randn(2, kv_heads, 16, 8), torch.randn(2, kv_heads, 16, 8)
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool).tril() if masked else None
    expected = attend(q, k, v, mask)
    there = [None if t is None else t.to(DEVICE) for t in (q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)]
    torch.testing.assert_close(attend(*there).float().cpu(), expected, atol=3e-2, rtol=3e-2)


def test_the_same_text_is_written(tiny_llama):
    network = tiny_llama()
    prompts = [[1, 2, 3], [4, 5]]
    expected = generate(network, prompts, max_new_tokens=8, temperature=0.0)
    assert generate(network.to(DEVICE), prompts, max_new_tokens=8, temperature=0.0) == expected
