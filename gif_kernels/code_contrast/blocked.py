"""Code contrast with its gradient written out: one product forward, two backward. Derivation in README.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gif_kernels.autograd import Gradients, backward_of
from gif_kernels.code_contrast.options import CodeContrastOptions
from gif_kernels.dispatch import full_precision
from gif_kernels.precision import compute_dtype, gradient_dtype, product
from gif_kernels.reduction import row_weights
from gif_kernels.sphere import inverse_norm, tangent


def code_contrast(
    embeddings: Tensor, vectors: Tensor, targets: Tensor, competes: Tensor | None, options: CodeContrastOptions
) -> Tensor:
    """The reduced loss; arguments as of the specification."""
    loss: Tensor = _CodeContrast.apply(embeddings, vectors, targets, competes, options)
    return loss


class _Saved(NamedTuple):
    """The tensors that the backward pass reads."""

    embeddings: Tensor
    vectors: Tensor
    row_inverse: Tensor
    """1 / ||z||, (B, 1)"""
    vector_inverse: Tensor
    """1 / ||h||, (C, 1)"""
    slopes: Tensor
    """dloss/dcosine / ||z||, (B, C)"""


class _CodeContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        vectors: Tensor,
        targets: Tensor,
        competes: Tensor | None,
        options: CodeContrastOptions,
    ) -> Tensor:
        scale, operand = options.scale, options.operand
        dtype = compute_dtype(embeddings, vectors)
        z, h = embeddings.to(dtype), vectors.to(dtype)
        z_inverse, h_inverse = inverse_norm(z), inverse_norm(h)
        logits = product(z, (h * h_inverse).T, operand, wide=True).mul_(z_inverse * scale)
        index = targets.clamp(min=0).unsqueeze(1)
        value, slope = options.margin.value_and_slope(logits.gather(1, index) / scale)
        logits.scatter_(1, index, value * scale)
        if competes is not None:
            logits.masked_fill_(~competes, -torch.inf)
        logarithms = torch.log_softmax(logits, 1)
        del logits
        own_logarithm = logarithms.gather(1, index)
        weight = row_weights(targets >= 0, options.reduction, dtype).unsqueeze(1)
        losses = (own_logarithm * -weight).squeeze(1)
        if any(ctx.needs_input_grad):
            slopes = logarithms.exp_()  # softmax; then dloss/dcosine / ||z||, in the same buffer
            slopes.scatter_(1, index, torch.expm1(own_logarithm) * slope).mul_(weight * scale * z_inverse)
            ctx.operand = operand
            saved = _Saved(
                embeddings=embeddings, vectors=vectors, row_inverse=z_inverse, vector_inverse=h_inverse, slopes=slopes
            )
            ctx.save_for_backward(*saved)
        return losses if options.reduction == "none" else losses.sum()

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        embeddings, vectors, z_inverse, h_inverse, slopes = _Saved(*ctx.saved_tensors)
        operand = gradient_dtype(ctx.operand)
        z, h = embeddings.to(slopes.dtype), vectors.to(slopes.dtype) * h_inverse
        factor = incoming
        if incoming.ndim:  # one a row; a common factor is left to the gradients, which are smaller than the slopes
            slopes, factor = slopes * incoming.unsqueeze(1), incoming.new_ones(())
        embeddings_gradient = vectors_gradient = None
        with full_precision(incoming.device):
            if ctx.needs_input_grad[0]:
                direction = product(slopes, h, operand)
                radial = torch.linalg.vecdot(direction, z).unsqueeze(1) * z_inverse.square()
                embeddings_gradient = direction.addcmul_(z, radial, value=-1).mul_(factor).to(embeddings.dtype)
            if ctx.needs_input_grad[1]:
                direction = product(slopes.T, z, operand)
                vectors_gradient = tangent(direction, h, h_inverse * factor).to(vectors.dtype)
        return {"embeddings": embeddings_gradient, "vectors": vectors_gradient}
