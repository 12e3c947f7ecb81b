"""Spread a file of code vectors without holding it in memory, in one process or several."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gif.distributed import rank, wait_for_all, world_size
from gif.files import atomic_path, check_file, fsync, read_json, seal, writing
from gif.ownership import check_output, existing, hold
from gif.resume import RECORD, claim_folder
from gif.vectors.config import SpreadConfig
from gif.vectors.spread import SpreadReport, spread_code_vectors
from gif.vectors.store import CodeVectors


def spread_file(
    source: Path,
    output: Path,
    config: SpreadConfig = SpreadConfig(),  # noqa: B008 (frozen)
    *,
    device: torch.device,
    write_report: Callable[[SpreadReport], None] = lambda report: None,
) -> SpreadReport:
    """Copy the code vectors in file ``source`` to ``output`` and spread them there, as `spread_code_vectors` does.

    Until then folder ``output`` with suffix .partial holds the copy and its undo log, at most 256 MiB and an index of
    8 bytes a vector: when killed at any moment, the same call continues to the same result, unless ``source`` holds
    other vectors by now (`CodeVectors.fingerprint`): that is refused, and changes nothing. In a process group each
    process steps its share of the rows, which lie in the one file. The first process calls ``write_report`` before
    ``output`` appears: a run that is killed there has lost nothing.

    Raises FileNotFoundError, or ValueError for a bad file, a folder of another run, or an output that
    cannot be written or that another process has.
    """
    given = CodeVectors.load(source, mmap=True)
    folder = output.with_suffix(".partial")
    check_output(output, [folder], [source])
    with hold(output, existing(folder / "journal")):
        return _spread(given, source, output, folder, config, device, write_report)


def _spread(
    given: CodeVectors,
    source: Path,
    output: Path,
    folder: Path,
    config: SpreadConfig,
    device: torch.device,
    write_report: Callable[[SpreadReport], None],
) -> SpreadReport:
    working, undo_log = folder / "vectors.safetensors", folder / "journal"
    if rank() == 0:
        if undo_log.exists() and not working.exists():  # killed while this was removed: the output is there
            shutil.rmtree(folder)
        claim_folder(folder, {"command": "spread", "vectors": given.fingerprint(), **_settings(folder, config)})
        if not working.exists():
            check_file(source)
            with atomic_path(working) as temporary:
                shutil.copyfile(source, temporary)
    wait_for_all()
    table = CodeVectors.load(working, mmap=True, writable=True)
    begin, end = (len(table) * share // world_size() for share in (rank(), rank() + 1))
    report = spread_code_vectors(
        table.part(begin, end), config, device=device, checkpoint=undo_log, keep_checkpoint=True
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


def _settings(folder: Path, config: SpreadConfig) -> dict[str, Any]:
    """What ``folder`` is claimed with: the settings, or of them those that the run in it has recorded.

    Runs of earlier versions recorded those alone that they were given, and the minutes. The undo log knows all that
    decide the result.
    """
    record = folder / RECORD
    recorded = read_json(record) if record.exists() else None
    if not isinstance(recorded, dict):
        return config.settings()
    return {name: value for name, value in asdict(config).items() if name in recorded}
