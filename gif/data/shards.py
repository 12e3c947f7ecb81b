"""Tar shards, named as webdataset names them: files of one sample share their name up to the first dot."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from gif.data.decoding import SUFFIXES
from gif.data.encoded import Labelled
from gif.data.listing import IDENTITIES, read_names
from gif.data.stored import MappedFile, PackedStrings, cached_index, fingerprint
from gif.errors import InputError, MissingFileError
from gif.packages import needs
from gif.progress import progress

INDEX_FORMAT = "gif.shard_index/1"
_SHARDS_A_PROCESS = 8  # fewer are read before a process has started
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardImages:
    """The images of tar files.

    Args:
        files: the tar files.
        shards, offsets, lengths: (N,) int64, where each image lies.
    """

    def __init__(self, files: list[MappedFile], shards: Tensor, offsets: Tensor, lengths: Tensor) -> None:
        self._files, self._shards, self._offsets, self._lengths = files, shards, offsets, lengths

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, row: int) -> bytes:
        return self._files[int(self._shards[row])].read(int(self._offsets[row]), int(self._lengths[row]))

    def place(self, row: int) -> str:
        return f"{self._files[int(self._shards[row])].path}, image at byte {int(self._offsets[row])}"

    def fingerprint(self) -> str:
        return fingerprint("shards", self._files)


def find_shards(pattern: str) -> list[Path]:
    """The tar files that a pattern names: a folder of them, ``{000..127}`` for a range, ``*`` for anything.

    Raises FileNotFoundError where one of a range is missing, or there are none.
    """
    if Path(pattern).is_dir():
        pattern = os.path.join(pattern, "*.tar")
    names = list(_expand(pattern))
    paths = [Path(path) for name in names for path in (sorted(glob(name)) if "*" in name else [name])]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise MissingFileError(
            f"{len(missing)} of {len(paths)} shards are missing, first {missing[0]}; check the range"
            if missing
            else f"no file is named {pattern}; wanted tar shards"
        )
    return paths


def _expand(pattern: str) -> Iterator[str]:
    """The names that ``{first..last}`` stands for, all with as many digits as ``first``."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def read_shards(pattern: str) -> Labelled:
    """The images of tar shards in the order of the shards, and their labels.

    A sample is an image (.jpg, .jpeg, .png, .webp) and its identity: the text of a .cls file, or "label" of a .json
    file. Identities are numbered in the order of their names, as numbers if all are numbers; ``identities.txt`` beside
    the shards may name numbers. The shards are read through once: what was found is kept in the cache folder.

    Raises FileNotFoundError, or ValueError where a shard is damaged, compressed or lacks a label.
    """
    files = [MappedFile.find(path) for path in find_shards(pattern)]
    found = cached_index(INDEX_FORMAT, files, lambda: _find_images(files))
    names = list(PackedStrings(found["names"], found["name_ends"]))
    folder = files[0].path.parent
    if (folder / IDENTITIES).exists() and all(name.isdecimal() for name in names):
        names = read_names(folder, [int(name) for name in names])
    source = ShardImages(files, found["shards"], found["offsets"], found["lengths"])
    return Labelled(source, found["labels"], names)


@dataclass(frozen=True)
class _Shard:
    """What is in one shard: offsets and lengths (n,) of its images, and whom they show."""

    offsets: Tensor
    lengths: Tensor
    identities: list[str]


def cpu_count() -> int:
    """Processors that this process may use."""
    with needs("joblib", "looking into shards"):
        import joblib
    return joblib.cpu_count()


def _find_images(files: list[MappedFile]) -> dict[str, Tensor]:
    with needs("joblib", "looking into shards"):
        from joblib import Parallel, delayed
    jobs = max(1, min(cpu_count(), len(files) // _SHARDS_A_PROCESS))
    shards: list[_Shard] = []
    with progress("looking into shards", len(files), "shards") as advance:
        for shard in Parallel(jobs, return_as="generator")(delayed(_read_shard)(file) for file in files):
            shards.append(shard)
            advance(1)
    identities = [name for shard in shards for name in shard.identities]
    if not identities:
        raise InputError(f"{files[0].path} and the {len(files) - 1} other shards hold no image")
    numeric = all(name.isdecimal() for name in set(identities))
    names = sorted(set(identities), key=int if numeric else None)
    numbers = {name: number for number, name in enumerate(names)}
    packed = PackedStrings.pack(names)
    return {
        "shards": torch.arange(len(files)).repeat_interleave(torch.tensor([len(shard.offsets) for shard in shards])),
        "offsets": torch.cat([shard.offsets for shard in shards]),
        "lengths": torch.cat([shard.lengths for shard in shards]),
        "labels": torch.tensor([numbers[name] for name in identities]),
        "names": packed.data,
        "name_ends": packed.ends,
    }


def _read_shard(file: MappedFile) -> _Shard:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(file.path, "r:") as archive:
            for member in archive:
                end = member.offset_data + member.size + -member.size % tarfile.BLOCKSIZE
                if member.isfile():
                    path = PurePosixPath(member.name)
                    stem, _, kind = path.name.partition(".")
                    samples.setdefault(str(path.parent / stem), {})[kind.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise InputError(
            f"{file.path} is damaged, or no plain tar file ({error}); copy, unpack or make it again"
        ) from error
    # where a header is damaged, tarfile stops as if the archive ended there
    if any(file.read(end, max(min(tarfile.BLOCKSIZE, file.size - end), 0))):
        raise InputError(f"{file.path} is damaged at byte {end:,}: it does not end there, nor does a file begin")
    offsets, lengths, identities = [], [], []
    for key, kinds in samples.items():
        images = [kind for kind in kinds if f".{kind}" in SUFFIXES]
        if images:
            offset, length = kinds[images[0]]
            offsets.append(offset)
            lengths.append(length)
            identities.append(_identity(file, key, kinds))
    return _Shard(torch.tensor(offsets, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64), identities)


def _identity(file: MappedFile, key: str, kinds: dict[str, tuple[int, int]]) -> str:
    try:
        if "cls" in kinds:
            identity = file.read(*kinds["cls"]).decode().strip()
        elif "json" in kinds:
            identity = str(json.loads(file.read(*kinds["json"]))["label"]).strip()
        else:
            raise InputError("there is no .cls and no .json")
        if not identity:
            raise InputError("it is empty")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file.path}: sample {key} has no label ({error}); wanted {key}.cls, or {key}.json with 'label'"
        ) from error
    return identity
