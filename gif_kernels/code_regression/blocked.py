"""Code regression with its gradient written out: three dot products a row, and nothing saved but the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.sphere import compute_dtype, inverse_norm


def code_regression_rows(embeddings: Tensor, targets: Tensor) -> Tensor:
    """1/2 (zhat . hhat - 1)^2 of each row, (B,)."""
    losses: Tensor = _CodeRegression.apply(embeddings, targets)
    return losses


class _CodeRegression(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, targets: Tensor) -> Tensor:
        dtype = compute_dtype(embeddings, targets)
        z, h = embeddings.to(dtype), targets.to(dtype)
        z_inverse, h_inverse = inverse_norm(z), inverse_norm(h)
        cosine = torch.einsum("bd,bd->b", z, h).unsqueeze(1) * z_inverse * h_inverse
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(embeddings, targets, z_inverse, h_inverse, cosine)
        return (cosine - 1).square_().squeeze(1) / 2

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, row_gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        embeddings, targets, z_inverse, h_inverse, cosine = ctx.saved_tensors
        z, h = embeddings.to(cosine.dtype) * z_inverse, targets.to(cosine.dtype) * h_inverse
        slope = (cosine - 1) * row_gradient.unsqueeze(1)
        embeddings_gradient = targets_gradient = None
        if ctx.needs_input_grad[0]:
            embeddings_gradient = torch.addcmul(h, z, cosine, value=-1).mul_(slope * z_inverse).to(embeddings.dtype)
        if ctx.needs_input_grad[1]:
            targets_gradient = torch.addcmul(z, h, cosine, value=-1).mul_(slope * h_inverse).to(targets.dtype)
        return embeddings_gradient, targets_gradient
