"""Uniformity step: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.dispatch import Impl
from gif_kernels.errors import InputError
from gif_kernels.precision import compute_dtype
from gif_kernels.uniformity_step import blocked, reference
from gif_kernels.uniformity_step.options import UniformityStepOptions

OP = "uniformity_step_"


def _triton() -> dispatch.Implementation:
    from gif_kernels.uniformity_step.kernels import step_

    return step_


dispatch.register(
    OP,
    reference=reference.step_,
    blocked=blocked.step_,
    triton=_triton,
)


def uniformity_step_(
    table: Tensor, index: Tensor, *, lr: float, t: float = 2.0, seed: int = 0, impl: Impl = "auto"
) -> Tensor:
    """One step of SGD on the Gaussian potential among n rows of a table, in place: h <- normalise(h - lr n dL/dh).

    The rate is per vector: the gradient of a mean over pairs shrinks as 1 / n, and n undoes that, so one rate serves
    any subset size (the paper's lr = 0.1 on the mean loss hardly moves a large table). Nothing of the table's size is
    read, written or allocated.

    Args:
        table: (m, d) float32, bfloat16, float16 (or float64); rows are normalised before the step and after it. A
            low-precision table is rounded stochastically, so that steps below its resolution survive on average.
        index: (n,) integer, n >= 2 distinct rows in [0, m).
        lr: the rate per vector, > 0.
        t: the potential's t, > 0.
        seed: of the stochastic rounding; give each step its own.
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        () the potential among the rows before the step.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also NaN, a row out of range or named twice.
    """
    checks.floating("table", table, ("m", "d"), finite=False)
    index = checks.integer("index", index, ("n",), low=0, high=len(table), hint="name rows of the table")
    if len(index) < 2:
        raise InputError(f"index must name at least 2 rows to form a pair, got {len(index)}")
    if checks.looks_at_values(index) and len(index.unique()) < len(index):
        raise InputError("index names a row more than once; give distinct rows")
    checks.positive("lr", lr)
    checks.positive("t", t)
    checks.same_device(table=table, index=index)
    if checks.is_traced(table):
        loss: Tensor = torch.ops.gif_kernels.uniformity_step_(table, index, float(lr), float(t), seed, impl)
        return loss
    return _step(table, index, UniformityStepOptions(lr=float(lr), t=float(t), seed=seed), impl)


@torch.no_grad()
def _step(table: Tensor, index: Tensor, options: UniformityStepOptions, impl: Impl) -> Tensor:
    implementation = dispatch.select(OP, impl, table.device, compute_dtype(table))
    with dispatch.full_precision(table.device):
        loss: Tensor = implementation(table, index, options)
    return loss


@torch.library.custom_op("gif_kernels::uniformity_step_", mutates_args=("table",))
def _step_op(table: Tensor, index: Tensor, lr: float, t: float, seed: int, impl: str) -> Tensor:
    """The step as one node of a compiled graph."""
    return _step(table, index, UniformityStepOptions(lr=lr, t=t, seed=seed), impl)  # type: ignore[arg-type]


@_step_op.register_fake
def _(table: Tensor, index: Tensor, lr: float, t: float, seed: int, impl: str) -> Tensor:
    return table.new_empty((), dtype=compute_dtype(table))
