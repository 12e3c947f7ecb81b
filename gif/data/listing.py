"""The small text files beside images, `property` and the names of the identities; what readers leave out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gif.errors import InputError
from gif.files import existing_file, write_text

PROPERTY = "property"
IDENTITIES = "identities.txt"
NAMES_ALONE = f"names in {IDENTITIES} of nobody with an image"
NAMED = 3  # of many, in a message


@dataclass
class Tally:
    """How many there are of something, and the names of the first: of millions no list is kept."""

    number: int = 0
    first: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, names: Iterable[str]) -> Tally:
        tally = cls()
        for name in names:
            tally.add(name)
        return tally

    def add(self, name: str) -> None:
        self.number += 1
        if len(self.first) < NAMED:
            self.first.append(printable(name))

    def add_all(self, others: Tally) -> None:
        """Count names that follow those counted so far."""
        self.number += others.number
        self.first = [*self.first, *others.first][:NAMED]

    @property
    def names(self) -> str:
        """The first names, and whether there are more."""
        return ", ".join(self.first) + (", ..." if self.number > len(self.first) else "")

    def __str__(self) -> str:
        return f"{self.number:,} ({self.names})"


def as_utf8(name: str) -> str:
    """A name from a file system in UTF-8, whatever its bytes are: those that are none are written out, as \\xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(name: str) -> str:
    """A name or a path in one line of UTF-8, line breaks written out too, as \\n."""
    return "".join(repr(letter)[1:-1] if letter in _BREAKS else letter for letter in as_utf8(name))


def is_foreign(name: str) -> bool:
    """Whether a file or folder of this name belongs to a program and not to a data set: hidden ones, previews, bins."""
    return name.startswith(".") or name in _FOREIGN


_BREAKS = frozenset("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")  # where str.splitlines breaks
_FOREIGN = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__")
)


def read_text(path: str | Path) -> str:
    """The text of a small UTF-8 file, with or without a byte-order mark, its lines ended by \\n.

    Raises FileNotFoundError, or ValueError where it is no UTF-8.
    """
    try:
        return existing_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error}); write it as UTF-8") from error


@dataclass(frozen=True)
class Property:
    """What `property` says of a data set: "number of identities,height,width"."""

    identities: int
    height: int
    width: int

    @classmethod
    def read(cls, path: str | Path) -> Property:
        """Raises FileNotFoundError, or ValueError if it does not hold three positive whole numbers."""
        text = read_text(path).strip()
        try:
            identities, height, width = map(int, text.split(","))
        except ValueError as error:
            raise InputError(f"{path} holds {text[:80]!r}, wanted 'identities,height,width'") from error
        if min(identities, height, width) < 1:
            raise InputError(f"{path} holds {text[:80]!r}, wanted positive numbers")
        return cls(identities, height, width)

    def write(self, path: str | Path) -> None:
        write_text(path, f"{self.identities},{self.height},{self.width}\n")


def read_names(folder: Path, numbers: list[int]) -> tuple[list[str], Tally]:
    """Names of the identities with these numbers: lines of ``folder``/identities.txt, or else the numbers themselves;
    and the names there that none of them has.

    Raises ValueError where the file has no such line, or not as many as ``property`` beside it says.
    """
    path = folder / IDENTITIES
    if not path.exists():
        return [str(number) for number in numbers], Tally()
    names = read_text(path).split("\n")
    names = names[:-1] if names[-1] == "" else names
    if numbers and max(numbers) >= len(names):
        raise InputError(f"{path} names {len(names)} identities, none of them {max(numbers)}; remove or correct it")
    if (beside := path.with_name(PROPERTY)).exists() and (said := Property.read(beside).identities) != len(names):
        raise InputError(f"{path} names {len(names)} identities, and {PROPERTY} says {said}; remove or correct either")
    given = set(numbers)
    others = (name for number, name in enumerate(names) if number not in given)
    return [names[number] for number in numbers], Tally.of(others)
