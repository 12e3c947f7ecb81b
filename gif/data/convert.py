"""From one format of data sets to another: the images' bytes are copied as they are."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from gif.data.decoding import BrokenImageError, suffix
from gif.data.encoded import BrokenPolicy, Labelled, stored
from gif.data.images import IdentityDataset, digest_images
from gif.data.listing import IDENTITIES, PROPERTY, Property, Tally, is_foreign, printable
from gif.data.loading import NAMES, WORDS, find_data, open_data
from gif.data.pairs import read_pairs, write_bin
from gif.data.records import LARGEST_LABEL, pack_record
from gif.errors import InputError
from gif.files import fsync, remove_temporaries, write_text
from gif.ownership import check_output, existing, hold
from gif.packages import needs
from gif.progress import progress, say
from gif.resume import UnfinishedWork

JOURNAL_FORMAT = "gif.conversion/1"
Format = Literal["folder", "rec", "tar"]
_PART_SEED = 1  # chooses a part; with that of the split, 0, a share that is held out of the part would be another share
_FACE_SIZE = 112  # what `property` says, as insightface's files do


def convert(
    data: str,
    output: Path,
    *,
    to: Format = "folder",
    identities: float | None = None,
    pairs: Path | None = None,
    shard_size: int = 10_000,
    on_broken: BrokenPolicy = "skip",
) -> None:
    """Write a data set in another format: image folder, RecordIO, tar shards; or pairs of images as a .bin file.

    Images keep their bytes, are never encoded anew, and are ordered by identity. A conversion that was interrupted
    continues when the same command is given again, and the output appears when it is whole.

    Args:
        data: the data set, a name or a path (docs/data.md); with --pairs, a folder of images.
        output: the folder to make; with --pairs, the .bin file.
        to: "folder" has a folder an identity; "rec" train.rec, train.idx and property, as insightface lays them out;
            "tar" shards 000000.tar, ... for webdataset. Beside the last two, identities.txt names the labels, a line
            each.
        identities: how many of the data set's, at random, such as 1e4; all where it is not given, a million of
            glyph-words. Of data sets that are made here.
        pairs: text file of pairs, a line "file file 0|1", or LFW's pairs.txt.
        shard_size: images a tar shard.
        on_broken: "skip" leaves out, and counts, what is no JPEG, PNG or WebP; "raise" stops there.
    """
    if pairs is not None:
        check_output(output, inputs=[pairs])
        named = read_pairs(pairs, Path(data))
        write_bin(output, named, len(named))
        say(f"wrote {len(named):,} pairs to {output}")
        return
    if output.suffix in (".rec", ".idx", ".tar", ".bin"):
        raise InputError(f"--output {output} looks like a file; give a folder, and say what goes into it with --to")
    if shard_size < 1:
        raise InputError(f"shard_size must be at least 1, got {shard_size}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty; give another --output")
    found = _find(data, identities)
    staging = output.with_name(f".{output.name}.partial")
    with hold(output, existing(staging / "journal")):
        written, broken, nobody = _write(found, staging, to, shard_size, on_broken)
        remove_temporaries(staging, held=True)
        os.replace(staging, output)
        fsync(output.parent)
    say(f"wrote {written:,} images of {len(found.names) - nobody.number:,} identities to {output}")
    if broken:
        say(f"{broken:,} of {len(found.labels):,} images were broken and left out; gif data inspect names them")
    if nobody.number:
        say(f"{nobody.number:,} identities have no image that could be read and were left out: {nobody.names}")
    for line in found.passed_over:
        say(line)


def _find(data: str, identities: float | None) -> Labelled:
    """The encoded images of a data set, or of some of its identities."""
    if data in NAMES or data in WORDS:
        seed = 0 if data in WORDS else _PART_SEED
        return PngImages.of(open_data(data, identities=identities, seed=seed))
    if identities is not None:
        raise InputError(
            f"identities is for data sets that are made here; {data} is converted as a whole: leave it out"
        )
    return find_data(data)


class PngImages:
    """Images in memory, encoded as PNG when they are asked for: glyphs, for instance."""

    def __init__(self, images: IdentityDataset) -> None:
        self._images = images

    @classmethod
    def of(cls, images: IdentityDataset) -> Labelled:
        return Labelled(cls(images), images.labels, images.names)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, row: int) -> bytes:
        pixels = self._images[row][0].permute(1, 2, 0).numpy()
        with needs("pillow", "writing images"):
            from PIL import Image
        file = BytesIO()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
        return file.getvalue()

    def place(self, row: int) -> str:
        return f"image {row}"

    def fingerprint(self) -> str:
        return self._images.names.fingerprint[:32]


def _write(
    found: Labelled, staging: Path, to: Format, shard_size: int, on_broken: BrokenPolicy
) -> tuple[int, int, Tally]:
    """Write everything into a folder, or continue there.

    Returns how many images were written, how many were broken, and the identities that nothing was written of.
    """
    identities = hashlib.sha256(repr(list(found.names)).encode() + found.labels.numpy().tobytes()).hexdigest()[:16]
    settings = {
        "input": found.source.fingerprint(),
        "sample of the images": digest_images(len(found.source), partial(stored, found.source)),
        "identities": identities,
        "to": to,
        "shard_size": shard_size,
        "on_broken": on_broken,
    }
    work = UnfinishedWork(staging / "journal", JOURNAL_FORMAT, settings)
    state = work.load()
    if state is None:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed before it could keep its state
        staging.mkdir(parents=True)
        state = {
            "done": torch.tensor(0),
            "counts": torch.zeros(len(found.names), dtype=torch.int64),
            "sizes": torch.zeros(2, dtype=torch.int64),
        }
    done, counts = int(state["done"]), state["counts"]
    order = found.labels.argsort(stable=True)
    writer = _writer(to, staging, list(found.names), shard_size)
    writer.resume(int(counts.sum()), *state["sizes"].tolist())

    def save() -> None:
        work.save({"done": torch.tensor(done), "counts": counts, "sizes": torch.tensor(writer.sizes())})

    with progress(f"converting to {to}", len(order) - done, "images") as advance:
        try:
            for row in order[done:].tolist():
                try:
                    encoded = found.source.read(row)
                    ending = suffix(encoded)
                except (ValueError, FileNotFoundError) as error:
                    if on_broken == "raise":
                        raise BrokenImageError(f"{found.source.place(row)} is a broken image: {error}") from error
                else:
                    label = int(found.labels[row])
                    writer.add(encoded, ending, label)
                    counts[label] += 1
                done += 1
                if work.due:
                    save()
                advance(1)
        except KeyboardInterrupt:
            save()
            raise
    written = int(counts.sum())
    if not written:
        raise InputError(f"not one of {done:,} images is a JPEG, PNG or WebP; check the input")
    writer.finish(counts)
    work.remove()
    return written, done - written, Tally.of(found.names[label] for label in (counts == 0).nonzero().flatten().tolist())


class _Writer(ABC):
    """Writes images, ordered by label, into a folder.

    At most two files grow at a time: their sizes, once everything is on disk, are all that is needed to continue.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder, self._names = folder, names

    @abstractmethod
    def resume(self, written: int, *sizes: int) -> None:
        """Continue behind ``written`` images, with the growing files cut to these sizes; at first all are 0."""

    @abstractmethod
    def add(self, image: bytes, ending: str, label: int) -> None:
        """Write the next image, whose file would end in ``ending``."""

    @abstractmethod
    def sizes(self) -> list[int]:
        """Wait until everything is on disk, and return the sizes of the two files that grow."""

    @abstractmethod
    def finish(self, counts: Tensor) -> None:
        """Write what belongs to the whole, of so many images an identity (m,), and wait until it is on disk."""

    def _check_lines(self) -> None:
        """Raise ValueError unless each name is a line of its own in identities.txt."""
        for name in self._names:
            if printable(name) != name:
                raise InputError(
                    f"identity {name!r} is no line of {IDENTITIES}: it holds a line break, or is no UTF-8; rename "
                    "it, or convert to folder"
                )

    def _name_identities(self) -> None:
        write_text(self._folder / IDENTITIES, "".join(f"{name}\n" for name in self._names))


def _writer(to: Format, folder: Path, names: list[str], shard_size: int) -> _Writer:
    if to == "folder":
        return _FolderWriter(folder, names)
    if to == "rec":
        return _RecordWriter(folder, names)
    if to == "tar":
        return _ShardWriter(folder, names, shard_size)
    raise InputError(f"to must be 'folder', 'rec' or 'tar', got {to!r}")


class _FolderWriter(_Writer):
    """name/000000.jpg, ...: numbered through the data set, the same whenever a run was killed."""

    def resume(self, written: int, *sizes: int) -> None:
        for name in self._names:
            if "\0" in name or any(part == "" or is_foreign(part) for part in name.split("/")):
                raise InputError(
                    f"identity {name!r} cannot name a folder, or one that is read again; convert to rec or tar"
                )
        if len(set(self._names)) < len(self._names):
            (name, number) = Counter(self._names).most_common(1)[0]
            raise InputError(
                f"{number:,} identities are called {name!r} and would share a folder; convert to rec or tar"
            )
        self._written = written

    def add(self, image: bytes, ending: str, label: int) -> None:
        folder = self._folder / self._names[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self._written:06d}{ending}").write_bytes(image)
        self._written += 1

    def sizes(self) -> list[int]:
        os.sync()  # once a minute, and cheaper than waiting for each of the files since
        return [0, 0]

    def finish(self, counts: Tensor) -> None:
        self.sizes()


class _RecordWriter(_Writer):
    """Writes train.rec and train.idx in insightface's dialect, and property."""

    def resume(self, written: int, *sizes: int) -> None:
        if len(self._names) > LARGEST_LABEL:
            raise InputError(f"labels are float32, exact to 2^24, and {len(self._names):,} identities; convert to tar")
        self._check_lines()
        self._records = _grow(self._folder / "train.rec", sizes[0])
        self._index = _grow(self._folder / "train.idx", sizes[1])
        self._key = written + 1
        if not sizes[0]:
            self._write(b"", 0, (0.0, 0.0))  # its numbers are known in the end

    def add(self, image: bytes, ending: str, label: int) -> None:
        self._write(image, self._key, (float(label),))
        self._key += 1

    def _write(self, image: bytes, key: int, labels: tuple[float, ...]) -> None:
        self._index.write(f"{key}\t{self._records.tell()}\n".encode())
        self._records.write(pack_record(image, key, labels))

    def sizes(self) -> list[int]:
        return [_flush(self._records), _flush(self._index)]

    def finish(self, counts: Tensor) -> None:
        ends = [1, *(1 + counts.cumsum(0)).tolist()]  # of the images' keys, identity after identity
        for place, (first, end) in enumerate(pairwise(ends)):
            self._write(b"", self._key + place, (float(first), float(end)))
        self._records.seek(0)
        self._records.write(pack_record(b"", 0, (float(self._key), float(self._key + len(counts)))))
        self.sizes()
        self._records.close()
        self._index.close()
        Property(len(counts), _FACE_SIZE, _FACE_SIZE).write(self._folder / PROPERTY)
        self._name_identities()


class _ShardWriter(_Writer):
    """Writes shards 000000.tar, ..., which hold 000000000.jpg and, with its label, 000000000.cls, and so on."""

    def __init__(self, folder: Path, names: list[str], shard_size: int) -> None:
        super().__init__(folder, names)
        self._shard_size = shard_size

    def resume(self, written: int, *sizes: int) -> None:
        self._check_lines()
        self._written = written
        self._open(max(written - 1, 0) // self._shard_size, sizes[0])

    def add(self, image: bytes, ending: str, label: int) -> None:
        if self._written and self._written % self._shard_size == 0:
            self._close()
            self._open(self._written // self._shard_size, 0)
        for name, data in ((ending, image), (".cls", str(label).encode())):
            member = tarfile.TarInfo(f"{self._written:09d}{name}")
            member.size = len(data)
            self._archive.addfile(member, BytesIO(data))
        self._written += 1

    def _open(self, number: int, size: int) -> None:
        self._file = _grow(self._folder / f"{number:06d}.tar", size)
        self._archive = tarfile.TarFile(fileobj=self._file, mode="w")

    def _close(self) -> None:
        self._archive.close()
        _flush(self._file)
        self._file.close()

    def sizes(self) -> list[int]:
        return [_flush(self._file), 0]

    def finish(self, counts: Tensor) -> None:
        self._close()
        self._name_identities()


def _grow(path: Path, size: int) -> BinaryIO:
    """The file at ``path``, made if it is new, cut to ``size`` and ready to grow from there."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _flush(file: BinaryIO) -> int:
    """Wait until everything written is on disk; the position, which is the size of a file that grew."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()
