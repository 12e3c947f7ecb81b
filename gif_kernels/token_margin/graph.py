"""Token-margin loss in a compiled graph, where each pass is an operator of its own.

Such an operator takes plain numbers, so the options are taken apart here. The arguments on which the outputs' shapes
depend come first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gif_kernels.device.cosine_gradients import Cosines, Pulled, cosine_gradients
from gif_kernels.device.primitives import empty_like_if
from gif_kernels.device.reduction import reduced_like
from gif_kernels.margins import AngularMargin
from gif_kernels.token_margin.kernels import forward, memory
from gif_kernels.token_margin.options import TokenMarginOptions


def forward_in_graph(
    rows: Tensor,
    centers: Tensor,
    codes: Tensor,
    token_weights: Tensor | None,
    targets: Tensor | None,
    target_rows: Tensor | None,
    options: TokenMarginOptions,
    save: bool,
) -> tuple[Tensor, ...]:
    """`kernels.forward` as one node of a compiled graph."""
    found: tuple[Tensor, ...] = torch.ops.gif_kernels.token_margin_forward(
        rows=rows,
        centers=centers,
        targets=targets,
        reduction=options.reduction,
        save=save,
        codes=codes,
        token_weights=token_weights,
        target_rows=target_rows,
        m1=options.margin.m1,
        m2=options.margin.m2,
        m3=options.margin.m3,
        gradient=options.margin.gradient,
        scale=options.scale,
        pull=options.pull,
        operand=options.operand,
    )
    return found


@torch.library.custom_op("gif_kernels::token_margin_forward", mutates_args=())
def _forward_op(
    rows: Tensor,
    centers: Tensor,
    targets: Tensor | None,
    reduction: str,
    save: bool,
    codes: Tensor,
    token_weights: Tensor | None,
    target_rows: Tensor | None,
    m1: float,
    m2: float,
    m3: float,
    gradient: str,
    scale: float,
    pull: float,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    margin = AngularMargin(m1=m1, m2=m2, m3=m3, gradient=gradient)  # type: ignore[arg-type]
    options = TokenMarginOptions(margin=margin, scale=scale, pull=pull, reduction=reduction, operand=operand)  # type: ignore[arg-type]
    return tuple(forward(rows, centers, codes, token_weights, targets, target_rows, options, save))  # type: ignore[return-value]


@_forward_op.register_fake
def _(rows: Tensor, centers: Tensor, targets: Tensor | None, reduction: str, save: bool, *_: Any) -> tuple[Tensor, ...]:
    found = memory(rows, centers, targets is not None, save)
    loss, share = reduced_like(found.loss, reduction)
    return tuple(found._replace(loss=loss, share=share))


def backward_in_graph(
    cosines: Cosines,
    pulled: Pulled | None,
    incoming: Tensor,
    share: Tensor,
    operand: torch.dtype,
    *,
    need_rows: bool,
    need_centers: bool,
) -> tuple[Tensor, Tensor]:
    """`cosine_gradients` as one node of a compiled graph."""
    pull, targets, target_rows = pulled or (None, None, None)
    found: tuple[Tensor, Tensor] = torch.ops.gif_kernels.token_margin_backward(
        rows=cosines.rows,
        centers=cosines.centers,
        need_rows=need_rows,
        need_centers=need_centers,
        slopes=cosines.slopes,
        row_inverse=cosines.row_inverse,
        radial=cosines.radial,
        center_inverse=cosines.center_inverse,
        pull=pull,
        targets=targets,
        target_rows=target_rows,
        incoming=incoming,
        share=share,
        operand=operand,
    )
    return found


@torch.library.custom_op("gif_kernels::token_margin_backward", mutates_args=())
def _backward_op(
    rows: Tensor,
    centers: Tensor,
    need_rows: bool,
    need_centers: bool,
    slopes: Tensor,
    row_inverse: Tensor,
    radial: Tensor,
    center_inverse: Tensor,
    pull: Tensor | None,
    targets: Tensor | None,
    target_rows: Tensor | None,
    incoming: Tensor,
    share: Tensor,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor]:
    cosines = Cosines(rows, centers, slopes, row_inverse, radial, center_inverse)
    pulled = None if pull is None or targets is None else Pulled(pull, targets, target_rows)
    return cosine_gradients(cosines, pulled, incoming, share, operand, need_rows=need_rows, need_centers=need_centers)


@_backward_op.register_fake
def _(rows: Tensor, centers: Tensor, need_rows: bool, need_centers: bool, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like_if(need_rows, rows), empty_like_if(need_centers, centers)
