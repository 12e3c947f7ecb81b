"""Code regression in Triton as an autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gif_kernels.autograd import Gradients, backward_of
from gif_kernels.code_regression import kernels
from gif_kernels.code_regression.graph import backward_in_graph, forward_in_graph
from gif_kernels.reduction import Reduction


def code_regression(
    embeddings: Tensor,
    targets: Tensor,
    target_rows: Tensor | None,
    reduction: Reduction,
    counted: Tensor | None = None,
) -> Tensor:
    """The reduced loss; arguments as of the specification.

    ``counted`` (B,) integer, any stride, says by values >= 0 which rows count, where ``target_rows`` do not.
    """
    counted = target_rows if counted is None else counted
    loss: Tensor = _CodeRegression.apply(embeddings, targets, target_rows, counted, reduction)
    return loss


class _Saved(NamedTuple):
    """The tensors that the backward pass reads."""

    embeddings: Tensor
    targets: Tensor
    target_rows: Tensor | None
    share: Tensor
    """See `reduced`."""
    norms_and_distance: Tensor
    """1 / ||z||, 1 / ||h||, cosine - 1, (B, 3)"""


class _CodeRegression(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        targets: Tensor,
        target_rows: Tensor | None,
        counted: Tensor | None,
        reduction: Reduction,
    ) -> Tensor:
        save = any(ctx.needs_input_grad)
        launch = forward_in_graph if torch.compiler.is_compiling() else kernels.forward
        loss, share, norms_and_distance = launch(
            embeddings=embeddings,
            targets=targets,
            target_rows=target_rows,
            counted=counted,
            reduction=reduction,
            save=save,
        )
        if save:
            saved = _Saved(
                embeddings=embeddings,
                targets=targets,
                target_rows=target_rows,
                share=share,
                norms_and_distance=norms_and_distance,
            )
            ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        saved = _Saved(*ctx.saved_tensors)
        need_embeddings, need_targets = ctx.needs_input_grad[:2]
        launch = backward_in_graph if torch.compiler.is_compiling() else kernels.backward
        embeddings_gradient, targets_gradient = launch(
            embeddings=saved.embeddings,
            targets=saved.targets,
            target_rows=saved.target_rows,
            share=saved.share,
            norms_and_distance=saved.norms_and_distance,
            incoming=incoming,
            need_embeddings=need_embeddings,
            need_targets=need_targets,
        )
        return {
            "embeddings": embeddings_gradient if need_embeddings else None,
            "targets": targets_gradient if need_targets else None,
        }
