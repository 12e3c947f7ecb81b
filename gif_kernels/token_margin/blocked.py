"""Token-margin loss in a handful of matrix products: the CPU default.

The loss is local to a row, so its gradient with respect to the cosines (B, l, v) comes out of the forward pass in the
buffer that held the logits; the backward pass is products alone. Rows are compared as they are: every norm is a factor
of a number that is already there, so that no normalised copy of the embeddings is made. Derivation in README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.code_regression.blocked import Pull
from gif_kernels.dispatch import full_precision
from gif_kernels.margins import AngularMargin
from gif_kernels.precision import gradient_dtype, product
from gif_kernels.reduction import Reduction, row_weights
from gif_kernels.sphere import compute_dtype, inverse_norm, tangent


def token_margin(embeddings: Tensor, centers: Tensor, *rest: Any) -> Tensor:
    """The reduced loss; arguments as of the specification."""
    loss: Tensor = _TokenMargin.apply(embeddings, centers, *rest)
    return loss


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
        pull: float,
        margin: AngularMargin,
        scale: float,
        reduction: Reduction,
        operand: torch.dtype,
    ) -> Tensor:
        dtype = compute_dtype(embeddings, centers, projections)
        length, vocab, inner = centers.shape
        z = embeddings.to(dtype)
        w = centers.to(dtype)
        w = w * inverse_norm(w)
        if projections is None:
            u = None
            inverse = inverse_norm(z).unsqueeze(1)  # (B, 1, 1)
            logits = product(z, w.flatten(0, 1).T, operand).view(len(z), length, vocab)
        else:
            u = product(z, _flatten(projections).T.to(dtype), operand).view(len(z), length, inner)
            inverse = inverse_norm(u)  # (B, l, 1)
            logits = product(u.transpose(0, 1), w.transpose(1, 2), operand).transpose(0, 1).contiguous()
        logits.mul_(inverse * scale)  # scale times cosine (B, l, v)

        index = codes.clamp(min=0).unsqueeze(-1)  # (B, l, 1)
        own = logits.gather(-1, index)
        value, slope = margin.value_and_slope(own / scale)
        value = value * scale
        logits.scatter_(-1, index, value)
        logarithms = torch.log_softmax(logits, -1)
        own_logarithm = logarithms.gather(-1, index)
        row_weight = row_weights(codes[:, 0] >= 0, reduction, dtype)
        lambdas = z.new_full((length,), 1 / length) if token_weights is None else token_weights.to(dtype)
        weight = (row_weight.unsqueeze(1) * lambdas).unsqueeze(-1)  # (B, l, 1)
        losses = (own_logarithm * weight).sum((1, 2)).neg_()
        pulled = None
        if targets is not None:
            z_inverse = inverse.squeeze(1) if projections is None else inverse_norm(z)
            pulled = Pull.of(z, z_inverse, targets, target_rows, pull * row_weight)
            losses += pulled.losses

        if any(ctx.needs_input_grad):
            weight = weight * inverse * scale
            slopes = logarithms.exp_()  # softmax; then dloss/dcosine / ||row||, in the same buffer
            own_slope = torch.expm1(own_logarithm) * slope
            slopes.scatter_(-1, index, own_slope).mul_(weight)
            # u . dloss/du, what the tangent projection needs, without a d-wide pass
            radial = (slopes * logits).sum(-1, keepdim=True) + own_slope * weight * (own - value)
            radial = radial * (inverse / -scale)
            if projections is None:
                radial = radial.sum(1, keepdim=True)
            ctx.operand = operand
            ctx.save_for_backward(
                embeddings, centers, projections, u, slopes, radial, targets, target_rows,
                *((None, None) if pulled is None else (pulled.along, pulled.towards)),
            )  # fmt: skip
        return losses if reduction == "none" else losses.sum()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(incoming.device):
            return *_gradients(ctx, incoming), *(None,) * 9


def _gradients(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    embeddings, centers, projections, u, slopes, radial, targets, target_rows, along, towards = ctx.saved_tensors
    need_embeddings, need_centers, need_projections = ctx.needs_input_grad[:3]
    operand = gradient_dtype(ctx.operand)
    z = embeddings.to(slopes.dtype)
    w_raw = centers.to(slopes.dtype)
    w_inverse = inverse_norm(w_raw)
    w = w_raw * w_inverse
    factor = incoming.view(-1, 1, 1)  # one, or one a row
    slopes, radial = slopes * factor, radial * factor

    direction = embeddings_gradient = projections_gradient = None
    along = None if along is None else along * factor.squeeze(1)
    if projections is None:
        flat = slopes.flatten(1)
        if need_centers:
            direction = product(flat.T, z, operand).view_as(w)
        if need_embeddings:
            radial = radial.squeeze(1) if along is None else radial.squeeze(1) + along
            embeddings_gradient = product(flat, w.flatten(0, 1), operand, add_to=z * radial)
    else:
        if need_centers:
            direction = product(slopes.permute(1, 2, 0), u.transpose(0, 1), operand)
        if need_embeddings or need_projections:
            raw = u * radial  # dloss/d(P_j z), (B, l, d')
            raw = product(slopes.transpose(0, 1), w, operand, add_to=raw.transpose(0, 1)).transpose(0, 1).flatten(1)
        if need_projections:
            projections_gradient = product(raw.T, z, operand).view_as(projections).to(projections.dtype)
        if need_embeddings:
            pulled = None if along is None else z * along
            embeddings_gradient = product(raw, _flatten(projections).to(z.dtype), operand, add_to=pulled)
    if embeddings_gradient is not None:
        if towards is not None:
            Pull.add_(embeddings_gradient, targets, target_rows, towards * factor.squeeze(1))
        embeddings_gradient = embeddings_gradient.to(embeddings.dtype)
    centers_gradient = None if direction is None else tangent(direction, w, w_inverse).to(centers.dtype)
    return embeddings_gradient, centers_gradient, projections_gradient


def _flatten(projections: Tensor) -> Tensor:
    return projections.reshape(-1, projections.shape[-1])  # (l d', d)
