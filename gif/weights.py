"""Files of PyTorch's, read for the tensors in them alone."""

from __future__ import annotations

import zipfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from gif.errors import InputError
from gif.files import existing_file

_REASON_CHARACTERS = 300  # of torch's message, which may name every object


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
        reason = shorten(str(error), _REASON_CHARACTERS)
        raise InputError(f"{path} is damaged or more than tensors ({reason}); save the state dict alone") from error


def check_pytorch(path: Path) -> None:
    """Raise InputError for a zip archive whose members are packed: PyTorch's never are, and they can be of any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is damaged ({error}); save the state dict again") from error
    size = path.stat().st_size
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > size for member in members):
        raise InputError(f"{path} is an archive that PyTorch did not write: its members are packed; save it again")
