"""When training ends before its last step: no validation has been better for long."""

from __future__ import annotations

from collections.abc import Mapping

from gif.training.checkpoint import mean_score


def is_stale(validations: Mapping[int, Mapping[str, float]], patience: int | None) -> bool:
    """Whether ``patience`` validations in a row, the last ones, were no better than one before them.

    ``validations`` are named scores by step; the mean of a validation's scores is what counts. None never ends.
    """
    if patience is None or len(validations) <= patience:
        return False
    scores = [mean_score(validations[step]) for step in sorted(validations)]
    return len(scores) - 1 - scores.index(max(scores)) >= patience
