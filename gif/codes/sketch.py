"""Rows in fewer columns, whose cosines are nearly those of the rows: what rounds of k-means can be done in.

A CountSketch (Charikar, Chen and Farach-Colton, 2002): columns are folded onto each other, each with a sign. The
product of two sketched rows is that of the rows in the mean over signs, and off by about 1/sqrt(columns) of their
lengths; so k-means in it finds nearly the same clusters (Makarychev, Makarychev and Razenshteyn, 2019).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from gif.codes.splitmix import uniforms

WIDTH = 64  # columns of a sketch; rows of fewer than twice as many are taken as they are


def sketch(rows: Tensor) -> Tensor:
    """``rows`` (..., d) in WIDTH columns, or as they are where that saves less than half; the same on any device."""
    if sketched_width(rows.shape[-1]) == rows.shape[-1]:
        return rows
    signs = _signs(rows.shape[-1]).to(rows)
    (first, sign), *others = zip(rows.split(WIDTH, -1), signs.split(WIDTH), strict=True)
    folded = first * sign
    for part, sign in others:
        folded[..., : part.shape[-1]].addcmul_(part, sign)
    return folded


def sketched_width(d: int) -> int:
    """Columns of a sketch of rows of ``d``."""
    return d if d < 2 * WIDTH else WIDTH


@cache
def _signs(d: int) -> Tensor:
    return torch.where(uniforms(np.zeros(1, np.uint64), d)[0] < 0.5, -1.0, 1.0)
