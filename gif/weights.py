"""Files of PyTorch's, read for the tensors in them alone."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path
from typing import Any

import torch

from gif.errors import InputError, in_short
from gif.files import existing_file

_READ_BYTES = 1 << 24
_DAMAGES = (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, OSError)
"""What zipfile raises of damaged archives: a flipped bit says that a member is encrypted, or lies before the file."""


def load_pytorch(path: str | Path) -> Any:
    """What a file holds that ``torch.save`` wrote: tensors in plain containers, on the CPU.

    Nothing that the file names is called, but torch's own makers of tensors (``weights_only``).

    Raises FileNotFoundError, or InputError for a file that is damaged, holds anything else, or would unpack to more
    than its own size.
    """
    path = existing_file(path)
    check_pytorch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(
            f"{path} is damaged or more than tensors ({in_short(error)}); save the state dict alone"
        ) from error


def check_pytorch(path: Path) -> None:
    """Compare the members of a zip archive with their checksums, which PyTorch does not.

    Raises InputError where one is damaged, or where members are packed: PyTorch's never are, and they can be of any
    size.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
    except _DAMAGES as error:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise InputError(f"{path} is damaged ({error}); save the state dict again") from error


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    members, size = archive.infolist(), path.stat().st_size
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > size for member in members):
        raise InputError(f"{path} is an archive that PyTorch did not write: its members are packed; save it again")
    for member in members:
        if member.CRC:  # 0 of each where torch.serialization.set_crc32_options(False) was said
            with archive.open(member) as data:
                while data.read(_READ_BYTES):
                    pass
