"""What the stages find, as JSON lines that are on the disk as soon as they are known. Nothing here imports torch."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

Status = Literal["ok", "note", "missing", "left out", "wrong", "failed"]
FAILURES = ("wrong", "failed")
FILE = "gpu.jsonl"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """Where records come from. A ``rehearsal`` ran on a CPU, at tiny sizes, and its speeds say nothing."""

    card: str
    driver: str
    torch: str
    triton: str
    numpy: str
    python: str
    commit: str
    rehearsal: bool


@dataclass(frozen=True)
class Goal:
    """What is wanted of a value: at most, or at least, so much."""

    sign: Literal["<=", ">="]
    wanted: float

    def reached_by(self, value: float) -> bool:
        """Whether ``value`` is good enough."""
        return value <= self.wanted if self.sign == "<=" else value >= self.wanted

    def __str__(self) -> str:
        return f"{self.sign} {self.wanted:g}"

    @classmethod
    def parse(cls, text: str) -> Goal | None:
        """The goal that stands in a file so; None for an empty text, which is no goal. ValueError for another text."""
        if not text:
            return None
        sign, wanted = text.split()
        if sign not in ("<=", ">="):
            raise ValueError(f"a goal begins with <= or >=, got {text!r}")
        return cls("<=" if sign == "<=" else ">=", float(wanted))


def at_most(wanted: float) -> Goal:
    """The goal of a value that should be small."""
    return Goal("<=", wanted)


def at_least(wanted: float) -> Goal:
    """The goal of a value that should be large."""
    return Goal(">=", wanted)


@dataclass(frozen=True)
class Record:
    """One number, or one thing that happened.

    Args:
        stage: who found it.
        what: it is.
        value: the number; None where there is none.
        unit: of the value, the floor and the goal.
        floor: the least that this card could take, or the most that it could give, by its measured ceilings.
        goal: what is wanted of the value; None if nothing is.
        status: "ok"; "note", of what is not judged; "missing", "left out", and why in the note; "wrong", of an output;
            "failed", of everything else.
        note: more, in words.
        date: when, UTC.
        environment: where.
        detail: whether it is one click away in the report.
    """

    stage: str
    what: str
    value: float | None
    unit: str
    floor: float | None
    goal: Goal | None
    status: Status
    note: str
    date: str
    environment: Environment
    detail: bool = False

    @property
    def failed(self) -> bool:
        """Whether the stage did not pass."""
        return self.status in FAILURES

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None without a goal or a value."""
        if self.goal is None or self.value is None:
            return None
        return self.goal.reached_by(self.value)

    def to_json(self) -> str:
        """One line."""
        entry = {name: value for name, value in asdict(self).items() if name != "environment"}
        entry["goal"] = "" if self.goal is None else str(self.goal)
        return json.dumps(entry | asdict(self.environment), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record of a line; ValueError, KeyError or TypeError for a line that is none."""
        entry = json.loads(line)
        environment = Environment(**{field.name: entry.pop(field.name) for field in fields(Environment)})
        return cls(**entry | {"goal": Goal.parse(entry["goal"]), "environment": environment})


class Recorder:
    """Appends to the file of a run. Each record is one write: several processes may append."""

    def __init__(self, path: Path, stage: str, environment: Environment) -> None:
        self.path, self.stage, self.environment = path, stage, environment
        self.failures = 0

    def __call__(
        self,
        what: str,
        value: float | None = None,
        unit: str = "",
        *,
        floor: float | None = None,
        goal: Goal | None = None,
        status: Status = "ok",
        note: str = "",
        detail: bool = False,
    ) -> Record:
        """Write a record, and print it into the stage's log. A value that is not finite is none."""
        if value is not None and not math.isfinite(value):
            note, value = f"{value} {note}".strip(), None
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(self.stage, what, value, unit, floor, goal, status, note, date, self.environment, detail)
        self.failures += record.failed
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, (record.to_json() + "\n").encode())
        finally:
            os.close(file)
        print(line(record), flush=True)
        return record


def read_records(path: Path) -> list[Record]:
    """The records of a run, in their order; none of a file that is not there yet.

    Raises ValueError for a file that `benchmarks.gpu` did not write.
    """
    if not path.exists():
        return []
    try:
        return [Record.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of `python -m benchmarks.gpu` ({error!r}); give its {FILE}") from error


def line(record: Record) -> str:
    """A record for a terminal."""
    text = f"{record.stage:>9}  {record.what}"
    if record.value is not None:
        text += f": {number(record.value)} {record.unit}".rstrip()
    if record.floor is not None:
        text += f" (the card's limit {number(record.floor)})"
    if record.goal is not None:
        text += f" (goal {record.goal}{'' if record.reached is not False else ': not reached'})"
    if record.status not in ("ok", "note"):
        text += f" {record.status.upper()}"
    return text + (f": {record.note}" if record.note else "")


def number(value: float) -> str:
    """Three digits, more of a large number."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def screen(records: Iterable[Record], rows: int = 44) -> str:
    """What a reader looks for first: how each stage ended, what went wrong, and the numbers that have a goal."""
    found = list(records)
    chosen = [r for r in found if r.what == ENDED or r.failed]
    chosen += [r for r in found if r.goal is not None and not r.failed]
    more = len(chosen) - rows
    return "\n".join([line(r)[:150] for r in chosen[:rows]] + ([f"... and {more} more in {FILE}"] if more > 0 else []))


ENDED = "the stage"
"""What the last record of a stage is about."""


def environment(rehearsal: bool, commit: str = "") -> Environment:
    """This machine and checkout, now. The commit can be given where there is no git."""
    card, driver = ("CPU", "") if rehearsal else _card()
    return Environment(
        card=card,
        driver=driver,
        torch=_version("torch"),
        triton=_version("triton"),
        numpy=_version("numpy"),
        python=platform.python_version(),
        commit=commit or _commit(),
        rehearsal=rehearsal,
    )


def _card() -> tuple[str, str]:
    """The first card that is visible, and the driver, by NVML."""
    try:
        import pynvml
    except ImportError:
        return "unknown", "unknown"
    try:
        pynvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdecimal() else 0)
        return str(pynvml.nvmlDeviceGetName(handle)), str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        return "unknown", str(error)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
