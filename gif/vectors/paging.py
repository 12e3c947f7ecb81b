"""How a mapped table is going to be read, told to the operating system where it takes advice."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable

import torch
from torch import Tensor


def read_at_random(table: Tensor) -> None:
    """Rows of the mapped ``table`` will be read one here, one there: reading on past each would be for nothing."""
    _advise(torch.tensor([table.data_ptr()]), table.nbytes, "MADV_RANDOM")


def read_in_order(table: Tensor) -> None:
    """The mapped ``table`` will be read from its begin to its end."""
    _advise(torch.tensor([table.data_ptr()]), table.nbytes, "MADV_SEQUENTIAL")


def read_soon(table: Tensor, rows: Tensor) -> None:
    """Begin to read ``rows`` (n,) of the mapped, contiguous ``table`` (m, d), all at once and not one after another."""
    row_bytes = table.shape[1] * table.itemsize
    _advise(table.data_ptr() + rows * row_bytes, row_bytes, "MADV_WILLNEED")


def _advise(addresses: Tensor, length: int, advice: str) -> None:
    """Advise on ``length`` bytes from each of ``addresses`` (n,) int64."""
    if not hasattr(mmap, advice):
        return
    call, number = _madvise(), getattr(mmap, advice)
    offsets = addresses % mmap.PAGESIZE
    pages, lengths = (addresses - offsets).tolist(), (offsets + length).tolist()
    if any(call(page, size, number) for page, size in zip(pages, lengths, strict=True)):
        error = ctypes.get_errno()
        raise OSError(error, f"{advice} for a mapped table: {os.strerror(error)}")


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
