"""Code regression with its gradient written out: three dot products a row, and nothing saved but the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gif_kernels.autograd import Gradients, backward_of
from gif_kernels.code_regression.reference import has_target
from gif_kernels.precision import compute_dtype
from gif_kernels.reduction import Reduction, row_weights
from gif_kernels.sphere import inverse_norm


@dataclass(frozen=True)
class Pull:
    """The pull of rows z towards targets h, c = zhat . hhat:  weight / 2 (c - 1)^2  and its gradient at z.

    dloss/dz = weight (c - 1) (hhat - c zhat) / ||z||  =  along z + towards h.
    """

    losses: Tensor
    """(B,)"""
    along: Tensor
    """(B, 1), of z"""
    towards: Tensor
    """(B, 1), of h"""
    back: Tensor
    """(B, 1), of h in the gradient at h, which takes z times ``towards``"""

    @staticmethod
    def of(z: Tensor, z_inverse: Tensor, targets: Tensor, target_rows: Tensor | None, weight: Tensor) -> Pull:
        """The pull of rows z (B, d), in the computation's dtype, with 1 / ||z|| (B, 1) and weights (B,).

        A row whose target row is -1 is not pulled.
        """
        h = _gather(targets, target_rows).to(z.dtype)
        h_inverse = inverse_norm(h)
        cosine = torch.linalg.vecdot(z, h).unsqueeze(1) * z_inverse * h_inverse
        weight = weight.unsqueeze(1)
        if target_rows is not None:
            weight = weight * (target_rows >= 0).unsqueeze(1)
        slope = weight * (cosine - 1)
        return Pull(
            losses=(slope * (cosine - 1)).squeeze(1) / 2,
            along=-slope * cosine * z_inverse.square(),
            towards=slope * z_inverse * h_inverse,
            back=-slope * cosine * h_inverse.square(),
        )

    @staticmethod
    def add_(gradient: Tensor, targets: Tensor, target_rows: Tensor | None, towards: Tensor) -> Tensor:
        """``gradient`` (B, d) += towards h, in place."""
        return gradient.addcmul_(_gather(targets, target_rows).to(gradient.dtype), towards)


def code_regression(embeddings: Tensor, targets: Tensor, target_rows: Tensor | None, reduction: Reduction) -> Tensor:
    """The reduced loss; arguments as of the specification."""
    loss: Tensor = _CodeRegression.apply(embeddings, targets, target_rows, reduction)
    return loss


class _Saved(NamedTuple):
    """The tensors that the backward pass reads; the last three are those of `Pull`."""

    embeddings: Tensor
    targets: Tensor
    target_rows: Tensor | None
    along: Tensor
    towards: Tensor
    back: Tensor


class _CodeRegression(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, targets: Tensor, target_rows: Tensor | None, reduction: Reduction
    ) -> Tensor:
        z = embeddings.to(compute_dtype(embeddings, targets))
        counted = has_target(z, target_rows)
        pull = Pull.of(z, inverse_norm(z), targets, target_rows, row_weights(counted, reduction, z.dtype))
        if any(ctx.needs_input_grad):
            saved = _Saved(
                embeddings=embeddings,
                targets=targets,
                target_rows=target_rows,
                along=pull.along,
                towards=pull.towards,
                back=pull.back,
            )
            ctx.save_for_backward(*saved)
        return pull.losses if reduction == "none" else pull.losses.sum()

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        embeddings, targets, target_rows, along, towards, back = _Saved(*ctx.saved_tensors)
        z = embeddings.to(along.dtype)
        factor = incoming.view(-1, 1)  # one, or one a row
        towards = towards * factor
        embeddings_gradient = targets_gradient = None
        if ctx.needs_input_grad[0]:
            embeddings_gradient = Pull.add_(z * (along * factor), targets, target_rows, towards).to(embeddings.dtype)
        if ctx.needs_input_grad[1]:  # without target_rows alone
            targets_gradient = (targets.to(z.dtype) * (back * factor)).addcmul_(z, towards).to(targets.dtype)
        return {"embeddings": embeddings_gradient, "targets": targets_gradient}


def _gather(targets: Tensor, target_rows: Tensor | None) -> Tensor:
    return targets if target_rows is None else targets[target_rows.clamp(min=0)]
