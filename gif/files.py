"""How this project writes and reads files: whole or not at all, and never a pickle."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
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
        save_file(contiguous, temporary, metadata={"format": format, **metadata})


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
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); make it again") from error


def existing_file(path: str | Path) -> Path:
    """Return ``path`` if it is a file; raise FileNotFoundError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; check the path, or make the file first")
    return path


def check_format(path: Path, metadata: Mapping[str, str] | None, wanted: str) -> dict[str, str]:
    """Return ``metadata`` as a dict; raise ValueError unless its ``format`` is ``wanted``."""
    found = (metadata or {}).get("format")
    if found != wanted:
        raise ValueError(f"{path} holds {found or 'an unknown format'}, wanted {wanted}; give a file of that kind")
    return dict(metadata or {})


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor lies in a safetensors file: what a memory map needs."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    metadata: dict[str, str]


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "U8": torch.uint8}


def locate_tensor(path: str | Path, name: str, *, format: str) -> TensorLocation:
    """Find tensor ``name`` in a safetensors file without reading its data.

    Raises FileNotFoundError if there is no such file, and ValueError if it is truncated, damaged, of another format or
    lacks the tensor.
    """
    path = existing_file(path)
    length_field = struct.Struct("<Q")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(length_field.size)
        length = length_field.unpack(prefix)[0] if len(prefix) == length_field.size else size
        if length > size - length_field.size:
            raise ValueError(f"{path} is damaged or not a safetensors file; make it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}); make it again") from error
    metadata = check_format(path, header.get("__metadata__"), format)
    if name not in header:
        raise ValueError(f"{path} has no tensor named {name}; it has {sorted(set(header) - {'__metadata__'})}")
    entry = header[name]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{path}: tensor {name} has dtype {entry['dtype']}, wanted one of {sorted(_DTYPES)}")
    start, end = (length_field.size + length + offset for offset in entry["data_offsets"])
    if end > size:
        raise ValueError(f"{path} is truncated: {size} bytes, wanted {end}; copy or make it again")
    return TensorLocation(start, tuple(entry["shape"]), _DTYPES[entry["dtype"]], metadata)
