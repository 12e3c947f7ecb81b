"""Token-margin loss in a handful of matrix products: the CPU default.

The loss is local to a row, so its gradient with respect to the cosines (B, l, v) comes out of the forward pass in the
buffer that held the logits; the backward pass is products alone. Derivation in README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.dispatch import full_precision
from gif_kernels.margins import AngularMargin
from gif_kernels.sphere import compute_dtype, inverse_norm, tangent


def token_margin_rows(
    embeddings: Tensor,
    centers: Tensor,
    projections: Tensor | None,
    codes: Tensor,
    weights: Tensor,
    margin: AngularMargin,
    scale: float,
) -> Tensor:
    """Loss of each row, (B,); 0 where the code is -1."""
    losses: Tensor = _TokenMargin.apply(embeddings, centers, projections, codes, weights, margin, scale)
    return losses


class _TokenMargin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        centers: Tensor,
        projections: Tensor | None,
        codes: Tensor,
        weights: Tensor,
        margin: AngularMargin,
        scale: float,
    ) -> Tensor:
        dtype = compute_dtype(embeddings, centers, projections)
        length, vocab, inner = centers.shape
        z = embeddings.to(dtype)
        z_inverse = inverse_norm(z)  # (B, 1)
        w = centers.to(dtype)
        w = (w * inverse_norm(w)).reshape(length * vocab, inner)
        if projections is None:
            u = u_inverse = None
            cosine = (z @ w.T).mul_(z_inverse).view(-1, length, vocab)
        else:
            flat = projections.to(dtype).reshape(length * inner, -1)
            u = (z @ flat.T).mul_(z_inverse).view(-1, length, inner)
            u_inverse = inverse_norm(u)  # (B, l, 1)
            u.mul_(u_inverse)
            cosine = torch.einsum("bli,lvi->blv", u, w.view(length, vocab, inner))

        index = codes.clamp(min=0).unsqueeze(-1)  # (B, l, 1)
        own = cosine.gather(-1, index)
        value, slope = margin.value_and_slope(own)
        logits = (cosine * scale).scatter_(-1, index, value * scale)
        # exponentials of differences from the largest logit: small numbers, so float32's rounding stays small too
        largest = logits.amax(-1, keepdim=True)
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(-1, keepdim=True)
        own_logit = value * scale - largest
        weights = torch.where(codes >= 0, weights.to(dtype), 0).unsqueeze(-1)  # (B, l, 1), ignored rows weigh nothing
        losses = ((total.log() - own_logit) * weights).sum((1, 2))

        if any(ctx.needs_input_grad):
            own_probability = own_logit.exp_() / total
            slopes = exponentials.div_(total)  # softmax; then dloss/dcosine, in the same buffer
            slopes.scatter_(-1, index, (own_probability - 1) * slope)
            slopes.mul_(weights * scale)
            radial = torch.einsum("blv,blv->bl", slopes, cosine)
            ctx.save_for_backward(embeddings, centers, projections, z_inverse, u, u_inverse, slopes, radial)
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, row_gradient: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(row_gradient.device):
            return *_gradients(ctx, row_gradient), None, None, None, None


def _gradients(ctx: Any, row_gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    embeddings, centers, projections, z_inverse, u, u_inverse, slopes, radial = ctx.saved_tensors
    need_embeddings, need_centers, need_projections = ctx.needs_input_grad[:3]
    length, vocab, inner = centers.shape
    z = embeddings.to(slopes.dtype)
    w_raw = centers.to(slopes.dtype)
    w_inverse = inverse_norm(w_raw)
    w = w_raw * w_inverse
    slopes = slopes * row_gradient.view(-1, 1, 1)
    radial = radial * row_gradient.view(-1, 1)  # u . dloss/du: what the tangent projection needs, without a d-wide pass

    embeddings_gradient = centers_gradient = projections_gradient = None
    if projections is None:
        flat = slopes.view(-1, length * vocab)
        if need_centers:
            direction = ((flat * z_inverse).T @ z).view_as(w)
            centers_gradient = tangent(direction, w, w_inverse).to(centers.dtype)
        if need_embeddings:
            direction = flat @ w.reshape(length * vocab, inner)
            radial = radial.sum(1, keepdim=True) * z_inverse
            embeddings_gradient = direction.addcmul_(z, radial, value=-1).mul_(z_inverse).to(embeddings.dtype)
        return embeddings_gradient, centers_gradient, None

    if need_centers:
        direction = torch.einsum("blv,bli->lvi", slopes, u)
        centers_gradient = tangent(direction, w, w_inverse).to(centers.dtype)
    if need_embeddings or need_projections:
        raw = torch.einsum("blv,lvi->bli", slopes, w)
        raw = raw.addcmul_(u, radial.unsqueeze(-1), value=-1).mul_(u_inverse).reshape(-1, length * inner)
        if need_projections:
            projections_gradient = ((raw * z_inverse).T @ z).view_as(projections).to(projections.dtype)
        if need_embeddings:
            direction = raw @ projections.to(raw.dtype).reshape(length * inner, -1)
            embeddings_gradient = tangent(direction, z * z_inverse, z_inverse).to(embeddings.dtype)
    return embeddings_gradient, centers_gradient, projections_gradient
