"""Tar shards, named as webdataset names them: files of one sample share their name up to a dot."""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from gif.data.decoding import SUFFIXES
from gif.data.encoded import Labelled
from gif.data.listing import IDENTITIES, NAMES_ALONE, Tally, is_foreign, printable, read_names
from gif.data.stored import MappedFile, PackedStrings, cached_index, fingerprint
from gif.errors import InputError, MissingFileError
from gif.packages import needs
from gif.progress import progress

INDEX_FORMAT = "gif.shard_index/2"
_SHARDS_A_PROCESS = 8  # fewer are read before a process has started
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_LABELS = (".cls", ".json")
_NO_IMAGES = f"files in shards passed over, neither {', '.join(SUFFIXES)} nor {' or '.join(_LABELS)}"
_FOREIGN_FILES = "files in shards passed over, of other programs"
_LABELS_ALONE = "labels in shards without an image"
_END = 2 * tarfile.BLOCKSIZE  # the zeros that end a tar file
_MOST_LINKS = 40  # that lead to each other, as in a file system
_LONGEST_NUMBER = 18  # digits
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
        return f"{printable(str(self._files[int(self._shards[row])].path))}, image at byte {int(self._offsets[row])}"

    def fingerprint(self) -> str:
        return fingerprint("shards", self._files)


def find_shards(pattern: str) -> list[Path]:
    """The tar files that a pattern names: a folder of them, ``{000..127}`` for a range, ``*`` for anything.

    Raises FileNotFoundError where one of a range is missing, or there are none; ValueError for compressed ones.
    """
    if pattern.endswith(COMPRESSED):
        raise InputError(
            f"{pattern} is compressed, and images are read from anywhere in a tar file; decompress it, as gunzip, "
            "bunzip2, unxz and unzstd do, and give the .tar"
        )
    if Path(pattern).is_dir():
        paths = sorted(path for path in Path(pattern).glob("*.tar") if not is_foreign(path.name))
    else:
        named = [path for name in _expand(pattern) for path in (_matching(name) if "*" in name else [name])]
        paths = [Path(path) for path in dict.fromkeys(named)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise MissingFileError(
            f"{len(missing)} of {len(paths)} shards are missing, first {missing[0]}; check the range"
            if missing
            else f"no file is named {pattern}; wanted tar shards"
        )
    return paths


def _matching(name: str) -> list[str]:
    """The files that a name with * in it matches; brackets are themselves where there are such files."""
    return sorted(glob("*".join(map(escape, name.split("*"))))) or sorted(glob(name))


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

    An image (.jpg, .jpeg, .png, .webp) shows the identity that the text of a .cls file says, or "label" of a .json
    file, of the same name up to a dot: of several such files the longest name counts. A name that comes again begins
    another sample. Links lead to what they name in the same shard. Identities are numbered in the order of their names,
    as numbers if all are numbers; ``identities.txt`` beside the shards may name numbers. The shards are read through
    once: what was found is kept in the cache folder.

    Raises FileNotFoundError, or ValueError where a shard is damaged, cut short, compressed or lacks a label.
    """
    files = [MappedFile.find(path) for path in find_shards(pattern)]
    found = cached_index(INDEX_FORMAT, files, lambda: _find_images(files))
    names = list(PackedStrings(found["names"], found["name_ends"]))
    passed_over = list(PackedStrings(found["passed_over"], found["passed_over_ends"]))
    folder = files[0].path.parent
    if (folder / IDENTITIES).exists() and all(map(_is_number, names)):
        names, unseen = read_names(folder, [int(name) for name in names])
        if unseen.number:
            passed_over.append(f"{NAMES_ALONE}: {unseen}")
    source = ShardImages(files, found["shards"], found["offsets"], found["lengths"])
    if Path(pattern).is_dir():
        beside = {path.name for path in folder.iterdir()} - {file.path.name for file in files} - {IDENTITIES}
        if beside:
            passed_over.append(f"passed over beside the shards: {Tally.of(sorted(beside))}")
    return Labelled(source, found["labels"], names, tuple(passed_over))


def _is_number(name: str) -> bool:
    return name.isdecimal() and len(name) <= _LONGEST_NUMBER


@dataclass(frozen=True)
class _Shard:
    """What is in one shard: offsets and lengths (n,) of its images, whom they show, and what is no part of a sample."""

    offsets: Tensor
    lengths: Tensor
    identities: list[str]
    passed_over: dict[str, Tally]


def cpu_count() -> int:
    """Count the processors that this process may use."""
    with needs("joblib", "looking into shards"):
        import joblib
    return joblib.cpu_count()


def _find_images(files: list[MappedFile]) -> dict[str, Tensor]:
    with needs("joblib", "looking into shards"):
        from joblib import Parallel, delayed
    jobs = max(1, min(cpu_count(), len(files) // _SHARDS_A_PROCESS))
    shards: list[_Shard] = []
    reasons = _no_tallies()
    with progress("looking into shards", len(files), "shards") as advance:
        for shard in Parallel(jobs, return_as="generator")(delayed(_read_shard)(file) for file in files):
            shards.append(shard)
            for reason, tally in shard.passed_over.items():
                reasons[reason].add_all(tally)
            advance(1)
    identities = [name for shard in shards for name in shard.identities]
    if not identities:
        raise InputError(f"{files[0].path} and the {len(files) - 1} other shards hold no image")
    numeric = all(map(_is_number, set(identities)))
    names = sorted(set(identities), key=int if numeric else None)
    numbers = {name: number for number, name in enumerate(names)}
    packed = PackedStrings.pack(names)
    passed_over = PackedStrings.pack(f"{reason}: {tally}" for reason, tally in reasons.items() if tally.number)
    return {
        "shards": torch.arange(len(files)).repeat_interleave(torch.tensor([len(shard.offsets) for shard in shards])),
        "offsets": torch.cat([shard.offsets for shard in shards]),
        "lengths": torch.cat([shard.lengths for shard in shards]),
        "labels": torch.tensor([numbers[name] for name in identities]),
        "names": packed.data,
        "name_ends": packed.ends,
        "passed_over": passed_over.data,
        "passed_over_ends": passed_over.ends,
    }


def _no_tallies() -> dict[str, Tally]:
    return {_NO_IMAGES: Tally(), _FOREIGN_FILES: Tally(), _LABELS_ALONE: Tally()}


def _read_shard(file: MappedFile) -> _Shard:
    passed_over = _no_tallies()
    used = []
    for member in _members(file):
        if any(map(is_foreign, member.path.parts)):
            passed_over[_FOREIGN_FILES].add(str(member.path))
        elif member.path.suffix.lower() not in (*SUFFIXES, *_LABELS):
            passed_over[_NO_IMAGES].add(str(member.path))
        else:
            used.append(member)
    offsets, lengths, identities = [], [], []
    for key, kinds in _samples(used):
        images = [place for kind, place in kinds.items() if f".{kind}".endswith(SUFFIXES)]
        if not images:
            passed_over[_LABELS_ALONE].add(key)
            continue
        identity = _identity(file, key, kinds)
        for offset, length in images:
            offsets.append(offset)
            lengths.append(length)
            identities.append(identity)
    return _Shard(
        torch.tensor(offsets, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64), identities, passed_over
    )


@dataclass(frozen=True)
class _Member:
    """A file in a tar file: its path there, and its offset and length, or for a link the path that it leads to."""

    path: PurePosixPath
    place: tuple[int, int] = (0, 0)
    target: PurePosixPath | None = None


def _members(file: MappedFile) -> list[_Member]:
    """The files of a tar file, in their order, links resolved.

    Raises ValueError where it is damaged or cut short, or an image or a label is neither file nor link in it.
    """
    members: list[_Member] = []
    by_path: dict[PurePosixPath, _Member] = {}
    try:
        with tarfile.open(file.path, "r:") as archive:
            for entry in archive:
                if entry.isdir():
                    continue
                member = _member(file, entry)
                if entry.islnk():  # to what was there at the time
                    member = replace(member, place=_follow(file, member, by_path), target=None)
                members.append(member)
                by_path[member.path] = member
            end = archive.offset
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise InputError(
            f"{file.path} is damaged, or no plain tar file ({error}); copy, unpack or make it again"
        ) from error
    _check_end(file, end)
    return [replace(member, place=_follow(file, member, by_path), target=None) for member in members]


def _member(file: MappedFile, entry: tarfile.TarInfo) -> _Member:
    path = _normal(entry.name)
    if entry.islnk():
        return _Member(path, target=_normal(entry.linkname))
    if entry.issym():
        return _Member(path, target=_normal(posixpath.join(str(path.parent), entry.linkname)))
    if entry.isreg() and not entry.issparse():
        if entry.offset_data + entry.size > file.size:
            raise InputError(f"{file.path} is damaged: it ends within {path}; copy or make it again")
        return _Member(path, (entry.offset_data, entry.size))
    if path.suffix.lower() in (*SUFFIXES, *_LABELS):
        raise InputError(
            f"{file.path}: {path} is a sparse file, a device or of an unknown type ({entry.type!r}); make the shard "
            "again, of plain files"
        )
    return _Member(path)


def _normal(name: str) -> PurePosixPath:
    return PurePosixPath(posixpath.normpath(name).lstrip("/"))


def _follow(file: MappedFile, member: _Member, by_path: dict[PurePosixPath, _Member]) -> tuple[int, int]:
    """Where the data lies that a member, perhaps a link to a link, leads to."""
    found: _Member | None = member
    for _ in range(_MOST_LINKS):
        if found is None:
            break
        if found.target is None:
            return found.place
        found = by_path.get(found.target)
    if member.path.suffix.lower() not in (*SUFFIXES, *_LABELS):
        return member.place
    raise InputError(
        f"{file.path}: {member.path} is a link to {member.target}, which is not in the shard; make it again with what "
        "links lead to, as tar --dereference does"
    )


def _check_end(file: MappedFile, end: int) -> None:
    """Raise ValueError unless behind the last file is what ends a tar file, and no more than that.

    Two blocks of zeros, and where the file's size is a multiple of tar's record, zeros to fill the last record. tarfile
    itself stops at whatever is no header as if the file ended there: one that was cut, or filled with zeros where it
    could not be copied, looks like a shorter one.
    """
    left = file.size - end
    if left < _END:
        raise InputError(
            f"{file.path} is cut short: behind its last file, at byte {end:,}, are {max(left, 0):,} bytes, wanted the "
            f"{_END:,} zeros that end a tar file; copy or make it again"
        )
    rest = file.read(end, min(left, _END + tarfile.RECORDSIZE))
    if any(rest[: tarfile.BLOCKSIZE]):
        raise InputError(f"{file.path} is damaged at byte {end:,}: it does not end there, nor does a file begin")
    most = _END + tarfile.RECORDSIZE - tarfile.BLOCKSIZE if file.size % tarfile.RECORDSIZE == 0 else _END
    if any(rest) or left > most:
        raise InputError(
            f"{file.path} goes on for {left:,} bytes where it seems to end, at byte {end:,}: it was filled with zeros "
            "in place of data, or archives were put behind each other; copy or make it again"
        )


def _samples(members: list[_Member]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Members by the name they share, in the order of the first of each: (key, their places by what follows the key).

    A key is what a label is called up to its last dot, and may come again.
    """
    labelled = {member.path.with_suffix("") for member in members if member.path.suffix.lower() in _LABELS}
    samples: dict[PurePosixPath, list[dict[str, tuple[int, int]]]] = {}
    order = []
    for member in members:
        key = _key(member.path, labelled)
        kind = member.path.name[len(key.name) + 1 :].lower()
        of_key = samples.setdefault(key, [])
        if not of_key or kind in of_key[-1]:
            of_key.append({})
            order.append((str(key), of_key[-1]))
        of_key[-1][kind] = member.place
    return iter(order)


def _key(path: PurePosixPath, labelled: set[PurePosixPath]) -> PurePosixPath:
    key = path.with_suffix("")
    while key not in labelled:
        if not key.suffix:
            return path.with_suffix("")
        key = key.with_suffix("")
    return key


def _identity(file: MappedFile, key: str, kinds: dict[str, tuple[int, int]]) -> str:
    try:
        if "cls" in kinds:
            identity = file.read(*kinds["cls"]).decode("utf-8-sig").strip()
        elif "json" in kinds:
            identity = _as_name(json.loads(file.read(*kinds["json"]))["label"])
        else:
            raise InputError("there is no .cls and no .json")
        if not identity or "\0" in identity:  # which is what lies where a file could not be copied
            raise InputError("it is empty, or zeros")
        identity.encode()  # JSON may hold halves of characters
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file.path}: sample {printable(key)} has no label ({error}); wanted {printable(key)}.cls, or "
            f"{printable(key)}.json with 'label'"
        ) from error
    return identity


def _as_name(label: Any) -> str:
    """A label in JSON, text or a whole number, as a name."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise InputError(f"it is {json.dumps(label)[:80]}, neither text nor a whole number")
    return str(label).strip()
