"""Gaussian potential and its gradient in one sweep over half the pairs, tile by tile. Derivation in README.md."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.dispatch import full_precision
from gif_kernels.sphere import compute_dtype, inverse_norm, tangent

TILE = 1024
"""Rows of a tile: 4 MiB of float32 pairs, a share of the last-level cache; workspace never grows with m."""


def gaussian_potential(vectors: Tensor, t: float) -> Tensor:
    """log mean_{i != j} exp(-t ||h_i - h_j||^2), ()."""
    loss: Tensor = _GaussianPotential.apply(vectors, t)
    return loss


class _GaussianPotential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, t: float) -> Tensor:
        rows = vectors.to(compute_dtype(vectors))
        inverse = inverse_norm(rows)
        unit_rows = rows * inverse
        loss, gradient = potential_and_gradient(unit_rows, t, want_gradient=ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.dtype = vectors.dtype
            ctx.save_for_backward(gradient.mul_(inverse))
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * loss_gradient).to(ctx.dtype), None


def potential_and_gradient(rows: Tensor, t: float, *, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss () and its tangent gradient (m, d), None unless wanted, at ``rows`` (m, d) of length 1 or 0."""
    if torch.compiler.is_compiling():
        total, gradient = torch.ops.gif_kernels.pair_sums(rows, t, want_gradient)
    else:
        total, gradient = pair_sums(rows, t, want_gradient)
    m = len(rows)
    loss = (total.log() - math.log(m * (m - 1))).to(rows.dtype)
    if not want_gradient:
        return loss, None
    gradient = gradient.mul_(4 * t / total.to(rows.dtype))
    return loss, tangent(gradient, rows, inverse_norm(rows))  # 1, or 0 for a row of zeros, which stays


def pair_sums(rows: Tensor, t: float, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """Z = sum_{i != j} P_ij () float64 and sum_j P_ij h_j (m, d) of unit ``rows``, with P_ij = exp(2t (h_i . h_j - 1)).

    Each pair of tiles is computed once and used for both of its sides: 3 m^2 d FLOPs with the gradient, m^2 d without
    (an empty tensor stands for the gradient then).
    """
    m = len(rows)
    gradient = torch.zeros_like(rows) if want_gradient else rows.new_empty(0)
    workspace = rows.new_empty(min(m, TILE) ** 2)
    shift = rows.new_tensor(-2 * t)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    with full_precision(rows.device):
        for i in range(0, m, TILE):
            left = rows[i : i + TILE]
            for j in range(i, m, TILE):
                right = rows[j : j + TILE]
                pairs = workspace[: len(left) * len(right)].view(len(left), len(right))
                torch.addmm(shift, left, right.T, alpha=2 * t, out=pairs).exp_()
                if i == j:
                    pairs.fill_diagonal_(0)
                total += pairs.sum(1).sum(dtype=torch.float64) * (1 if i == j else 2)
                if want_gradient:
                    gradient[i : i + TILE].addmm_(pairs, right)
                    if i != j:
                        gradient[j : j + TILE].addmm_(pairs.T, left)
    return total, gradient


@torch.library.custom_op("gif_kernels::pair_sums", mutates_args=())
def _pair_sums_op(rows: Tensor, t: float, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """`pair_sums` as one node of a compiled graph: its loop over tiles must not be unrolled into it."""
    return pair_sums(rows, t, want_gradient)


@_pair_sums_op.register_fake
def _(rows: Tensor, t: float, want_gradient: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty((), dtype=torch.float64), torch.empty_like(rows) if want_gradient else rows.new_empty(0)
