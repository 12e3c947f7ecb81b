"""Code contrast with its gradient written out: one product forward, two backward. Derivation in README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.dispatch import full_precision
from gif_kernels.margins import AngularMargin
from gif_kernels.sphere import compute_dtype, inverse_norm, tangent


def code_contrast_rows(
    embeddings: Tensor, vectors: Tensor, targets: Tensor, competes: Tensor, margin: AngularMargin, scale: float
) -> Tensor:
    """Cross entropy of each row over the vectors that compete, (B,); 0 where the target is -1."""
    losses: Tensor = _CodeContrast.apply(embeddings, vectors, targets, competes, margin, scale)
    return losses


class _CodeContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        vectors: Tensor,
        targets: Tensor,
        competes: Tensor,
        margin: AngularMargin,
        scale: float,
    ) -> Tensor:
        dtype = compute_dtype(embeddings, vectors)
        z, h = embeddings.to(dtype), vectors.to(dtype)
        z_inverse, h_inverse = inverse_norm(z), inverse_norm(h)
        logits = (z @ (h * h_inverse).T).mul_(z_inverse)  # cosines, for now
        index = targets.clamp(min=0).unsqueeze(1)
        value, slope = margin.value_and_slope(logits.gather(1, index))
        logits.mul_(scale).scatter_(1, index, value * scale).masked_fill_(~competes, -torch.inf)
        # exponentials of differences from the largest logit: small numbers, so float32's rounding stays small too
        largest = logits.amax(1, keepdim=True)
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(1, keepdim=True)
        own_logit = value * scale - largest
        counted = (targets >= 0).unsqueeze(1)
        losses = torch.where(counted, total.log() - own_logit, 0).squeeze(1)
        if any(ctx.needs_input_grad):
            own_probability = own_logit.exp_() / total
            slopes = exponentials.div_(total)  # softmax; then dloss/dcosine, in the same buffer
            slopes.scatter_(1, index, (own_probability - 1) * slope)
            slopes.mul_(counted * scale)
            ctx.save_for_backward(embeddings, vectors, z_inverse, h_inverse, slopes)
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, row_gradient: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, vectors, z_inverse, h_inverse, slopes = ctx.saved_tensors
        z, h = embeddings.to(slopes.dtype) * z_inverse, vectors.to(slopes.dtype) * h_inverse
        slopes = slopes * row_gradient.unsqueeze(1)
        embeddings_gradient = vectors_gradient = None
        with full_precision(row_gradient.device):
            if ctx.needs_input_grad[0]:
                embeddings_gradient = tangent(slopes @ h, z, z_inverse).to(embeddings.dtype)
            if ctx.needs_input_grad[1]:
                vectors_gradient = tangent(slopes.T @ z, h, h_inverse).to(vectors.dtype)
        return embeddings_gradient, vectors_gradient, None, None, None, None
