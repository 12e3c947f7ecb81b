"""What is done, how fast, and when it will end."""

from gif import progress as progress_module
from gif.progress import console, progress


def test_what_was_done_before_is_shown_and_is_no_speed(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with console.capture() as capture, progress("reading", 100, "rows", done=60) as advance:
        advance(20, "loss 1")
    assert capture.get() == "reading: 80/100 rows, 2/s, 10 s left loss 1\n"
