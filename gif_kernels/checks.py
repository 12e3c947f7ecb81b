"""Argument checks shared by the ops: each says what was given, what was wanted and what to do.

Shapes, dtypes and devices are checked everywhere. Values (ranges, NaN) are checked where looking at them costs no
synchronisation: on CPU, outside torch.compile. On an accelerator a range is asserted on the device, or answered with
NaN by the kernel that reads it, and NaN propagates to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from gif_kernels.errors import InputError
from gif_kernels.margins import AngularMargin

__all__ = [
    "FLOATING",
    "INTEGER",
    "angular_margin",
    "choice",
    "finite",
    "floating",
    "integer",
    "is_traced",
    "labels",
    "looks_at_values",
    "positive",
    "refuse_not_finite",
    "require",
    "same_device",
    "seen_not_finite",
]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of vectors that ops take."""
INTEGER = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
"""The dtypes of labels, codes and rows that ops take."""
BATCH = ("B", "n")
"""Names of dimensions that count samples and may be 0; every other dimension is at least 1."""


def looks_at_values(tensor: Tensor) -> bool:
    """Whether values may be read here without a host synchronisation or a graph break."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def is_traced(tensor: Tensor) -> bool:
    """Whether a call with ``tensor`` is recorded and not run: by torch.compile, or because the tensor has no values."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor | FunctionalTensor)


def floating(name: str, tensor: object, shape: Sequence[int | str], *, finite: bool = True) -> Tensor:
    """``tensor`` as a floating-point tensor of ``shape``: an int must match, a str names a free dimension.

    Raises TypeError for another type or dtype, ValueError for another shape, or NaN or infinity in it.
    """
    given = _tensor(name, tensor)
    if given.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {given.dtype}; convert it")
    _shape(name, given, shape)
    if finite and looks_at_values(given):
        refuse_not_finite(**{name: given})
    return given


def seen_not_finite(result: Tensor) -> bool:
    """Whether ``result`` may be looked at and holds NaN or infinity.

    It does where an input does, and reading it is cheaper than reading them: then `refuse_not_finite` says which.
    """
    return looks_at_values(result) and not math.isfinite((result.sum() if result.ndim else result).item())


def refuse_not_finite(**inputs: Tensor | None) -> None:
    """Raise ValueError that names the first input that holds NaN or infinity."""
    for name, tensor in inputs.items():
        if tensor is None or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor.detach())  # NaN propagates through both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"{name} hold NaN or infinity, wanted finite numbers; look for a diverged learning rate, "
                "a float16 overflow or broken input upstream"
            )


def integer(
    name: str,
    tensor: object,
    shape: Sequence[int | str],
    *,
    low: int,
    high: int,
    hint: str,
    asserted: bool = True,
    whole_rows: bool = False,
) -> Tensor:
    """``tensor`` as an integer tensor of ``shape`` with every value in [low, high); returned as int64, whatever it was.

    ``whole_rows`` wants a row (the last dimension) to be -1 in every entry or in none. Raises TypeError for another
    type or dtype, ValueError for another shape or a value out of range. Where values cannot be read, a device-side
    assertion takes that place, unless the kernel itself answers (``asserted`` is false).
    """
    given = _tensor(name, tensor)
    if given.dtype not in INTEGER:
        raise TypeError(f"{name} must be an integer tensor, got {given.dtype}; convert it")
    _shape(name, given, shape)
    if given.dtype == torch.uint64:
        low = max(low, 0)  # what int64 cannot hold becomes negative, and must not pass for a row to ignore
    given = given.long()
    smallest = -1
    if looks_at_values(given):
        smallest, largest = (int(x) for x in torch.aminmax(given)) if given.numel() else (low, high - 1)
        if smallest < low or largest >= high:
            raise InputError(f"{name} must lie in [{low}, {high}), got values from {smallest} to {largest}; {hint}")
    elif asserted:
        require(((given >= low) & (given < high)).all(), f"{name} must lie in [{low}, {high}); {hint}")
    if whole_rows and smallest < 0 and (asserted or looks_at_values(given)):
        ignored = given < 0
        require((ignored == ignored[..., :1]).all(), f"a row of {name} must be -1 in every entry or in none; {hint}")
    return given


def labels(name: str, tensor: object, batch: int, *, high: int, hint: str = "", asserted: bool = True) -> Tensor:
    """``tensor`` (batch,) as int64 labels in [-1, high), of which -1 ignores its row; raises as `integer` does."""
    ignores = "-1 ignores a row"
    hint = f"{ignores}; {hint}" if hint else ignores
    return integer(name, tensor, (batch,), low=-1, high=high, hint=hint, asserted=asserted)


def within(name: str, values: Tensor, end: int, hint: str) -> None:
    """Raise ValueError unless all ``values`` lie in [0, ``end``); on an accelerator assert it without waiting."""
    wanted = f"{name} must lie in [0, {end})"
    if not looks_at_values(values):
        require(((values >= 0) & (values < end)).all(), f"{wanted}; {hint}")
    elif values.numel():
        low, high = (int(x) for x in torch.aminmax(values))
        if low < 0 or high >= end:
            raise InputError(f"{wanted}, got [{low}, {high}]; {hint}")


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError(message) where ``condition`` () bool is false; on an accelerator assert it without waiting."""
    if looks_at_values(condition):
        if not bool(condition):
            raise InputError(message)
    else:
        torch._assert_async(condition, message)


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def angular_margin(margin: object) -> None:
    """Raise TypeError unless ``margin`` is an AngularMargin."""
    if not isinstance(margin, AngularMargin):
        raise TypeError(f"margin must be an AngularMargin, got {type(margin).__name__}; give AngularMargin(m2=0.5)")


def positive(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is finite and > 0."""
    _number(name, value)
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be a finite number > 0, got {value}")


def finite(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is finite."""
    _number(name, value)
    if not -math.inf < value < math.inf:
        raise InputError(f"{name} must be a finite number, got {value}")


def same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all the tensors that are given live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InputError(f"all inputs must be on one device, got {where}; move them with .to(device)")


def _number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)):  # torch 2.9 cannot compile int | float
        raise TypeError(f"{name} must be a number, got {type(value).__name__}; convert it with float()")


def _tensor(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    return tensor


def _shape(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    fits = tensor.ndim == len(shape) and all(
        size == wanted if isinstance(wanted, int) else size >= 1 or wanted in BATCH
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise InputError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
