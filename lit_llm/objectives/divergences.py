"""Divergences between a teacher's and a student's distributions, and their sum over many tokens in chunks."""

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
    """A divergence between two distributions in nats: at least 0, and 0 if they are equal."""

    @abstractmethod
    def between(self, log_p: Float[Tensor, "*n k"], log_q: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
        """The divergence of the teacher's log-probabilities `log_p` and the student's `log_q`."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """`KL(p ‖ q)`, the cross-entropy up to a constant: the student is to cover all that the teacher deems possible.

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
    """`KL(q ‖ p)`, which is mode-seeking: the student is to predict only what the teacher deems likely.

    Source:
        Gu et al., 2023, "MiniLLM", arXiv:2306.08543, eq. 1; here on tokens of the data instead of the student's texts.
    """

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """`Σ q (log q - log p)`."""
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """The mean of the KL divergences of both distributions from their mean, from 0 to log 2.

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
    """A teacher's distributions for some tokens or examples, softened by a temperature.

    Attributes:
        log_p: Log-probabilities of all tokens or classes, or of the `k` most likely.
        index: The `k` most likely ones; `None` if `log_p` is of all.
    """

    log_p: Float[Tensor, "*n k"]
    index: Int[Tensor, "*n k"] | None = None

    @classmethod
    def of(cls, logits: Float[Tensor, "*n vocab"], temperature: float) -> SoftTargets:
        """Makes them from a teacher's logits."""
        return cls(F.log_softmax(logits.float() / temperature, dim=-1))

    def top(self, k: int) -> SoftTargets:
        """The same for the `k` most likely tokens or classes only."""
        log_p, index = self.log_p.topk(min(k, self.log_p.shape[-1]), dim=-1)
        return SoftTargets(log_p, index)

    def __getitem__(self, here: slice | Tensor) -> SoftTargets:
        return SoftTargets(self.log_p[here], None if self.index is None else self.index[here])

    def against(
        self, logits: Float[Tensor, "*n vocab"], temperature: float, divergence: Divergence
    ) -> Float[Tensor, "*n"]:
        """The divergence of a student's logits, times the temperature squared, which keeps the size of its gradients.

        If only the `k` most likely are known, all others count as one, with the sum of their probabilities.

        Source:
            Hinton et al., 2015, arXiv:1503.02531, section 2.
        """
        log_p, log_q = self.log_p.float(), F.log_softmax(logits.float() / temperature, dim=-1)
        if self.index is not None:
            some = self.index.shape[-1] < log_q.shape[-1]
            log_q = log_q.gather(-1, self.index.long())
            if some:
                log_p, log_q = (_with_rest(x) for x in (log_p, log_q))
            log_p = log_p.log_softmax(dim=-1)  # stored in fp16, the probabilities do not quite sum to 1
        return temperature**2 * divergence.between(log_p, log_q)


def _with_rest(log_p: Tensor) -> Tensor:
    """Appends the log of the remaining probability."""
    rest = (1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([log_p, rest.log()], dim=-1)


class _LinearLoss(torch.autograd.Function):
    """Computes the gradients of a chunk in the forward pass, with its logits, as `losses._LinearCrossEntropy` does."""

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
            del logits, loss  # freed before the next chunk's are allocated
        ctx.gradients = grad_hidden, grad_weight
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients, in place because they are used once."""
        return *scaled_once(ctx, grad), None


def linear_loss_sum(
    hidden: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "vocab d_model"],
    loss_of: Callable[[Float[Tensor, "chunk vocab"], slice], Float[Tensor, ""]],
) -> Float[Tensor, ""]:
    """The sum of any loss of the logits `hidden @ weight.T`, which are never held all at once.

    Args:
        hidden: Input of the output layer.
        weight: Weight of the output layer.
        loss_of: Makes the summed loss of a chunk from its logits, in fp32, and the slice of `hidden` they are for. It
            is differentiated with respect to the logits only.

    Source:
        As `losses.linear_cross_entropy_sum`, for losses whose gradients are computed by autograd.
    """
    kind = hidden.device.type
    hidden = hidden.to(product_dtype(hidden))
    if not torch.is_grad_enabled():  # inside an `autograd.Function` this is not visible
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(kind, enabled=False):
        return _LinearLoss.apply(hidden, weight, loss_of)
