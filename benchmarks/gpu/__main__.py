"""`python -m benchmarks.gpu`: prove, time and tune every kernel on the GPU at hand, in the seconds that are given.

    python -m benchmarks.gpu --seconds 600 --output runs/gpu
    python -m benchmarks.gpu --rehearse --output runs/rehearsal     # every stage, tiny, on a CPU

Stages run in order of worth, each in a process group of its own, with a limit of its own; what one does not use flows
on to those after it. Results are appended to gpu.jsonl as they come, a stage's output to STAGE.log. A stage that
crashes or is killed is a record, and the rest goes on. The exit code is 0 if all stages passed, 1 if not, 2 for wrong
arguments, 3 where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import NO_DEVICE, STAGES, Stage, limit
from benchmarks.gpu.records import ENDED, FILE, ROOT, Recorder, environment, read_records, screen

NEEDED = (
    *("torch", "triton", "numpy", "rich", "scipy", "matplotlib", "fontTools", "PIL", "joblib"),
    *("filelock", "psutil", "pynvml", "pytest"),
)
"""Packages that the stages need."""
OPTIONAL = {
    "xdist": "the tests run in one process",
    "pytest_timeout": "a test that hangs takes the others with it",
    "hypothesis": "no test of the kernels draws by it",
    "jsonargparse": "no `gif` command, no benchmarks.report",
    "open_clip": "no CLIP encoder",
    "ortools": "tokenising is not held against the exact optimum",
    "faiss": "no clustering to compare with",
    "liger_kernel": "no Liger to compare with",
    "cut_cross_entropy": "no CCE to compare with",
}
LEAST = 8.0
"""Seconds below which a stage is not begun: importing torch takes most of them."""
PATIENCE = 3.0
"""Seconds between asking a stage to end and ending it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / FILE
    if file.exists():
        return _refuse(f"{file} exists: give another --output, so that no run is lost or mixed with another")
    where = environment(options.rehearse, options.commit)
    stages = [stage for stage in STAGES if stage.name in options.stages]
    deadline = time.monotonic() + options.seconds
    _say_what_is_missing(Recorder(file, "start", where))
    passed = True
    for place, stage in enumerate(stages):
        seconds = limit(stages[place:], deadline - time.monotonic())
        code = _run(stage, seconds, options, Recorder(file, stage.name, where))
        if code == NO_DEVICE:
            print((options.output / f"{stage.name}.log").read_text(encoding="utf-8"))
            return NO_DEVICE
        passed = passed and code == 0
    print(f"\n{where.card}, torch {where.torch}, Triton {where.triton}, {where.commit}: all in {file}\n")
    print(screen(read_records(file)))
    return 0 if passed else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog="\n".join(f"{stage.name:>10}  {stage.says}" for stage in STAGES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {FILE} and the stages' logs")
    parser.add_argument("--seconds", type=float, default=600, help="for all stages together (600)")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE", help="only these")
    parser.add_argument("--rehearse", action="store_true", help="every stage at tiny sizes on a CPU")
    parser.add_argument("--commit", default="", help="what is measured, where the checkout is no git repository")
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error(f"--seconds must be > 0, got {options.seconds:g}")
    return options


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


def _say_what_is_missing(record: Recorder) -> None:
    needed = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if needed:
        record("packages", status="missing", note=f"{', '.join(needed)} are needed: stages will fail")
    for name, consequence in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            record(name, status="missing", note=consequence)


def _run(stage: Stage, seconds: float, options: argparse.Namespace, record: Recorder) -> int:
    """One stage in its own process group; how it ended is its last record. Returns 0 if it passed."""
    if seconds < LEAST:
        record(ENDED, status="left out", note=f"{seconds:.0f} s were left for it, and {LEAST:.0f} are needed to begin")
        return 1
    command = [sys.executable, "-m", "benchmarks.gpu.stage", stage.name, "--output", str(options.output)]
    command += ["--seconds", str(seconds), "--commit", record.environment.commit]
    command += ["--rehearse"] if options.rehearse else []
    begin = time.monotonic()
    with (options.output / f"{stage.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment(options), start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    took = time.monotonic() - begin
    if code == 0:
        record(ENDED, took, "s", note="passed")
    elif code != NO_DEVICE:
        why = f"see {stage.name}.log"
        if code is None:
            why = f"killed at its limit; {why}"
        elif code < 0:
            why = f"crashed by {signal.Signals(-code).name}; {why}"
        record(ENDED, took, "s", status="failed", note=why)
    return 1 if code is None else code


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """What the stages' processes are given: this checkout; for a rehearsal Triton's interpreter and no card."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    given = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if options.rehearse:
        given |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | given


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the group: the stage, if it has not ended, and whatever it left."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main())
