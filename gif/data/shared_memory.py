"""The shared memory that processes exchange batches through: small in containers, and filling it is a wait for ever."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from gif.errors import InputError

_PLACE = Path("/dev/shm")
_BATCHES_A_WORKER = 2  # that a DataLoader lets each read ahead
_PAGES = 2 * 4096  # that the labels of a batch take


def check_workers(workers: int, batch_size: int, image_shape: tuple[int, ...]) -> None:
    """Raise ValueError where reading processes may fill the shared memory with batches that they read ahead.

    Args:
        workers: reading processes of each process on this machine.
        batch_size: images of a batch.
        image_shape: channels, height and width of each, a byte a value.
    """
    if not workers:
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    batches = processes * (workers * _BATCHES_A_WORKER + 1)
    needed = batches * (batch_size * math.prod(image_shape) + _PAGES)
    _check_free(
        needed,
        f"{workers} workers read {batches} batches of {batch_size} images ahead",
        "lower workers (0 needs none) or the batch size",
    )


def shared_flags(count: int) -> Tensor:
    """``count`` flags, (count,) bool, all False, that processes share. Raises ValueError where there is no room."""
    _check_free(count, f"{count:,} images take a byte each there", "give fewer images")
    return torch.zeros(count, dtype=torch.bool).share_memory_()


def _check_free(needed: int, what: str, advice: str) -> None:
    if not _PLACE.is_dir():  # not Linux, which alone limits it like this
        return
    free = shutil.disk_usage(_PLACE).free
    if needed > free:
        raise InputError(
            f"{_PLACE} has {free / 1e6:,.0f} MB free, and {what}: {needed / 1e6:,.0f} MB; {advice}, or make it larger "
            "(docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm)"
        )
