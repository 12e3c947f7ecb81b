"""What a backward pass does beside gradients, as operators of a compiled graph: code vectors step, a counter counts.

Eager mode hangs a Python function on its graph. A compiled graph knows only tensors, so here they are named: what the
backward pass writes to is an argument.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gif_kernels import vector_step_


class TableStep(NamedTuple):
    """A step of some rows of a table, and what it is recorded in.

    Attributes:
        table: (n, d), the code vectors.
        rows: (C,) int64, those that move.
        gradient: (C, d), theirs.
        lr: the rate.
        stayed: () int64, the number of rows that could not move, which is added up.
        draws: () int64, the seed of the rounding, and after the step one more; None: nothing is drawn.
        moved: (n,) bool, in which the rows are marked; None: nowhere.
    """

    table: Tensor
    rows: Tensor
    gradient: Tensor
    lr: float
    stayed: Tensor
    draws: Tensor | None
    moved: Tensor | None

    def take(self) -> None:
        """Take it."""
        seed = 0 if self.draws is None else self.draws
        self.stayed.add_(vector_step_(self.table, self.rows, self.gradient, lr=self.lr, seed=seed))
        if self.draws is not None:
            self.draws.add_(1)
        if self.moved is not None:
            self.moved.index_fill_(0, self.rows, True)


def then_step(losses: Tensor, embeddings: Tensor, of_embeddings: Tensor, step: TableStep) -> Tensor:
    """``losses`` (B,), constants, as functions of ``embeddings`` with known gradients; their backward pass steps too.

    As `gif_kernels.autograd.with_row_gradients`, but that each backward pass takes the step, not the first alone.
    """
    found: Tensor = torch.ops.gif.then_step(losses, embeddings, of_embeddings, *step)
    return found


@torch.library.custom_op("gif::then_step", mutates_args=())
def _then_step(
    losses: Tensor,
    embeddings: Tensor,
    of_embeddings: Tensor,
    table: Tensor,
    rows: Tensor,
    gradient: Tensor,
    lr: float,
    stayed: Tensor,
    draws: Tensor | None,
    moved: Tensor | None,
) -> Tensor:
    return losses.clone()


def _keep_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.of_embeddings, ctx.step = inputs[2], TableStep(*inputs[3:])  # not saved: the table has moved by then


def _take_step(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    ctx.step.take()
    of_embeddings = (ctx.of_embeddings * incoming.unsqueeze(1)).to(ctx.of_embeddings.dtype)
    return None, of_embeddings, *[None] * (1 + len(TableStep._fields))


def then_count(losses: Tensor, counter: Tensor) -> Tensor:
    """``losses`` (B,), whose backward pass adds one to ``counter`` () int64."""
    found: Tensor = torch.ops.gif.then_count(losses, counter)
    return found


@torch.library.custom_op("gif::then_count", mutates_args=())
def _then_count(losses: Tensor, counter: Tensor) -> Tensor:
    return losses.clone()


def _keep_counter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.counter = inputs[1]


def _count(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    ctx.counter.add_(1)
    return incoming, None


_then_step.register_autograd(_take_step, setup_context=_keep_step)
_then_count.register_autograd(_count, setup_context=_keep_counter)


@_then_step.register_fake
@_then_count.register_fake
def _(losses: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(losses)
