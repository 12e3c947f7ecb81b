"""`gif run` on the card as a user gives it: code vectors, spreading, codes, training, judging; and once more, killed.

The glyphs are those of matplotlib's fonts, so there is nothing to download. A fault that no kernel's test sees would
show in what it reaches on identities never seen.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.records import ROOT, Status, at_least
from benchmarks.gpu.stage import Run
from gif.files import read_json

EPOCHS, FEW_EPOCHS = 4, 1
HEAD, WANTED = "gif", at_least(0.4)
"""TAR at FAR 1e-4 that is wanted of it after `EPOCHS` epochs: 0.44 on an H200 (212 steps of 512 images, iresnet18)."""
FAR = "0.0001"


def run(run: Run) -> None:
    """A whole run; then one that is killed in training, and given again."""
    if importlib.util.find_spec("jsonargparse") is None:
        run.record("gif run", status="missing", note="the commands want jsonargparse")
        return
    with run.attempt("gif run"):
        _whole(run, run.folder / "train")
    with run.attempt("gif run, killed and given again"):
        _killed(run, run.folder / "killed")


def _command(run: Run, output: Path, epochs: int) -> list[str]:
    command = [sys.executable, "-m", "gif.cli", "run", "--data", "glyphs", "--output", str(output)]
    command += ["--epochs", str(epochs), "--device", run.device.name]
    command += run.pick([], ["--identities", "60", "--workers", "0"])
    print(" ".join(command), flush=True)
    return command


def _whole(run: Run, folder: Path) -> None:
    epochs = run.pick(EPOCHS, FEW_EPOCHS)
    subprocess.run(_command(run, folder, epochs), cwd=ROOT, timeout=max(run.seconds_left, 1.0), check=True)
    for name, timing in read_json(folder / "stages.json").items():
        run.record(f"gif run, {name}", timing["seconds"], "s", status="note")
    tar = read_json(folder / HEAD / "evaluation.json")["held_out"]["tar"][FAR]
    run.record(f"TAR at FAR {FAR}, {epochs} epochs", tar, "", goal=None if run.rehearsal else WANTED)


def _killed(run: Run, folder: Path) -> None:
    """SIGKILL in training, then the same command, which goes on at the checkpoint and ends."""
    command = _command(run, folder, FEW_EPOCHS)
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        while process.poll() is None and not _training(folder) and run.seconds_left > 0:
            time.sleep(0.02)
        killed = process.poll() is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
    begun = _training(folder)
    subprocess.run(command, cwd=ROOT, timeout=max(run.seconds_left, 1.0), check=True)
    stages = read_json(folder / "stages.json")
    note = "killed in training" if killed and begun else "it ended before it was killed"
    good = stages["train GIF"]["begun"] == 1 + killed and stages["spread"]["begun"] == 1
    status: Status = "wrong" if not good else "ok" if killed and begun else "note"
    run.record("gif run, killed and given again: ended", 1, "", status=status, note=note)


def _training(folder: Path) -> bool:
    """Whether the head is being trained: its measures are written as they come."""
    measures = folder / HEAD / "measures.jsonl"
    return measures.exists() and measures.stat().st_size > 0
