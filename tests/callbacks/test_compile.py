from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch._dynamo.testing import CompileCounter

from lit_llm.blocks import Block
from lit_llm.callbacks.compile import Compile, compile_blocks
from lit_llm.checkpoint_files import read_checkpoint
from tests.cli.test_resume import losses
from tests.writing import REPOSITORY, exactly


class Layer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.relu()


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_blocks_of_a_kind_share_what_is_compiled() -> None:
    network, counter, x = nn.Sequential(*(Layer() for _ in range(12))), CompileCounter(), torch.randn(2, 3)
    plain = network(x)
    assert compile_blocks(network, backend=counter) == list(network)
    torch.testing.assert_close(network(x), plain)
    assert 1 <= counter.frame_count <= 2  # a second compilation may generalise over blocks


def test_a_network_without_blocks_is_compiled_whole() -> None:
    network, counter = Doubled(), CompileCounter()
    assert compile_blocks(network, backend=counter) == [network]
    assert network(torch.ones(2)).tolist() == [2, 2]
    assert counter.frame_count == 1


@pytest.fixture
def module() -> LightningModule:
    made = LightningModule()
    made.network = nn.Sequential(Layer(), Layer())
    return made


@pytest.fixture
def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


class Watched(LightningModule):
    """Notes at each step whether its blocks are compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.seen = nn.Sequential(Layer(), Layer()), []

    def note(self, step: str) -> None:
        [compiled] = {layer._compiled_call_impl is not None for layer in self.network}
        self.seen.append((step, compiled))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.note("train")
        return self.network[0].linear(batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.note("validate")

    def on_validation_end(self) -> None:
        self.note("after")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_only_training_steps_are_compiled_also_after_a_validation(tmp_path) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    limits = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[Compile()], **quiet, **limits)
    watched, data = Watched(), torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2)
    trainer.fit(watched, data, data)
    one = [("train", True), ("train", True), ("validate", False), ("after", False)]
    assert watched.seen == one * 2
    assert all(layer._compiled_call_impl is None for layer in watched.network)


def test_sequences_that_are_shared_out_by_hooks_are_refused(module: LightningModule, trainer: Trainer) -> None:
    trainer.strategy.sequence_parallel = True
    with pytest.raises(
        ValueError, match=exactly("sequence_parallel must be false where blocks are compiled, but is true")
    ):
        Compile().on_fit_start(trainer, module)


def test_what_looks_into_blocks_is_refused(module: LightningModule, trainer: Trainer) -> None:
    module.hidden_weight = 1.0
    with pytest.raises(
        ValueError, match=exactly("model.hidden_weight must be 0 where blocks are compiled, but is 1.0")
    ):
        Compile().on_fit_start(trainer, module)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_has_the_losses_and_the_checkpoint_of_a_plain_one(tiny, tmp_path) -> None:
    """In child processes, because the tests' type checks (jaxtyping, beartype) cannot be compiled."""
    overlay = ["--config", REPOSITORY / "configs/strategy/compile.yaml"]
    # SGD, since Muon scales all directions of a gradient to equal length, so that rounding in the weakest ones matters.
    linear = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.3"]
    for run, more in {"plain": [], "compiled": overlay}.items():
        words = [*tiny, *linear, *more, "--test_after_fit", "false", "--run_dir", tmp_path / run]
        command = [sys.executable, "-m", "lit_llm", "fit", *map(str, words)]
        environment = os.environ | {"TORCH_LOGS": "recompiles,graph_code"}
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("TRACED GRAPH" in done.stderr) == (run == "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    ends = [read_checkpoint(tmp_path / run / "checkpoints/last.ckpt")["state_dict"] for run in ("plain", "compiled")]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-3, rtol=1e-3)
