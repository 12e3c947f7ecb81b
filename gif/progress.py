"""One look for everything that takes more than a second: what is done, how fast, and when it will end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gif.distributed import rank
from gif.packages import needs

if TYPE_CHECKING:  # rich is imported where it draws: training and tokenising do without it
    from rich.console import Console
    from rich.progress import Progress, Task
    from rich.table import Table
    from rich.text import Text

PLAIN_INTERVAL = 5.0  # seconds between lines where the output is not a terminal


@cache
def _console() -> Console:
    with needs("rich", "tables on the terminal"):
        from rich.console import Console
    return Console()


def __getattr__(name: str) -> Console:
    """``console``, which everything is printed through, made when it is first asked for."""
    if name == "console":
        return _console()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def new_table(*headers: str, **options: Any) -> Table:
    """An empty `rich.table.Table`. Raises ValueError where rich is not installed."""
    with needs("rich", "tables on the terminal"):
        from rich.table import Table
    return Table(*headers, **options)


def print_table(table: Table) -> None:
    """Print what `new_table` began."""
    _console().print(table)


def say_once(text: str) -> None:
    """Print a line of what all processes know alike: the first of them does."""
    if rank() == 0:
        say(text)


def say_resumed(what: str, done: int, total: int, unit: str) -> None:
    """Say where work goes on that an earlier run began, or that there is nothing left of it; nothing at a beginning.

    ``unit`` is one of what is counted: "step".
    """
    if done >= total > 0:
        say_once(f"{what}: already finished, {unit} {total:,} of {total:,}")
    elif done:
        say_once(f"{what}: resuming at {unit} {done:,} of {total:,}")


def say(text: str) -> None:
    """Print a line as it is, whatever the width of the terminal; what its encoding lacks is written out, as \\xe9."""
    rich = find_spec("rich") is not None
    encoding = (_console().encoding if rich else sys.stdout.encoding) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    if rich:
        _console().print(text, soft_wrap=True, highlight=False, markup=False)
    else:
        print(text, flush=True)


@contextmanager
def progress(description: str, total: int, unit: str = "items", *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a progress bar with rate and ETA; yields ``advance(n, note="")``.

    On a terminal it is one live line. In a log file, or where rich is not installed, it is a line every few seconds,
    so that a log stays readable.
    ``note`` is a short text shown below the bar: a loss, an optimality gap; in a log, at the end of its line. ``done``
    were done by a run before: they are shown, and do not count as speed. Of processes that work together the first
    shows its bar, the others none.
    """
    if rank() > 0:
        yield lambda n, note="": None
        return
    if find_spec("rich") is not None and _console().is_terminal:
        with _live_line() as bar:
            task = bar.add_task(description, total=total, completed=done, unit=unit, note="")
            yield lambda n, note="": bar.update(task, advance=n, note=note)
        return

    start = last = time.monotonic()
    before = done

    def advance(n: int, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL or done >= total:
            last = now
            rate = (done - before) / max(now - start, 1e-9)
            left = max(total - done, 0) / max(rate, 1e-9)
            say(f"{description}: {done:,}/{total:,} {unit}, {rate:,.0f}/s, {left:.0f} s left {note}".rstrip())

    yield advance


def _live_line() -> Progress:
    """A bar that takes what the count, the rate and the time left leave of the line; the note in a line below."""
    from rich.console import RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")

    class TwoLines(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if note := task.fields["note"]:
                    yield Text(f"  {note}", overflow="ellipsis", no_wrap=True)

    def whole() -> Column:
        return Column(no_wrap=True)

    return TwoLines(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3)),
        BarColumn(bar_width=None, table_column=Column(ratio=2, min_width=6)),
        MofNCompleteColumn(table_column=whole()),
        RateColumn(table_column=whole()),
        TimeRemainingColumn(table_column=whole()),
        console=_console(),
        expand=True,
    )
