from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lit_llm.callbacks.compile import Compile, compile_blocks
from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.models.block import Block
from tests.cli.test_resume import losses
from tests.writing import REPOSITORY, exactly


@pytest.fixture
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_all_blocks_of_a_kind_are_compiled_once(tiny_llama, compiled_anew):
    network = tiny_llama(num_layers=12)
    ids = torch.randint(37, (2, 8))
    plain = network(ids)
    counter = CompileCounter()
    assert compile_blocks(network, backend=counter) == [m for m in network.modules() if isinstance(m, Block)]
    torch.testing.assert_close(network(ids), plain)
    assert 1 <= counter.frame_count <= 3


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.relu()


def test_a_network_without_blocks_is_compiled_whole(compiled_anew):
    network, counter = Doubled(), CompileCounter()
    assert compile_blocks(network, backend=counter) == [network]
    assert network(torch.ones(2)).tolist() == [2, 2]
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_has_the_losses_and_the_checkpoint_of_a_plain_one(lit_llm, tiny, tmp_path, compiled_anew):
    from torch._dynamo.utils import counters

    counters.clear()
    words = [*tiny, "--test_after_fit", "false"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "plain").code == 0
    assert not counters["stats"]
    overlay = ["--config", REPOSITORY / "configs/strategy/compile.yaml"]
    outcome = lit_llm("fit", *words, *overlay, "--run_dir", tmp_path / "compiled")
    assert outcome.code == 0, outcome.err
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    ends = [read_checkpoint(tmp_path / run / "checkpoints/last.ckpt")["state_dict"] for run in ("plain", "compiled")]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-3, rtol=1e-3)


def test_only_training_steps_are_compiled(tiny_llama, compiled_anew):
    network, callback = tiny_llama(), Compile()
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    module, trainer = SimpleNamespace(network=network), SimpleNamespace(training=True)

    def compiled() -> bool:
        [found] = {block._compiled_call_impl is not None for block in blocks}
        return found

    seen = []
    for hook in ("fit_start", "train_start", "validation_start", "validation_end", "fit_end"):
        getattr(callback, f"on_{hook}")(trainer, module)
        seen.append(compiled())
    assert seen == [False, True, False, True, False]


def test_another_mode_is_refused():
    message = "mode must be default, reduce-overhead or max-autotune, but is fast"
    with pytest.raises(ValueError, match=exactly(message)):
        Compile(mode="fast")


def test_what_looks_into_blocks_is_refused(tiny_llama):
    module = SimpleNamespace(network=tiny_llama(), hidden_weight=1.0)
    with pytest.raises(
        ValueError, match=exactly("model.hidden_weight must be 0 where blocks are compiled, but is 1.0")
    ):
        Compile().on_fit_start(None, module)
