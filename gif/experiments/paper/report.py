"""What every experiment of the paper leaves: its numbers, tables and pictures, and its block in a document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gif.documents import markdown_table, replace_block, require_block
from gif.experiments.comparison import Rows, show
from gif.files import read_json, write_text
from gif.ownership import existing, hold
from gif.progress import say
from gif.resume import RECORD, claim_folder

FOLDER = Path("runs/experiments")
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Table:
    """A table with a title, which is a sentence without its stop."""

    title: str
    columns: Sequence[str]
    rows: Rows

    def __str__(self) -> str:
        return f"{self.title}.\n\n{markdown_table(self.columns, self.rows)}"


@dataclass(frozen=True)
class Findings:
    """What an experiment found.

    Args:
        numbers: all of them, fit for JSON.
        conditions: what they hold for: data, budgets, machine; a sentence or two.
        verdict: what they say, a sentence each.
        tables: the few that are read.
        pictures: what draws each into a file, by name and caption.
    """

    numbers: Mapping[str, Any]
    conditions: str
    verdict: Sequence[str]
    tables: Sequence[Table]
    pictures: Mapping[str, tuple[str, Callable[[Path], None]]]


def chosen(settings: Settings, **given: Any) -> Settings:
    """``settings``, a dataclass, with those fields that are ``given``: not None."""
    return replace(settings, **{name: value for name, value in given.items() if value is not None})  # type: ignore[type-var]


def counted(number: int, noun: str) -> str:
    """Such as "1 seed" and "3 seeds"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def place(name: str, output: Path | None, quick: bool) -> Path:
    """The folder of an experiment: ``output``, or its own; the quick form has another."""
    return output or FOLDER / (f"{name}-quick" if quick else name)


@contextmanager
def experiment(name: str, output: Path, settings: Mapping[str, Any], docs: Path | None) -> Iterator[None]:
    """Hold ``output`` for an experiment with these ``settings``, which another run there must share.

    Raises ValueError where ``docs`` has no place for it, before work starts, or the folder holds another run.
    """
    if docs is not None:
        require_block(docs, _block(name))
    with hold(output, existing(output / RECORD)):
        claim_folder(output, {"command": f"experiments {name}", **json.loads(json.dumps(settings))})
        yield


def once(path: Path, work: Callable[[], Any]) -> Any:
    """What ``path`` holds, as JSON; where it is not there yet, what ``work`` gives is written there first."""
    if not path.exists():
        write_text(path, json.dumps(work(), indent=2))
    return read_json(path)


def publish(name: str, found: Findings, output: Path, docs: Path | None) -> None:
    """Print what was found, write NAME.json, NAME.md and pictures into ``output``, and its block into ``docs``."""
    for table in found.tables:
        show(table.columns, table.rows, table.title)
    for sentence in found.verdict:
        say(sentence)
    numbers = {"conditions": found.conditions, "verdict": list(found.verdict), **found.numbers}
    write_text(output / f"{name}.json", json.dumps(numbers, indent=2))
    drawn = [_draw(found, "{picture}.png", output)]
    write_text(output / f"{name}.md", _text(found, "{picture}.png"))
    say(f"wrote {output / f'{name}.json'} and {output / f'{name}.md'}, drew {', '.join(map(str, drawn[0]))}")
    if docs is not None:
        path = f"pictures/experiments-{name}-{{picture}}.png"
        _draw(found, path, docs.parent)
        replace_block(docs, _block(name), _text(found, path))
        say(f"wrote the block of {name} into {docs}")


def draw_scores(axes: Any, place: float, scores: Sequence[float], **style: Any) -> None:
    """Draw the mean of some scores at a ``place`` of the x axis, with their deviation where there are several."""
    spread = np.std(scores) if len(scores) > 1 else None
    axes.errorbar(place, np.mean(scores), spread, marker="o", markersize=8, capsize=4, **style)


def _block(name: str) -> str:
    return f"experiments {name}"


def _draw(found: Findings, path: str, folder: Path) -> list[Path]:
    places = [folder / path.format(picture=picture) for picture in found.pictures]
    for place_of, (_, draw) in zip(places, found.pictures.values(), strict=True):
        place_of.parent.mkdir(parents=True, exist_ok=True)
        draw(place_of)
    return places


def _text(found: Findings, path: str) -> str:
    shown = [f"![{caption}]({path.format(picture=picture)})" for picture, (caption, _) in found.pictures.items()]
    points = "\n".join(f"- {sentence}" for sentence in found.verdict)
    return "\n\n".join([found.conditions, points, *shown, *(str(table).rstrip() for table in found.tables)]) + "\n"
