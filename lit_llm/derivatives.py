"""A guard for backward passes written by hand, which have no derivative themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward pass of an `autograd.Function`, which then refuses second derivatives.

    torch's `once_differentiable` raises only if the second derivative passes through the incoming gradient. If that is
    constant, as for a sum, it silently treats the tensors saved in the forward pass as constants too.

    Raises:
        RuntimeError: When gradients are computed with `create_graph`.

    Example:
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x**2
        ...     @staticmethod
        ...     @differentiable_once
        ...     def backward(ctx, grad):
        ...         return 2 * ctx.saved_tensors[0] * grad
        >>> x = torch.ones(3, requires_grad=True)
        >>> torch.autograd.grad(Square.apply(x).sum(), x)
        (tensor([2., 2., 2.]),)
        >>> torch.autograd.grad(Square.apply(x).sum(), x, create_graph=True)
        Traceback (most recent call last):
        RuntimeError: create_graph must be false where Square.backward takes part, which is written by hand, but is true
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        """The gradients, without a graph of their own."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"create_graph must be false where {backward.__qualname__} takes part, which is written by hand, but "
                f"is true"
            )
        return backward(ctx, *grads)

    return once
