"""How this project writes and reads files: whole or not at all, and never a pickle."""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gif.errors import InputError, MissingFileError, UnavailableError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it over ``path``, on failure remove it.

    A reader therefore sees the old file or the new one, never a part of one, whenever the process is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until what was written to ``path``, also through memory maps, is on the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows opens no folder, and files alone can be waited for
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs what is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, format: str, **metadata: str) -> None:
    """Write named tensors to a safetensors file whose metadata holds ``format`` and ``metadata``, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"format": format, **metadata})
        except SafetensorError as error:
            raise UnavailableError(f"cannot write {path} ({error}); look at the disk") from error


def load_tensors(path: str | Path, *, format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: the tensors, in memory, and the metadata.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged or holds another format.
    """
    path = existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = check_format(path, file.metadata(), format)
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error}); make it again") from error


def existing_file(path: str | Path) -> Path:
    """Return ``path`` if it is a file; raise FileNotFoundError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no file {path}; check the path, or make the file first")
    return path


def check_format(path: Path, metadata: Mapping[str, str] | None, wanted: str) -> dict[str, str]:
    """Return ``metadata`` as a dict; raise ValueError unless its ``format`` is ``wanted``."""
    found = (metadata or {}).get("format")
    if found != wanted:
        raise InputError(f"{path} holds {found or 'an unknown format'}, wanted {wanted}; give a file of that kind")
    return dict(metadata or {})


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor lies in a safetensors file: what a memory map needs."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    metadata: dict[str, str]


_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAP_NORESERVE = 0x4000  # of Linux; the mmap module names it from Python 3.13 on
_READ_WRITE = 0x1 | 0x2
_LENGTH = struct.Struct("<Q")  # the length of the header, which begins a safetensors file


def locate_tensor(path: str | Path, name: str, *, format: str) -> TensorLocation:
    """Find tensor ``name`` in a safetensors file without reading its data.

    Raises FileNotFoundError if there is no such file, and ValueError if it is truncated, damaged, of another format or
    lacks the tensor.
    """
    path = existing_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
        if length > size - _LENGTH.size:
            raise InputError(f"{path} is damaged or not a safetensors file; make it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise InputError(f"{path} is damaged or not a safetensors file ({error}); make it again") from error
    metadata = check_format(path, header.get("__metadata__"), format)
    if name not in header:
        raise InputError(f"{path} has no tensor named {name}; it has {sorted(set(header) - {'__metadata__'})}")
    entry = header[name]
    if entry["dtype"] not in _DTYPES:
        raise InputError(f"{path}: tensor {name} has dtype {entry['dtype']}, wanted one of {sorted(_DTYPES)}")
    start, end = (_LENGTH.size + length + offset for offset in entry["data_offsets"])
    if end > size:
        raise InputError(f"{path} is truncated: {size} bytes, wanted {end}; copy or make it again")
    return TensorLocation(start, tuple(entry["shape"]), _DTYPES[entry["dtype"]], metadata)


def map_tensor(path: str | Path, name: str, *, format: str, writable: bool = False) -> Tensor:
    """Tensor ``name`` of a safetensors file, memory-mapped: only what is looked at is read.

    ``writable`` lets in-place changes reach the file; otherwise they stay private to this process. Errors are those of
    `locate_tensor`.
    """
    where = locate_tensor(path, name, format=format)
    with open(path, "r+b" if writable else "rb") as file:
        if writable:
            pages = mmap.mmap(file.fileno(), 0)
        elif sys.platform == "linux":  # reserve no memory for private changes: the file may be larger than it
            pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=_READ_WRITE)
        else:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    count = math.prod(where.shape)
    return torch.frombuffer(pages, dtype=where.dtype, count=count, offset=where.offset).view(where.shape)


def allocate_tensors(
    path: str | Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, format: str, **metadata: str
) -> None:
    """Write a safetensors file of zeros, atomically and without holding it in memory; fill it through `map_tensor`.

    ``tensors`` gives the shape and dtype of each. Raises OSError where the disk has no room for them.
    """
    header: dict[str, object] = {"__metadata__": {"format": format, **metadata}}
    end = 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):  # keeps all aligned
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    with atomic_path(path) as temporary:
        free = shutil.disk_usage(temporary.parent).free
        if end > free:
            raise OSError(f"{path} needs {end / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free; make room")
        with temporary.open("wb") as file:
            file.write(_LENGTH.pack(len(text)) + text)
            file.truncate(_LENGTH.size + len(text) + end)
