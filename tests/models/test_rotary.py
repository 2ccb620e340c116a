import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lit_llm.models.rotary import Llama3Scaling, PositionInterpolation, YaRN, rotate, rotation
from tests.writing import exactly


def places(*positions: int) -> torch.Tensor:
    return torch.tensor([positions])


def test_products_of_rotated_vectors_depend_on_their_distance_alone() -> None:
    q, k = torch.randn(2, 1, 3, 1, 16)

    def product(i: int, j: int) -> torch.Tensor:
        return (rotate(q, rotation(places(i), 16, 10_000.0)) * rotate(k, rotation(places(j), 16, 10_000.0))).sum(-1)

    for distance in (0, 1, 7, 100):
        torch.testing.assert_close(product(distance, 0), product(distance + 50, 50), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(product(1, 0), product(2, 0), atol=1e-3)


def test_rotation_keeps_the_length_of_every_pair() -> None:
    x = torch.randn(2, 3, 5, 8)
    turned = rotate(x, rotation(torch.arange(5)[None], 8, 10_000.0))
    pairs, turned_pairs = (t.unflatten(-1, (2, 4)).norm(dim=-2) for t in (x, turned))
    torch.testing.assert_close(turned_pairs, pairs)


def test_a_pair_is_turned_by_its_angle_as_a_complex_number() -> None:
    x, positions, base = torch.randn(1, 2, 6, 8), torch.tensor([[3, 0, 9, 1, 100, 5]]), 500.0
    frequencies = torch.tensor([base ** (-2 * i / 8) for i in range(4)])
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(6, 4), positions[0, :, None] * frequencies)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x, rotation(positions, 8, base)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("d_head", [2, 16])
def test_rotation_is_that_of_transformers_llama(base: float, d_head: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * d_head, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    q, k, positions = torch.randn(2, 4, 9, d_head), torch.randn(2, 2, 9, d_head), torch.randint(0, 2000, (2, 9))
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    by = rotation(positions, d_head, base)
    torch.testing.assert_close((rotate(q, by), rotate(k, by)), expected, atol=1e-4, rtol=1e-4)


SCALINGS = [
    (PositionInterpolation(3.0), {"rope_type": "linear", "factor": 3.0}),
    (
        Llama3Scaling(8.0, 1.0, 4.0, 512),
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    (YaRN(4.0, 512), {"rope_type": "yarn", "factor": 4.0}),
    (YaRN(4.0, 512, 20.0, 2.0), {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0}),
    (YaRN(1.0, 512), {"rope_type": "yarn", "factor": 1.0}),
    (YaRN(4.0, 512, attention_factor=0.5), {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5}),
]


@pytest.mark.parametrize(("scaling", "theirs"), SCALINGS, ids=str)
def test_scaled_rotation_is_that_of_transformers(scaling, theirs: dict) -> None:
    rope = {**theirs, "rope_theta": 5000.0, "original_max_position_embeddings": 512}
    config = LlamaConfig(hidden_size=4 * 64, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=rope)
    q, positions = torch.randn(2, 4, 9, 64), torch.randint(0, 2000, (2, 9))
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(rotate(q, rotation(positions, 64, 5000.0, scaling)), expected, atol=2e-3, rtol=1e-3)
    unscaled = rotate(q, rotation(positions, 64, 5000.0))
    assert torch.allclose(unscaled, expected, atol=0.1) == (scaling.factor == 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: YaRN(0.5), "rope_scaling.factor must be at least 1, but is 0.5"),
        (
            lambda: Llama3Scaling(2.0, 4.0, 4.0),
            "rope_scaling.high_freq_factor must be greater than low_freq_factor, 4.0, but is 4.0",
        ),
    ],
)
def test_scalings_that_are_none_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        make()


def test_gradients_of_a_lengthening_rotation_are_those_of_the_formula() -> None:
    by = tuple(part.double() for part in rotation(torch.arange(3)[None], 4, 100.0, YaRN(4.0, 64, 2.0, 1.0)))
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, by), x)


def test_each_row_may_have_positions_of_its_own() -> None:
    x, positions = torch.randn(2, 1, 4, 8), torch.tensor([[0, 1, 2, 3], [7, 7, 0, 2]])
    together = rotate(x, rotation(positions, 8, 10_000.0))
    for row in range(2):
        alone = rotate(x[row : row + 1], rotation(positions[row : row + 1], 8, 10_000.0))
        torch.testing.assert_close(together[row : row + 1], alone)


def test_gradients_are_those_of_the_formula() -> None:
    by = tuple(part.double() for part in rotation(torch.arange(3)[None], 4, 100.0))
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, by), x)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, by), x)


def test_gradients_are_right_for_a_tensor_that_is_not_contiguous() -> None:
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    by = rotation(torch.arange(5)[None], 8, 100.0)
    weights = torch.randn(2, 3, 5, 8)
    [found] = torch.autograd.grad((rotate(x.transpose(1, 2), by) * weights).sum(), x)
    back = by[0], -by[1]
    torch.testing.assert_close(found, rotate(weights, back).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 4).to(dtype)
    by = rotation(torch.arange(3)[None], 4, 100.0)
    turned = rotate(x, by)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.float(), rotate(x.float(), by), atol=2e-2, rtol=2e-2)
