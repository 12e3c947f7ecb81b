"""Gradients written by hand: named as the arguments are, differentiable once, and an error where twice is asked for.

Published: `with_row_gradients`, for a head that differentiates its loss where it is made, and `in_backward_pass`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["in_backward_pass", "with_row_gradients"]


Gradients = dict[str, Tensor | None]
"""Gradients by the names of the forward pass's arguments; an argument that is not named gets none."""


def backward_of(forward: Callable[..., Any]) -> Callable[[Callable[..., Gradients]], Callable[..., Any]]:
    """Decorate the ``backward`` of an autograd.Function that returns the gradients of ``forward`` by their names.

    PyTorch wants one for each argument, in order, and gets that. The gradients have no derivative of their own:
    PyTorch's once_differentiable gives constants where the incoming gradient is one, as that of a loss is, so a penalty
    on the gradient would train nothing and say nothing. Here differentiating again raises RuntimeError.
    """
    arguments = tuple(inspect.signature(forward).parameters)[1:]  # without ctx

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def ordered(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                named = backward(ctx, *incoming)
            gradients = tuple([named.pop(name, None) for name in arguments])
            if named:
                raise TypeError(f"gradients of {', '.join(named)}, which are no arguments of the forward pass")
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # enabled: create_graph=True
                return gradients
            return tuple(None if g is None else _NoSecondDerivative.apply(g.requires_grad_()) for g in gradients)

        return ordered

    return decorate


def kept_graph() -> saved_tensors_hooks:
    """Around a graph that is differentiated at once: activation checkpointing need not repeat a forward pass for it."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


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


def in_backward_pass() -> bool:
    """Whether a backward pass is running: a forward pass is then one that activation checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1


class _RowGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, rows: Tensor, gradients: Tensor, then: Callable[[], None] | None = None
    ) -> Tensor:
        ctx.save_for_backward(gradients)
        ctx.then = then
        return losses.view_as(losses)

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        # first: a checkpointed forward pass is repeated here, and must find all as it was
        (gradients,) = ctx.saved_tensors
        if ctx.then is not None:
            ctx.then()
            ctx.then = None
        return {"rows": (gradients * incoming.unsqueeze(1)).to(gradients.dtype)}


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        raise RuntimeError('this op is differentiable once, a second derivative was wanted; use impl="reference"')
