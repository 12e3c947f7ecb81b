"""What readers of files on disk share: memory maps that processes may inherit or reopen, many strings in one tensor."""

from __future__ import annotations

import hashlib
import mmap
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import torch
from filelock import FileLock
from torch import Tensor

from gif.data.cache import cache_folder
from gif.errors import InputError, OutputError
from gif.files import check_length, existing_file, load_tensors, save_tensors
from gif.progress import say

OPEN_FILES = 256  # of each process, so that thousands of shards do not use up its descriptors


@dataclass(frozen=True)
class MappedFile:
    """A file that is read through a memory map, which every process makes for itself when it first reads.

    It is its path, size and time of change: small to send to a process, whether forked or spawned, and a cache of maps
    never confuses a file with one that replaced it.
    """

    path: Path
    size: int
    modified: int

    @classmethod
    def find(cls, path: str | Path) -> MappedFile:
        """The file at ``path``. Raises FileNotFoundError if there is none."""
        path = existing_file(path).absolute()
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length). Raises ValueError where the file is shorter."""
        if offset + length > self.size:
            raise InputError(
                f"{self.path} is truncated: {self.size:,} bytes, wanted {offset + length:,}; copy or make it again"
            )
        return self.pages()[offset : offset + length] if length else b""

    def pages(self) -> mmap.mmap:
        """The memory map of all of it. Raises ValueError where the file was shortened since it was found."""
        pages = _map(self)
        check_length(self.path, pages, self.size)
        return pages


@lru_cache(maxsize=OPEN_FILES)
def _map(file: MappedFile) -> mmap.mmap:
    with file.path.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


class PackedStrings(Sequence[str]):
    """Strings as UTF-8 bytes in one tensor: a list of millions would be copied, page by page, into each worker.

    Args:
        data: uint8, all strings one after another.
        ends: (n,) int64, where each ends.
    """

    def __init__(self, data: Tensor, ends: Tensor) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> Self:
        data, ends = bytearray(), array("q")
        for string in strings:
            data += string.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        packed = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return cls(packed, torch.tensor(ends, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        begin = int(self.ends[index - 1]) if index else 0
        return self.data[begin : int(self.ends[index])].numpy().tobytes().decode("utf-8", "surrogateescape")


def cached_index(format: str, files: Sequence[MappedFile], build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``build`` finds by reading through ``files``, kept in the cache folder until one of them changes.

    ``format`` is the kind of index, with a version. Processes that ask at once wait for the first. Where the cache
    folder cannot be written, what is in it is read, and what is not is built each time.
    """
    path = cache_folder(None) / f"index-{fingerprint(format, files)}.safetensors"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        held = lock.acquire()
    except OSError as error:
        say(f"{path.parent} cannot be written ({error.strerror or error}): the index of {files[0].path} is not kept")
        return _kept_index(path, format) or build()
    with held:
        tensors = _kept_index(path, format)
        if tensors is None:
            tensors = build()
            try:
                save_tensors(path, tensors, format=format)
            except OutputError as error:
                say(f"{error}; the index of {files[0].path} is not kept")
    return tensors


def _kept_index(path: Path, format: str) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        return load_tensors(path, format=format)[0]
    except InputError as error:
        say(f"{error}: it is made again")
        return None


def fingerprint(kind: str, files: Sequence[MappedFile]) -> str:
    """32 hexadecimal digits that follow from a word and from which files these are, in which state."""
    digest = hashlib.sha256(kind.encode())
    for file in files:
        digest.update(f"\0{file.path}\0{file.size}\0{file.modified}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]
