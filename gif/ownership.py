"""An output belongs to the processes of one command at a time."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import shorten

from filelock import FileLock, Timeout

from gif.distributed import first_decides, rank, world_size
from gif.errors import InputError, Interrupted, OutputError
from gif.files import remove_temporaries, writing
from gif.resume import unclaim

_COMMAND_CHARACTERS = 200  # of another process's command, in a message
_held: set[Path] = set()


def check_output(output: Path, beside: Iterable[Path] = (), inputs: Iterable[Path | None] = ()) -> None:
    """Raise OutputError where a command could not write the file ``output`` in its end, or would write over a file.

    ``beside`` are the files that it writes besides, ``inputs`` those that it reads.
    """
    if output.is_dir():
        raise OutputError(f"--output {output} is a folder; give the name of a file in it")
    given = {path.resolve() for path in inputs if path is not None}
    if output.resolve() in given:
        raise OutputError(f"--output {output} would be written over what is read; give another --output")
    for path in beside:
        if path.is_dir() and path.suffix != ".partial":
            raise OutputError(f"{path}, which this command also writes, is a folder; give another --output")
        if path == output:
            raise OutputError(
                f"--output {output} would be overwritten by what is written beside it; give {output.stem}.safetensors"
            )
        if path.resolve() in given:
            raise OutputError(f"{path}, which is read, would be overwritten beside --output {output}; give another one")


def check_folder(folder: Path) -> None:
    """Raise OutputError where no file can be written into ``folder``, which is made."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


@contextmanager
def hold(output: Path, kept: Callable[[], Path | None] = lambda: None) -> Iterator[None]:
    """Hold ``output``, a file or a folder, for the processes of this group.

    It is looked at whether something can be written there, and what killed processes left unfinished is removed. A
    folder that a run has claimed, and in which nothing but the claim is, is given up again where the run fails.

    ``kept``: where the work that is done is kept, None where there is nothing, as an interrupt's message will say.

    Raises OutputError where nothing can be written, InputError where another process holds it, named; Interrupted
    instead of KeyboardInterrupt. Where nothing is kept of work inside of other work, whoever holds that says what is.
    """
    path, inside = output.resolve(), bool(_held)
    lock = first_decides(lambda: _lock(path), local=True)
    fresh = not path.exists()
    try:
        yield
    except BaseException as error:
        if fresh and rank() == 0:
            unclaim(path)
        if isinstance(error, KeyboardInterrupt):
            raise _interrupted(error, kept(), inside) from error
        raise
    finally:
        if lock is not None:
            _release(lock, path)


def _lock(path: Path) -> FileLock | None:
    """The lock of ``path``; None where this process has it already."""
    if path in _held:
        return None
    place = path.with_name(f".{path.name}.lock")
    with writing(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = shorten(place.read_text(encoding="utf-8", errors="replace"), _COMMAND_CHARACTERS)
            raise InputError(
                f"{path} is being written by {owner or 'another process'}; wait for it, or give another output"
            ) from None
        processes = "" if world_size() == 1 else f", the first of {world_size()},"
        command = " ".join(sys.argv)
        place.write_text(f"process {os.getpid()}{processes} on {platform.node()}: {command}", encoding="utf-8")
        for name in _written_beside(path):
            remove_temporaries(path.parent, name)
    _held.add(path)
    return lock


def _written_beside(path: Path) -> set[str]:
    """Names of the unfinished files there that are called as ``path`` is, whatever their ending."""
    left_over = path.parent.glob(f".{escape(path.stem)}[.-]*.tmp")
    return {left.name[1:].rsplit(".", 2)[0] for left in left_over}


def _release(lock: FileLock, path: Path) -> None:
    _held.discard(path)
    with suppress(PermissionError):  # of Windows, where it is open; it stays then, and locks nothing
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def existing(path: Path) -> Callable[[], Path | None]:
    """What `hold` takes as ``kept`` where that is ``path``, once it is there."""
    return lambda: path if path.exists() else None


def _interrupted(stop: KeyboardInterrupt, kept: Path | None, inside: bool) -> Interrupted:
    number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
    if isinstance(stop, Interrupted) and str(stop):
        return stop
    if kept is None and inside:
        return Interrupted("", number)
    if kept is None:
        return Interrupted("interrupted; nothing was kept, and the same command begins anew", number)
    return Interrupted(f"interrupted; the same command continues from what {kept} holds", number)
