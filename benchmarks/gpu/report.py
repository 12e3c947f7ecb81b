"""The records of a run as tables, in docs/gpu.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import STAGES
from benchmarks.gpu.records import ENDED, Record, number, read_records
from gif.documents import markdown_table, replace_block, require_block
from gif.files import write_text
from gif.progress import say


def report_gpu(path: Path, *, output: Path, docs: Path | None) -> None:
    """Write gpu.md, and the blocks of ``docs``: the goals, and the stages that were run.

    Raises ValueError for a file without records, or a rehearsal that is to go into a document.
    """
    records = read_records(path)
    if not records:
        raise ValueError(f"{path} holds no records; give the gpu.jsonl of `python -m benchmarks.gpu`")
    if docs is not None and any(record.environment.rehearsal for record in records):
        raise ValueError(f"{path} is a rehearsal, which says nothing of a card: it goes into no document")
    stages = [stage for stage in STAGES if any(record.stage == stage.name for record in records)]
    blocks = {"gpu goals": goals(records)}
    for stage in stages:
        blocks[f"gpu {stage.name}"] = as_markdown([r for r in records if r.stage == stage.name], stage.says)
    if docs is not None:
        for name in blocks:
            require_block(docs, name)
    write_text(output / "gpu.md", "\n".join(f"## {name}\n\n{text}" for name, text in blocks.items()))
    if docs is not None:
        for name, text in blocks.items():
            replace_block(docs, name, text)
    say(f"wrote gpu.md into {output}")


def goals(records: Sequence[Record]) -> str:
    """What was wanted, and what came out."""
    rows = [
        (f"{r.stage}: {r.what}", str(r.goal), _value(r), {True: "yes", False: "**no**", None: "not known"}[r.reached])
        for r in records
        if r.goal is not None
    ]
    table = markdown_table(("", "goal", "measured", "reached"), rows) if rows else "No goal was looked at.\n"
    return f"{where(records)}\n\n{table}"


def as_markdown(records: Sequence[Record], says: str) -> str:
    """One stage: its numbers, what is one click away, and what was not measured, with the reason."""
    numbers = [r for r in records if r.value is not None and r.what != ENDED]
    shown = [r for r in numbers if not r.detail or r.failed]
    folded = [r for r in numbers if r not in shown]
    text = f"{says} {where(records)}\n\n"
    text += _table(shown) if shown else "No numbers.\n"
    if folded:
        text += f"\n<details><summary>{len(folded)} more</summary>\n\n{_table(folded)}\n</details>\n"
    others = [r for r in records if r.value is None and r.what != ENDED]
    return text + "".join(f"\n- {r.what}: {r.status}. {_cell(r.note)}" for r in others) + "\n" * bool(others)


def where(records: Sequence[Record]) -> str:
    """Card, versions and date of the last, and the commits of all."""
    at = records[-1].environment
    commits = list(dict.fromkeys(record.environment.commit for record in records))
    rehearsal = "A rehearsal, which says nothing of speed: " if at.rehearsal else ""
    driver = f", driver {at.driver}" if at.driver else ""
    return (
        f"{rehearsal}{at.card}{driver}, torch {at.torch}, Triton {at.triton}, NumPy {at.numpy}, Python {at.python}, "
        f"commit{'s' * (len(commits) > 1)} {' and '.join(commits)}, {records[-1].date[:10]}."
    )


def _table(records: Sequence[Record]) -> str:
    rows = [
        (
            _cell(r.what),
            _value(r),
            "" if r.floor is None else f"{number(r.floor)} {r.unit}",
            _goal(r),
            _cell(f"**{r.status}** {r.note}" if r.failed else r.note),
        )
        for r in records
    ]
    return markdown_table(("", "measured", "the card's limit", "goal", ""), rows)


def _value(record: Record) -> str:
    return "" if record.value is None else f"{number(record.value)} {record.unit}".strip()


def _goal(record: Record) -> str:
    if record.goal is None:
        return ""
    return f"{record.goal}: **no**" if record.reached is False else str(record.goal)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
