"""The stages of a run: which are done, how long each took, and going on at the first that is not."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gif.errors import Interrupted
from gif.files import read_json, write_text
from gif.progress import say

RECORD = "stages.json"


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        name: what it is called where it is kept that it is done; its first word is its kind.
        title: what is said when it begins.
        outputs: the files it makes, the main one first; a stage of which one is gone is done once more.
        work: does it, and continues where it was interrupted.
    """

    name: str
    title: str
    outputs: Sequence[Path]
    work: Callable[[], None]

    @property
    def kind(self) -> str:
        """What several stages may be called, as those that train a head each."""
        return self.name.partition(" ")[0]

    def is_done(self, timing: Timing | None) -> bool:
        """Whether it has ended, and left all that it makes."""
        return timing is not None and timing.seconds is not None and all(output.exists() for output in self.outputs)


@dataclass(frozen=True)
class Timing:
    """How often a stage was begun, and how long its last, whole attempt took (s); None where it has not ended."""

    begun: int = 0
    seconds: float | None = None


class StageRecord:
    """What is known of a run's stages, in ``folder``/stages.json, written before and after each."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD

    def read(self) -> dict[str, Timing]:
        """Of each stage that was begun, by name."""
        return {name: Timing(**kept) for name, kept in read_json(self._path).items()} if self._path.exists() else {}

    def begin(self, name: str) -> None:
        """Note that a stage begins, once more perhaps."""
        self._write(name, Timing(self.read().get(name, Timing()).begun + 1))

    def end(self, name: str, seconds: float) -> None:
        """Note that it is done."""
        self._write(name, Timing(self.read()[name].begun, seconds))

    def _write(self, name: str, timing: Timing) -> None:
        all_of_them = self.read() | {name: timing}
        write_text(self._path, json.dumps({name: asdict(timing) for name, timing in all_of_them.items()}, indent=2))


def run_stages(stages: Sequence[Stage], folder: Path, until: str | None = None) -> None:
    """Do the stages that are not done, in order, up to those of the kind ``until`` and with them.

    Raises Interrupted instead of KeyboardInterrupt, which says where it was and what goes on.
    """
    record = StageRecord(folder)
    last = max((place for place, stage in enumerate(stages) if stage.kind == until), default=len(stages) - 1)
    for number, stage in enumerate(stages[: last + 1], start=1):
        where = f"[{number}/{len(stages)}] {stage.title}"
        timing = record.read().get(stage.name)
        if stage.is_done(timing):
            say(f"{where}: already done, {stage.outputs[0]}")
        else:
            say(f"{where}{': goes on' if timing and timing.begun else ''}")
            record.begin(stage.name)
            began = time.monotonic()
            try:
                stage.work()
            except KeyboardInterrupt as stop:
                told = str(stop) or "interrupted; the same command does this stage anew"
                kept = "" if number == 1 else ", and what was done before it is kept"
                raise Interrupted(f"{where}: {told}{kept}", getattr(stop, "number", signal.SIGINT)) from stop
            record.end(stage.name, time.monotonic() - began)
