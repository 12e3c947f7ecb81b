"""Token-margin loss in Triton as an autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gif_kernels.autograd import Gradients, backward_of
from gif_kernels.code_regression.function import code_regression
from gif_kernels.device.cosine_gradients import Cosines, Pulled, cosine_gradients
from gif_kernels.dispatch import full_precision
from gif_kernels.token_margin import kernels
from gif_kernels.token_margin.graph import backward_in_graph, forward_in_graph
from gif_kernels.token_margin.kernels import Found
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
    """The reduced loss; arguments as of the specification. At most MAX_VOCAB centres a token.

    With projections the kernels never see z, so the pull has its own two launches beside the products.
    """
    loss: Tensor
    if targets is None or projections is None:
        loss = _TokenMargin.apply(embeddings, centers, projections, codes, token_weights, targets, target_rows, options)
        return loss
    loss = _TokenMargin.apply(embeddings, centers, projections, codes, token_weights, None, None, options)
    return loss + options.pull * code_regression(embeddings, targets, target_rows, options.reduction, codes[:, 0])


class _Saved(NamedTuple):
    """The tensors that the backward pass reads, by the names that the kernels give them."""

    embeddings: Tensor
    projections: Tensor | None
    rows: Tensor
    centers: Tensor
    targets: Tensor | None
    target_rows: Tensor | None
    share: Tensor
    slopes: Tensor
    row_inverse: Tensor
    radial: Tensor
    center_inverse: Tensor
    pull: Tensor


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
        rows = embeddings.unsqueeze(1) if projections is None else _project(embeddings, projections, options.operand)
        save = any(ctx.needs_input_grad)
        launch = forward_in_graph if torch.compiler.is_compiling() else kernels.forward
        found = Found(*launch(rows, centers, codes, token_weights, targets, target_rows, options, save))
        if save:
            saved = _Saved(
                embeddings=embeddings,
                projections=projections,
                rows=rows,
                centers=centers,
                targets=targets,
                target_rows=target_rows,
                share=found.share,
                slopes=found.slopes,
                row_inverse=found.row_inverse,
                radial=found.radial,
                center_inverse=found.center_inverse,
                pull=found.pull,
            )
            ctx.operand = options.operand
            ctx.save_for_backward(*saved)
        return found.loss

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        saved = _Saved(*ctx.saved_tensors)
        embeddings, projections = saved.embeddings, saved.projections
        need_embeddings, need_centers, need_projections = ctx.needs_input_grad[:3]
        cosines = Cosines(
            rows=saved.rows,
            centers=saved.centers,
            slopes=saved.slopes,
            row_inverse=saved.row_inverse,
            radial=saved.radial,
            center_inverse=saved.center_inverse,
        )
        pulled = None if saved.targets is None else Pulled(saved.pull, saved.targets, saved.target_rows)
        launch = backward_in_graph if torch.compiler.is_compiling() else cosine_gradients
        row_gradient, centers_gradient = launch(
            cosines,
            pulled,
            incoming,
            saved.share,
            ctx.operand,
            need_rows=need_embeddings or need_projections,
            need_centers=need_centers,
        )
        embeddings_gradient = projections_gradient = None
        flat = row_gradient.flatten(1)  # (B, T d')
        if projections is None:
            embeddings_gradient = flat
        else:
            with full_precision(embeddings.device):
                if need_embeddings:
                    embeddings_gradient = (flat @ _flatten(projections, flat.dtype)).to(embeddings.dtype)
                if need_projections:
                    projections_gradient = (flat.T @ embeddings.to(flat.dtype)).to(projections.dtype)
                    projections_gradient = projections_gradient.view_as(projections)
        return {
            "embeddings": embeddings_gradient if need_embeddings else None,
            "centers": centers_gradient if need_centers else None,
            "projections": projections_gradient,
        }


def _project(embeddings: Tensor, projections: Tensor, operand: torch.dtype) -> Tensor:
    """u_j = P_j z, (B, l, d'), in one product; its direction does not depend on the norm of z."""
    length, inner, _ = projections.shape
    return (embeddings.to(operand) @ _flatten(projections, operand).T).view(-1, length, inner)


def _flatten(projections: Tensor, dtype: torch.dtype) -> Tensor:
    return projections.to(dtype).reshape(-1, projections.shape[-1])  # (l d', d)
