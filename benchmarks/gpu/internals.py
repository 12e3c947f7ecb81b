"""The few places where a measurement reaches into the kernels: a tile, a design, what a compilation came to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch

from gif_kernels.device import tuning
from gif_kernels.device.tuning import FUSED_POTENTIAL, TILES, Tile, architecture
from gif_kernels.gaussian_potential import kernels as potential_kernels

FUSED = "gaussian_potential_fused"
"""The kernel whose tiles go by width: in `FUSED_POTENTIAL`, not in `TILES`."""
ALWAYS = 1 << 60
SHARED_H100 = 227 << 10


def clear_caches() -> None:
    """Forget the constants that launches remember, which were made from tiles."""
    for name, module in list(sys.modules.items()):
        if name.startswith("gif_kernels"):
            for found in vars(module).values():
                if hasattr(found, "cache_clear"):
                    found.cache_clear()


@contextmanager
def fresh_caches(*patches: Any) -> Iterator[None]:
    """Apply the patches; nothing that a launch remembers comes in from before, or stays after."""
    with ExitStack() as stack:
        for found in patches:
            stack.enter_context(found)
        clear_caches()
        try:
            yield
        finally:
            clear_caches()


@contextmanager
def with_tile(kernel: str, operand: int, tile: Tile, device: str) -> Iterator[None]:
    """``kernel`` with another tile for operands of so many bytes; the fused potential's for every width and dtype."""
    if kernel == FUSED:
        with potential_design("fused", tile=tile):
            yield
        return
    key = (architecture(torch.device(device)), operand)
    with fresh_caches(patch.dict(TILES[kernel], {key: tile})):
        yield


def architecture_name(device: str) -> str:
    """The name of a device's architecture, as the tables of tiles write it."""
    return architecture(torch.device(device))


def shared_memory() -> int:
    """Bytes of shared memory that a program may use on this card, or on an H100 where there is none."""
    if not torch.cuda.is_available():
        return SHARED_H100
    return int(torch.cuda.get_device_properties().shared_memory_per_block_optin)


def shipped_tile(kernel: str, operand: int, device: str) -> Tile:
    """The tile that this device takes of ``kernel`` for operands of so many bytes."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[operand]
    return tuning.tile(kernel, dtype, architecture(torch.device(device)))


def shipped_tiles(kernel: str, operand: int, device: str) -> list[tuple[Tile, bool]]:
    """Every tile that is shipped for operands of so many bytes and NVIDIA, and whether it is this device's own."""
    own = shipped_tile(kernel, operand, device)
    others = [tile for (name, size), tile in TILES[kernel].items() if size == operand and name.startswith("sm_")]
    return [(tile, tile == own) for tile in dict.fromkeys([own, *others])]


def tile_sizes(tile: Tile) -> dict[str, int]:
    """The sizes of a tile, without how they were chosen."""
    return {name: value for name, value in vars(tile).items() if name != "source"}


def tile_name(tile: Tile) -> str:
    """A tile as the tables of results write it."""
    return ", ".join(f"{name}={value}" for name, value in tile_sizes(tile).items())


def fused_tiles() -> list[tuple[str, int, Tile]]:
    """Architecture, largest width and tile of every fused potential that is shipped."""
    return [(name, width, tile) for name, tiles in FUSED_POTENTIAL.items() for width, tile in tiles.items()]


def fused_tile(width: int, device: str) -> Tile | None:
    """The fused potential's tile of this device for bfloat16 rows of ``width``."""
    return tuning.fused_potential_tile(torch.bfloat16, width, architecture(torch.device(device)))


@contextmanager
def looked_up(found: set[str]) -> Iterator[None]:
    """Adds to ``found`` the kernels whose tiles are looked up in the block."""

    class Watched(dict[str, Any]):
        def __getitem__(self, kernel: str) -> Any:
            found.add(kernel)
            return super().__getitem__(kernel)

    with fresh_caches(patch.object(tuning, "TILES", Watched(TILES))):
        yield


Design = Literal["shipped", "fused", "blocks"]


@contextmanager
def potential_design(design: Design, *, tile: Tile | None = None, block: int | None = None) -> Iterator[None]:
    """The Gaussian potential by one of its designs, whatever the table says; rows of a block in the second."""
    patches = []
    if design == "fused":
        patches = [patch.object(potential_kernels, "FUSED_UP_TO", ALWAYS)]
        if tile is not None:
            patches.append(patch.object(potential_kernels, "fused_potential_tile", lambda *_: tile))
    elif design == "blocks":
        patches = [
            patch.object(potential_kernels, "FUSED_UP_TO", 0),
            patch.object(potential_kernels, "fused_potential_tile", lambda *_: None),
        ]
    if block is not None:
        patches.append(patch.object(potential_kernels, "BLOCK", block))
    with fresh_caches(*patches):
        yield


def fused_up_to() -> int:
    """Rows beyond which the potential goes from the fused design to blocks."""
    return int(potential_kernels.FUSED_UP_TO)


def spilled() -> Callable[[], int]:
    """A function that says how many registers a thread has spilled at most, in kernels that were compiled since.

    Triton keeps what it compiled by device in ``device_caches``. Interpreted kernels have none, and spill none.
    """

    def compiled() -> dict[int, Any]:
        modules = [module for name, module in list(sys.modules.items()) if name.startswith("gif_kernels")]
        kernels = [found for module in modules for found in vars(module).values() if hasattr(found, "device_caches")]
        caches = [cache for kernel in kernels for cache in kernel.device_caches.values()]
        return {id(built): built for cache in caches for built in cache[0].values()}

    before = compiled()

    def since() -> int:
        return max((int(built.n_spills) for key, built in compiled().items() if key not in before), default=0)

    return since
