"""How a killed run continues: copies of a table in memory, an undo log for one in a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gif.distributed import least_of_processes, rank, wait_for_all, world_size
from gif.errors import InputError
from gif.files import fsync, load_tensors, remove_temporaries, save_tensors
from gif.resume import UnfinishedWork
from gif.vectors.distributed_table import DistributedTable, Round
from gif.vectors.store import digest_rows

CHECKPOINT_FORMAT = "gif.spread_checkpoint/2"
UNDO_BYTES = 1 << 28  # the size of an undo log at most, or one round
SAMPLE = 256  # rows by which a table's file is known again


class Recovery(ABC):
    """What a run in rounds needs so that it can be killed; this class itself keeps nothing.

    A round is done once `done` is called for it. `remember` keeps what cannot be computed again.
    """

    @abstractmethod
    def load(self, record: Tensor) -> int:
        """Restore the table, and ``record`` in place, to a state after so many rounds; 0 where there is nothing."""

    @abstractmethod
    def remember(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or what it returned when this run was at this place before."""

    @abstractmethod
    def forget(self, name: str) -> None:
        """What was remembered is not needed after the rounds that are done."""

    @abstractmethod
    def before(self, round: Round, rows: Tensor) -> None:
        """Called in another thread before the round's rows are overwritten; ``rows`` are what they were."""

    @abstractmethod
    def done(self, finished: int, record: Tensor) -> None:
        """``finished`` rounds are in the table."""

    @abstractmethod
    def interrupted(self, finished: int, record: Tensor) -> None:
        """The run ends early, with the table as after ``finished`` rounds."""

    @abstractmethod
    def finish(self, finished: int, record: Tensor, *, keep: bool) -> None:
        """The run has come to its end: drop what was kept, or ``keep`` the end, so that `load` gives it."""


class Copies(Recovery):
    """The table in memory is copied to ``checkpoint``, once a minute and on interruption; None keeps nothing."""

    def __init__(self, table: DistributedTable, checkpoint: Path | None, settings: Mapping[str, Any]) -> None:
        self._own = table.own
        self._kept: dict[str, Tensor] = {}
        self._work = UnfinishedWork(checkpoint, CHECKPOINT_FORMAT, settings)

    def load(self, record: Tensor) -> int:
        saved = self._work.load()
        if saved is None:
            return 0
        self._own.copy_(saved.pop("vectors"))
        record.copy_(saved.pop("losses"))
        finished = int(saved.pop("finished"))
        self._kept = saved
        return finished

    def remember(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def forget(self, name: str) -> None:
        self._kept.pop(name, None)

    def before(self, round: Round, rows: Tensor) -> None:
        pass

    def done(self, finished: int, record: Tensor) -> None:
        if self._work.due:
            self.interrupted(finished, record)

    def interrupted(self, finished: int, record: Tensor) -> None:
        state = {"vectors": self._own, "losses": record, "finished": torch.tensor(finished)}
        self._work.save({**self._kept, **state})

    def finish(self, finished: int, record: Tensor, *, keep: bool) -> None:
        if keep:
            self.interrupted(finished, record)
        else:
            self._work.remove()


class UndoLog(Recovery):
    """The table in ``file`` is changed in place; folder ``checkpoint`` holds what undoes the changes since a state.

    Before rows are overwritten their old values are on the disk. Now and then the table's file is flushed, the number
    of rounds in it is written, and older values are dropped. Whenever the run is killed, or the machine, undoing the
    newer rounds gives that state. Each process keeps its own rows' values, and all flush after the same rounds.
    """

    def __init__(
        self, table: DistributedTable, file: Path, checkpoint: Path, settings: Mapping[str, Any], round_rows: int
    ) -> None:
        self._table = table
        self._file = file
        self._folder = checkpoint
        self._work = UnfinishedWork(self._path("state"), CHECKPOINT_FORMAT, settings)
        row_bytes = table.width * table.own.itemsize
        self._interval = max(1, UNDO_BYTES // (round_rows * row_bytes))
        rows = len(table.own)
        self._sample = torch.arange(0, rows, max(1, rows // SAMPLE))
        self._flushed = 0
        self._forgotten: list[Path] = []

    def load(self, record: Tensor) -> int:
        if rank() == 0:
            remove_temporaries(self._folder, held=True)
        wait_for_all()
        saved = self._work.load()
        finished = least_of_processes(-1 if saved is None else int(saved["finished"]))
        if saved is not None:
            self._check_table(saved)
        if saved is not None and finished >= 0:
            record.copy_(saved["losses"])
        for path in sorted(self._undo_files(), reverse=True):
            if _number(path) >= finished:
                old, _ = load_tensors(path, format=CHECKPOINT_FORMAT)
                self._table.put(old["rows"], old["vectors"])
        self._flush(max(finished, 0), record)
        return self._flushed

    def remember(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        path = self._path(name)
        if least_of_processes(path.exists()):
            return load_tensors(path, format=CHECKPOINT_FORMAT)[0][name]
        made = make()
        save_tensors(path, {name: made}, format=CHECKPOINT_FORMAT)
        return made

    def forget(self, name: str) -> None:
        self._forgotten.append(self._path(name))  # until the table is flushed, a resumed run may need it

    def before(self, round: Round, rows: Tensor) -> None:
        save_tensors(self._undo(round.number), {"rows": round.rows, "vectors": rows}, format=CHECKPOINT_FORMAT)

    def done(self, finished: int, record: Tensor) -> None:
        if finished - self._flushed >= self._interval:
            self._flush(finished, record)

    def interrupted(self, finished: int, record: Tensor) -> None:
        pass

    def finish(self, finished: int, record: Tensor, *, keep: bool) -> None:
        self._flush(finished, record)
        if keep:
            return
        wait_for_all()
        for path in self._folder.glob(f"*.{rank()}.safetensors"):
            path.unlink()
        wait_for_all()
        if rank() == 0:
            self._folder.rmdir()

    def _flush(self, finished: int, record: Tensor) -> None:
        """Make the table on the disk that after ``finished`` rounds; older values are needed by no process then."""
        fsync(self._file)
        sample = self._table.take(self._sample)
        self._work.save({"losses": record, "finished": torch.tensor(finished), "sample": sample})
        wait_for_all()
        for path in self._undo_files():
            if _number(path) < finished:
                path.unlink()
        while self._forgotten:
            self._forgotten.pop().unlink(missing_ok=True)
        self._flushed = finished

    def _check_table(self, saved: dict[str, Tensor]) -> None:
        """Raise ValueError, having changed nothing, if undoing would not give the table of the ``saved`` state."""
        found = self._table.take(self._sample)
        for path in sorted(self._undo_files(), reverse=True):
            if _number(path) >= int(saved["finished"]):
                old, _ = load_tensors(path, format=CHECKPOINT_FORMAT)
                place = torch.searchsorted(self._sample, old["rows"]).clamp_max(len(self._sample) - 1)
                hit = self._sample[place] == old["rows"]
                found[place[hit]] = old["vectors"][hit].to(found.device)
        if not torch.equal(found.cpu(), saved["sample"]):
            raise InputError(
                f"{self._file} is not the table that {self._folder} continues: other vectors were written there since; "
                "put that table back, or remove the folder to begin anew"
            )

    def _undo_files(self) -> list[Path]:
        return list(self._folder.glob(f"undo-*.{rank()}.safetensors"))

    def _undo(self, number: int) -> Path:
        return self._path(f"undo-{number:012d}")

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.{rank()}.safetensors"


def _number(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("undo-"))


def recovery(
    table: DistributedTable,
    file: Path | None,
    checkpoint: str | Path | None,
    settings: Mapping[str, Any],
    round_rows: int,
) -> Recovery:
    """What keeps a run of these ``settings`` in ``checkpoint``: an undo log where there is a ``file``, else copies.

    ``round_rows``: own rows of a round.
    """
    settings = {**settings, "processes": world_size()}
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and file is not None:
        return UndoLog(table, file, path, {**settings, "file": str(file.resolve())}, round_rows)
    if path is not None and world_size() > 1:
        raise InputError(
            "several processes keep a checkpoint of a table in a file only; give CodeVectors.load(path, mmap=True, "
            "writable=True), or no checkpoint"
        )
    return Copies(table, path, {**settings, "vectors": None if path is None else digest_rows(table.own)})
