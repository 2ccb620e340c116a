import pytest
import torch
from torch import nn

from lit_llm.models.normalization import RMSNorm
from tests.writing import exactly

SHAPES = [(6,), (4, 6), (2, 3, 6), (2, 3, 4, 6)]


def pair(d_model: int, eps: float = 1e-6) -> tuple[RMSNorm, nn.RMSNorm]:
    ours, theirs = RMSNorm(d_model, eps), nn.RMSNorm(d_model, eps)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(d_model))
        theirs.weight.copy_(ours.weight)
    return ours, theirs


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_vectors_are_divided_by_their_root_mean_square(eps: float) -> None:
    x = torch.randn(3, 4, 8)
    norm, _ = pair(8, eps)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    ours, theirs = pair(shape[-1])
    x, weights = torch.randn(shape, requires_grad=True), torch.randn(shape)
    outputs = [norm(x) for norm in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad((y * weights).sum(), (x, norm.weight)) for y, norm in zip(outputs, (ours, theirs))]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_gradients_are_right_for_a_tensor_that_is_not_contiguous() -> None:
    ours, theirs = pair(6)
    x, weights = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 5, 6)
    found, expected = (torch.autograd.grad((norm(x.mT) * weights).sum(), x) for norm in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    message = "create_graph must be false where _CPURMSNorm.backward takes part, which is written by hand, but is true"
    with pytest.raises(RuntimeError, match=exactly(message)):
        torch.autograd.grad(RMSNorm(8)(x).sum(), x, create_graph=True)


def test_bfloat16_is_as_close_as_it_can_be_to_float32() -> None:
    ours, theirs = pair(64)
    x, weights = torch.randn(5, 64), torch.randn(5, 64)
    small, exact = x.bfloat16().requires_grad_(), x.bfloat16().float().requires_grad_()
    y, expected = ours(small), theirs(exact)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=2e-2, rtol=1e-2)
    found = torch.autograd.grad((y * weights.bfloat16()).sum(), (small, ours.weight))
    wanted = torch.autograd.grad((expected * weights.bfloat16().float()).sum(), (exact, theirs.weight))
    for here, there in zip(found, wanted):
        torch.testing.assert_close(here.float(), there, atol=3e-2, rtol=3e-2)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_output_is_what_products_take(dtype: torch.dtype) -> None:
    ours, theirs = pair(16)
    x = torch.randn(3, 16).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), theirs(x.float()), atol=2e-2, rtol=1e-2)
    y.float().sum().backward()
    assert x.grad.dtype == dtype


def test_a_zero_vector_stays_zero() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = RMSNorm(4)(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad.isfinite().all()


def test_the_scale_of_a_vector_does_not_matter() -> None:
    norm, _ = pair(8)
    x = torch.randn(3, 8)
    for scale in (10, 1e3, 1e10):
        torch.testing.assert_close(norm(scale * x), norm(x), atol=1e-4, rtol=1e-4)


def test_a_network_in_double_precision_stays_there() -> None:
    norm = RMSNorm(6).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
