"""The small text files beside images: insightface's `property`, and the names of the identities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gif.errors import InputError
from gif.files import existing_file, write_text

PROPERTY = "property"
IDENTITIES = "identities.txt"


@dataclass(frozen=True)
class Property:
    """What `property` says of a data set: "number of identities,height,width"."""

    identities: int
    height: int
    width: int

    @classmethod
    def read(cls, path: str | Path) -> Property:
        """Raises FileNotFoundError, or ValueError if it does not hold three positive whole numbers."""
        text = existing_file(path).read_text(encoding="utf-8", errors="replace").strip()
        try:
            identities, height, width = map(int, text.split(","))
        except ValueError as error:
            raise InputError(f"{path} holds {text[:80]!r}, wanted 'identities,height,width'") from error
        if min(identities, height, width) < 1:
            raise InputError(f"{path} holds {text[:80]!r}, wanted positive numbers")
        return cls(identities, height, width)

    def write(self, path: str | Path) -> None:
        write_text(path, f"{self.identities},{self.height},{self.width}\n")


def read_names(folder: Path, numbers: list[int]) -> list[str]:
    """Names of the identities with these numbers: lines of ``folder``/identities.txt, or else the numbers themselves.

    Raises ValueError where the file has no such line.
    """
    path = folder / IDENTITIES
    if not path.exists():
        return [str(number) for number in numbers]
    names = path.read_text(encoding="utf-8").split("\n")
    names = names[:-1] if names[-1] == "" else names
    if numbers and max(numbers) >= len(names):
        raise InputError(f"{path} names {len(names)} identities, none of them {max(numbers)}; remove or correct it")
    return [names[number] for number in numbers]
