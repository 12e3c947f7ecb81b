"""Uniformity step on the one-sweep loss and gradient."""

from __future__ import annotations

from torch import Tensor

from gif_kernels.gaussian_potential.blocked import potential_and_gradient
from gif_kernels.gaussian_potential.options import GaussianPotentialOptions
from gif_kernels.sphere import inverse_norm
from gif_kernels.uniformity_step import in_rows
from gif_kernels.uniformity_step.options import UniformityStepOptions


def step_(table: Tensor, index: Tensor, options: UniformityStepOptions) -> Tensor:
    """Move the rows of ``table`` (m, d) that ``index`` (n,) names; returns the loss before, ()."""
    return in_rows.step_(table, index, options, moved_rows)


def moved_rows(rows: Tensor, lr: float, t: float) -> tuple[Tensor, Tensor]:
    """Unit ``rows`` (n, d) after a step, and the loss before it."""
    loss, gradient = potential_and_gradient(rows, None, GaussianPotentialOptions(t=t), want_gradient=True)
    moved = rows.add(gradient, alpha=-lr * len(rows))
    return moved.mul_(inverse_norm(moved)), loss
