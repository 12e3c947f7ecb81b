"""Measurements as tables: all of a kernel's for the report, the few that answer its question for a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.heads import BACKBONE_ALONE, BATCH, HEADS
from benchmarks.results import Measurement
from gif.documents import markdown_table

Cell = Callable[[Measurement, Measurement], str]
"""What a small table says of a measurement, beside the first provider's at the same point."""


def as_markdown(found: Sequence[Measurement]) -> str:
    """Tables of a kernel, one a machine: a row a point, a column a provider. What is no headline is folded away."""
    parts = []
    for machine in dict.fromkeys(m.machine for m in found):
        here = [m for m in found if m.machine == machine]
        first = here[0].provider
        third = "the head's share" if first == BACKBONE_ALONE else f"time over that of {first}"
        note = (
            f"{machine}; median time, memory beyond the inputs, and {third}, by ratios to a product timed in the same "
            "rounds."
        )
        if any(m.roofline is not None for m in here):
            note += " In brackets: FLOPs or bytes a second, by formula, as a share of that product's or of a copy's."
        headline, others = ([m for m in here if m.headline is wanted] for wanted in (True, False))
        parts.append(f"{note}\n\n{_table(headline)}")
        if others:
            count = len({m.point for m in others})
            parts.append(f"<details><summary>{count} more</summary>\n\n{_table(others)}\n</details>\n")
    return "\n".join(parts)


def by_point(found: Sequence[Measurement]) -> dict[tuple[str, ...], dict[str, Measurement]]:
    """Measurements of one machine by point and, in it, by provider."""
    points: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for m in found:
        points.setdefault(m.point, {})[m.provider] = m
    return points


def _table(found: Sequence[Measurement]) -> str:
    providers = list(dict.fromkeys(m.provider for m in found))
    rows = []
    for point, there in by_point(found).items():
        first = there.get(providers[0])
        rows.append((" ".join(point), *(_cell(there.get(name), first) for name in providers)))
    return markdown_table(("", *providers), rows)


def _cell(m: Measurement | None, first: Measurement | None) -> str:
    if m is None:
        return ""
    text = f"{_time(m.seconds)}, {_bytes(m.held_bytes)}"
    if first is not None and m is not first:
        text += f", {_share(m, first) if first.provider == BACKBONE_ALONE else _times(m, first)}"
    if m.distinct is not None:
        text += f", {100 * m.distinct:.3g} % distinct"
    return text + (f" ({100 * m.roofline:.0f} %)" if m.roofline is not None else "")


def _times(m: Measurement, first: Measurement) -> str:
    return f"{m.ratio / first.ratio:.3g} x"


def _share(m: Measurement, first: Measurement) -> str:
    """What ``m`` takes beside the backbone alone, of its own time."""
    return f"{100 * (1 - first.ratio / m.ratio):.0f} %"


def missing_heads(found: Sequence[Measurement]) -> str:
    """Which heads did not fit, with the memory they would need."""
    measured = {(m.provider, m.identities) for m in found}
    rows = [
        (f"{m:,}", head.name, _bytes(head.cost(m, BATCH).bytes))
        for m in sorted({m.identities for m in found if m.identities is not None})
        for head in HEADS.values()
        if (head.name, m) not in measured
    ]
    if not rows:
        return ""
    table = markdown_table(("identities", "head", "needs"), rows)
    return f"Not measured, since this machine has too little memory:\n\n{table}"


def _time_and_memory(m: Measurement, first: Measurement) -> str:
    return f"{_time(m.seconds)}, {_bytes(m.held_bytes)}"


def _time_then_times(m: Measurement, first: Measurement) -> str:
    return _time(m.seconds) if m is first else _times(m, first)


def _time_and_share(m: Measurement, first: Measurement) -> str:
    return _time(m.seconds) if m is first else f"{_time(m.seconds)}, {_share(m, first)}"


def _time_and_distinct(m: Measurement, first: Measurement) -> str:
    return f"{_time(m.seconds)}, {100 * (m.distinct or 0):.3g} %"


@dataclass(frozen=True)
class Question:
    """What a document asks of a kernel: what its cells say, in words and as text, and which modes it looks at."""

    says: str
    cell: Cell
    modes: tuple[str, ...] | None = None

    def asks(self, m: Measurement) -> bool:
        """Whether a measurement belongs into the small table."""
        return m.headline and (self.modes is None or m.mode in self.modes)


_TIMES = "Median time of the first column; the others' times over it, by ratios to a product timed in the same rounds"
QUESTIONS = {
    "head": Question("Median time, and memory of a step that is not the first", _time_and_memory),
    "whole_step": Question("Median time, and the head's share of it by ratios to the backbone alone", _time_and_share),
    "uniformity_step": Question("Median time, and memory", _time_and_memory),
    "token_margin": Question(_TIMES, _time_then_times, modes=("forward+backward",)),
    "tokenize": Question("Time, and how many of the codes are distinct", _time_and_distinct),
}


def small_table(found: Sequence[Measurement]) -> str:
    """The headline points of a kernel, a row each, with a line that says what the cells are. All machines are shown."""
    question = QUESTIONS.get(found[0].kernel, Question(_TIMES, _time_then_times))
    asked = [m for m in found if question.asks(m)]
    machines = list(dict.fromkeys(m.machine for m in asked))
    providers = list(dict.fromkeys(m.provider for machine in reversed(machines) for m in asked if m.machine == machine))
    rows = []
    for machine in machines:
        for point, there in by_point([m for m in asked if m.machine == machine]).items():
            cells = [_small_cell(question, there, name, providers[0]) for name in providers]
            rows.append((*([machine] if len(machines) > 1 else []), " ".join(point), *cells))
    where = f" {machines[0]}." if len(machines) == 1 else ""
    table = markdown_table((*(["machine"] if len(machines) > 1 else []), "", *providers), rows)
    return f"{question.says}.{where}\n\n{table}"


def _small_cell(question: Question, there: dict[str, Measurement], provider: str, first: str) -> str:
    if provider in there:
        return question.cell(there[provider], there.get(first, there[provider]))
    (m, *_) = there.values()
    if m.kernel == "head" and m.identities is not None:
        return f"needs {_bytes(HEADS[provider].cost(m.identities, BATCH).bytes)}"
    return ""


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 2**power:
            return f"{count / 2**power:.4g} {unit}" if count >= 1000 * 2**power else f"{count / 2**power:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"
