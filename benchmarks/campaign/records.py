"""What becomes of a case, kept as JSON lines that are on the disk as soon as they are known, and counted in a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Literal

from gif.progress import new_table

Outcome = Literal["right", "refused", "fell back", "not promised", "silent", "executed", "traceback", "lost"]
OUTCOMES: dict[Outcome, str] = {
    "right": "right",
    "refused": "refused in one line",
    "fell back": "fell back",
    "not promised": "not promised",
    "silent": "silent",
    "executed": "executed",
    "traceback": "traceback",
    "lost": "lost",
}
"""With the columns' titles."""
VIOLATIONS: tuple[Outcome, ...] = ("silent", "executed", "traceback", "lost")
FILE = "campaign.jsonl"


@dataclass(frozen=True)
class Found:
    """What became of a case, and in words what was done and what came of it."""

    outcome: Outcome
    note: str = ""


@dataclass(frozen=True)
class Kind:
    """Cases of one kind, numbered from 0.

    Args:
        part: of the campaign.
        name: of the kind.
        attempt: one case, by its number, its own random numbers and an empty folder.
        cases: how many there are; None for as many as are wanted.
    """

    part: str
    name: str
    attempt: Callable[[int, Random, Path], Found]
    cases: int | None = None


@dataclass(frozen=True)
class Record:
    """A case that was tried. ``case`` repeats it: seed/part/kind/number."""

    case: str
    outcome: Outcome
    note: str

    @property
    def kind(self) -> tuple[str, str]:
        """Part and kind."""
        _, part, name, _ = self.case.split("/")
        return part, name


class Records:
    """The cases tried so far, in a file to which each is appended: a campaign that was interrupted keeps them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.all = [Record(**json.loads(line)) for line in lines if line.endswith("}")]  # the last may be half of one
        if path.exists():
            path.write_text("".join(map(_line, self.all)), encoding="utf-8")

    def add(self, record: Record) -> None:
        self.all.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    @property
    def violations(self) -> list[Record]:
        return [record for record in self.all if record.outcome in VIOLATIONS]

    def tried(self) -> set[str]:
        """The cases there are."""
        return {record.case for record in self.all}


def _line(record: Record) -> str:
    return json.dumps(asdict(record)) + "\n"


def rows(records: Iterable[Record]) -> list[tuple[str, str, list[int]]]:
    """Part, kind, and how many cases were tried and had each of the `OUTCOMES`; the last row counts all."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for record in records:
        counts.setdefault(record.kind, Counter())[record.outcome] += 1
    counts["all", ""] = sum(counts.values(), Counter())
    return [(*kind, [found.total(), *(found[outcome] for outcome in OUTCOMES)]) for kind, found in counts.items()]


def table(records: Iterable[Record]):  # type: ignore[no-untyped-def]  # rich is imported where it draws
    """The counts as a `rich.table.Table`."""
    drawn = new_table("part", "kind", "tried", *OUTCOMES.values())
    for column in drawn.columns[2:]:
        column.justify = "right"
    for part, kind, counts in rows(records):
        drawn.add_row(part, kind, *(f"{count:,}" if count else "." for count in counts))
    return drawn
