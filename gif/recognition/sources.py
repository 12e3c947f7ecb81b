"""Which images are meant: files, folders, data sets; each image by a name of its own."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gif.data import EncodedImages, IdentityDataset, ImageDecoder, open_data
from gif.data.decoding import SUFFIXES
from gif.data.listing import as_utf8, is_foreign, printable
from gif.data.loading import NAMES, WORDS
from gif.errors import InputError, MissingFileError

_RECORDS = "train.rec"


class ImageFiles:
    """Image files, wherever they lie: an `EncodedSource`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, row: int) -> bytes:
        return self._paths[row].read_bytes()

    def place(self, row: int) -> str:
        return printable(str(self._paths[row]))

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(map(str, self._paths)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def open_images(inputs: Sequence[str], decoder: ImageDecoder) -> IdentityDataset:
    """The images of files and folders, each as an identity of its own, which is called as the image is; or a data set.

    Of one folder, at whatever depth, images are called by their paths in it, of several by the paths that were given
    with it, and files as they were given. A single .rec file, folder of train.rec, pattern of tar shards or name of a
    data set is that data set: call `image_names` for what its images are called.

    Raises FileNotFoundError, ValueError for no image, two of one name, or nothing of the kind.
    """
    if not inputs:
        raise InputError("no image is given; give image files, or a folder of them")
    if len(inputs) == 1 and _is_data_set(inputs[0]):
        return open_data(inputs[0], decoder=decoder)
    found = dict[str, Path]()
    for given in inputs:
        for name, path in _images(given, within=len(inputs) > 1):
            if name in found and found[name] != path:
                raise InputError(f"two images are called {name!r}; rename one, for embeddings go by the name")
            found[name] = path
    images = EncodedImages(ImageFiles(list(found.values())), torch.arange(len(found)), list(found), decoder=decoder)
    images.origin = inputs[0] if len(inputs) == 1 else f"{len(inputs)} files and folders"
    images.check_readable()
    return images


def image_names(images: IdentityDataset) -> list[str]:
    """What each image of a data set is called: as its identity where that has no other, else identity/number."""
    if len(images) == images.num_identities:
        return [images.names[label] for label in images.labels.tolist()]
    counts: Counter[int] = Counter()
    names = []
    for label in images.labels.tolist():
        names.append(f"{images.names[label]}/{counts[label]}")
        counts[label] += 1
    return names


def _is_data_set(given: str) -> bool:
    path = Path(given)
    if path.is_dir():
        return (path / _RECORDS).exists() or any(path.glob("*.tar"))
    return given in NAMES or given in WORDS or (path.suffix.lower() in (".rec", ".tar") and "." in path.name)


def _images(given: str, *, within: bool) -> Iterator[tuple[str, Path]]:
    """Names and paths of the images that one file or folder is, in the order of the names."""
    path = Path(given)
    if not path.exists():
        raise MissingFileError(f"no file or folder {printable(given)}; give images, or a folder of them")
    if not path.is_dir():
        yield as_utf8(given), path
        return
    before = 0
    for folder, folders, files in os.walk(path, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not is_foreign(name))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not is_foreign(name):
                image = Path(folder, name)
                yield as_utf8(str(image if within else image.relative_to(path))), image
                before += 1
    if not before:
        raise InputError(f"no image below {path} ({', '.join(SUFFIXES)}); give a folder that holds images")


def _refuse(error: OSError) -> None:
    raise InputError(f"the folder {error.filename} cannot be read ({error.strerror}); give it the right to be read")
