"""Devices by name, tensors on their way to one, and what the processor is called."""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from gif.errors import InputError

AUTO = "auto"
"""The device that is a GPU if there is one, and else the CPU."""


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; from the CPU without waiting for what the device is doing."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except FileNotFoundError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def check_device(device: str) -> None:
    """Raise ValueError unless ``device`` is a name of PyTorch's, and what it names is there and can be used."""
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise InputError(f'unknown device "{device}"; give "cpu", "cuda" or "auto"') from error
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f'device "{device}" was asked for, and PyTorch sees {torch.cuda.device_count()} GPUs; look at the driver '
            'and at CUDA_VISIBLE_DEVICES, or give "cpu"'
        )
    try:
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError) as error:  # of another kind, or torch was built without
        raise InputError(f'device "{device}" cannot be used ({error}); gif doctor says which there are') from error


def resolve_device(device: str) -> torch.device:
    """The device that a name is of, "auto" among them. Errors are those of `check_device`."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == AUTO else device
    check_device(name)
    return torch.device(name)
