"""Image folders: one folder an identity."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gif.data.decoding import SUFFIXES
from gif.data.encoded import Labelled
from gif.data.listing import Tally, as_utf8, is_foreign, printable
from gif.data.stored import PackedStrings
from gif.errors import InputError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_LOOKED_AT = 1 << 16  # bytes from either end of such a file


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
        return printable(str(self._root / self._files[row]))

    def fingerprint(self) -> str:
        return hashlib.sha256(os.fsencode(self._root) + self._files.data.numpy().tobytes()).hexdigest()[:32]


def read_folder(path: str | Path) -> Labelled:
    """Find the images below a folder: each folder that holds images is an identity, at whatever depth.

    Identities are numbered, and images follow each other, in the order of their names. An identity's name is its
    folder's path below ``path``; bytes of it that are no UTF-8 are written out, as \\xe9. Passed over, and named in
    what is returned, are files without one of the suffixes .jpg, .jpeg, .png, .webp, folders without an image, hidden
    folders and those of other programs, and links to folders that are read where they are.

    Raises ValueError where images lie directly in ``path``, there are none, a folder cannot be read, or a file beside
    the images says whom they show.
    """
    root = Path(path).absolute()
    names: list[str] = []
    counts: list[int] = []
    walk = _Walk(root)

    def files() -> Iterator[str]:
        for name, images in walk.identities():
            if name == ".":
                raise InputError(f"images lie directly in {root} ({images[0]}, ...); give each identity its own folder")
            names.append(as_utf8(name))
            counts.append(len(images))
            yield from (f"{name}/{image}" for image in images)

    source = FolderImages(root, PackedStrings.pack(files()))
    if not names:
        found = f"; {'; '.join(walk.passed_over())}" if walk.passed_over() else ""
        raise InputError(
            f"no folder below {root} holds images ({', '.join(SUFFIXES)}); wanted one folder an identity{found}"
        )
    if len(set(names)) < len(names):
        ((name, _),) = Counter(names).most_common(1)
        raise InputError(f"two folders below {root} are both called {name!r} as UTF-8; rename one")
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor(counts))
    return Labelled(source, labels, names, walk.passed_over())


def _leads_to(entry: os.DirEntry[str], itself: Callable[..., bool], what_it_links: Callable[[str], bool]) -> bool:
    """A question about a folder's entry, or about what it links to: only then the file system is asked once more."""
    return what_it_links(entry.path) if entry.is_symlink() else itself(entry, follow_symlinks=False)


def _may_be_image(path: str) -> bool:
    """A link that leads nowhere is a broken image."""
    return os.path.isfile(path) or not os.path.exists(path)


class _Walk:
    """One walk through the folders below ``root``, and what was passed over."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real_root = root.resolve()
        self._linked: set[tuple[int, int]] = set()  # folders that a link led to
        self._files, self._foreign, self._empty, self._links = Tally(), Tally(), Tally(), Tally()

    def passed_over(self) -> tuple[str, ...]:
        """A line for each kind of thing that was passed over so far."""
        reasons = {
            f"files passed over, none of {', '.join(SUFFIXES)}": self._files,
            "files and folders passed over, hidden or of other programs": self._foreign,
            "folders without an image": self._empty,
            "links passed over, to folders that are read where they are": self._links,
        }
        return tuple(f"{reason}: {tally}" for reason, tally in reasons.items() if tally.number)

    def identities(self, name: str = ".", linked: bool = False) -> Iterator[tuple[str, list[str]]]:
        """The folders with images, in the order of their paths, with their images' names in order."""
        images, below, metadata = [], [], []
        for entry in self._entries(name):
            path = os.path.normpath(f"{name}/{entry.name}")
            if is_foreign(entry.name):
                self._foreign.add(path)
            elif _leads_to(entry, os.DirEntry.is_dir, os.path.isdir):
                below.append((entry, path))
            elif entry.name.lower().endswith(SUFFIXES) and _leads_to(entry, os.DirEntry.is_file, _may_be_image):
                images.append(entry.name)
            else:
                self._files.add(path)
                metadata += [path] * (entry.name in _METADATA)
        for path in metadata:
            self._refuse_metadata(path)
        if images:
            yield name, images
        elif not below and name != ".":
            self._empty.add(name)
        for entry, path in below:
            through = linked or entry.is_symlink()
            if through and self._is_read_elsewhere(entry):
                self._links.add(path)
            else:
                yield from self.identities(path, through)

    def _entries(self, name: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._root / name) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(
                f"the folder {self._root / name} cannot be read ({error.strerror}); give it the right to be read, or "
                "move it elsewhere"
            ) from error

    def _is_read_elsewhere(self, entry: os.DirEntry[str]) -> bool:
        """Whether the folder that a link leads to, or one below such a folder, is read by another path."""
        real = Path(entry.path).resolve()
        if self._real_root.is_relative_to(real):
            return True
        if real.is_relative_to(self._real_root):
            return not any(map(is_foreign, real.relative_to(self._real_root).parts)) or self._has_been_linked(entry)
        return self._has_been_linked(entry)

    def _has_been_linked(self, entry: os.DirEntry[str]) -> bool:
        status = entry.stat()
        folder = (status.st_dev, status.st_ino)
        seen = folder in self._linked
        self._linked.add(folder)
        return seen

    def _refuse_metadata(self, path: str) -> None:
        """Raise ValueError for a file that names images, as those of Hugging Face's imagefolder do."""
        with (self._root / path).open("rb") as file:
            begin = file.read(_LOOKED_AT)
            file.seek(max(file.seek(0, os.SEEK_END) - _LOOKED_AT, 0))
            end = file.read()
        if b"file_name" in begin + end:
            raise InputError(
                f"{self._root / path} says whom the images show, as in a Hugging Face imagefolder, and here folders "
                "do; give each identity its own folder, or write tar shards; remove the file if the folders are right"
            )
