"""Code contrast with its gradient written out: one product forward, two backward. Derivation in README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gif_kernels.autograd import Gradients, backward_of
from gif_kernels.code_contrast.options import CodeContrastOptions
from gif_kernels.dispatch import full_precision
from gif_kernels.precision import compute_dtype, gradient_dtype, product
from gif_kernels.reduction import row_weights
from gif_kernels.sphere import inverse_norm


def code_contrast(
    embeddings: Tensor, vectors: Tensor, targets: Tensor, competes: Tensor | None, options: CodeContrastOptions
) -> Tensor:
    """The reduced loss; arguments as of the specification."""
    loss: Tensor = _CodeContrast.apply(embeddings, vectors, targets, competes, options)
    return loss


def code_contrast_gradients(
    embeddings: Tensor, vectors: Tensor, targets: Tensor, competes: Tensor | None, options: CodeContrastOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (B,), and the gradients of their sum: of the embeddings and of the vectors."""
    losses, found = _losses(embeddings, vectors, targets, competes, options)
    of_embeddings, of_vectors = _gradients(_saved(embeddings, vectors, found, options.scale), options.operand)
    assert of_embeddings is not None and of_vectors is not None  # both are asked for
    return losses, of_embeddings, of_vectors


class _Saved(NamedTuple):
    """The tensors that the backward pass reads."""

    embeddings: Tensor
    vectors: Tensor
    row_inverse: Tensor
    """1 / ||z||, (B, 1)"""
    vector_inverse: Tensor
    """1 / ||h||, (C, 1)"""
    slopes: Tensor
    """dloss/dcosine / (||z|| ||h||), (B, C)"""


class _Found(NamedTuple):
    """What the losses and the slopes are made of."""

    logarithms: Tensor
    """log of the softmax, (B, C)"""
    own: Tensor
    """The own candidate, (B, 1)"""
    own_slope: Tensor
    """dpsi/dcosine there, (B, 1)"""
    weight: Tensor
    """Of each row in the loss, (B, 1)"""
    row_inverse: Tensor
    vector_inverse: Tensor


def _losses(
    embeddings: Tensor, vectors: Tensor, targets: Tensor, competes: Tensor | None, options: CodeContrastOptions
) -> tuple[Tensor, _Found]:
    """The weighted losses (B,), and what they were made of."""
    scale = options.scale
    dtype = compute_dtype(embeddings, vectors)
    z, h = embeddings.to(dtype), vectors.to(dtype)
    z_inverse, h_inverse = inverse_norm(z), inverse_norm(h)
    logits = product(z, h.T, options.operand, wide=True).mul_(z_inverse * scale).mul_(h_inverse.T)
    index = targets.clamp(min=0).unsqueeze(1)
    value, slope = options.margin.value_and_slope(logits.gather(1, index) / scale)
    logits.scatter_(1, index, value * scale)
    if competes is not None:
        logits.masked_fill_(~competes, -torch.inf)
    logarithms = torch.log_softmax(logits, 1)
    weight = row_weights(targets >= 0, options.reduction, dtype).unsqueeze(1)
    losses = (logarithms.gather(1, index) * -weight).squeeze(1)
    return losses, _Found(logarithms, index, slope, weight, z_inverse, h_inverse)


def _saved(embeddings: Tensor, vectors: Tensor, found: _Found, scale: float) -> _Saved:
    """What the gradients are made of. The slopes take the logarithms' memory."""
    own_slopes = torch.expm1(found.logarithms.gather(1, found.own)) * found.own_slope
    slopes = found.logarithms.exp_()  # softmax; then dloss/dcosine / (||z|| ||h||), in the same buffer
    slopes.scatter_(1, found.own, own_slopes)
    slopes.mul_(found.weight * scale * found.row_inverse).mul_(found.vector_inverse.T)
    return _Saved(embeddings, vectors, found.row_inverse, found.vector_inverse, slopes)


def _gradients(
    saved: _Saved, operand: torch.dtype, factor: Tensor | None = None, *, needed: Sequence[bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the embeddings and of the vectors, as far as they are ``needed``, times ``factor`` ()."""
    embeddings, vectors, z_inverse, h_inverse, slopes = saved
    operand = gradient_dtype(operand)
    z, h = embeddings.to(slopes.dtype), vectors.to(slopes.dtype)
    of_embeddings = of_vectors = None
    with full_precision(slopes.device):
        if needed[0]:
            of_embeddings = _tangent(product(slopes, h, operand), z, z_inverse, factor).to(embeddings.dtype)
        if needed[1]:
            of_vectors = _tangent(product(slopes.T, z, operand), h, h_inverse, factor).to(vectors.dtype)
    return of_embeddings, of_vectors


def _tangent(gradient: Tensor, rows: Tensor, inverse: Tensor, factor: Tensor | None) -> Tensor:
    """``gradient`` less its part along ``rows``, whose 1 / ||row|| ``inverse`` is, times ``factor``; in its memory."""
    radial = torch.linalg.vecdot(gradient, rows).unsqueeze(1) * inverse.square()
    torch.addcmul(gradient, rows, radial, value=-1, out=gradient)  # compiled, the method rounds in between
    return gradient if factor is None else gradient.mul_(factor)


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
        losses, found = _losses(embeddings, vectors, targets, competes, options)
        if any(ctx.needs_input_grad):
            ctx.operand = options.operand
            ctx.save_for_backward(*_saved(embeddings, vectors, found, options.scale))
        return losses if options.reduction == "none" else losses.sum()

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        saved = _Saved(*ctx.saved_tensors)
        factor: Tensor | None = incoming
        if incoming.ndim:  # one a row; a common factor is left to the gradients, which are smaller than the slopes
            saved, factor = saved._replace(slopes=saved.slopes * incoming.unsqueeze(1)), None
        of_embeddings, of_vectors = _gradients(saved, ctx.operand, factor, needed=ctx.needs_input_grad[:2])
        return {"embeddings": of_embeddings, "vectors": of_vectors}
