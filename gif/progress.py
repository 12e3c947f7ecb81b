"""One look for everything that takes more than a second: what is done, how fast, and when it will end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gif.distributed import rank

console = Console()
PLAIN_INTERVAL = 5.0  # seconds between lines where the output is not a terminal


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


def say(text: str) -> None:
    """Print a line as it is, whatever the width of the terminal; what its encoding lacks is written out, as \\xe9."""
    text = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress(description: str, total: int, unit: str = "items", *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a progress bar with rate and ETA; yields ``advance(n, note="")``.

    On a terminal it is one live line. In a log file it is a line every few seconds, so that a log stays readable.
    ``note`` is a short text shown after the bar: a loss, an optimality gap. ``done`` were done by a run before: they
    are shown, and do not count as speed. Of processes that work together the first shows its bar, the others none.
    """
    if rank() > 0:
        yield lambda n, note="": None
        return
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
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
