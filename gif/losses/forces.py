"""What cross entropy does to a centre: its own images pull it, all others push it (the supplement's section 6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gif.errors import InputError
from gif_kernels import AngularMargin, checks
from gif_kernels.precision import compute_dtype
from gif_kernels.runs import runs
from gif_kernels.sphere import inverse_norm, tangent, unit


class Forces(NamedTuple):
    """``pull`` and ``push`` (C, d): of each centre, from its own images and from those of others."""

    pull: Tensor
    push: Tensor


@torch.no_grad()
def pull_and_push(
    logits: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    candidates: Tensor | None = None,
    centers: Tensor | None = None,
    margin: AngularMargin = AngularMargin(m2=0.0),  # noqa: B008 (frozen)
    scale: float = 1.0,
) -> Forces:
    """The negative gradient of the cross entropy, summed over a batch, at each centre w_j, as f_pull + f_push.

    Of a plain softmax, whose logits are x_ij = w_j . z_i (+ b_j), with p_ij = softmax(x_i)_j, by Eq. 11 and 12 of the
    supplement::

        f_pull(w_j) = sum_{i: y_i = j} (1 - p_ij) z_i,        f_push(w_j) = - sum_{i: y_i != j} p_ij z_i

    Where ``centers`` are given the logits are a margin softmax's, scale psi(cos_ij) of the own class and scale cos_ij
    of the others, and z_i gives way to the logit's derivative at w_j::

        dx_ij / dw_j = scale psi'(cos_ij) (zhat_i - cos_ij what_j) / ||w_j||,        psi' = 1 where y_i != j

    Of a softmax over a sample the logits are those of the ``candidates``; other centres feel nothing. Divide by the
    number of rows that count for the gradient of the batch's mean.

    Args:
        logits: (B, C), as the cross entropy takes them: with scale and margin.
        embeddings: z (B, d).
        labels: (B,) of any integer dtype, numbers of classes; -1 ignores a row.
        candidates: (C,) which classes the columns are of, each once; 0, 1, ... where not given.
        centers: w (C, d) of a margin softmax; None for a plain one.
        margin: psi, of a margin softmax.
        scale: of a margin softmax's logits.

    Returns both, (C, d) in the largest precision of the inputs, float32 at least.

    Raises TypeError or ValueError for a wrong dtype or shape, NaN, a margin or scale without ``centers``, a class that
    is named twice, or a label that is no column.
    """
    checks.floating("logits", logits, ("B", "C"))
    checks.floating("embeddings", embeddings, (len(logits), "d"))
    dtype = compute_dtype(logits, embeddings)
    columns = _columns(labels, candidates, logits)
    counts = columns >= 0
    z = embeddings.to(dtype)
    own = one_hot(columns.clamp(min=0), logits.shape[1]).to(dtype)
    log_probabilities = logits.to(dtype).log_softmax(1)
    pulling = (-own * log_probabilities.expm1()).where(counts[:, None], 0)  # 1 - p, also where p is near 1
    pushing = ((own - 1) * log_probabilities.exp()).where(counts[:, None], 0)
    if centers is None:
        if margin != AngularMargin(m2=0.0) or scale != 1:
            raise InputError("margin and scale belong to a margin softmax; give its centers too")
        return Forces(pulling.T @ z, pushing.T @ z)
    checks.floating("centers", centers, (logits.shape[1], z.shape[1]))
    checks.angular_margin(margin)
    checks.positive("scale", scale)
    z, directions, inverse = unit(z), unit(centers.to(dtype)), inverse_norm(centers.to(dtype))
    pulling = margin.value_and_slope(z @ directions.T)[1] * pulling
    pull, push = (tangent(scale * weight.T @ z, directions, inverse) for weight in (pulling, pushing))
    return Forces(pull, push)


def _columns(labels: Tensor, candidates: Tensor | None, logits: Tensor) -> Tensor:
    """The column (B,) of each label, -1 where the row is ignored."""
    count, width = logits.shape
    checks.same_device(logits=logits, labels=labels, candidates=candidates)
    if candidates is None:
        return checks.labels("labels", labels, count, high=width, hint="each column is a class")
    largest = torch.iinfo(torch.int64).max
    labels = checks.labels("labels", labels, count, high=largest)
    candidates = checks.integer("candidates", candidates, (width,), low=0, high=largest, hint="they number classes")
    ordered, order, first = runs(candidates)
    if not bool(first.all()):
        raise InputError("candidates name a class twice; give each once, with one column")
    place = torch.searchsorted(ordered, labels.contiguous()).clamp(max=width - 1)
    found = (ordered[place] == labels) | (labels < 0)
    if not bool(found.all()):
        raise InputError(
            f"label {int(labels[~found][0])} is none of the {width:,} candidates; add the batch's own classes to them"
        )
    return torch.where(labels < 0, -1, order[place])
