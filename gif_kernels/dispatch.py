"""Which implementation of an op runs, and why."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
from collections.abc import Callable
from typing import Any, Literal

import torch

from gif_kernels import checks
from gif_kernels.errors import InputError

__all__ = [
    "IMPLS",
    "INTERPRETING",
    "TRITON_INSTALLED",
    "Impl",
    "Implementation",
    "choose",
    "full_precision",
    "implementation",
    "ops",
    "register",
    "resolve",
    "select",
    "triton_packages",
    "triton_unavailable",
]

Impl = Literal["auto", "triton", "blocked", "reference"]
"""The argument ``impl`` of every op."""
Implementation = Callable[..., Any]
"""What computes an op: a function of its tensors, then its options."""
IMPLS: tuple[Impl, ...] = ("auto", "triton", "blocked", "reference")
"""Every `Impl`."""

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""Whether Triton can be imported; it is not imported to find out."""
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
"""Whether Triton runs its kernels in NumPy, on CPU tensors: slow, and how they are tested without a GPU."""

_OPS: dict[str, dict[str, Implementation]] = {}
_TRITON_OPS: dict[str, Callable[[], Implementation]] = {}


def register(op: str, *, triton: Callable[[], Implementation] | None = None, **implementations: Implementation) -> None:
    """Declare the implementations of ``op`` by name: reference, blocked and, where it exists, triton.

    ``triton`` imports the implementation and returns it. It is called when that runs for the first time, so that
    importing this package does not import Triton; an import statement in it is one that `torch.compile` traces through.
    """
    _OPS[op] = implementations
    if triton is not None:
        _TRITON_OPS[op] = triton


def select(
    op: str, impl: Impl, device: torch.device, dtype: torch.dtype = torch.float32, *, obstacle: str = ""
) -> Implementation:
    """The implementation of ``op`` that runs for ``impl``: see `resolve`."""
    return implementation(op, resolve(op, impl, device, dtype, obstacle=obstacle))


def resolve(
    op: str, impl: Impl, device: torch.device, dtype: torch.dtype = torch.float32, *, obstacle: str = ""
) -> str:
    """The name of the implementation of ``op`` that runs for ``impl`` on ``device`` and computes in ``dtype``.

    ``obstacle`` says why these very inputs are not for the Triton kernel; empty if they are. Nothing falls back
    silently: an explicit choice that cannot run raises ValueError and says why.
    """
    checks.choice("impl", impl, IMPLS)
    if impl == "auto":
        return choose(op, device, dtype, obstacle=obstacle)[0]
    if impl == "triton" and (reason := triton_unavailable(op, device, dtype) or obstacle):
        raise InputError(f'{op} cannot run with impl="triton": {reason}; use impl="auto" or impl="blocked"')
    return impl


def choose(op: str, device: torch.device, dtype: torch.dtype = torch.float32, *, obstacle: str = "") -> tuple[str, str]:
    """What impl="auto" means for ``op`` on ``device``, and the reason: ("blocked", "no Triton kernel yet")."""
    reason = triton_unavailable(op, device, dtype) or obstacle
    if not reason and device.type == "cpu":
        reason = "Triton's interpreter is for tests"
    return ("blocked", reason) if reason else ("triton", f"Triton runs on {device.type}")


def implementation(op: str, name: str) -> Implementation:
    """The implementation of ``op`` by the name that `resolve` gave."""
    return _TRITON_OPS[op]() if name == "triton" else _OPS[op][name]


def triton_unavailable(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Why the Triton kernel of ``op`` cannot run on ``device`` and compute in ``dtype``; empty if it can."""
    if op not in _TRITON_OPS:
        return f"{op} has no Triton kernel in this version"
    if not TRITON_INSTALLED:
        return f"Triton is not installed ({platform.system()})"
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETING):
        return f"Triton needs a CUDA or ROCm device, the tensors are on {device.type}"
    if device.type == "cpu" and (obstacle := _interpreter_obstacle(*_versions())):
        return obstacle
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, an input is float64"
    return ""


def _interpreter_obstacle(triton: str, numpy: str) -> str:
    """Why Triton of this version cannot interpret kernels with NumPy of that; empty if it can.

    3.5 and 3.6 make numbers of arrays of one element, which NumPy refuses since 2.4. Kernels on a GPU do not care.
    """
    old, new = (tuple(map(int, version.split(".")[:2])) for version in (triton, numpy))
    if old < (3, 7) and new >= (2, 4):
        return f"the interpreter of Triton {triton} needs NumPy before 2.4, not {numpy}: pip install 'numpy<2.4'"
    return ""


@functools.cache
def _versions() -> tuple[str, str]:
    """Of Triton and NumPy."""
    import numpy
    import triton

    return triton.__version__, numpy.__version__


def ops() -> tuple[str, ...]:
    """The names of all ops."""
    return tuple(_OPS)


def triton_packages() -> tuple[str, ...]:
    """The packages of the ops that have Triton kernels."""
    return tuple(sorted({load.__module__.rpartition(".")[0] for load in _TRITON_OPS.values()}))


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: the ops round what may be rounded themselves, and a margin's logits are not to be."""
    # The usual case is that there is nothing to turn off; but a backward pass is traced where the forward pass has
    # turned it off, and runs where it is on.
    if not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
