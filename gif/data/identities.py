"""Who the rows of a table are: the names of identities, kept with everything that has a row an identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gif.data.stored import PackedStrings
from gif.errors import InputError
from gif.files import load_tensors, map_tensor, save_tensors

FORMAT = "gif.identities/1"
DIGEST_BYTES = 8  # of a name: of 64 million, two share theirs with probability 1e-4
_NAMED = 3  # identities in a message
_NAMES_A_BLOCK = 1 << 20
_KEY = "identities"  # of the metadata of a file that has names


class Names(PackedStrings):
    """What identities are called, in order, as UTF-8 bytes in one tensor, which may be memory-mapped.

    A sequence of strings that equals a list of the same strings. Arguments are those of `PackedStrings`.
    """

    @classmethod
    def of(cls, strings: Iterable[str]) -> Names:
        """The strings packed, or as they are if they are packed names; numbers as their digits."""
        return strings if isinstance(strings, Names) else cls.pack(map(str, strings))

    def __getitem__(self, index: int | slice) -> Any:
        """Return one name, or the list of those in a slice."""
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        return super().__getitem__(range(len(self))[index])

    def __add__(self, others: Iterable[str]) -> Names:
        more = Names.of(others)
        return Names(torch.cat([self.data, more.data]), torch.cat([self.ends, more.ends + len(self.data)]))

    def __iter__(self) -> Iterator[str]:
        return (name.decode("utf-8", "surrogateescape") for name in self._encoded())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return torch.equal(self.ends, other.ends) and torch.equal(self.data, other.data)
        return isinstance(other, list | tuple) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        some = ", ".join(repr(self[row]) for row in range(min(len(self), _NAMED)))
        return f"Names([{some}{', ...' if len(self) > _NAMED else ''}], {len(self)})"

    def where(self, keep: Tensor) -> Names:
        """Those for which ``keep`` (m,) bool is True, in their order."""
        lengths = self.ends.diff(prepend=self.ends.new_zeros(1))
        return Names(self.data[keep.repeat_interleave(lengths)], lengths[keep].cumsum(0))

    def digests(self, key: str = "") -> Tensor:
        """(m,) int64: the 8-byte BLAKE2b of each name, of that name and ``key`` alone."""
        keyed = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key.encode())
        found = bytearray()
        for name in self._encoded():
            digest = keyed.copy()
            digest.update(name)
            found += digest.digest()
        return torch.frombuffer(found, dtype=torch.int64) if found else torch.empty(0, dtype=torch.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all names in their order."""
        digest = hashlib.sha256(self.ends.numpy().tobytes())
        digest.update(self.data.numpy().data)
        return digest.hexdigest()

    def _encoded(self) -> Iterator[bytes]:
        for begin in range(0, len(self), _NAMES_A_BLOCK):
            first = int(self.ends[begin - 1]) if begin else 0
            ends = [0, *(self.ends[begin : begin + _NAMES_A_BLOCK] - first).tolist()]
            block = self.data[first : first + ends[-1]].numpy().tobytes()
            yield from (block[one:other] for one, other in pairwise(ends))


@dataclass(frozen=True, eq=False)
class Identities:
    """Who m identities are, in order, and how their images were read.

    Args:
        names: of each, its own.
        images: settings in which the images were decoded, such as {"size": 112, "channels": 3, "fit": "squash"}.
        data: the data set's name or path.
    """

    names: Names
    images: dict[str, Any] = field(default_factory=dict)
    data: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def followed_by(self, others: Identities) -> Identities:
        """These, and after them the others.

        Raises ValueError for a name that both have, or if their images were read in different settings.
        """
        require_same_images("those there", self, "the newcomers", others)
        again = np.isin(others.names.digests().numpy(), self.names.digests().numpy())
        if again.any():
            raise InputError(
                f"{again.sum()} of {len(others)} newcomers are there already ({quote_some(others.names, again)}); give "
                "those alone that came later"
            )
        return Identities(self.names + others.names, self.images, self.data)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a file keeps of the identities, beside `metadata`."""
        return {"names": self.names.data, "name_ends": self.names.ends}

    def metadata(self) -> dict[str, str]:
        """The settings of the images, the data set, and a digest of these and all names, for a file's metadata."""
        texts = {"images": json.dumps(self.images), "data": self.data}
        digest = hashlib.sha256("\n".join([self.names.fingerprint, *texts.values()]).encode("utf-8", "surrogateescape"))
        return {_KEY: digest.hexdigest(), **texts}

    @classmethod
    def read(cls, path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Identities | None:
        """Those that a file at ``path`` with these tensors and metadata keeps; None where it keeps none.

        Raises ValueError where they are damaged.
        """
        if _KEY not in metadata:
            return None
        names = Names(tensors.get("names", torch.empty(0)), tensors.get("name_ends", torch.empty(0)))
        try:
            found = cls(names, json.loads(metadata.get("images", "")), metadata.get("data", ""))
        except json.JSONDecodeError:
            found = None
        if found is None or found.metadata()[_KEY] != metadata[_KEY]:
            raise InputError(f"{path} is damaged: the identities in it are not those that were written; make it again")
        return found

    def save(self, path: str | Path) -> None:
        """Write them to a file of their own, as safetensors, atomically."""
        save_tensors(path, self.tensors(), format=FORMAT, **self.metadata())

    @classmethod
    def load(cls, path: str | Path) -> Identities:
        """What `save` wrote. Raises FileNotFoundError, or ValueError if the file is damaged or of another kind."""
        found = cls.read(path, *load_tensors(path, format=FORMAT))
        if found is None:
            raise InputError(f"{path} names nobody; it is damaged: make it again")
        return found

    @classmethod
    def map(cls, path: str | Path, metadata: Mapping[str, str], *, format: str) -> Identities | None:
        """Do what `read` does, but leave the names in the file, memory-mapped."""
        keys = ("names", "name_ends") if _KEY in metadata else ()
        return cls.read(path, {name: map_tensor(path, name, format=format) for name in keys}, metadata)


def require_same_names(what: str, one: Identities | None, others: str, other: Identities | None) -> None:
    """Raise ValueError, saying what differs, unless both are the same names in the same order; None is not known.

    ``what`` and ``others`` call the two in the message: "the codes", "the data set".
    """
    if one is None or other is None or one.names == other.names:
        return
    mine, theirs = (who.names.digests().numpy() for who in (one, other))
    parts = []
    for names, place, absent in (
        (one.names, others, ~np.isin(mine, theirs)),
        (other.names, what, ~np.isin(theirs, mine)),
    ):
        if absent.any():
            parts.append(f"{absent.sum()} not in {place} ({quote_some(names, absent)})")
    both = min(len(mine), len(theirs))
    moved = np.flatnonzero(mine[:both] != theirs[:both])
    if len(moved):
        row = int(moved[0])
        parts.append(
            f"identity {row} is {_quoted(one.names[row])} in {what} and {_quoted(other.names[row])} in {others}"
        )
    raise InputError(
        f"{what} ({len(one)} identities{_origin(one)}) and {others} ({len(other)}{_origin(other)}) are not of the same "
        f"identities: {'; '.join(parts)}. Give those that belong together, with the held_out they were made with, or "
        "make code vectors and codes anew from this data set"
    )


def require_same(what: str, one: Identities | None, others: str, other: Identities | None) -> None:
    """`require_same_names`, and raise ValueError unless the images of both were read in the same settings."""
    require_same_names(what, one, others, other)
    if one is not None and other is not None:
        require_same_images(what, one, others, other)


def require_same_images(what: str, one: Identities, others: str, other: Identities) -> None:
    """Raise ValueError, saying what differs, unless the images of both were read in the same settings."""
    if one.images != other.images:
        differ = {name for name in one.images | other.images if one.images.get(name) != other.images.get(name)}
        told = ", ".join(f"{name} {one.images.get(name)} and {other.images.get(name)}" for name in sorted(differ))
        raise InputError(
            f"the images of {what} and of {others} were read in different settings ({told}); make both in the same, "
            "and take the code vectors that the codes were cut from"
        )


def check_count(what: str, identities: Identities | None, rows: int) -> None:
    """Raise ValueError unless there is an identity for each of the ``rows`` of ``what``, where there are identities."""
    if identities is not None and len(identities) != rows:
        raise InputError(f"there are {rows} {what} and {len(identities)} identities; give one for each")


def _origin(who: Identities) -> str:
    return f" of {who.data}" if who.data else ""


def quote_some(names: Names, where: np.ndarray) -> str:
    """The first few of the names for which ``where`` (m,) is True, for a message."""
    rows = np.flatnonzero(where)
    return ", ".join(_quoted(names[row]) for row in rows[:_NAMED].tolist()) + (", ..." if len(rows) > _NAMED else "")


def _quoted(name: str) -> str:
    """A name on one line that every terminal can show, whatever its bytes are."""
    return json.dumps(name.encode("utf-8", "backslashreplace").decode(), ensure_ascii=False)
