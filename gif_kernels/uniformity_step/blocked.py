"""Uniformity step on the one-sweep loss and gradient."""

from __future__ import annotations

from torch import Tensor

from gif_kernels.gaussian_potential.blocked import potential_and_gradient
from gif_kernels.sphere import inverse_norm


def moved_rows(rows: Tensor, lr: float, t: float) -> tuple[Tensor, Tensor]:
    """Unit ``rows`` (n, d) after a step, and the loss before it."""
    loss, gradient = potential_and_gradient(rows, t, want_gradient=True)
    assert gradient is not None
    moved = rows.add(gradient, alpha=-lr * len(rows))
    return moved.mul_(inverse_norm(moved)), loss
