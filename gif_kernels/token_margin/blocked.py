"""Token-margin loss in a handful of matrix products: the CPU default.

The loss is local to a row, so its gradient with respect to the cosines comes out of the forward pass in the buffer that
held the logits, (l, v, B); the backward pass is products alone. Rows are compared as they are: every norm is a factor
of a number that is already there, so that no normalised copy of the embeddings is made. Derivation in README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gif_kernels.autograd import Gradients, backward_of
from gif_kernels.code_regression.blocked import Pull
from gif_kernels.dispatch import full_precision
from gif_kernels.precision import add_products, compute_dtype, gradient_dtype, product
from gif_kernels.reduction import row_weights
from gif_kernels.sphere import inverse_norm, tangent
from gif_kernels.token_margin.options import TokenMarginOptions


def token_margin(
    embeddings: Tensor,
    centers: Tensor,
    projections: Tensor | None,
    codes: Tensor,
    token_weights: Tensor | None,
    targets: Tensor | None,
    target_rows: Tensor | None,
    options: TokenMarginOptions,
) -> Tensor:
    """The reduced loss; arguments as of the specification."""
    loss: Tensor = _TokenMargin.apply(
        embeddings, centers, projections, codes, token_weights, targets, target_rows, options
    )
    return loss


class _Saved(NamedTuple):
    """The tensors that the backward pass reads."""

    embeddings: Tensor
    centers: Tensor
    projections: Tensor | None
    targets: Tensor | None
    target_rows: Tensor | None
    center_inverse: Tensor
    """1 / ||w||, (l, v, 1)"""
    projected: Tensor | None
    """u, (B, l, d')"""
    slopes: Tensor
    """dloss/dcosine / ||row||, (l, v, B)"""
    radial: Tensor
    """The factor of each row in what the tangent projection subtracts, (1 or l, 1, B)"""
    along: Tensor | None
    """`Pull.along`, (B, 1)"""
    towards: Tensor | None
    """`Pull.towards`, (B, 1)"""


class _TokenMargin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        centers: Tensor,
        projections: Tensor | None,
        codes: Tensor,
        token_weights: Tensor | None,
        targets: Tensor | None,
        target_rows: Tensor | None,
        options: TokenMarginOptions,
    ) -> Tensor:
        scale, operand = options.scale, options.operand
        dtype = compute_dtype(embeddings, centers, projections)
        length, vocab, inner = centers.shape
        z, w = embeddings.to(dtype), centers.to(dtype)
        w_inverse = inverse_norm(w)
        w = w * w_inverse
        if projections is None:
            u = None
            inverse = inverse_norm(z).view(1, 1, -1)
            logits = product(w.flatten(0, 1), z.T, operand, wide=True).view(length, vocab, -1)
        else:
            u = product(z, _flatten(projections).T.to(dtype), operand).view(len(z), length, inner)
            inverse = inverse_norm(u).permute(1, 2, 0)  # (l, 1, B)
            logits = product(w, u.permute(1, 2, 0), operand, wide=True)
        to_logit = inverse * scale
        logits.mul_(to_logit)  # scale times cosine (l, v, B)

        index = codes.T.clamp(min=0).unsqueeze(1)  # (l, 1, B)
        own = logits.gather(1, index)
        value, slope = options.margin.value_and_slope(own / scale)
        logarithms = logits.scatter_(1, index, value * scale).log_softmax(1)
        row_weight = row_weights(codes[:, 0] >= 0, options.reduction, dtype)
        weight = row_weight * (1 / length if token_weights is None else token_weights.to(dtype).view(-1, 1, 1))
        # what is returned and was changed in place, PyTorch 2.11 compiles as a constant
        losses = -(logarithms.gather(1, index) * weight).sum((0, 1))
        pulled = None
        if targets is not None:
            z_inverse = inverse_norm(z) if u is not None else inverse.view(-1, 1)
            pulled = Pull.of(z, z_inverse, targets, target_rows, options.pull * row_weight)
            losses = losses + pulled.losses

        if any(ctx.needs_input_grad):
            slopes = logarithms.exp_()  # softmax; then dloss/dcosine / ||row||, in the same buffer
            others = slopes.scatter_(1, index, 0).sum(1, keepdim=True)  # 1 - p of the own centre, without cancellation
            slopes.scatter_(1, index, others.mul_(slope).neg_()).mul_(weight * to_logit)
            # u . dloss/du, what the tangent projection needs, without a d-wide pass
            radial = logits.scatter_(1, index, own).mul_(slopes).sum((0, 1) if u is None else 1, keepdim=True)
            radial = radial * inverse / -scale  # (1 or l, 1, B)
            ctx.operand = operand
            saved = _Saved(
                embeddings=embeddings,
                centers=centers,
                projections=projections,
                targets=targets,
                target_rows=target_rows,
                center_inverse=w_inverse,
                projected=u,
                slopes=slopes,
                radial=radial,
                along=None if pulled is None else pulled.along,
                towards=None if pulled is None else pulled.towards,
            )
            ctx.save_for_backward(*saved)
        return losses if options.reduction == "none" else losses.sum()

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        with full_precision(incoming.device):
            return _gradients(_Saved(*ctx.saved_tensors), incoming, gradient_dtype(ctx.operand), ctx.needs_input_grad)


def _gradients(saved: _Saved, incoming: Tensor, operand: torch.dtype, needed: Sequence[bool]) -> Gradients:
    """Those of the embeddings, centres and projections, where they are ``needed``."""
    embeddings, centers, projections = saved.embeddings, saved.centers, saved.projections
    need_embeddings, need_centers, need_projections = needed[:3]
    dtype = saved.slopes.dtype
    z, w = embeddings.to(dtype), centers.to(dtype) * saved.center_inverse
    factor = incoming.view(-1)  # one, or one a row
    slopes, radial = saved.slopes * factor, saved.radial * factor

    direction = embeddings_gradient = projections_gradient = None
    along = None if saved.along is None else saved.along * factor.unsqueeze(1)
    if projections is None or saved.projected is None:
        flat = slopes.flatten(0, 1)
        if need_centers:
            direction = product(flat, z, operand).view_as(w)
        if need_embeddings:
            radial = radial.view(-1, 1) if along is None else radial.view(-1, 1) + along
            embeddings_gradient = product(flat.T, w.flatten(0, 1), operand).addcmul_(z, radial)
    else:
        u = saved.projected.transpose(0, 1)  # (l, B, d')
        if need_centers:
            direction = product(slopes, u, operand)
        if need_embeddings or need_projections:
            raw = u * radial.transpose(1, 2)  # dloss/d(P_j z), (l, B, d')
            raw = add_products(raw, slopes.transpose(1, 2), w, operand).transpose(0, 1).flatten(1)
        if need_projections:
            projections_gradient = product(raw.T, z, operand).view_as(projections).to(projections.dtype)
        if need_embeddings:
            embeddings_gradient = product(raw, _flatten(projections).to(z.dtype), operand)
            if along is not None:
                embeddings_gradient.addcmul_(z, along)
    if embeddings_gradient is not None:
        if saved.targets is not None and saved.towards is not None:
            Pull.add_(embeddings_gradient, saved.targets, saved.target_rows, saved.towards * factor.unsqueeze(1))
        embeddings_gradient = embeddings_gradient.to(embeddings.dtype)
    centers_gradient = None if direction is None else tangent(direction, w, saved.center_inverse).to(centers.dtype)
    return {"embeddings": embeddings_gradient, "centers": centers_gradient, "projections": projections_gradient}


def _flatten(projections: Tensor) -> Tensor:
    return projections.reshape(-1, projections.shape[-1])  # (l d', d)
