"""Image folders: one folder an identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from gif.data.decoding import SUFFIXES
from gif.data.encoded import Labelled
from gif.data.stored import PackedStrings
from gif.errors import InputError


class FolderImages:
    """Image files below a folder.

    Args:
        root: the folder.
        files: their paths below it.
    """

    def __init__(self, root: Path, files: PackedStrings) -> None:
        self._root, self._files = root, files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, row: int) -> bytes:
        return (self._root / self._files[row]).read_bytes()

    def place(self, row: int) -> str:
        return str(self._root / self._files[row])

    def fingerprint(self) -> str:
        return hashlib.sha256(str(self._root).encode() + self._files.data.numpy().tobytes()).hexdigest()[:32]


def read_folder(path: str | Path) -> Labelled:
    """Find the images below a folder: each folder that holds images is an identity, at whatever depth.

    Identities are numbered, and images follow each other, in the order of their names. An identity's name is its
    folder's path below ``path``. Files without one of the suffixes .jpg, .jpeg, .png, .webp are passed over.

    Raises ValueError where images lie directly in ``path``, or there are none.
    """
    root = Path(path).absolute()
    names: list[str] = []
    counts: list[int] = []

    def files() -> Iterator[str]:
        for name, images in _identities(root):
            if name == ".":
                raise InputError(f"images lie directly in {root} ({images[0]}, ...); give each identity its own folder")
            names.append(name)
            counts.append(len(images))
            yield from (f"{name}/{image}" for image in images)

    source = FolderImages(root, PackedStrings.pack(files()))
    if not names:
        raise InputError(f"no folder below {root} holds images ({', '.join(SUFFIXES)}); wanted one folder an identity")
    return Labelled(source, torch.arange(len(names)).repeat_interleave(torch.tensor(counts)), names)


def _identities(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The folders with images, in the order of their paths, with their images' names in order."""
    for folder, below, files in os.walk(root, followlinks=True):
        below.sort()
        images = sorted(file for file in files if file.lower().endswith(SUFFIXES) and not file.startswith("."))
        if images:
            yield os.path.relpath(folder, root), images
