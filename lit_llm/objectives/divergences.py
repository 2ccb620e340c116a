"""How far what a student says is from what its teacher says: divergences, and their sum over many tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lit_llm.derivatives import differentiable_once
from lit_llm.objectives.losses import scaled_once
from lit_llm.products import product_dtype


class Divergence(ABC):
    """How far two distributions are apart, in nats; 0 where they are the same, never less."""

    @abstractmethod
    def between(self, log_p: Float[Tensor, "*n k"], log_q: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
        """Of the teacher's log-probabilities `log_p` and the student's `log_q`."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """The student is to cover all that the teacher holds possible: `KL(p ‖ q)`, cross-entropy but for a constant.

    Source:
        Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(ForwardKL().between(p, q).item(), 4)
        0.1438
    """

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """`Σ p (log p - log q)`."""
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """The student is to say only what the teacher holds likely: `KL(q ‖ p)`, which seeks one mode of several.

    Source:
        Gu et al., 2023, "MiniLLM", arXiv:2306.08543, eq. 1; here over tokens of the data, not of the student's texts.
    """

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """`Σ q (log q - log p)`."""
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Between the two: both against their mean, from 0 to log 2.

    Source:
        Agarwal et al., 2023, "On-Policy Distillation of Language Models", arXiv:2306.13649, eq. 1, with beta 1/2.
    """

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """`(KL(p ‖ m) + KL(q ‖ m)) / 2` with `m = (p + q) / 2`."""
        log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
        return 0.5 * (
            F.kl_div(log_m, log_p, reduction="none", log_target=True)
            + F.kl_div(log_m, log_q, reduction="none", log_target=True)
        ).sum(dim=-1)


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher says of some tokens or examples, softened by a temperature.

    Attributes:
        log_p: Its log-probabilities: of everything, or of the likeliest.
        index: What those are of, where they are of the likeliest alone.
    """

    log_p: Float[Tensor, "*n k"]
    index: Int[Tensor, "*n k"] | None = None

    @classmethod
    def of(cls, logits: Float[Tensor, "*n vocab"], temperature: float) -> SoftTargets:
        """From a teacher's logits of everything."""
        return cls(F.log_softmax(logits.float() / temperature, dim=-1))

    def top(self, k: int) -> SoftTargets:
        """The likeliest alone."""
        log_p, index = self.log_p.topk(min(k, self.log_p.shape[-1]), dim=-1)
        return SoftTargets(log_p, index)

    def __getitem__(self, here: slice | Tensor) -> SoftTargets:
        return SoftTargets(self.log_p[here], None if self.index is None else self.index[here])

    def against(
        self, logits: Float[Tensor, "*n vocab"], temperature: float, divergence: Divergence
    ) -> Float[Tensor, "*n"]:
        """How far a student is from it, times the temperature squared, which keeps its gradients' size.

        Where only the likeliest are known, all others count as one: their probability is to be right together.

        Source:
            Hinton et al., 2015, arXiv:1503.02531, section 2.
        """
        log_p, log_q = self.log_p.float(), F.log_softmax(logits.float() / temperature, dim=-1)
        if self.index is not None:
            some = self.index.shape[-1] < log_q.shape[-1]
            log_q = log_q.gather(-1, self.index.long())
            if some:
                log_p, log_q = (_with_rest(x) for x in (log_p, log_q))
            log_p = log_p.log_softmax(dim=-1)  # stored in half precision they do not quite add up
        return temperature**2 * divergence.between(log_p, log_q)


def _with_rest(log_p: Tensor) -> Tensor:
    """With the log-probability of all others together."""
    rest = (1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([log_p, rest.log()], dim=-1)


class _LinearLoss(torch.autograd.Function):
    """Makes the gradients of a chunk while its logits are at hand, as `losses._LinearCrossEntropy`."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, loss_of: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Loops over chunks of tokens."""
        d_model, head = weight.shape[1], weight.to(hidden.dtype)
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        wanted = wants_hidden or wants_weight
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for first in range(0, len(hidden), 2 * d_model):
            here = slice(first, first + 2 * d_model)
            h = hidden[here]
            logits = (h @ head.T).float().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = loss_of(logits, here)
            total += loss.detach()
            if wanted:
                grad = torch.autograd.grad(loss, logits)[0].to(h.dtype)
                if wants_hidden:
                    torch.mm(grad, head, out=grad_hidden[here])
                if wants_weight:
                    grad_weight += grad.T @ h
                del grad
            del logits, loss  # or the next would be made beside them
        ctx.gradients = grad_hidden, grad_weight
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scales, in place: the gradients are used once."""
        return *scaled_once(ctx, grad), None


def linear_loss_sum(
    hidden: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "vocab d_model"],
    loss_of: Callable[[Float[Tensor, "chunk vocab"], slice], Float[Tensor, ""]],
) -> Float[Tensor, ""]:
    """The sum of any loss of the logits `hidden @ weight.T`, which are never held all at once.

    Args:
        hidden: What the output layer reads.
        weight: The output layer's matrix.
        loss_of: The loss of a chunk's logits, in fp32, and of which rows of `hidden` they are; of them alone gradients
            are taken.

    Source:
        As `losses.linear_cross_entropy_sum`, for losses whose gradients are not written by hand.
    """
    kind = hidden.device.type
    hidden = hidden.to(product_dtype(hidden))
    if not torch.is_grad_enabled():  # which the function cannot see
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(kind, enabled=False):
        return _LinearLoss.apply(hidden, weight, loss_of)
