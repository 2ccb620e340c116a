import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_llm.models.feed_forward import SwiGLU, linear_of_recomputed


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


@pytest.mark.parametrize("rows", [(5,), (2, 5)])
def test_what_an_activation_gives_is_not_kept_and_the_gradients_are_the_same(rows: tuple[int, ...]) -> None:
    linear, x = nn.Linear(12, 3), torch.randn(*rows, 12, requires_grad=True)
    weighed = torch.randn(*rows, 3)

    def gradients(way: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        hidden = x * 2  # kept by the layer before
        made = way(linear, nn.GELU(approximate="tanh"), hidden)
        first = torch.autograd.grad((made * weighed).sum(), (x, *linear.parameters()), create_graph=True)
        return made, *first, *torch.autograd.grad(first[0].square().sum(), (x, linear.weight))

    expected = gradients(lambda linear, activation, x: linear(activation(x)))
    assert all(torch.equal(a, b) for a, b in zip(gradients(linear_of_recomputed), expected, strict=True))


def test_only_the_activations_input_lives_on() -> None:
    linear, seen = nn.Linear(12, 3), []

    def activation(x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(x)
        seen.append(weakref.ref(y.untyped_storage()))
        return y

    made = linear_of_recomputed(linear, activation, torch.randn(5, 12, requires_grad=True))
    assert [storage() for storage in seen] == [None]
    made.sum().backward()
    assert len(seen) == 2


def test_a_network_whose_activations_are_made_anew_takes_functional_transforms() -> None:
    linear, x = nn.Linear(12, 3), torch.randn(4, 12)
    per_row = torch.func.vmap(torch.func.grad(lambda x: linear_of_recomputed(linear, F.gelu, x).sum()))(x)
    inputs = x.requires_grad_()
    torch.testing.assert_close(per_row, torch.autograd.grad(linear(F.gelu(inputs)).sum(), inputs)[0])


def test_hooks_around_it_decide_what_is_kept() -> None:
    linear, x, kept = nn.Linear(12, 3), torch.randn(5, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_of_recomputed(linear, F.gelu, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear(F.gelu(x))
    assert kept[: len(kept) // 2] == kept[len(kept) // 2 :]


def test_a_layer_that_reads_part_of_the_activation_keeps_that_part() -> None:
    linear, x = nn.Linear(6, 3), torch.randn(5, 12, requires_grad=True)

    class First(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return linear(y[:, :6])

    made = torch.autograd.grad(linear_of_recomputed(First(), F.gelu, x).sum(), (x, linear.weight))
    expected = torch.autograd.grad(First()(F.gelu(x)).sum(), (x, linear.weight))
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
