"""Where a table of code vectors lies while training reads and moves its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from gif.distributed import first_decides, world_size
from gif.errors import InputError
from gif.files import is_mapped
from gif.head import Placement
from gif.packages import needs
from gif.vectors.divided import DividedCodeVectors
from gif.vectors.store import CodeVectors
from gif_kernels import checks

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
DEVICE_SHARE, HOST_SHARE = 0.5, 0.7
"""Of the memory that is free: activations need the rest of a device's, and the loader and page cache of a host's."""


@dataclass(frozen=True)
class Place:
    """Where a table lies, and why."""

    placement: Literal["device", "host", "file"]
    reason: str

    def __str__(self) -> str:
        return f"{self.placement} ({self.reason})"


def choose_placement(
    table_bytes: int, device: torch.device, placement: Placement = "auto", *, processes: int = 1
) -> Place:
    """Where a table of so many bytes goes whose steps are on ``device``: "auto" takes the fastest place that it fits.

    Each of ``processes`` on one machine has its part of it. "device" is the memory of the device; on a CPU that is the
    host's. Raises ValueError for an unknown placement, or a device without room.
    """
    checks.choice("placement", placement, PLACEMENTS)
    part = -(-table_bytes // processes)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        fits, told = part <= DEVICE_SHARE * free, f"{_gib(part)} of {_gib(free)} that are free on {device}"
        if placement == "device" and part > free:
            raise InputError(f"the code vectors take {told}; give --placement host or file, or more processes")
        if placement == "device" or (placement == "auto" and fits):
            return Place("device", told)
    free = psutil_memory().available
    told = f"{_gib(table_bytes)} of {_gib(free)} that are free on the host"
    if placement == "auto":
        placement = "host" if table_bytes <= HOST_SHARE * free else "file"
    return Place(placement, told)


def place_code_vectors(
    vectors: CodeVectors, device: torch.device, placement: Placement, working: Path, *, moves: bool, goes_on: bool
) -> tuple[CodeVectors, Place]:
    """``vectors`` for training on ``device``, and where they are now.

    Those that training ``moves`` are divided among the processes of a group, and on the host or on a device they are a
    copy. In a file they are a copy too, ``working``, which a run that ``goes_on`` finds as it was. Those that stay as
    they are stay in the file that they are mapped from, unless they are wanted or fit elsewhere.
    """
    place = first_decides(
        lambda: choose_placement(vectors.table.nbytes, device, placement, processes=world_size() if moves else 1)
    )
    assert place is not None  # the first process has decided
    stays = is_mapped(vectors.table) and not moves
    if place.placement == "file" or (place.placement == "host" and placement == "auto" and stays):
        return (vectors if stays else _in_file(vectors, working, goes_on)), place
    divides = moves and world_size() > 1
    own = DividedCodeVectors.of(vectors) if divides else vectors
    target = device if place.placement == "device" else torch.device("cpu")
    copied = own.table if divides or not is_mapped(own.table) else own.table.clone()
    return own.with_table(copied.to(target)), place


def _in_file(vectors: CodeVectors, working: Path, goes_on: bool) -> CodeVectors:
    def make() -> None:
        if not (goes_on and working.exists()):
            working.parent.mkdir(parents=True, exist_ok=True)
            vectors.save(working)

    first_decides(make)
    there = CodeVectors.load(working, mmap=True, writable=True)
    return DividedCodeVectors.of(there) if world_size() > 1 else there


def psutil_memory() -> Any:
    """What psutil says of the host's memory: total, available and more, in bytes."""
    with needs("psutil", "looking at the memory that is free"):
        import psutil
    return psutil.virtual_memory()


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
