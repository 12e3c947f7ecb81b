"""Code contrast: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.code_contrast import blocked, reference
from gif_kernels.code_contrast.options import CodeContrastOptions
from gif_kernels.dispatch import Impl
from gif_kernels.margins import AngularMargin
from gif_kernels.precision import compute_dtype, in_range, operand_dtype, range_factor
from gif_kernels.reduction import REDUCTIONS, Reduction
from gif_kernels.runs import runs

OP, GRADIENTS = "code_contrast_loss", "code_contrast_gradients"


def _triton() -> dispatch.Implementation:
    from gif_kernels.code_contrast.function import code_contrast

    return code_contrast


def _triton_gradients() -> dispatch.Implementation:
    from gif_kernels.code_contrast.function import code_contrast_gradients

    return code_contrast_gradients


dispatch.register(
    OP,
    reference=reference.code_contrast,
    blocked=blocked.code_contrast,
    triton=_triton,
)
dispatch.register(
    GRADIENTS,
    reference=reference.code_contrast_gradients,
    blocked=blocked.code_contrast_gradients,
    triton=_triton_gradients,
)


def code_contrast_loss(
    embeddings: Tensor,
    vectors: Tensor,
    labels: Tensor,
    *,
    candidates: Tensor | None = None,
    margin: AngularMargin = AngularMargin(),  # noqa: B008 (frozen)
    scale: float = 64.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Cross entropy of the own code vector against the other candidates' (METHOD: L_CC).

    Its cost knows the number of candidates C and not the number of identities::

        logit_ik = scale * psi(zhat_i . hhat_k) if k = y_i else scale * zhat_i . hhat_k
        loss_i   = CE(logit_i, y_i) over the candidates k

    Args:
        embeddings: z, (B, d). Rows are normalised inside.
        vectors: h, (C, d): the candidates' code vectors. Normalised inside.
        labels: y, (B,) integer: the identity of each row, which must be among the candidates; -1 is ignored.
        candidates: (C,) integer >= 0: the identity of each row of ``vectors``. An identity that stands there more than
            once counts once, by its first row, so a batch's labels may be given as they are. None: row k is identity k.
        margin: psi.
        scale: s, > 0.
        reduction: "mean", "sum" or "none".
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        () for "mean" and "sum", (B,) for "none"; float64 if an input is, else float32. Differentiable
        once, with respect to embeddings and vectors.

    Products take operands in autocast's dtype where it is on, else in the dtype that the inputs share, else in float32.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also NaN, or a label that is no candidate
            (on an accelerator its loss is NaN).
    """
    loss: Tensor = _run(OP, embeddings, vectors, labels, candidates, margin, scale, reduction, impl)
    return loss


@torch.no_grad()
def code_contrast_gradients(
    embeddings: Tensor,
    vectors: Tensor,
    labels: Tensor,
    *,
    candidates: Tensor | None = None,
    margin: AngularMargin = AngularMargin(),  # noqa: B008 (frozen)
    scale: float = 64.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`code_contrast_loss` of each row, and both gradients of their sum, at once and outside of any graph.

    For a step that is taken where the loss is made, as code vectors take it: no backward pass is waited for, and
    nothing is kept for one. Arguments and errors as of `code_contrast_loss`.

    Returns:
        The losses (B,), constants; their sum's gradient in embeddings (B, d) and in vectors (C, d), to the bit what
        autograd would give, each in its input's dtype.
    """
    losses, *gradients = _run(GRADIENTS, embeddings, vectors, labels, candidates, margin, scale, "none", impl)
    operand = operand_dtype(embeddings, vectors)
    for gradient, rows in zip(gradients, (embeddings, vectors), strict=True):
        if (factor := range_factor(rows, operand)) is not None:
            gradient *= factor
    of_embeddings, of_vectors = gradients
    return losses, of_embeddings, of_vectors


def _run(
    op: str,
    embeddings: Tensor,
    vectors: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    margin: AngularMargin,
    scale: float,
    reduction: Reduction,
    impl: Impl,
) -> Any:
    """What an implementation of ``op`` returns for arguments that this checks."""
    checks.floating("embeddings", embeddings, ("B", "d"))
    batch, width = embeddings.shape
    checks.floating("vectors", vectors, ("C", width))
    count = len(vectors)
    name = dispatch.resolve(op, impl, embeddings.device, compute_dtype(embeddings, vectors))
    asserted = name != "triton"
    high, hint = count, "give candidates where rows of vectors are not numbered from 0"
    if candidates is not None:
        high, hint = torch.iinfo(torch.int64).max, ""
        candidates = checks.integer(
            "candidates",
            candidates,
            (count,),
            low=0,
            high=high,
            hint="name the identity of each row",
            asserted=asserted,
        )
    labels = checks.labels("labels", labels, batch, high=high, hint=hint, asserted=asserted)
    checks.angular_margin(margin)
    checks.positive("scale", scale)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.same_device(embeddings=embeddings, vectors=vectors, labels=labels, candidates=candidates)
    targets, competes = labels, None
    if candidates is not None:
        targets, competes = _first_rows(labels, candidates)
        if asserted or checks.looks_at_values(targets):
            checks.require(
                (targets < count).all(),
                "every label must be among the candidates; add the batch's own identities to them",
            )
    operand = operand_dtype(embeddings, vectors)
    embeddings, vectors = in_range(embeddings, operand), in_range(vectors, operand)
    with dispatch.full_precision(embeddings.device):
        return dispatch.implementation(op, name)(
            embeddings=embeddings,
            vectors=vectors,
            targets=targets,
            competes=competes,
            options=CodeContrastOptions(margin=margin, scale=float(scale), reduction=reduction, operand=operand),
        )


def _first_rows(labels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each label among the candidates (B,), and which rows stand first (C,) bool.

    -1 where the label is, and C where it is no candidate.
    """
    sorted_ids, order, is_first = runs(candidates)
    competes = torch.empty_like(is_first).scatter_(0, order, is_first)
    place = torch.searchsorted(sorted_ids, labels.contiguous()).clamp(max=len(candidates) - 1)
    found = torch.where(sorted_ids[place] == labels, order[place], len(candidates))
    return torch.where(labels < 0, -1, found), competes
