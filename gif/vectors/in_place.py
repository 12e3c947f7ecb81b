"""Spread a file of code vectors without holding it in memory, in one process or several."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gif.distributed import rank, wait_for_all, world_size
from gif.files import atomic_path, check_file, fsync, seal, writing
from gif.ownership import check_output, existing, hold
from gif.resume import claim_folder
from gif.vectors.spread import SpreadReport, spread_code_vectors
from gif.vectors.store import CodeVectors


def spread_file(
    source: Path,
    output: Path,
    *,
    device: torch.device,
    write_report: Callable[[SpreadReport], None] = lambda report: None,
    **options: Any,
) -> SpreadReport:
    """Copy the code vectors in file ``source`` to ``output`` and spread them there, as `spread_code_vectors` does.

    Until then folder ``output`` with suffix .partial holds the copy and its journal, at most 256 MiB and an index of 8
    bytes a vector: when killed at any moment, the same call continues to the same result, unless ``source`` holds other
    vectors by now (`CodeVectors.fingerprint`): that is refused, and changes nothing. In a process group each
    process steps its share of the rows, which lie in the one file. The first process calls ``write_report`` before
    ``output`` appears: a run that is killed there has lost nothing.

    Raises FileNotFoundError, or ValueError for a bad file, bad options, a folder of another run, or an output that
    cannot be written or that another process has.
    """
    given = CodeVectors.load(source, mmap=True)
    folder = output.with_suffix(".partial")
    check_output(output, [folder], [source])
    with hold(output, existing(folder / "journal")):
        return _spread(given, source, output, folder, device, write_report, options)


def _spread(
    given: CodeVectors,
    source: Path,
    output: Path,
    folder: Path,
    device: torch.device,
    write_report: Callable[[SpreadReport], None],
    options: dict[str, Any],
) -> SpreadReport:
    working, journal = folder / "vectors.safetensors", folder / "journal"
    if rank() == 0:
        if journal.exists() and not working.exists():  # killed while this was removed: the output is there
            shutil.rmtree(folder)
        claim_folder(folder, {"command": "spread", "vectors": given.fingerprint(), **options})
        if not working.exists():
            check_file(source)
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
        seal(working)
        write_report(report)
        with writing(output):
            working.replace(output)
            fsync(output.parent)
        shutil.rmtree(folder)
    return report
