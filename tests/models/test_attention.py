import pytest
import torch
import torch.nn.functional as F

from lit_llm.models.attention import Attention, KVCache, attend, document_mask
from lit_llm.models.rotary import rotation
from lit_llm.products import MAX_QUERIES
from tests.writing import exactly

BATCH, HEADS, D_HEAD = 2, 4, 16


def tensors(seq: int, new: int, kv_heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = [(BATCH, HEADS, new, D_HEAD), (BATCH, kv_heads, seq, D_HEAD), (BATCH, kv_heads, seq, D_HEAD)]
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = (t.float().repeat_interleave(HEADS // t.shape[1], dim=1) for t in (k, v))
    scores = q.float() @ k.mT / D_HEAD**0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def masks(seq: int, new: int) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
    causal = torch.ones(new, seq, dtype=torch.bool).tril(seq - new)[None, None]
    own = (torch.rand(BATCH, 1, new, seq) < 0.5) & causal
    own[..., seq - new :] |= torch.eye(new, dtype=torch.bool)
    return {"causal": (None, causal), "shared": (own[:1], own[:1]), "own": (own, own)}


@pytest.mark.parametrize("kind", ["causal", "shared", "own"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("seq", "new"), [(24, 24), (24, 5), (24, 1), (1, 1), (900, 600)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_is_its_formula(kind, kv_heads, seq, new, dtype, tolerance) -> None:
    q, k, v = tensors(seq, new, kv_heads, dtype)
    given, looked_at = masks(seq, new)[kind]
    found, expected = attend(q, k, v, given), reference(q, k, v, looked_at)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(found.shape).to(dtype).float()
    gradients = [torch.autograd.grad((y.float() * weights).sum(), (q, k, v)) for y in (found, expected)]
    for here, there in zip(*gradients):
        torch.testing.assert_close(here.float(), there.float(), atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_both_ways_of_the_cpu_agree_where_one_takes_over_from_the_other(kv_heads: int) -> None:
    last = MAX_QUERIES[torch.bfloat16][1]
    for seq in (last, last + 1):
        q, k, v = (t.detach()[:1, :, :, :2] for t in tensors(seq, seq, kv_heads, torch.bfloat16))
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
        torch.testing.assert_close(attend(q, k, v, None).float(), expected, atol=2e-2, rtol=2e-2)


def test_a_position_looks_back_inside_its_document_alone() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])
    expected = [[[i >= j and row[i] == row[j] for j in range(5)] for i in range(5)] for row in ids.tolist()]
    assert document_mask(ids)[:, 0].tolist() == expected


def test_a_cache_returns_all_that_was_stored_in_a_layer() -> None:
    cache, k, v = KVCache(2, 10), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    for start, end in ((0, 4), (4, 5), (5, 7)):
        for layer in (0, 1):
            sign = 1 - 2 * layer
            keys, values = cache.update(layer, sign * k[:, :, start:end], sign * v[:, :, start:end])
            assert torch.equal(keys, sign * k[:, :, :end])
            assert torch.equal(values, sign * v[:, :, :end])
        cache.length = end


def test_a_sequence_that_outgrows_the_cache_is_refused() -> None:
    cache, new = KVCache(1, 4), torch.zeros(1, 1, 3, 2)
    cache.update(0, new, new)
    cache.length = 3
    message = "sequence length must be at most 4, the size of the key-value cache, but is 6"
    with pytest.raises(ValueError, match=exactly(message)):
        cache.update(0, new, new)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_are_normalised_where_that_is_asked_for(qk_norm: bool) -> None:
    layer = Attention(32, HEADS, 2, D_HEAD, qk_norm=qk_norm, norm_eps=1e-6)
    x, by = torch.randn(BATCH, 6, 32), rotation(torch.arange(6)[None], D_HEAD, 10_000.0)
    before = layer(x, by)
    with torch.no_grad():
        layer.q_proj.weight.mul_(10)
        layer.k_proj.weight.mul_(10)
    assert torch.allclose(layer(x, by), before, atol=1e-4) == qk_norm
