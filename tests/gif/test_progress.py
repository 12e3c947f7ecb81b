"""What is done, how fast, and when it will end."""

import io
import itertools
import re

import pytest
from rich.console import Console

from gif import progress as progress_module
from gif.progress import console, progress, say_resumed


def test_what_was_done_before_is_shown_and_is_no_speed(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with console.capture() as capture, progress("reading", 100, "rows", done=60) as advance:
        advance(20, "loss 1")
    assert capture.get() == "reading: 80/100 rows, 2/s, 10 s left loss 1\n"


@pytest.mark.parametrize("width", [80, 60])
def test_count_rate_and_time_left_stay_whatever_the_note(monkeypatch, width):
    file = io.StringIO()
    seconds = itertools.count()
    terminal = Console(file=file, force_terminal=True, width=width, get_time=lambda: float(next(seconds)))
    monkeypatch.setattr(progress_module, "_console", lambda: terminal)
    note = "loss 12.345, tokens 34/31/99 %, codes 3%, own 0.50, impostor 0.45, 12.0 GB, validation 0.9876"
    with progress("training", 640_000, "images", done=320_000) as advance:
        for _ in range(4):
            advance(1280, note)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", file.getvalue())]
    assert all(len(line) <= width for line in lines)
    bar = next(line for line in reversed(lines) if "/640000" in line)
    assert "training" in bar and "325120/640000" in bar and "images/s" in bar and re.search(r"\d:\d\d:\d\d", bar)
    assert "━" in bar
    assert any(line.startswith("  loss 12.345, tokens 34/31/99 %") for line in lines)  # below it


def test_where_work_goes_on_is_said():
    with console.capture() as capture:
        say_resumed("training", 0, 100, "step")
        say_resumed("training", 1234, 5000, "step")
        say_resumed("training", 5000, 5000, "step")
    assert capture.get() == (
        "training: resuming at step 1,234 of 5,000\ntraining: already finished, step 5,000 of 5,000\n"
    )
