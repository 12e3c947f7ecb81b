"""Closed forms that spread a table most of the way before the first step: centring and whitening."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gif.vectors.distributed_table import DistributedTable
from gif_kernels.sphere import unit

ClosedForm = Literal["none", "center", "whiten"]
"""What `fit_closed_form` computes; "none" leaves the vectors as they are."""
CLOSED_FORMS: tuple[ClosedForm, ...] = ("none", "center", "whiten")
ROWS_A_BLOCK = 1 << 12
RIDGE = 1.0  # of the mean eigenvalue; less whitens more, and keeps less of the order


def fit_closed_form(table: DistributedTable, form: ClosedForm) -> Tensor:
    """The closed form of this table, as one float64 tensor: the mean, and M below it.

    `apply_closed_form` does h <- normalise((h - mean) M) to a row h.

    "center": (1, d), without M. "whiten": (1 + d, d), M = (C + r I)^(-1/2), C the vectors' covariance and
    r = RIDGE tr(C) / d. The table is read once, in blocks.
    """
    d = table.width
    total = torch.zeros(1, d, dtype=torch.float64, device=table.device)
    square = torch.zeros(d if form == "whiten" else 0, d, dtype=torch.float64, device=table.device)
    for block in table.own_blocks(ROWS_A_BLOCK):
        rows = block.float()
        total += rows.sum(0, dtype=torch.float64)
        if form == "whiten":
            square += (rows.T @ rows).double()
    moments = table.mean(torch.cat([total, square])).cpu()
    mean = moments[:1]
    if form == "center":
        return mean
    covariance = moments[1:] - mean.T @ mean
    ridge = RIDGE * covariance.trace() / d
    values, axes = torch.linalg.eigh(covariance)
    spread = values.clamp_min(0) + ridge
    scales = torch.where(spread > 0, spread.rsqrt(), 0)  # rows that are all the same spread nowhere
    return torch.cat([mean, axes * scales @ axes.T])


def apply_closed_form(transform: Tensor, rows: Tensor) -> Tensor:
    """Unit rows (n, d) float32 after the closed form ``transform`` that `fit_closed_form` found.

    A row at the mean itself, which leaves no direction, stays.
    """
    transform = transform.to(rows.device, torch.float32)
    centered = rows.float() - transform[0]
    moved = unit(centered @ transform[1:] if len(transform) > 1 else centered)
    return torch.where(moved.any(1, keepdim=True), moved, rows.float())
