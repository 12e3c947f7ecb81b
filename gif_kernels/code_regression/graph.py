"""Code regression in a compiled graph, where each pass is an operator of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels.code_regression.kernels import backward, forward, memory
from gif_kernels.device.primitives import empty_like_if
from gif_kernels.device.reduction import reduced_like

forward_in_graph = torch.library.custom_op("gif_kernels::code_regression_forward", forward, mutates_args=())
backward_in_graph = torch.library.custom_op("gif_kernels::code_regression_backward", backward, mutates_args=())


@forward_in_graph.register_fake
def _(
    embeddings: Tensor,
    targets: Tensor,
    target_rows: Tensor | None,
    counted: Tensor | None,
    reduction: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses, norms_and_distance = memory(embeddings, save)
    return *reduced_like(losses, reduction), norms_and_distance


@backward_in_graph.register_fake
def _(
    embeddings: Tensor,
    targets: Tensor,
    target_rows: Tensor | None,
    share: Tensor,
    norms_and_distance: Tensor,
    incoming: Tensor,
    need_embeddings: bool,
    need_targets: bool,
) -> tuple[Tensor, Tensor]:
    return empty_like_if(need_embeddings, embeddings), empty_like_if(need_targets, targets)
