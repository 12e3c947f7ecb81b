"""Does this op, at my shapes, in my dtype, on my machine, compute what it says? Compare it with float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gif_kernels.dispatch import Impl
from gif_kernels.errors import InputError

ALLOWED_RATIO = 2.0
"""Our error over PyTorch's own in the same dtype (FlashAttention's rule)."""
NOISE = 32.0
"""Errors below this many units in the last place of the largest value are rounding, whatever their ratio: the scale of
a margin loss multiplies the rounding of a cosine, and in a small problem few such errors average out. Of a result that
is wider than the inputs one unit of theirs is noise too: a single number can come out right by chance."""


@dataclass(frozen=True)
class Agreement:
    """Errors of one result against float64, relative to its largest true value: ours, and plain PyTorch's."""

    name: str
    rms: float
    max: float
    torch_rms: float
    torch_max: float
    noise: float
    """The error that rounding alone may leave."""

    @property
    def ok(self) -> bool:
        """Whether both errors are within twice PyTorch's, or within rounding."""
        return all(
            ours <= max(ALLOWED_RATIO * theirs, self.noise)
            for ours, theirs in ((self.rms, self.torch_rms), (self.max, self.torch_max))
        )


def gradcheck(
    op: Callable[..., Tensor], *inputs: Any, impl: Impl = "auto", show: bool = True, **options: Any
) -> list[Agreement]:
    """Compare a loss of this package, and its gradients, with the float64 specification on the caller's own inputs.

    Three runs: ``op`` as ``impl`` runs it; the specification (impl="reference") in float64, which is taken for the
    truth; and the specification in the inputs' dtype, which is what plain PyTorch would give. Inputs are rounded to
    their dtype first, so only the computation is judged.

    Args:
        op: a differentiable function of `gif_kernels`, such as `token_margin_loss`.
        inputs: its positional arguments. Gradients are compared for the tensors that require one.
        impl: the implementation to judge.
        show: print the table.
        options: its other arguments.

    Returns:
        One `Agreement` for the value and one for each gradient.

    Raises:
        ValueError: no tensor requires a gradient, so there is nothing but a value to compare.
    """
    bound = inspect.signature(op).bind(*inputs, **options).arguments
    wanted = [name for name, value in bound.items() if isinstance(value, Tensor) and value.requires_grad]
    if not wanted:
        raise InputError("no tensor requires a gradient; call requires_grad_() on those whose gradients you train with")
    ours = _run(op, bound, wanted, impl, None)
    truth = _run(op, bound, wanted, "reference", torch.float64)
    plain = _run(op, bound, wanted, "reference", None)
    unit = max(torch.finfo(bound[name].dtype).eps for name in wanted)
    results = [
        _compare(name, unit, *found)
        for name, *found in zip(["value", *(f"d/d {name}" for name in wanted)], ours, truth, plain, strict=True)
    ]
    if show:
        print(_table(getattr(op, "__name__", str(op)), impl, results))
    return results


def _run(
    op: Callable[..., Tensor], arguments: dict[str, Any], wanted: list[str], impl: Impl, dtype: torch.dtype | None
) -> list[Tensor]:
    """The value and the wanted gradients; floating-point inputs as they are, or in ``dtype``."""
    copies = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            copies[name] = value.detach().to(dtype or value.dtype).requires_grad_(name in wanted)
    value = op(**copies, impl=impl)
    # a slope of its own for each row, so that rows that are swapped do not pass
    slope = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return [value, *torch.autograd.grad(value, [copies[name] for name in wanted], slope)]


def _compare(name: str, unit: float, ours: Tensor, truth: Tensor, plain: Tensor) -> Agreement:
    truth = truth.detach()
    largest = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)

    def error(found: Tensor) -> tuple[float, float]:
        difference = (found.detach().double() - truth) / largest
        return float(difference.square().mean().sqrt()), float(difference.abs().max())

    noise = max(NOISE * torch.finfo(ours.dtype).eps, unit)
    return Agreement(name, *error(ours), *error(plain), noise)


def _table(op: str, impl: str, results: list[Agreement]) -> str:
    lines = [
        f"{op}, impl={impl}: relative errors against float64",
        f"{'':>18} {'rms':>9} {'max':>9} {'torch rms':>10} {'torch max':>10}",
    ]
    for result in results:
        verdict = "ok" if result.ok else "TOO LARGE"
        lines.append(
            f"{result.name:>18} {result.rms:9.1e} {result.max:9.1e} {result.torch_rms:10.1e} {result.torch_max:10.1e}  "
            f"{verdict}"
        )
    return "\n".join(lines)
