"""Spread a file of code vectors without holding it in memory, in one process or several."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from gif.distributed import rank, wait_for_all, world_size
from gif.files import atomic_path
from gif.resume import claim_folder
from gif.vectors.spread import SpreadReport, spread_code_vectors
from gif.vectors.store import CodeVectors


def spread_file(source: Path, output: Path, *, device: torch.device, **options: Any) -> SpreadReport:
    """Copy the code vectors in file ``source`` to ``output`` and spread them there, as `spread_code_vectors` does.

    Until then folder ``output`` with suffix .partial holds the copy and its journal, at most 256 MiB and an index of 8
    bytes a vector: when killed at any moment, the same call continues to the same result, unless ``source`` holds other
    vectors by now (`CodeVectors.fingerprint`): that is refused, and changes nothing. In a process group each
    process steps its share of the rows, which lie in the one file.

    Raises FileNotFoundError, or ValueError for a bad file, bad options, or a folder of another run.
    """
    given = CodeVectors.load(source, mmap=True)
    folder = output.with_suffix(".partial")
    working, journal = folder / "vectors.safetensors", folder / "journal"
    if rank() == 0:
        if journal.exists() and not working.exists():  # killed while this was removed: the output is there
            shutil.rmtree(folder)
        claim_folder(folder, {"command": "spread", "vectors": given.fingerprint(), **options})
        if not working.exists():
            with atomic_path(working) as temporary:
                shutil.copyfile(source, temporary)
    wait_for_all()
    table = CodeVectors.load(working, mmap=True, writable=True)
    begin, end = (len(table) * share // world_size() for share in (rank(), rank() + 1))
    report = spread_code_vectors(
        table.part(begin, end), device=device, checkpoint=journal, keep_checkpoint=True, **options
    )
    wait_for_all()
    if rank() == 0:
        working.replace(output)
        shutil.rmtree(folder)
    return report
