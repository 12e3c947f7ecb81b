"""Gaussian potential and its gradient in one sweep over half the pairs, tile by tile. Derivation in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels.dispatch import full_precision
from gif_kernels.gaussian_potential import one_sweep
from gif_kernels.gaussian_potential.options import GaussianPotentialOptions
from gif_kernels.precision import compute_dtype, product
from gif_kernels.sphere import inverse_norm, tangent

__all__ = ["TILE"]

TILE = 768
"""Rows of a tile: 2.25 MiB of float32 pairs, in the last-level cache; workspace never grows with m."""


def gaussian_potential(vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions) -> Tensor:
    """log mean_{i != j} exp(-t ||h_i - h_j||^2), (); with ``others`` (m, d), the share of rows [offset, offset + n)."""
    return one_sweep.gaussian_potential(vectors, others, options, potential_and_gradient)


def potential_and_gradient(
    vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss () and its gradient (n, d) at ``vectors``, empty unless wanted; float32, or float64 if the vectors are."""
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor] = torch.ops.gif_kernels.gaussian_potential_blocked(
            vectors, others, options.offset, options.t, want_gradient
        )
        return found
    return _potential_and_gradient(vectors, others, options, want_gradient)


def _potential_and_gradient(
    vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    with full_precision(vectors.device):
        total, gradient = pair_sums(vectors, others, options, want_gradient)
    loss = one_sweep.log_mean(total, len(vectors if others is None else others)).to(compute_dtype(vectors))
    if want_gradient:
        slope = (4 * options.t / total).to(gradient.dtype)
        for i in range(0, len(vectors), TILE):
            rows = vectors[i : i + TILE].to(gradient.dtype)
            inverse = inverse_norm(rows)
            part = gradient[i : i + TILE]
            part.copy_(tangent(part.mul_(slope), rows * inverse, inverse))
    return loss, gradient


def pair_sums(
    vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Z = sum_{i != j} P_ij () float64 and sum_j P_ij h_j (n, d), with P_ij = exp(2t (h_i . h_j - 1)).

    Among the vectors themselves each pair of tiles is computed once and used for both of its sides: 3 m^2 d FLOPs with
    the gradient, m^2 d without (an empty tensor stands for the gradient then). Against ``others``: 4 n m d and 2 n m d.
    """
    n, width = vectors.shape
    columns = vectors if others is None else others
    dtype = compute_dtype(vectors)
    left_buffer, right_buffer = (vectors.new_empty(min(len(x), TILE), width, dtype=dtype) for x in (vectors, columns))
    gradient = vectors.new_zeros((n, width) if want_gradient else 0, dtype=dtype)
    total = torch.zeros((), dtype=torch.float64, device=vectors.device)
    for i in range(0, n, TILE):
        left = _unit(vectors[i : i + TILE], left_buffer)
        for j in range(i if others is None else 0, len(columns), TILE):
            mirrored = others is None and i != j
            right = _unit(columns[j : j + TILE], right_buffer) if mirrored or others is not None else left
            pairs = product(left, right.T, dtype).sub_(1).mul_(2 * options.t).exp_()
            diagonal = i + options.offset - j
            if -len(left) < diagonal < len(right):
                pairs.diagonal(diagonal).fill_(0)
            total += pairs.sum(1).sum(dtype=torch.float64) * (2 if mirrored else 1)
            if want_gradient:
                gradient[i : i + TILE] += product(pairs, right, dtype)
                if mirrored:
                    gradient[j : j + TILE] += product(pairs.T, left, dtype)
            del pairs  # one tile at a time
    return total, gradient


def _unit(rows: Tensor, buffer: Tensor) -> Tensor:
    """``rows`` over their norms, in ``buffer``."""
    unit = buffer[: len(rows)].copy_(rows)
    return unit.mul_(inverse_norm(unit))


@torch.library.custom_op("gif_kernels::gaussian_potential_blocked", mutates_args=())
def _op(vectors: Tensor, others: Tensor | None, offset: int, t: float, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """A sweep as one node of a compiled graph."""
    return _potential_and_gradient(vectors, others, GaussianPotentialOptions(t=t, offset=offset), want_gradient)


@_op.register_fake
def _(vectors: Tensor, others: Tensor | None, offset: int, t: float, want_gradient: bool) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(vectors)
    return vectors.new_empty((), dtype=dtype), vectors.new_empty(vectors.shape if want_gradient else 0, dtype=dtype)
