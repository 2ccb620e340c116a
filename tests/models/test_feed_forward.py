import pytest
import torch

from lit_llm.models.feed_forward import SwiGLU


def test_swiglu_is_its_formula() -> None:
    layer = SwiGLU(6, 10)
    x = torch.randn(2, 3, 6)
    gate, up, down = (p.weight for p in (layer.gate_proj, layer.up_proj, layer.down_proj))
    gated = x @ gate.T
    expected = (gated / (1 + (-gated).exp()) * (x @ up.T)) @ down.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_each_position_is_transformed_on_its_own(shape: tuple[int, ...]) -> None:
    layer = SwiGLU(6, 10)
    x = torch.randn(shape)
    alone = torch.stack([layer(row) for row in x.view(-1, 6)]).view(shape)
    torch.testing.assert_close(layer(x), alone)


def test_there_are_no_biases() -> None:
    assert {name: tuple(p.shape) for name, p in SwiGLU(6, 10).named_parameters()} == {
        "gate_proj.weight": (10, 6), "up_proj.weight": (10, 6), "down_proj.weight": (6, 10),
    }  # fmt: skip
