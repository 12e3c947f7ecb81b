"""Vector step: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.dispatch import Impl
from gif_kernels.errors import InputError
from gif_kernels.precision import compute_dtype
from gif_kernels.rounding import seed_on
from gif_kernels.vector_step import blocked, reference

OP = "vector_step_"


def _triton() -> dispatch.Implementation:
    from gif_kernels.vector_step.kernels import step_

    return step_


dispatch.register(
    OP,
    reference=reference.step_,
    blocked=blocked.step_,
    triton=_triton,
)

_ANY = torch.iinfo(torch.int64)


def vector_step_(
    table: Tensor,
    rows: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    seed: int | Tensor = 0,
    row_ids: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """One step of gradient descent for some rows of a table, in place: h <- h - lr g.

    Rows are directions: where the loss reads them at unit length, its gradient is tangent and falls with the length, so
    each step makes the row longer and the next one turn it by less (README.md). A row whose step is not finite, or
    leaves nothing, stays as it is to the bit: one overflow upstream must not outlive the step it spoils. Nothing of the
    table's size is read, written or allocated, and on an accelerator no host waits.

    Args:
        table: (n, d) float32, bfloat16, float16 (or float64). A low-precision table is rounded stochastically, so that
            steps below its resolution survive on average.
        rows: (B,) integer < n: the row that each gradient belongs to. A negative one is skipped. A row that is named
            more than once takes the sum of its gradients, added in the order in which they stand.
        gradient: g, (B, d); summed in float32, or in float64 where it or the table is.
        lr: the rate, a finite number.
        seed: of the rounding: an int, or () int64 on the table's device, so that a replayed CUDA graph draws anew. Both
            draw the same numbers, which follow from (seed, row, column); give each step its own.
        row_ids: (n,) integer: what the rows are called in the rounding, where the table is gathered rows of a larger
            one. None: row k is called k.
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        () int64: how many distinct rows were named and stayed.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also a row >= n (on an accelerator the
            Triton kernel skips it).
    """
    checks.floating("table", table, ("n", "d"), finite=False)
    n, width = table.shape
    rows = checks.integer(
        "rows", rows, ("B",), low=_ANY.min, high=_ANY.max, hint="name rows of the table", asserted=False
    )
    gradient = checks.floating("gradient", gradient, (len(rows), width), finite=False).detach()
    checks.finite("lr", lr)
    if row_ids is not None:
        hint = "name each row of the table"
        row_ids = checks.integer("row_ids", row_ids, (n,), low=_ANY.min, high=_ANY.max, hint=hint, asserted=False)
    _check_seed(seed)
    place = seed if isinstance(seed, Tensor) else None
    checks.same_device(table=table, rows=rows, gradient=gradient, row_ids=row_ids, seed=place)
    name = dispatch.resolve(OP, impl, table.device, compute_dtype(table, gradient))
    _check_below(rows, n, asserted=name != "triton")
    if checks.is_traced(table):
        seed = seed_on(table.device, seed)
        stayed: Tensor = torch.ops.gif_kernels.vector_step_(table, rows, gradient, row_ids, seed, float(lr), impl)
        return stayed
    return _step(table, rows, gradient, row_ids, seed, float(lr), name)


def _check_below(rows: Tensor, n: int, *, asserted: bool) -> None:
    """Raise ValueError where a row is n or more; on a device it is ``asserted``, or the kernel answers."""
    wanted, hint = f"rows must lie below {n}", "a negative one is skipped"
    if checks.looks_at_values(rows):
        if rows.numel() and (highest := int(rows.max())) >= n:
            raise InputError(f"{wanted}, got {highest}; {hint}")
    elif asserted:
        checks.require((rows < n).all(), f"{wanted}; {hint}")


def _check_seed(seed: object) -> None:
    """Raise TypeError or ValueError unless the seed is an int or () int64."""
    if not isinstance(seed, (int, Tensor)):
        raise TypeError(f"seed must be an int or a () int64 tensor, got {type(seed).__name__}")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.ndim):
        raise InputError(f"seed must be an int or () int64, got {tuple(seed.shape)} {seed.dtype}; convert it")


@torch.no_grad()
def _step(
    table: Tensor, rows: Tensor, gradient: Tensor, row_ids: Tensor | None, seed: int | Tensor, lr: float, name: str
) -> Tensor:
    if len(rows) == 0 or len(table) == 0:
        return torch.zeros((), dtype=torch.int64, device=table.device)
    with dispatch.full_precision(table.device):
        stayed: Tensor = dispatch.implementation(OP, name)(table, rows, gradient, row_ids, seed, lr)
    return stayed


@torch.library.custom_op("gif_kernels::vector_step_", mutates_args=("table",))
def _step_op(
    table: Tensor, rows: Tensor, gradient: Tensor, row_ids: Tensor | None, seed: Tensor, lr: float, impl: str
) -> Tensor:
    """The step as one node of a compiled graph."""
    name = dispatch.resolve(OP, impl, table.device, compute_dtype(table, gradient))  # type: ignore[arg-type]
    return _step(table, rows, gradient, row_ids, seed, lr, name)


@_step_op.register_fake
def _(
    table: Tensor, rows: Tensor, gradient: Tensor, row_ids: Tensor | None, seed: Tensor, lr: float, impl: str
) -> Tensor:
    return table.new_empty((), dtype=torch.int64)
