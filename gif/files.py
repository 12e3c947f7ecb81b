"""How this project writes and reads files: whole or not at all, with a checksum, and never a pickle.

Tensors are in the safetensors format, which its own library reads too: a test holds them to that. They are written
here because that library writes neither in a stream, as tables larger than memory need, nor a checksum that covers the
header; they are read here because of a damaged header it says nothing that its owner could act on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import platform
import re
import shutil
import struct
import sys
import time
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gif.errors import DamagedFileError, InputError, MissingFileError, OutputError
from gif.packages import needs

CHECKED_WHEN_MAPPED = 1 << 28
"""Bytes up to which a file is read whole, and its checksum compared, when it is mapped: a fraction of a second."""

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(?:-(?P<host>[0-9a-f]{8}))?\.tmp", re.DOTALL)
_FORGOTTEN_SECONDS = 86_400.0  # a temporary file that has not grown for a day is no one's, on whichever machine
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it over ``path``, on failure remove it.

    A reader therefore sees the old file or the new one, never a part of one, whenever the process is killed. What a
    killed process left of the same file is removed. The file's mode is that of any new file: the umask decides.

    Raises OutputError where the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{_HOST}.tmp")
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(path.parent, path.name)
        temporary.touch()
    mode = temporary.stat().st_mode
    try:
        with writing(path, _NO_ROOM):  # what else fails in there may be of another file
            yield temporary
        with writing(path):
            os.chmod(temporary, mode)  # a library may have put another file there
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path, numbers: Container[int | None] | None = None) -> Iterator[None]:
    """Say of a file that cannot be written which it is and why: OutputError instead of OSError.

    ``numbers``: only of these error numbers; all where not given.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, InputError) or (numbers is not None and error.errno not in numbers):
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; make room, or give a place that can be written"
        ) from error


def is_temporary(path: Path) -> bool:
    """Whether a file's name is that of a file which `atomic_path` has not finished."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path, name: str | None = None, *, held: bool = False) -> None:
    """Remove the unfinished files in ``folder``, of file ``name`` or of all, that killed processes left.

    ``held``: this process alone writes them, and is not writing now, so that all are left over.
    """
    for path in folder.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and name in (None, found["name"]) and path.is_file() and (held or _forgotten(path, found)):
            path.unlink(missing_ok=True)


def _forgotten(path: Path, found: re.Match[str]) -> bool:
    try:
        changed = path.stat().st_mtime
    except FileNotFoundError:
        return False
    here = found["host"] in (None, _HOST)
    return (here and not _ran(int(found["pid"]), changed)) or time.time() - changed > _FORGOTTEN_SECONDS


def _ran(pid: int, moment: float) -> bool:
    """Whether the process that runs as ``pid`` now, if one does, is one that ran at that ``moment`` (s) already."""
    with needs("psutil", "telling what a killed run left from what one is writing"):
        import psutil
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= moment + 1
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except psutil.AccessDenied:
        return True


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


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds. Raises DamagedFileError, which names it, where that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: it is no JSON ({error}); remove it and make it again") from error


@dataclass(frozen=True)
class Blocks:
    """A tensor that is written without being held in memory: its parts, one after another along the first axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Iterable[Tensor]


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor | Blocks], *, format: str, **metadata: str) -> None:
    """Write named tensors to a safetensors file whose metadata holds ``format`` and ``metadata``, atomically.

    The metadata also gets a checksum: the SHA-256 of the file with zeros in the checksum's place. One tensor at a time
    is brought to the CPU.

    Raises OutputError where the file cannot be written.
    """
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    header, size = _header(layout, format, metadata)
    with atomic_path(path) as temporary:
        _check_room(path, temporary, size)
        digest = hashlib.sha256(header)
        with temporary.open("wb") as file:
            file.write(header)
            for name in _in_order(layout):
                tensor = tensors[name]
                for part in tensor.parts if isinstance(tensor, Blocks) else (tensor,):
                    data = _bytes(part.detach().cpu().contiguous())
                    file.write(data)
                    digest.update(data)
            file.seek(header.index(_CHECKSUM_KEY) + len(_CHECKSUM_KEY))
            file.write(digest.hexdigest().encode())


def load_tensors(path: str | Path, *, format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: the tensors, in memory, and the metadata.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged or holds another format:
    DamagedFileError where its bytes are not those that were written.
    """
    path = existing_file(path)
    header = _read_header(path)
    metadata = check_format(path, header.metadata, format)
    tensors = {}
    digest = hashlib.sha256(header.unsealed)
    with path.open("rb") as file:
        file.seek(len(header.unsealed))
        for name, entry in header.entries.items():
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            data = _bytes(tensor)
            if file.readinto(data) != len(data):
                raise DamagedFileError(f"{path} was shortened while it was read; copy or make it again")
            digest.update(data)
            tensors[name] = tensor
    _compare(path, header, digest.hexdigest())
    return tensors, metadata


def read_metadata(path: str | Path, *, format: str) -> dict[str, str]:
    """The metadata alone of what `save_tensors` wrote; errors are those of `locate_tensor`."""
    path = existing_file(path)
    return check_format(path, _read_header(path).metadata, format)


def check_file(path: str | Path) -> bool:
    """Compare a file's bytes with its checksum, in one pass; whether it has one.

    Files of versions before checksums have none, nor has one that was mapped to be written (see `seal`).

    Raises FileNotFoundError, or DamagedFileError where the file is not what was written.
    """
    path = existing_file(path)
    header = _read_header(path)
    if header.checksum is not None:
        _compare(path, header, _digest(path, header))
    return header.checksum is not None


def seal(path: str | Path) -> None:
    """Give a file that was written through `map_tensor` its checksum, and wait until it is on the disk."""
    path = existing_file(path)
    header = _read_header(path)
    _write_checksum(path, header, _digest(path, header))
    fsync(path)


def _digest(path: Path, header: _Header) -> str:
    digest = hashlib.sha256(header.unsealed)
    with path.open("rb") as file:
        file.seek(len(header.unsealed))
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _compare(path: Path, header: _Header, found: str) -> None:
    if header.checksum not in (None, found):
        raise DamagedFileError(f"{path} is damaged: its checksum is wrong; copy or make it again")


def _write_checksum(path: Path, header: _Header, digits: str) -> None:
    if (place := _checksum_place(header.unsealed)) is not None:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(digits.encode())


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
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAP_NORESERVE = 0x4000  # of Linux; the mmap module names it from Python 3.13 on
_READ_WRITE = 0x1 | 0x2
_LENGTH = struct.Struct("<Q")  # the length of the header, which begins a safetensors file
_LARGEST_HEADER = 100_000_000  # bytes, as in safetensors' own reader
_READ_BYTES = 1 << 24
_CHECKSUM = "checksum"
_CHECKSUM_KEY = b'"checksum":"'  # cannot stand in a text of the header: quotes are escaped there
_UNSEALED = "0" * 2 * hashlib.sha256().digest_size
_MISNAMED = re.compile(rb'\{"__metadata__":\{"(?!checksum").{8}":"[^"\\]{%d}"' % len(_UNSEALED), re.DOTALL)
"""The first entry of a header is what a checksum is but for its name: a damaged byte in it makes no file unchecked."""


@dataclass(frozen=True)
class _Header:
    """The header of a safetensors file, its length before it, with zeros in the checksum's place.

    ``entries`` in the order of their data; ``checksum`` is None where the file has none.
    """

    unsealed: bytes
    entries: dict[str, TensorLocation]
    metadata: dict[str, str]
    checksum: str | None


def _header(
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], format: str, metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """The header of a file of such tensors, without a checksum yet, and the size of the whole file."""
    header: dict[str, object] = {
        "__metadata__": dict(sorted({"format": format, **metadata, _CHECKSUM: _UNSEALED}.items()))
    }
    end = 0
    for name in _in_order(layout):
        shape, dtype = layout[name]
        if dtype not in _NAMES:
            raise InputError(f"tensor {name} is {dtype}, which files do not hold; wanted one of {list(_NAMES)}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    return _LENGTH.pack(len(text)) + text, _LENGTH.size + len(text) + end


def _in_order(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[str]:
    """Names in the order of their data, the widest first: all are aligned."""
    return sorted(layout, key=lambda name: -layout[name][1].itemsize)


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum_place(header: bytes) -> int | None:
    """Where the digits of the checksum begin; None where there are none."""
    found = header.find(_CHECKSUM_KEY)
    return None if found < 0 else found + len(_CHECKSUM_KEY)


def _read_header(path: Path) -> _Header:
    """Read a header, and look whether the tensors in it fill the file, none over another, no byte left.

    Raises DamagedFileError where they do not.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
        if length > min(size - _LENGTH.size, _LARGEST_HEADER):
            raise DamagedFileError(f"{path} is damaged or not a safetensors file; make it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {name: _location(entry, metadata) for name, entry in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata that is no text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged or not a safetensors file ({error}); make it again") from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))))
    end = 0
    for name, where in entries.items():
        if where.offset != end:
            wrong = f"tensor {name} begins at {where.offset}, wanted {end}"
            raise DamagedFileError(f"{path} is damaged: {wrong}; copy or make it again")
        end += math.prod(where.shape) * where.dtype.itemsize
    end += _LENGTH.size + length
    if end > size:
        raise DamagedFileError(f"{path} is truncated: {size} bytes, wanted {end}; copy or make it again")
    if end < size:
        raise DamagedFileError(f"{path} is damaged: {size} bytes, wanted {end}; copy or make it again")
    checksum, place = metadata.pop(_CHECKSUM, None), _checksum_place(text)
    if checksum is not None and place is not None and len(checksum) == len(_UNSEALED):
        text = text[:place] + _UNSEALED.encode() + text[place + len(_UNSEALED) :]
    elif checksum is not None or _MISNAMED.match(text):
        raise DamagedFileError(f"{path} is damaged: its checksum cannot be read; copy or make it again")
    return _Header(prefix + text, entries, metadata, None if checksum == _UNSEALED else checksum)


def _location(entry: dict[str, Any], metadata: dict[str, str]) -> TensorLocation:
    """A tensor's place behind the header. Raises KeyError, TypeError or ValueError for an entry that is none."""
    shape, (begin, end), dtype = entry["shape"], entry["data_offsets"], _DTYPES[entry["dtype"]]
    numbers = [*shape, begin, end]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"shape or place {numbers}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for shape {shape}")
    if math.prod(filter(None, shape)) > sys.maxsize:  # of no elements, and yet of no tensor's size
        raise ValueError(f"shape {shape}")
    return TensorLocation(begin, tuple(shape), dtype, metadata)


def locate_tensor(path: str | Path, name: str, *, format: str) -> TensorLocation:
    """Find tensor ``name`` in a safetensors file without reading its data.

    Raises FileNotFoundError if there is no such file, and ValueError if it is truncated, damaged, of another format or
    lacks the tensor.
    """
    path = existing_file(path)
    header = _read_header(path)
    metadata = check_format(path, header.metadata, format)
    if name not in header.entries:
        raise InputError(f"{path} has no tensor named {name}; it has {sorted(header.entries)}")
    where = header.entries[name]
    return TensorLocation(len(header.unsealed) + where.offset, where.shape, where.dtype, metadata)


class _Pages(mmap.mmap):
    """A memory map that knows its file."""

    path: Path


_MAPPED: weakref.WeakValueDictionary[int, _Pages] = weakref.WeakValueDictionary()  # by the address of the tensor's data


def check_mapped(tensor: Tensor) -> None:
    """Raise InputError if the file that ``tensor`` is mapped from was shortened: to look there would be a bus error.

    A microsecond; nothing for a tensor that `map_tensor` did not make.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    pages = _MAPPED.get(tensor.untyped_storage().data_ptr())
    if pages is not None:
        check_length(pages.path, pages, len(pages))


def is_mapped(tensor: Tensor) -> bool:
    """Whether `map_tensor` made ``tensor``, or the one that it is a part of."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _MAPPED


def check_length(path: Path, pages: mmap.mmap, length: int) -> None:
    """Raise DamagedFileError if a mapped file has fewer than ``length`` bytes by now: to look there is a bus error."""
    if (size := pages.size()) < length:
        raise DamagedFileError(
            f"{path} was shortened while it was in use: {size:,} bytes, {length:,} when it was opened; copy or make it "
            "again, and leave it alone while a command reads it"
        )


def map_tensor(path: str | Path, name: str, *, format: str, writable: bool = False) -> Tensor:
    """Tensor ``name`` of a safetensors file, memory-mapped: only what is looked at is read.

    ``writable`` lets in-place changes reach the file, which has no checksum from then on until it is sealed (`seal`);
    otherwise they stay private to this process. Errors are those of `locate_tensor`; of a file of up to
    `CHECKED_WHEN_MAPPED` bytes that is not written, the checksum is compared too. `check_file` does so for any.
    """
    path = Path(path)
    where = locate_tensor(path, name, format=format)
    if writable:
        _write_checksum(path, _read_header(path), _UNSEALED)
    elif path.stat().st_size <= CHECKED_WHEN_MAPPED:
        check_file(path)
    if math.prod(where.shape) == 0:  # nothing to map
        return torch.empty(where.shape, dtype=where.dtype)
    with path.open("r+b" if writable else "rb") as file:
        if writable:
            pages = _Pages(file.fileno(), 0)
        elif sys.platform == "linux":  # reserve no memory for private changes: the file may be larger than it
            pages = _Pages(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=_READ_WRITE)
        else:
            pages = _Pages(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pages.path = path
    tensor = torch.frombuffer(pages, dtype=where.dtype, count=math.prod(where.shape), offset=where.offset)
    _MAPPED[tensor.untyped_storage().data_ptr()] = pages
    return tensor.view(where.shape)


def allocate_tensors(
    path: str | Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, format: str, **metadata: str
) -> None:
    """Write a safetensors file of zeros, atomically and without holding it in memory; fill it through `map_tensor`.

    ``tensors`` gives the shape and dtype of each. Raises OutputError where the disk has no room for them.
    """
    header, size = _header(tensors, format, metadata)
    with atomic_path(path) as temporary:
        _check_room(path, temporary, size)
        with temporary.open("wb") as file:
            file.write(header)
            file.truncate(size)


def _check_room(path: str | Path, temporary: Path, size: int) -> None:
    free = shutil.disk_usage(temporary.parent).free
    if size > free:
        raise OutputError(f"{path} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free; make room")
