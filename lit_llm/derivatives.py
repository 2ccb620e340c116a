"""Backward passes that are written by hand, and so have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Has an `autograd.Function` with this backward pass refuse a second derivative.

    torch's `once_differentiable` does so only where it goes through the gradient that comes in. That of a sum is
    constant; what the forward pass kept would be taken for constant with it, and its part be left out unsaid.

    Raises:
        RuntimeError: When the gradients are asked for with `create_graph`.

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
        """The gradients, unless theirs are wanted too."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"create_graph must be false where {backward.__qualname__} takes part, which is written by hand, but "
                f"is true"
            )
        return backward(ctx, *grads)

    return once
