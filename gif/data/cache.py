"""Where rendered data sets are kept, and how damage to them is found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gif.progress import say


def cache_folder(cache_dir: str | Path | None) -> Path:
    """``cache_dir``, by default ``$XDG_CACHE_HOME/gif`` or ``~/.cache/gif``, made where that is possible."""
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gif")
    folder = Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"the cache folder {folder} cannot be made ({error.strerror}), so nothing is kept; set XDG_CACHE_HOME")
    return folder


def checksum(tensors: Mapping[str, Tensor], names: str) -> str:
    """SHA-256 of the tensors (contiguous, on the CPU), their shapes and a text, in hexadecimal digits."""
    digest = hashlib.sha256(names.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
