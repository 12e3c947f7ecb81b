"""Damaged files: each gives what was written, a refusal in one line that names it, or a fallback that is documented."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from random import Random

from benchmarks.campaign.formats import FORMATS, Format, Reading
from benchmarks.campaign.mutations import mutate
from benchmarks.campaign.records import Found, Kind
from gif.errors import InputError
from gif.progress import console

PART = "mutations"


def kinds(folder: Path) -> list[Kind]:
    """A kind a format, of the files that `write_all` has made in ``folder``."""
    return [
        *(Kind(PART, format.name, partial(_attempt, folder, format)) for format in FORMATS),
        Kind(PART, "index in the cache", partial(_attempt_index, folder)),
    ]


def write_all(folder: Path) -> None:
    """The files of every format, each in a folder of its name."""
    for format in FORMATS:
        (place := folder / format.name).mkdir(parents=True)
        with console.capture():
            format.write(place)


def _attempt(whole: Path, format: Format, _: int, random: Random, folder: Path) -> Found:
    wanted = undamaged(whole / format.name, format, folder)
    path = random.choice(format.places(folder))
    content, what = mutate(path.read_bytes(), random)
    path.write_bytes(content)
    return read(whole / format.name, format, folder, wanted, path, f"{path.relative_to(folder)}, {what}")


def undamaged(whole: Path, format: Format, folder: Path) -> object:
    """Copy the files of a format into ``folder``; their content."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    with console.capture():
        return format.read(folder)


def read(whole: Path, format: Format, folder: Path, wanted: object, path: Path, what: str) -> Found:
    """What becomes of the files in ``folder``, of which that at ``path`` is damaged."""
    with console.capture() as printed:
        try:
            found = format.read(folder)
        except Exception as error:
            return _refusal(error, folder, path, what)
    outcome, why = format.judge(Reading(wanted, found, folder, whole, printed.get()))
    return Found(outcome, f"{what}: {why}" if why else what)


def _refusal(error: Exception, folder: Path, path: Path, what: str) -> Found:
    """An InputError has to name the file, or one that lies beside it and has to agree with it."""
    text = str(error)
    if not isinstance(error, InputError):
        return Found("traceback", f"{what}: {type(error).__name__}: {text}")
    beside = {other.name for other in path.parent.iterdir()} | {str(folder), path.parent.name, path.name}
    if not any(name in text for name in beside):
        return Found("traceback", f"{what}: an error that names no file: {text}")
    if len(text.splitlines()) != 1:
        return Found("traceback", f"{what}: an error of several lines: {text}")
    return Found("refused", f"{what}: {text}")


def _attempt_index(whole: Path, _: int, random: Random, folder: Path) -> Found:
    """What the cache keeps of a data set is made again where it is damaged."""
    name = random.choice(["RecordIO: .rec", "tar shards"])
    format = next(format for format in FORMATS if format.name == name)
    wanted = undamaged(whole / name, format, folder)
    (path,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.safetensors")
    content, what = mutate(path.read_bytes(), random)
    path.write_bytes(content)
    with console.capture() as printed:
        try:
            found = format.read(folder)
        except Exception as error:
            return _refusal(error, folder, path, what)
    if found != wanted:
        return Found("silent", f"{what}: other content")
    return Found("fell back" if "made again" in printed.get() else "right", f"{what}: {printed.get()}")
