"""Losses that several objectives use: pure functions, summed rather than averaged."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lit_llm.batch import IGNORE_INDEX
from lit_llm.derivatives import differentiable_once
from lit_llm.products import product_dtype


def token_nats(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Cross-entropy of each label in nats, 0 where it is `IGNORE_INDEX`; computed in fp32."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view_as(labels)


def cross_entropy_sum(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy in nats, summed over the labels that are not `IGNORE_INDEX`.

    Args:
        logits: Unnormalised log-probabilities of any floating type; converted to fp32.
        labels: The tokens to predict.
        label_smoothing: Probability that the target spreads evenly over all tokens (Szegedy et al., 2015,
            arXiv:1512.00567, section 7).
        z_loss: Weight of the squared log of the softmax's denominator, which keeps logits from drifting (Chowdhery et
            al., 2022, arXiv:2204.02311, section 5, with 1e-4).

    Example:
        >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[1, IGNORE_INDEX]])
        >>> round(cross_entropy_sum(logits, labels).item(), 4)  # log 4
        1.3863
    """
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        log_z = torch.logsumexp(logits, dim=-1)
        total = total + z_loss * (log_z.square() * (labels != IGNORE_INDEX)).sum()
    return total


FP32_LOGITS = {"cpu": 2**22, "accelerator": 2**26}
"""Largest number of logits in fp32 at a time on each device. On a CPU they fit into the caches; on an accelerator there
are more, because kernel launches cost more, but this number has not been tuned by measurements."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of a chunk in the forward pass, with its logits; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        label_smoothing: float,
        z_loss: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Loops over chunks of tokens."""
        vocab, d_model = weight.shape
        first, end = (0, vocab) if group is None else _own_tokens(vocab, group)
        head, kept, targets = weight[first:end].to(hidden.dtype), (labels != IGNORE_INDEX)[:, None], labels[:, None]
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad  # with adapters the head may be frozen
        wanted = wants_hidden or wants_weight
        losses = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        step = 2 * d_model  # in smaller chunks, accumulating the weight's gradient would cost more than the logits
        devices = 1 if group is None else group.size()
        rows = max(1, FP32_LOGITS["cpu" if hidden.device.type == "cpu" else "accelerator"] * devices // vocab)
        for start in range(0, len(hidden), step):
            here = slice(start, start + step)
            h, keep = hidden[here], kept[here]
            logits = h @ head.T
            for part, target, loss in zip(*(x.split(rows) for x in (logits, targets[here], losses[here])), strict=True):
                loss.copy_(_losses(part, target - first, vocab, label_smoothing, z_loss, group, wanted))
            # If gradients are wanted, `logits` now holds the gradient of the logits.
            if wants_hidden:
                torch.mm(logits, head, out=grad_hidden[here]).mul_(keep)
            if wants_weight and h.dtype == torch.float32:
                grad_weight[first:end].addmm_(logits.T, h * keep)
            elif wants_weight:
                grad_weight[first:end] += logits.T @ (h * keep)
            del logits, part  # freed before the next chunk's are allocated
        ctx.gradients = grad_hidden, grad_weight
        for gradient in ctx.gradients if group is not None else ():
            if gradient is not None:
                dist.all_reduce(gradient, group=group)
        return losses.where(kept, 0).sum()

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients, in place because they are used once."""
        return *scaled_once(ctx, grad), None, None, None, None


def scaled_once(ctx: FunctionCtx, grad: Tensor) -> list[Tensor | None]:
    """Multiplies the gradients that a forward pass left in `ctx.gradients` by `grad`, in place."""
    gradients, ctx.gradients = ctx.gradients, None
    return [None if gradient is None else gradient.mul_(grad) for gradient in gradients]


def _losses(
    logits: Tensor,
    target: Tensor,
    vocab: int,
    label_smoothing: float,
    z_loss: float,
    group: dist.ProcessGroup | None,
    wanted: bool,
) -> Tensor:
    """The loss of each row; if `wanted`, overwrites the logits with their gradients.

    Args:
        logits: As in `_log_softmax`.
        target: Column of each label in `logits`; outside them if another device has it.
        vocab: Number of tokens on all devices together.
        label_smoothing: As in `cross_entropy_sum`.
        z_loss: As in `cross_entropy_sum`.
        group: As in `_log_softmax`.
        wanted: Whether gradients are wanted.
    """
    own = (target >= 0) & (target < logits.shape[1])
    target = target.clamp(0, logits.shape[1] - 1)
    log_p, log_z, nats = _log_softmax(logits, target, own, group)
    loss = (1 - label_smoothing) * nats
    if label_smoothing:
        of_all = log_p.sum(dim=1, keepdim=True)
        if group is not None:
            dist.all_reduce(of_all, group=group)
        loss -= label_smoothing / vocab * of_all
    if z_loss:
        loss += z_loss * log_z.square()
    if wanted:
        grad = log_p.exp_()  # in place: from log-probabilities to probabilities to the gradient
        if z_loss:
            grad.mul_(1 + 2 * z_loss * log_z)
        if label_smoothing:
            grad.sub_(label_smoothing / vocab)
        logits.copy_(grad.scatter_add_(1, target, (label_smoothing - 1) * own.float()))
    return loss


def _log_softmax(
    logits: Tensor, target: Tensor, own: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities in fp32, and for each row the log of their denominator and the nats of the label.

    Args:
        logits: Logits of all tokens, or of this device's part of the vocabulary; may be overwritten.
        target: Column of each label in `logits`, clamped into their range.
        own: Whether the label is in this device's part.
        group: Process group that shares the vocabulary; `None` if this device has all of it.
    """
    if group is None:
        log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        nats = -log_p.gather(1, target)
        return log_p, logits.gather(1, target) + nats, nats
    logits = logits.float()
    most = logits.amax(dim=1, keepdim=True)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    logits.sub_(most)
    sums = torch.cat([logits.exp().sum(dim=1, keepdim=True), logits.gather(1, target) * own], dim=1)
    dist.all_reduce(sums, group=group)
    log_z, of_target = sums[:, :1].log(), sums[:, 1:]
    return logits.sub_(log_z), log_z + most, log_z - of_target


def _own_tokens(vocab: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """The part of the vocabulary whose logits this device computes: its first token and the one after its last."""
    rank, size = group.rank(), group.size()
    return vocab * rank // size, vocab * (rank + 1) // size


def linear_cross_entropy_sum(
    hidden: Float[Tensor, "batch seq d_model"],
    weight: Float[Tensor, "vocab d_model"],
    labels: Int[Tensor, "batch seq"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """`cross_entropy_sum` of the logits `hidden @ weight.T`, which are never held all at once.

    The logits are computed for `2 * d_model` tokens at a time, and only a few of them in fp32 (`FP32_LOGITS`), so the
    loss needs about three times the memory of the head's gradient, whatever the size of the batch. On a CPU, ignored
    labels cost nothing.

    Args:
        hidden: Input of the output layer.
        weight: Weight of the output layer.
        labels: As in `cross_entropy_sum`.
        label_smoothing: As in `cross_entropy_sum`.
        z_loss: As in `cross_entropy_sum`.
        group: Process group whose devices pass the same arguments and share the work: each computes the logits of its
            part of the vocabulary, and all get the whole loss and the whole gradients. It may not be larger than the
            vocabulary.

    Source:
        Chunking over tokens, with gradients in the forward pass: Hsu et al., 2024, "Liger Kernel", arXiv:2410.10989,
        section 3.2; see also Wijmans et al., 2024, "Cut Your Losses", arXiv:2411.09009. Parts of the vocabulary:
        Shoeybi et al., 2019, "Megatron-LM", arXiv:1909.08053, section 3.

    Example:
        >>> hidden, weight = torch.randn(1, 3, 4), torch.randn(5, 4)
        >>> labels = torch.tensor([[1, IGNORE_INDEX, 4]])
        >>> plain = cross_entropy_sum(hidden @ weight.T, labels)
        >>> torch.allclose(linear_cross_entropy_sum(hidden, weight, labels), plain)
        True
    """
    kind = hidden.device.type
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    hidden = hidden.to(product_dtype(hidden))
    if (
        kind == "cpu" and not (kept := labels != IGNORE_INDEX).all()
    ):  # on other devices this check would wait for the device
        hidden, labels = hidden[kept], labels[kept]
    if not torch.is_grad_enabled():  # inside an `autograd.Function` this is not visible
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(kind, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, label_smoothing, z_loss, group)
