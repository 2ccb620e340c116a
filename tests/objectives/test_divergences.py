from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_llm.objectives.divergences import ForwardKL, JensenShannon, ReverseKL, SoftTargets, linear_loss_sum
from lit_llm.objectives.losses import cross_entropy_sum


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def test_divergences_are_those_of_the_textbook():
    logits = torch.randn(2, 5, 7).double()
    log_p, log_q = logits.log_softmax(-1)
    p, q = logits.softmax(-1).numpy()
    mean = (p + q) / 2
    expected = {ForwardKL(): kl(p, q), ReverseKL(): kl(q, p), JensenShannon(): (kl(p, mean) + kl(q, mean)) / 2}
    for divergence, values in expected.items():
        np.testing.assert_allclose(divergence.between(log_p, log_q).numpy(), values, rtol=1e-9)
        assert divergence.between(log_p, log_p).abs().max() < 1e-12


def test_the_likeliest_alone_say_what_all_say_of_them_and_of_the_rest_together():
    logits, student = torch.randn(2, 6, 11)
    full, top = SoftTargets.of(logits, 2.0), SoftTargets.of(logits, 2.0).top(4)
    assert top.index.shape == (6, 4)
    p, q = ((x / 2).softmax(-1).gather(-1, top.index) for x in (logits, student))
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).double().numpy() for x in (p, q))
    told = top.against(student, 2.0, ForwardKL())
    np.testing.assert_allclose(told.numpy(), 4 * kl(p, q), rtol=1e-4)
    assert (told <= full.against(student, 2.0, ForwardKL())).all()
    whole = full.top(99).against(student, 2.0, ReverseKL())
    torch.testing.assert_close(whole, full.against(student, 2.0, ReverseKL()))


def test_temperature_softens_and_its_square_keeps_the_size_of_gradients():
    logits, student = torch.randn(3, 5), torch.randn(3, 5, requires_grad=True)
    told = SoftTargets.of(logits, 3.0).against(student, 3.0, ForwardKL())
    expected = 9 * F.kl_div((student / 3).log_softmax(-1), (logits / 3).softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(told, expected)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon()])
def test_a_loss_in_chunks_is_the_loss_of_all_logits_and_has_its_gradients(divergence):
    n, d, vocab = 21, 4, 9  # three chunks of eight, the last not full
    hidden, weight, logits = torch.randn(n, d), torch.randn(vocab, d), torch.randn(n, vocab)
    labels, taught = torch.randint(vocab, (n,)), SoftTargets.of(logits, 1.5)

    def loss_of(said: torch.Tensor, here: slice) -> torch.Tensor:
        hard = cross_entropy_sum(said[None], labels[None, here], 0.1, 1e-3)
        return hard + taught[here].against(said, 1.5, divergence).sum()

    results = []
    for chunked in (True, False):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        loss = linear_loss_sum(h, w, loss_of) if chunked else loss_of(h @ w.T, slice(None))
        (2 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_loss_sum(hidden, weight, loss_of), results[1][0])
