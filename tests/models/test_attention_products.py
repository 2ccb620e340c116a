import pytest
import torch
import torch.nn.functional as F

from lit_llm.models import attention_products
from lit_llm.models.attention import attend
from lit_llm.models.attention_products import attend_by_products, products_win
from lit_llm.products import MAX_QUERIES


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]


def masks(batch: int, seq: int) -> dict[str, torch.Tensor | None]:
    padding = torch.arange(seq) < torch.tensor([seq, seq // 3])[:, None]
    documents = (torch.arange(seq) // 50)[:, None] == torch.arange(seq) // 50
    return {"none": None, "padding": padding[:, None, None], "documents": documents.tril()[None, None]}


@pytest.mark.parametrize("kind", ["none", "padding", "documents"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seq", [5, 300, attention_products.ROWS * 5])
def test_few_and_many_queries_find_what_torchs_own_attention_finds(kind: str, is_causal: bool, seq: int) -> None:
    q, k, v = tensors(2, 3, seq, 8)
    mask = masks(2, seq)[kind]
    found = attend_by_products(q, k, v, mask, is_causal, 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal and mask is None, scale=0.3)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    weights = torch.randn(found.shape)
    here, there = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (found, expected))
    torch.testing.assert_close(here, there, atol=2e-5, rtol=2e-5)


def test_gradients_of_many_keys_are_summed_in_32_bits() -> None:
    q, k, v = tensors(1, 2, 2048, 16, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    weights = torch.randn(1, 2, 2048, 16).bfloat16()
    (attend_by_products(q, k, v, None, True, 0.25) * weights).sum().backward()
    (F.scaled_dot_product_attention(*exact, is_causal=True) * weights).sum().backward()
    for t, e in zip((k, v), exact[1:], strict=True):
        assert (t.grad - e.grad).norm() / e.grad.norm() < 6.5e-3  # 8e-3 with sums in 16 bits


@pytest.mark.parametrize(("seq", "kept"), [(256, True), (257, False)])
def test_memory_grows_with_the_square_of_few_queries_alone(seq: int, kept: bool) -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attend_by_products(*tensors(1, 2, seq, 4, dtype=torch.bfloat16), None, True, 0.5)
    shares = sum(saved) - 3 * 2 * seq * 4
    assert shares == (2 * (128 * 128 + 128 * 256) if kept else 0)  # without the quarter of keys ahead


def test_shares_that_were_kept_and_such_that_are_made_again_give_the_same(monkeypatch) -> None:
    q, k, v = tensors(2, 3, 200, 8, dtype=torch.bfloat16)
    found = []
    for most in (512, 0):
        monkeypatch.setattr(attention_products, "_most_kept", lambda *_, most=most: most)
        y = attend_by_products(q, k, v, None, True, 0.3)
        found.append((y, *torch.autograd.grad(y.float().pow(2).sum(), (q, k, v))))
    assert all(torch.equal(kept, remade) for kept, remade in zip(*found, strict=True))


def test_under_autocast_products_are_taken_in_its_dtype() -> None:
    q, k, v = tensors(1, 2, 300, 4)
    expected = attend_by_products(*(t.bfloat16() for t in (q, k, v)), None, True, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        y = attend_by_products(q, k, v.bfloat16(), None, True, 0.5)
    assert torch.equal(y, expected)
    here, there = (torch.autograd.grad(z.float().pow(2).sum(), (q, k, v)) for z in (y, expected))
    torch.testing.assert_close(here, there, atol=0, rtol=0)


def test_dropout_drops_probabilities() -> None:
    q, k = (torch.randn(1, 2, 8, 4).bfloat16() for _ in range(2))
    v = torch.eye(8).expand(1, 2, 8, 8).bfloat16()  # so that the output is the attention weights
    kept = attend_by_products(q, k, v, None, False, 0.5, 0.0)
    some = attend_by_products(q, k, v, None, False, 0.5, 0.5)
    dropped = some == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(some[~dropped], 2 * kept[~dropped], atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "seq", "mask", "dropout", "wins"),
    [
        (torch.bfloat16, 4096, False, 0.0, True),
        (torch.bfloat16, 4097, False, 0.0, False),
        (torch.bfloat16, 512, True, 0.1, True),
        (torch.bfloat16, 513, True, 0.1, False),  # all weights would be kept
        (torch.float32, 1, False, 0.0, False),  # matmuls by MKL
        (torch.float16, 1, False, 0.0, False),
    ],
)
def test_products_win_while_queries_are_not_too_many(dtype, seq, mask, dropout, wins) -> None:
    q = torch.empty(1, 1, seq, 2, dtype=dtype)
    assert products_win(q, torch.ones(1, 1, 1, seq, dtype=torch.bool) if mask else None, True, dropout) == wins


@pytest.mark.parametrize("seq", [1, 2, 13, 224, 225, 512, 513])
def test_sequences_in_32_bits_are_attended_to_as_by_the_flash_kernel_where_onednn_multiplies(monkeypatch, seq) -> None:
    q, k, v = (torch.randn(2, heads, seq, 8) for heads in (4, 2, 2))
    padded = torch.ones(2, 1, seq, seq, dtype=torch.bool)
    padded[1, ..., 1:] = False
    for mask in (None, padded):
        expected = attend(q, k, v, mask)
        with monkeypatch.context() as patched:
            patched.setitem(MAX_QUERIES, torch.float32, (224, 512))
            torch.testing.assert_close(attend(q, k, v, mask), expected, atol=2e-6, rtol=2e-6)
