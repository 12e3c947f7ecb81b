"""Gradients written by hand: differentiable once, and an error instead of a wrong second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an autograd.Function whose gradients have no derivative of their own.

    PyTorch's once_differentiable gives constants where the incoming gradient is one, as that of a loss is, so a penalty
    on the gradient would train nothing and say nothing. Here differentiating again raises RuntimeError.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *incoming: Tensor) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # enabled: create_graph=True
            return gradients
        return tuple(None if g is None else _NoSecondDerivative.apply(g.requires_grad_()) for g in gradients)

    return checked


def with_row_gradients(
    losses: Tensor, rows: Tensor, gradients: Tensor, then: Callable[[], None] | None = None
) -> Tensor:
    """``losses`` (B,), constants, as functions of ``rows`` (B, d) whose gradients (B, d) are already known.

    For a graph that was differentiated where it was made: nothing of it is kept, nor done again. Once differentiable.
    ``then`` is called the first time that the backward pass comes by, and never again: a forward pass that activation
    checkpointing repeats makes a second graph, and no backward pass comes by that one.
    """
    found: Tensor = _RowGradients.apply(losses, rows, gradients, then)
    return found


class _RowGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, rows: Tensor, gradients: Tensor, then: Callable[[], None] | None = None
    ) -> Tensor:
        ctx.save_for_backward(gradients)
        ctx.then = then
        return losses.view_as(losses)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        # first: a checkpointed forward pass is repeated here, and must find all as it was
        (gradients,) = ctx.saved_tensors
        if ctx.then is not None:
            ctx.then()
            ctx.then = None
        return None, (gradients * incoming.unsqueeze(1)).to(gradients.dtype), None, None


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        raise RuntimeError('this op is differentiable once, a second derivative was wanted; use impl="reference"')
