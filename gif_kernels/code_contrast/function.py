"""Code contrast in Triton as an autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gif_kernels import checks
from gif_kernels.autograd import Gradients, backward_of
from gif_kernels.code_contrast import kernels
from gif_kernels.code_contrast.graph import backward_in_graph, forward_in_graph
from gif_kernels.code_contrast.kernels import Saved
from gif_kernels.code_contrast.options import CodeContrastOptions
from gif_kernels.dispatch import full_precision


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
    forward, backward = kernels.forward, kernels.backward
    if checks.is_traced(embeddings):
        forward, backward = forward_in_graph, backward_in_graph
    losses, *found = forward(embeddings, vectors, targets, competes, options, True)
    saved = Saved(embeddings, vectors, *found)
    one = losses.new_ones(())
    of_embeddings, of_vectors = backward(
        saved, one, options.scale, options.operand, need_embeddings=True, need_vectors=True
    )
    return losses, of_embeddings, of_vectors


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
        save = any(ctx.needs_input_grad)
        launch = forward_in_graph if checks.is_traced(embeddings) else kernels.forward
        loss, share, weights, row_inverse, vector_inverse = launch(
            embeddings, vectors, targets, competes, options, save
        )
        if save:
            saved = Saved(
                embeddings=embeddings,
                vectors=vectors,
                share=share,
                weights=weights,
                row_inverse=row_inverse,
                vector_inverse=vector_inverse,
            )
            ctx.scale, ctx.operand = options.scale, options.operand
            ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    @backward_of(forward)
    def backward(ctx: Any, incoming: Tensor) -> Gradients:
        saved = Saved(*ctx.saved_tensors)
        need_embeddings, need_vectors = ctx.needs_input_grad[:2]
        launch = backward_in_graph if checks.is_traced(incoming) else kernels.backward
        with full_precision(incoming.device):
            of_embeddings, of_vectors = launch(
                saved, incoming, ctx.scale, ctx.operand, need_embeddings=need_embeddings, need_vectors=need_vectors
            )
        return {
            "embeddings": of_embeddings if need_embeddings else None,
            "vectors": of_vectors if need_vectors else None,
        }
