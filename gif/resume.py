"""Unfinished long work in a file, so that a killed run continues where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gif.distributed import rank, world_size
from gif.errors import DamagedFileError, InputError
from gif.files import Blocks, is_temporary, load_tensors, read_json, remove_temporaries, save_tensors, write_text

SECONDS = 60.0  # between two saves
LARGEST_SHARE = 0.1  # of the time that may go into saving
RECORD = "settings.json"  # of what a folder belongs to
WHO = "identities.safetensors"  # whom the run in it is trained on
WORKING = "vectors.working.safetensors"  # the copy in which it moves code vectors that are placed in a file
_SHOWN = 80  # characters of settings that cannot be read


def own_file(path: str | Path) -> Path:
    """Where this process keeps its state: ``path`` itself where it is the only one."""
    return Path(path) if world_size() == 1 else Path(f"{path}-{rank() + 1}-of-{world_size()}")


class UnfinishedWork:
    """The state of one piece of long work, kept in ``path``; None keeps nothing.

    Args:
        path: file of the state.
        format: the kind of work, with a version.
        settings: everything that decides the result, fit for JSON; the state of a run with other settings is refused.
    """

    def __init__(self, path: str | Path | None, format: str, settings: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._format = format
        self._settings = json.dumps(settings)
        self._due = time.monotonic() + SECONDS

    def load(self) -> dict[str, Tensor] | None:
        """The tensors last saved; None where there are none.

        Raises ValueError if the file is damaged or another run's.
        """
        if self._path is None or not self._path.exists():
            return None
        if self._path.is_dir():
            raise InputError(f"{self._path} is the folder of another run, with --in_file; finish that, or remove it")
        try:
            tensors, metadata = load_tensors(self._path, format=self._format)
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}, or remove it, and the same command begins anew") from error
        if other := differences(metadata.get("settings", ""), self._settings):
            raise InputError(
                f"{self._path} is the checkpoint of another run ({other}); give the settings and the input it had to "
                "continue it, or remove it, or name another file"
            )
        return tensors

    @property
    def due(self) -> bool:
        """Whether it is time to save again: once a minute, and more rarely where saving takes long."""
        return self._path is not None and time.monotonic() >= self._due

    def save(self, tensors: Mapping[str, Tensor | Blocks]) -> None:
        """Write the state, atomically."""
        if self._path is None:
            return
        begin = time.monotonic()
        save_tensors(self._path, tensors, format=self._format, settings=self._settings)
        end = time.monotonic()
        self._due = end + max(SECONDS, (end - begin) / LARGEST_SHARE)

    def remove(self) -> None:
        """Forget the state: the work is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def claim_folder(
    folder: Path, settings: Mapping[str, Any], *, may_differ: Sequence[str] = (), longer: Sequence[str] = ()
) -> None:
    """Make ``folder`` that of a run with these ``settings`` (fit for JSON), or continue the run that it holds.

    Settings that ``may_differ``, by their names as a.b, are those of the run from now on. ``longer``: settings that
    decide for how long, of which the message says how they may differ.

    What a killed run left of its very first write is no obstacle, and is removed.

    Raises ValueError, and changes nothing, if the folder holds anything else: a run with other settings, other files.
    """
    record = folder / RECORD
    if record.exists():
        there, here = json.dumps(read_json(record)), json.dumps(settings)
        if other := differences(there, here, but=may_differ):
            hint = "" if differences(there, here, but=longer) else "; --resume longer goes on with it"
            raise InputError(
                f"{folder} holds a run with other settings ({other}; all of them are in {record}); give the settings "
                f"and the input it had to continue it, or another --output{hint}"
            )
        if there != here:
            write_text(record, json.dumps(settings, indent=2))
    elif folder.exists() and (not folder.is_dir() or not all(_is_left_over(path) for path in folder.iterdir())):
        raise InputError(f"{folder} holds something that is no run of this command; give another --output")
    else:
        write_text(record, json.dumps(settings, indent=2))
    remove_temporaries(folder)


def unclaim(folder: Path) -> None:
    """Remove a ``folder`` that holds a claim and what follows from it: of a run that failed before it did anything."""
    if folder.is_dir() and all(path.name in (RECORD, WHO, WORKING) or _is_left_over(path) for path in folder.iterdir()):
        shutil.rmtree(folder)


def _is_left_over(path: Path) -> bool:
    """Whether ``path`` is nothing but what a killed process left: an unfinished file, a lock."""
    return path.is_file() and (is_temporary(path) or (path.name.startswith(".") and path.suffix == ".lock"))


def differences(there: str, here: str, *, but: Sequence[str] = ()) -> str:
    """What differs between the settings of the run that is there and of this one, both as JSON; "" if nothing does.

    ``but``: names of settings, as a.b, that are passed over.
    """
    if there == here:
        return ""
    try:
        old, new = (dict(_flat(json.loads(text))) for text in (there, here))
    except ValueError:
        return f"its settings cannot be read: {there[:_SHOWN]!r}"
    return ", ".join(
        f"{name or 'everything'} is {_told(old, name)} there and {_told(new, name)} here"
        for name in (*old, *(name for name in new if name not in old))
        if _told(old, name) != _told(new, name) and name not in but
    )


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every single setting, by its name: nested ones as a.b."""
    if not isinstance(settings, dict) or not settings:
        yield prefix.removesuffix("."), settings
        return
    for name, value in settings.items():
        yield from _flat(value, f"{prefix}{name}.")


def _told(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not set"
