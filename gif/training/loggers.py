"""Where a run's measures go: a file of its own always; a table, TensorBoard and Weights & Biases by name."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from gif.errors import InputError, UnavailableError, in_short
from gif.files import write_text, writing

Write = Callable[[int, Mapping[str, float]], None]
LoggerName = Literal["csv", "tensorboard", "wandb"]
MEASURES, TABLE = "measures.jsonl", "measures.csv"
WANDB_PROJECT = "gif"


class Logger(ABC):
    """Something that takes named measures by step. Only the first process opens it."""

    package: str | None = None
    """What has to be installed, as pip calls it."""

    def check(self) -> None:
        """Raise UnavailableError, before work starts, where the package is not installed."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise UnavailableError(
                f'{self.package} is not installed; pip install "gif-recognition[{self.package}]", or train without'
            )

    @abstractmethod
    def open(self, done: int) -> Any:
        """A context of ``write(step, measures)``; what a killed run wrote after ``done`` steps is replaced."""


class MeasuresFile(Logger):
    """A line of JSON for each time that a run tells something: {"step": 10, "loss": 3.2, ...}.

    ``pandas.read_json(path, lines=True)`` reads it. What is no finite number is null.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def open(self, done: int) -> Iterator[Write]:
        kept = [line for line in self._lines() if _step_of(line) <= done]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:

            def write(step: int, measures: Mapping[str, float]) -> None:
                finite = {name: value if math.isfinite(value) else None for name, value in measures.items()}
                file.write(json.dumps({"step": step, **finite}) + "\n")
                file.flush()

            yield write

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []


class MeasuresTable(Logger):
    """A row of CSV for each time that a run tells something: its step, and a column a measure.

    What is not told is empty; a measure that comes later is a new column at the end; no finite number is nan or inf.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def open(self, done: int) -> Iterator[Write]:
        rows = [row for row in self._rows() if int(row["step"]) <= done]
        columns = list(rows[0]) if rows else ["step"]
        write_text(self.path, _csv(columns, rows, header=True))

        def write(step: int, measures: Mapping[str, float]) -> None:
            row = {"step": step, **measures}
            if new := [name for name in row if name not in columns]:
                before = self._rows()
                columns.extend(new)
                write_text(self.path, _csv(columns, before, header=True))
            with writing(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_csv(columns, [row]))

        yield write

    def _rows(self) -> list[dict[str, str]]:
        """All whole rows: a killed run may have left a part of one."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        return [row for row in rows if (row.get("step") or "").isdecimal() and None not in row]


class TensorBoard(Logger):
    """TensorBoard's files in a folder."""

    package = "tensorboard"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @contextmanager
    def open(self, done: int) -> Iterator[Write]:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder), purge_step=done + 1) as writer:

            def write(step: int, measures: Mapping[str, float]) -> None:
                for name, value in measures.items():
                    writer.add_scalar(name, value, step)

            yield write


class WeightsAndBiases(Logger):
    """A run of Weights & Biases, whose files are in ``folder``/wandb; a run that continues is the same one there.

    Who is not logged in sets WANDB_MODE=offline, or WANDB_API_KEY; WANDB_PROJECT and others mean what they do there.

    Args:
        folder: of the run.
        settings: of the run, shown there.
    """

    package = "wandb"

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = Path(folder).resolve(), dict(settings)

    @contextmanager
    def open(self, done: int) -> Iterator[Write]:
        import os

        import wandb

        identity = hashlib.sha256(f"{self.folder} {json.dumps(self.settings)}".encode()).hexdigest()[:16]
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=self.folder.name,
                id=identity,
                resume="allow",
                dir=str(self.folder),
                config=self.settings,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # its own, and its client's, share no class
            raise UnavailableError(
                f"wandb cannot begin a run ({in_short(error)}); log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        failed = 1
        try:
            yield lambda step, measures: run.log(dict(measures), step=step)
            failed = 0
        finally:
            run.finish(exit_code=failed)


def loggers_of(folder: Path, names: Sequence[LoggerName] | LoggerName, settings: Mapping[str, Any]) -> list[Logger]:
    """The loggers of the run in a folder: its file of measures, and those named. Raises ValueError for another name."""
    known: dict[str, Callable[[], Logger]] = {
        "csv": lambda: MeasuresTable(folder / TABLE),
        "tensorboard": lambda: TensorBoard(folder / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(folder, settings),
    }
    given = [names] if isinstance(names, str) else names
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"no logger {', '.join(unknown)}; there are {', '.join(known)}")
    return [MeasuresFile(folder / MEASURES), *(known[name]() for name in dict.fromkeys(given))]


@contextmanager
def all_open(loggers: Sequence[Logger], done: int) -> Iterator[Write]:
    """``write(step, measures)`` to all of them."""
    with ExitStack() as stack:
        writes = [stack.enter_context(logger.open(done)) for logger in loggers]

        def write(step: int, measures: Mapping[str, float]) -> None:
            for each in writes:
                each(step, measures)

        yield write


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool = False) -> str:
    """Rows as CSV, a line each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _step_of(line: str) -> float:
    """The step that a line is of; infinite for half a line, which a killed run has left."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
