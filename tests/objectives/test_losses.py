from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llm.batch import IGNORE_INDEX
from lit_llm.dry_run import measure_step
from lit_llm.objectives import losses
from lit_llm.objectives.divergences import linear_loss_sum
from lit_llm.objectives.losses import _LinearCrossEntropy, cross_entropy_sum, linear_cross_entropy_sum, token_nats
from tests.threads import each

BATCH, SEQ, VOCAB = 3, 7, 11


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(BATCH, SEQ, VOCAB)


@pytest.fixture
def labels() -> torch.Tensor:
    labels = torch.randint(VOCAB, (BATCH, SEQ))
    labels[0, 3:] = labels[2, 0] = IGNORE_INDEX
    return labels


def kept(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_sum_is_torchs_over_the_labels_that_count(logits, labels, smoothing: float) -> None:
    expected = F.cross_entropy(*kept(logits, labels), reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy_sum(logits, labels, smoothing), expected)


def test_smoothing_mixes_in_the_mean_over_all_tokens(logits, labels) -> None:
    log_p, targets = kept(logits.log_softmax(-1), labels)
    hard, soft = -log_p.gather(1, targets[:, None]).sum(), -log_p.mean(-1).sum()
    torch.testing.assert_close(cross_entropy_sum(logits, labels, 0.2), 0.8 * hard + 0.2 * soft)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_z_loss_adds_the_squared_log_of_the_denominator(logits, labels, smoothing: float) -> None:
    squares = kept(logits, labels)[0].exp().sum(-1).log().square()
    found = cross_entropy_sum(logits, labels, smoothing, 0.01) - cross_entropy_sum(logits, labels, smoothing)
    torch.testing.assert_close(found, 0.01 * squares.sum(), atol=1e-4, rtol=1e-4)


def test_each_label_has_its_own_nats(logits, labels) -> None:
    nats = token_nats(logits, labels)
    assert nats.shape == labels.shape
    assert (nats[labels == IGNORE_INDEX] == 0).all()
    expected = F.cross_entropy(*kept(logits, labels), reduction="none")
    torch.testing.assert_close(nats[labels != IGNORE_INDEX], expected)
    torch.testing.assert_close(nats.sum(), cross_entropy_sum(logits, labels))


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_ignored_positions_have_no_gradient(logits, labels, z_loss: float) -> None:
    logits.requires_grad_()
    cross_entropy_sum(logits, labels, 0.1, z_loss).backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert torch.equal(touched, labels != IGNORE_INDEX)


def test_labels_that_are_all_ignored_cost_nothing(logits) -> None:
    nothing = torch.full((BATCH, SEQ), IGNORE_INDEX)
    assert cross_entropy_sum(logits, nothing, 0.1, 0.1) == 0
    assert (token_nats(logits, nothing) == 0).all()


def test_eight_rows_cost_what_they_cost_one_by_one(logits, labels) -> None:
    alone = sum(cross_entropy_sum(logits[i : i + 1], labels[i : i + 1], 0.1, 0.01) for i in range(BATCH))
    torch.testing.assert_close(cross_entropy_sum(logits, labels, 0.1, 0.01), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_computed_with_in_float32(logits, labels, dtype: torch.dtype) -> None:
    small = logits.to(dtype)
    for loss in (cross_entropy_sum, token_nats):
        found = loss(small, labels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(small.float(), labels))


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and the gradients of a third of it, so that the backward pass has to scale them."""
    return [loss.detach(), *torch.autograd.grad(loss / 3, leaves)]


@pytest.fixture
def hidden() -> torch.Tensor:
    """Hidden states so narrow that the tokens form several chunks, with a smaller last one."""
    return torch.randn(BATCH, SEQ, 2, requires_grad=True)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(VOCAB, 2, requires_grad=True)


@pytest.fixture(params=[1, 3, 99])
def rows_in_fp32(monkeypatch, request) -> None:
    """Converts this many of the four rows of a chunk to fp32 at a time."""
    monkeypatch.setattr(losses, "FP32_LOGITS", {"cpu": request.param * VOCAB})


@pytest.mark.usefixtures("rows_in_fp32")
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("counted", ["some", "all", "none"])
def test_a_loss_in_chunks_is_that_of_all_logits_at_once(hidden, weight, labels, counted, smoothing, z_loss) -> None:
    labels = {"some": labels, "all": labels.clamp(min=0), "none": torch.full_like(labels, IGNORE_INDEX)}[counted]
    expected = gradients(cross_entropy_sum(hidden @ weight.T, labels, smoothing, z_loss), hidden, weight)
    found = gradients(linear_cross_entropy_sum(hidden, weight, labels, smoothing, z_loss), hidden, weight)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_under_autocast_a_loss_in_chunks_differs_from_the_plain_one_by_rounding(hidden, weight, labels) -> None:
    exact = gradients(cross_entropy_sum(hidden @ weight.T, labels), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(cross_entropy_sum(F.linear(hidden, weight), labels), hidden, weight)
        chunked = gradients(linear_cross_entropy_sum(hidden, weight, labels), hidden, weight)
    for ours, theirs, true in zip(chunked, plain, exact, strict=True):
        assert ours.dtype == true.dtype
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + 1e-6


def test_ignored_labels_are_masked_where_they_are_not_left_out(hidden, weight, labels) -> None:
    plain = gradients(cross_entropy_sum(hidden @ weight.T, labels, 0.1, 0.01), hidden, weight)
    loss = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.flatten(), 0.1, 0.01, None)  # as on a GPU
    for ours, theirs in zip(gradients(loss, hidden, weight), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_step_of_a_loss_in_chunks_holds_the_logits_of_all_tokens() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    tokens, vocab, d_model = 1024, 1000, 16
    hidden = torch.randn(1, tokens, d_model, requires_grad=True)
    weight = torch.randn(vocab, d_model, requires_grad=True)
    labels = torch.randint(vocab, (1, tokens))
    with Largest() as chunked:
        linear_cross_entropy_sum(hidden, weight, labels).backward()
    with Largest() as plain:
        cross_entropy_sum(hidden @ weight.T, labels).backward()
    assert chunked.numel <= 2 * d_model * vocab < plain.numel == tokens * vocab


def peak(loss_of, vocab: int, d_model: int, chunks: int, precision: str = "32-true") -> int:
    """Peak memory of a loss in bytes, forward and backward, without its arguments."""
    shape = 1, chunks * 2 * d_model
    batch = {"hidden": torch.empty(*shape, d_model), "input_ids": torch.empty(*shape, dtype=torch.int64)}
    return measure_step(
        build=lambda: torch.nn.Linear(d_model, vocab, bias=False),
        make_optimizer=lambda head: torch.optim.SGD(head.parameters()),
        loss=lambda head, batch: loss_of(batch["hidden"], head.weight, batch["input_ids"]),
        batch=batch,
        precision=precision,
    ).passes


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda hidden, weight, labels: linear_cross_entropy_sum(hidden, weight, labels, 0.1, 1e-4),
        lambda hidden, weight, labels: linear_loss_sum(hidden[0], weight, lambda said, here: said.logsumexp(-1).sum()),
    ],
)
def test_eight_chunks_of_a_loss_hold_no_more_than_one(loss_of) -> None:
    assert peak(loss_of, 4096, 16, chunks=8) < 1.1 * peak(loss_of, 4096, 16, chunks=1)


def test_a_loss_in_chunks_holds_about_three_times_the_gradient_of_the_head(monkeypatch) -> None:
    vocab, d_model = 8192, 64
    monkeypatch.setattr(losses, "FP32_LOGITS", {"cpu": 4 * vocab})
    found = peak(linear_cross_entropy_sum, vocab, d_model, chunks=4, precision="bf16-mixed")
    assert found < 3.5 * 4 * vocab * d_model


@pytest.mark.parametrize(
    "make", [linear_cross_entropy_sum, lambda h, w, y: linear_loss_sum(h[0], w, lambda x, _: x.sum())]
)
def test_a_loss_in_chunks_is_in_float32_where_half_precision_is_the_default(make) -> None:
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does under bf16-true
    try:
        hidden, weight = torch.randn(1, 6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        loss = make(hidden, weight, torch.zeros(1, 6, dtype=torch.int64))
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_a_loss_in_chunks_without_gradients_makes_none(hidden, weight, labels) -> None:
    class Operations(TorchDispatchMode):
        names: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Operations() as without:
        loss = linear_cross_entropy_sum(hidden, weight, labels)
    assert "scatter_add_" not in without.names
    with Operations() as learning:
        linear_cross_entropy_sum(hidden, weight, labels)
    assert "scatter_add_" in learning.names
    torch.testing.assert_close(loss, cross_entropy_sum(hidden @ weight.T, labels).detach())
    assert not loss.requires_grad


@pytest.mark.parametrize("learns", ["hidden", "weight"])
@pytest.mark.parametrize(
    "make", [linear_cross_entropy_sum, lambda h, w, y: linear_loss_sum(h[0], w, lambda x, _: x.logsumexp(-1).sum())]
)
def test_what_does_not_learn_costs_a_loss_in_chunks_no_gradient(make, learns) -> None:
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func._overloadpacket.__name__ in ("mm", "addmm_")
            return func(*args, **(kwargs or {}))

    given = {"hidden": torch.randn(1, 6, 4), "weight": torch.randn(9, 4)}
    counts, gradients = [], []
    for learning in (list(given), [learns]):
        each = {name: x.clone().requires_grad_(name in learning) for name, x in given.items()}
        with Products() as products:
            make(each["hidden"], each["weight"], torch.zeros(1, 6, dtype=torch.int64)).backward()
        counts.append(products.count)
        gradients.append(each[learns].grad)
    torch.testing.assert_close(*gradients)
    assert counts == [3, 2]


@pytest.mark.usefixtures("rows_in_fp32")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_devices_that_share_the_vocabulary_have_the_loss_and_the_gradients_of_one(precision):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 9, 4), (37, 4)))
    labels = torch.randint(0, 37, (2, 9), generator=generator)
    labels[0, :2] = IGNORE_INDEX

    def found(group: dist.ProcessGroup | None) -> tuple[torch.Tensor, ...]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = linear_cross_entropy_sum(h, w, labels, 0.1, 1e-2, group)
        loss.backward()
        with torch.no_grad():
            assert linear_cross_entropy_sum(hidden, weight, labels, 0.1, 1e-2, group) == pytest.approx(
                loss.item(), rel=1e-6 if precision == "32-true" else 1e-2
            )
        return loss.detach(), h.grad, w.grad

    one, near = found(None), {} if precision == "32-true" else {"rtol": 2e-2, "atol": 2e-2}
    for device in each(3, lambda: found(dist.group.WORLD)):  # 37 tokens do not divide evenly
        torch.testing.assert_close(device, one, **near)


def test_a_second_derivative_of_what_was_made_chunk_by_chunk_is_refused_and_not_left_out() -> None:
    hidden, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4)
    loss = linear_cross_entropy_sum(hidden, weight, torch.tensor([[1, 2, 4]]))
    with pytest.raises(RuntimeError, match=r"^create_graph must be false where _LinearCrossEntropy\.backward takes"):
        torch.autograd.grad(loss, hidden, create_graph=True)
