"""Gaussian potential from one sweep over the pairs: what `blocked` and `kernels` have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gif_kernels.autograd import Gradients, backward_of
from gif_kernels.gaussian_potential.options import GaussianPotentialOptions

Sweep = Callable[[Tensor, Tensor | None, GaussianPotentialOptions, bool], tuple[Tensor, Tensor]]
"""(vectors, others, options, want_gradient) -> loss () and its gradient at ``vectors``, empty unless wanted."""


def gaussian_potential(
    vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions, sweep: Sweep
) -> Tensor:
    """The loss of ``sweep``, (), differentiable once with respect to ``vectors``."""
    loss: Tensor = _OneSweep.apply(vectors, others, options, sweep)
    return loss


def log_mean(total: Tensor, m: int) -> Tensor:
    """log of the mean over the ordered pairs of m rows, given their sum, (); float64."""
    return total.log() - math.log(m * (m - 1))


class _OneSweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions, sweep: Sweep
    ) -> Tensor:
        loss, gradient = sweep(vectors, others, options, ctx.needs_input_grad[0])
        ctx.dtype = vectors.dtype
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        (gradient,) = ctx.saved_tensors
        return {"vectors": (gradient * incoming).to(ctx.dtype)}
