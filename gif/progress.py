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
    ``note`` is a short text shown after the bar: a loss, an optimality gap. ``done`` were done by a run before: they
    are shown, and do not count as speed. Of processes that work together the first shows its bar, the others none.
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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_console(),
    )
