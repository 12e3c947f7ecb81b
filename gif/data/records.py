"""RecordIO (.rec and .idx), as insightface and im2rec write it, without mxnet.

A record is, little-endian: magic u32; lrec u32, whose upper 3 bits say which part of a record this is (0 whole, 1
first, 2 middle, 3 last) and whose lower 29 the length; the data; zeros up to 4 bytes. Where the data holds the magic
number itself, aligned to 4 bytes, it was cut there: joining the parts puts it back. The data begins with flag u32,
label f32, id u64, id2 u64; where flag > 0 that many float32 labels follow, and the first of them is the label. The rest
is the image. `.idx` has a line "key, tab, byte offset" a record, in any order.

insightface's files begin with a record without image, key 0, whose labels are (end of the images' keys, end of all
keys); images have the keys from 1, and a record an identity follows, without image, labels (first, end of its images'
keys). im2rec's files hold images alone. float32 holds whole numbers exactly only up to 2^24: of more images the first
record's numbers are rounded, so the keys of the .idx and what the records hold decide.
"""

from __future__ import annotations

import codecs
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gif.data.encoded import Labelled
from gif.data.listing import NAMED, NAMES_ALONE, PROPERTY, Property, Tally, printable, read_names
from gif.data.stored import MappedFile, PackedStrings, cached_index, fingerprint
from gif.errors import InputError
from gif.progress import progress

MAGIC = 0xCED7230A
LARGEST_LABEL = 1 << 24  # beyond, float32 skips numbers
INDEX_FORMAT = "gif.record_index/2"
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_LENGTH_BITS = 29
_LONGEST = (1 << _LENGTH_BITS) - 1
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_ALIGNMENT = 4
_BLOCK = 1 << 16  # records looked at together

_HEAD = np.dtype(
    [
        ("magic", "<u4"),
        ("lrec", "<u4"),
        ("flag", "<u4"),
        ("label", "<f4"),
        ("id", "<u8"),
        ("id2", "<u8"),
        ("first", "<f4"),
    ]
)


class RecordImages:
    """The images of a .rec file.

    Args:
        file: the file.
        offsets: (N,) int64, where their records begin.
    """

    def __init__(self, file: MappedFile, offsets: Tensor) -> None:
        self._file, self._offsets = file, offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, row: int) -> bytes:
        data = read_record(self._file, int(self._offsets[row]))[0]
        flag = _HEADER.unpack_from(data)[0]
        return data[_HEADER.size + 4 * flag :]

    def place(self, row: int) -> str:
        return f"{printable(str(self._file.path))}, record at byte {int(self._offsets[row])}"

    def fingerprint(self) -> str:
        return fingerprint("records", [self._file])


def read_records(path: str | Path) -> Labelled:
    """The images of a .rec file in the order of their keys, and their labels.

    The .idx file beside it, where there is one, says where the records are; otherwise the .rec file is read through.
    Labels are read from each record, once: what was found is kept in the cache folder. Labels are numbered anew without
    gaps; an identity's name is its number in the file, or that line of ``identities.txt`` beside it. Labels are checked
    against ``property`` beside it. Records that the .idx does not name, and labels within ``property`` without image,
    are named in what is returned.

    Raises FileNotFoundError, or ValueError where a file is damaged, the two do not belong together, or a label is no
    whole number from 0 to 2^24 and within ``property``.
    """
    file = MappedFile.find(path)
    index = Path(path).with_suffix(".idx")
    files = [file] + ([MappedFile.find(index)] if index.exists() else [])
    found = cached_index(INDEX_FORMAT, files, lambda: _find_images(file, files[1:]))
    limit = LARGEST_LABEL
    labels = found["labels"]
    passed_over = list(PackedStrings(found["passed_over"], found["passed_over_ends"]))
    if (beside := file.path.with_name(PROPERTY)).exists():
        limit = Property.read(beside).identities
    wrong = ((labels < 0) | (labels >= limit)).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise InputError(
            f"{file.path}: {len(wrong)} of {len(labels)} labels lie outside [0, {limit}), first {int(labels[first])} "
            f"in the record at byte {int(found['offsets'][first])}; correct `property`, or make the file again"
        )
    numbers, labels = labels.unique(return_inverse=True)
    if beside.exists() and len(numbers) < limit:
        without = np.setdiff1d(np.arange(min(limit, len(numbers) + NAMED)), numbers.numpy())[:NAMED]
        nobody = Tally(limit - len(numbers), [str(label) for label in without])
        passed_over.append(f"identities of `property` without an image: {nobody}")
    names, others = read_names(file.path.parent, numbers.tolist())
    if others.number and not beside.exists():
        passed_over.append(f"{NAMES_ALONE}: {others}")
    return Labelled(RecordImages(file, found["offsets"]), labels, names, tuple(passed_over))


def read_record(file: MappedFile, offset: int) -> tuple[bytes, int]:
    """The data of the record that begins at ``offset``, its parts joined, and where the next record begins.

    Raises ValueError where there is no whole record.
    """
    parts, wanted = [], (_WHOLE, _FIRST)
    while True:
        magic, lrec = _PART.unpack(file.read(offset, _PART.size))
        kind, length = lrec >> _LENGTH_BITS, lrec & _LONGEST
        if magic != MAGIC or kind not in wanted:
            raise InputError(
                f"{file.path} holds no record at byte {offset:,} (magic {magic:#010x}, wanted {MAGIC:#010x}, part "
                f"{kind}); it is damaged, or its .idx belongs to another file"
            )
        parts.append(file.read(offset + _PART.size, length))
        offset += _PART.size + length + -length % _ALIGNMENT
        if kind in (_WHOLE, _LAST):
            data = _MAGIC_BYTES.join(parts)
            if len(data) < _HEADER.size:
                raise InputError(f"{file.path}: the record before byte {offset:,} has {len(data)} bytes; it is damaged")
            return data, offset
        wanted = (_MIDDLE, _LAST)


def _find_images(file: MappedFile, index: Sequence[MappedFile]) -> dict[str, Tensor]:
    """Offsets and labels (N,) int64 of the images, in the order of their keys."""
    if file.size == 0:
        raise InputError(f"{file.path} is empty; copy or make it again")
    keys, offsets = _read_index(index[0], file) if index else _scan(file)
    heads = _heads(file, offsets)
    unnamed = _records_between(file, offsets, np.minimum(heads["end"], file.size))  # some leave the last zeros out
    flag, label, empty = _parse(read_record(file, int(offsets[0]))[0]) if keys[0] == 0 else (0, 0.0, False)
    if flag > 0 and empty:  # insightface's
        end = int(label)
        slack = int(np.spacing(np.float32(end))) if end > LARGEST_LABEL else 0
        named = slice(*np.searchsorted(keys, [1, end + slack]))
        missing = max(end - slack, 1) - 1 - int(((keys >= 1) & (keys < end - slack)).sum())
        if missing > 0:
            raise InputError(
                f"{index[0].path if index else file.path} lacks {missing} of {end - 1} images; make it again"
            )
        kept = (keys[named] < end - slack) | ~heads["empty"][named]  # the true end lies within the rounding
        beyond = keys[(keys >= end + slack) & ~heads["empty"]]
    else:
        named = slice(None)
        kept = np.ones(len(keys), dtype=bool)
        beyond = keys[:0]
    labels, offsets = heads["label"][named][kept], offsets[named][kept]
    if not len(labels):
        raise InputError(f"{file.path} holds no image")
    bad = np.flatnonzero(~(np.isfinite(labels) & (labels == np.floor(labels)) & (np.abs(labels) < LARGEST_LABEL)))
    if len(bad):
        raise InputError(
            f"{file.path}: label {labels[bad[0]]} of the record at byte {offsets[bad[0]]:,} is no whole number below "
            "2^24, up to which float32 holds every one; keep so many identities in tar shards"
        )
    reasons = {
        "records that the .idx does not name": unnamed,
        "images whose keys lie beyond those that the first record says": Tally.of(map(str, beyond)),
    }
    passed_over = PackedStrings.pack(f"{reason}: {tally}" for reason, tally in reasons.items() if tally.number)
    return {
        "offsets": torch.from_numpy(offsets),
        "labels": torch.from_numpy(labels.astype(np.int64)),
        "passed_over": passed_over.data,
        "passed_over_ends": passed_over.ends,
    }


def _records_between(file: MappedFile, offsets: NDArray[np.int64], ends: NDArray[np.int64]) -> Tally:
    """The records that lie beside those which begin at ``offsets`` and end at ``ends``.

    Raises ValueError where something else lies there: a file that was shortened or filled up, or another's index.
    """
    order = offsets.argsort()
    gaps = np.append(0, ends[order]) != np.append(offsets[order], file.size)
    found = Tally()
    for place in np.flatnonzero(gaps):
        begin = int(ends[order[place - 1]]) if place else 0
        end = int(offsets[order[place]]) if place < len(order) else file.size
        while begin < end:
            found.add(f"at byte {begin:,}")
            begin = read_record(file, begin)[1]
        if begin > end:
            raise InputError(
                f"{file.path}: the record before byte {begin:,} goes on where another begins, at byte {end:,}; it "
                "is damaged, or its .idx belongs to another"
            )
    return found


def _read_index(index: MappedFile, file: MappedFile) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read the keys from an .idx, in rising order, and the offsets that belong to them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy stops at what is no number with a warning
            with index.path.open("rb") as text:
                text.seek(len(codecs.BOM_UTF8) if text.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0)
                numbers = np.fromfile(text, np.int64, sep=" ")
        keys, offsets = numbers.reshape(-1, 2).T
    except (ValueError, DeprecationWarning) as error:
        raise InputError(f"{index.path} is damaged ({error}); wanted a line 'key, tab, offset' a record") from error
    if not len(keys):
        raise InputError(f"{index.path} names no record; copy or make it again, or remove it to do without")
    if not (offsets.min() >= 0 and offsets.max() <= file.size - _PART.size):
        raise InputError(
            f"{index.path} names byte {int(offsets.max()):,}, and {file.path} has {file.size:,}; it is truncated, or "
            "the two do not belong together: copy or make them again"
        )
    order = keys.argsort(kind="stable")
    keys, offsets = keys[order], offsets[order]
    if (keys[1:] == keys[:-1]).any():
        raise InputError(f"{index.path} has a key more than once; make it again")
    if len(np.unique(offsets)) < len(offsets):
        raise InputError(f"{index.path} has two keys of one record; make it again")
    return keys, offsets


def _scan(file: MappedFile) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find keys and offsets where there is no .idx, by going through the records in their order."""
    offsets, offset = [], 0
    with progress(f"looking for records in {file.path.name}", file.size, "bytes") as advance:
        while offset < file.size:
            offsets.append(offset)
            offset = read_record(file, offset)[1]
            advance(offset - offsets[-1])
    return np.arange(len(offsets)), np.array(offsets, dtype=np.int64)


def _heads(file: MappedFile, offsets: NDArray[np.int64]) -> dict[str, NDArray]:
    """Of the record at each offset: its label float32, whether it is empty, without image, and where it ends."""
    found: dict[str, list[NDArray]] = {"label": [], "empty": [], "end": []}
    order = offsets.argsort()  # the file is read once from front to back
    with progress("reading labels", len(offsets), "records") as advance:
        for begin in range(0, len(offsets), _BLOCK):
            some = offsets[order[begin : begin + _BLOCK]]
            places = np.minimum(some[:, None] + np.arange(_HEAD.itemsize), file.size - 1)
            heads = np.frombuffer(file.pages(), np.uint8)[places].view(_HEAD)[:, 0]
            kind, length = heads["lrec"] >> _LENGTH_BITS, (heads["lrec"] & _LONGEST).astype(np.int64)
            whole = (heads["magic"] == MAGIC) & (kind == _WHOLE) & (length >= _HEADER.size)
            whole &= some + _PART.size + length <= file.size
            end = some + _PART.size + length + -length % _ALIGNMENT
            label = np.where(heads["flag"] > 0, heads["first"], heads["label"])
            empty = length <= _HEADER.size + 4 * heads["flag"].astype(np.int64)
            for place in np.flatnonzero(~whole):  # cut into parts, or an error
                data, end[place] = read_record(file, int(some[place]))
                _, label[place], empty[place] = _parse(data)
            for name, values in (("label", label), ("empty", empty), ("end", end)):
                found[name].append(values)
            advance(len(some))
    back = order.argsort()
    return {name: np.concatenate(blocks)[back] for name, blocks in found.items()}


def _parse(data: bytes) -> tuple[int, float, bool]:
    """Read a record's flag, its label, and whether it is empty, that is without an image."""
    flag, label, _, _ = _HEADER.unpack_from(data)
    end = _HEADER.size + 4 * flag
    if flag and len(data) >= _HEADER.size + 4:
        (label,) = struct.unpack_from("<f", data, _HEADER.size)
    return flag, label, len(data) <= end


def pack_record(image: bytes, key: int, labels: Sequence[float]) -> bytes:
    """A record as it lies in a file: one label goes into the header, several follow it."""
    flag = len(labels) if len(labels) > 1 else 0
    header = _HEADER.pack(flag, 0.0 if flag else labels[0], key, 0)
    data = header + (struct.pack(f"<{flag}f", *labels) if flag else b"") + image
    parts, begin, at = [], 0, data.find(_MAGIC_BYTES)
    while at >= 0:
        if at % _ALIGNMENT == 0:
            parts.append(data[begin:at])
            begin = at + _ALIGNMENT
        at = data.find(_MAGIC_BYTES, max(at + 1, begin))
    parts.append(data[begin:])
    if max(map(len, parts)) > _LONGEST:
        raise InputError(f"an image has {len(image):,} bytes, and a record holds at most {_LONGEST:,}")
    kinds = [_WHOLE] if len(parts) == 1 else [_FIRST, *[_MIDDLE] * (len(parts) - 2), _LAST]
    return b"".join(
        _PART.pack(MAGIC, kind << _LENGTH_BITS | len(part)) + part + bytes(-len(part) % _ALIGNMENT)
        for kind, part in zip(kinds, parts, strict=True)
    )
