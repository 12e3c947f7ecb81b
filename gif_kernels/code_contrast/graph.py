"""Code contrast in a compiled graph, where each pass is an operator of its own.

Such an operator takes plain numbers, so the options are taken apart here. The arguments on which the outputs' shapes
depend come first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gif_kernels.code_contrast.kernels import Saved, backward, forward, memory
from gif_kernels.code_contrast.options import CodeContrastOptions
from gif_kernels.device.primitives import empty_like_if
from gif_kernels.device.reduction import reduced_like
from gif_kernels.margins import AngularMargin


def forward_in_graph(
    embeddings: Tensor,
    vectors: Tensor,
    targets: Tensor,
    competes: Tensor | None,
    options: CodeContrastOptions,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kernels.forward` as one node of a compiled graph."""
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.gif_kernels.code_contrast_forward(
        embeddings=embeddings,
        vectors=vectors,
        reduction=options.reduction,
        operand=options.operand,
        save=save,
        targets=targets,
        competes=competes,
        m1=options.margin.m1,
        m2=options.margin.m2,
        m3=options.margin.m3,
        gradient=options.margin.gradient,
        scale=options.scale,
    )
    return found


@torch.library.custom_op("gif_kernels::code_contrast_forward", mutates_args=())
def _forward_op(
    embeddings: Tensor,
    vectors: Tensor,
    reduction: str,
    operand: torch.dtype,
    save: bool,
    targets: Tensor,
    competes: Tensor | None,
    m1: float,
    m2: float,
    m3: float,
    gradient: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    margin = AngularMargin(m1=m1, m2=m2, m3=m3, gradient=gradient)  # type: ignore[arg-type]
    options = CodeContrastOptions(margin=margin, scale=scale, reduction=reduction, operand=operand)  # type: ignore[arg-type]
    return forward(embeddings, vectors, targets, competes, options, save)


@_forward_op.register_fake
def _(
    embeddings: Tensor, vectors: Tensor, reduction: str, operand: torch.dtype, save: bool, *_: Any
) -> tuple[Tensor, ...]:
    losses, weights = memory(embeddings, vectors, operand, save)
    batch, count = (len(embeddings), len(vectors)) if save else (0, 0)
    return *reduced_like(losses, reduction), weights, losses.new_empty(batch), losses.new_empty(count)


def backward_in_graph(
    saved: Saved,
    incoming: Tensor,
    scale: float,
    operand: torch.dtype,
    *,
    need_embeddings: bool,
    need_vectors: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels.backward` as one node of a compiled graph."""
    found: tuple[Tensor, Tensor] = torch.ops.gif_kernels.code_contrast_backward(
        embeddings=saved.embeddings,
        vectors=saved.vectors,
        need_embeddings=need_embeddings,
        need_vectors=need_vectors,
        share=saved.share,
        weights=saved.weights,
        row_inverse=saved.row_inverse,
        vector_inverse=saved.vector_inverse,
        incoming=incoming,
        scale=scale,
        operand=operand,
    )
    return found


@torch.library.custom_op("gif_kernels::code_contrast_backward", mutates_args=())
def _backward_op(
    embeddings: Tensor,
    vectors: Tensor,
    need_embeddings: bool,
    need_vectors: bool,
    share: Tensor,
    weights: Tensor,
    row_inverse: Tensor,
    vector_inverse: Tensor,
    incoming: Tensor,
    scale: float,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor]:
    saved = Saved(embeddings, vectors, share, weights, row_inverse, vector_inverse)
    return backward(saved, incoming, scale, operand, need_embeddings=need_embeddings, need_vectors=need_vectors)


@_backward_op.register_fake
def _(embeddings: Tensor, vectors: Tensor, need_embeddings: bool, need_vectors: bool, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like_if(need_embeddings, embeddings), empty_like_if(need_vectors, vectors)
