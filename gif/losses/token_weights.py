"""Weights lambda_j of the tokens of a code: the patterns of the paper's supplement, section 7."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gif.errors import InputError

TokenWeights = Literal["uniform", "increasing", "decreasing", "gaussian"]
"""The patterns that `token_weights` makes weights of."""


def token_weights(pattern: TokenWeights, length: int) -> Tensor:
    """lambda, (length,) float32, summing to 1.

    "uniform" is 1 / l each, which the supplement finds best; "increasing" and "decreasing" are proportional to 1..l and
    l..1; "gaussian" is a bell over the token index, centred, with a standard deviation of l / 4.

    Raises ValueError for an unknown pattern.
    """
    index = torch.arange(1, length + 1, dtype=torch.float64)
    if pattern == "uniform":
        weights = torch.ones_like(index)
    elif pattern == "increasing":
        weights = index
    elif pattern == "decreasing":
        weights = index.flip(0)
    elif pattern == "gaussian":
        weights = torch.exp(-((index - (length + 1) / 2) ** 2) / (2 * (length / 4) ** 2))
    else:
        raise InputError(
            f"token_weights must be uniform, increasing, decreasing, gaussian or a tensor, got {pattern!r}"
        )
    return (weights / weights.sum()).float()
