"""compute-sanitizer on a small case of each op: memcheck for what is outside of memory, racecheck for shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from benchmarks.gpu.cases import CASES
from benchmarks.gpu.records import ROOT
from benchmarks.gpu.stage import Run


@dataclass(frozen=True)
class Tool:
    """One of compute-sanitizer's; ``finds``: what it counts."""

    name: str
    flags: tuple[str, ...]
    finds: str


MEMCHECK = Tool("memcheck", ("--report-api-errors", "no"), "errors")
RACECHECK = Tool("racecheck", ("--racecheck-report", "all"), "hazards")
NO_TOOL = Tool("no tool", (), "errors")
PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
PROCESSES = 7
"""Side by side: the card is shared, and each is slow on its own."""


def run(run: Run) -> None:
    """A process for each op and tool; in a rehearsal one for all, without the tool."""
    program = next(filter(None, map(shutil.which, PLACES)), None)
    if program is None and not run.rehearsal:
        run.record("compute-sanitizer", status="missing", note="it comes with the CUDA toolkit")
        return
    each = [(tool, [op]) for tool in (MEMCHECK, RACECHECK) for op in CASES]
    jobs = run.pick(each, [(NO_TOOL, list(CASES)[-2:])])
    with ThreadPoolExecutor(min(PROCESSES, run.device.cores)) as pool:
        futures = {pool.submit(_checked, run, program, tool, ops): (tool, ops) for tool, ops in jobs}
        for future in as_completed(futures):
            tool, ops = futures[future]
            _report(run, tool, f"{tool.name}, {', '.join(ops)}", future.result())


def _checked(run: Run, program: str | None, tool: Tool, ops: list[str]) -> subprocess.CompletedProcess[str] | None:
    """What the tool said; None where there was no time."""
    if run.seconds_left <= 0:
        return None
    prefix = [] if program is None or run.rehearsal else [program, "--tool", tool.name, "--print-limit", "20"]
    prefix += tool.flags
    command = [*prefix, sys.executable, "-m", "benchmarks.gpu.small", *ops]
    # the caching allocator's blocks are larger than what a kernel may touch
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=run.seconds_left
        )
    except subprocess.TimeoutExpired:
        return None


def _report(run: Run, tool: Tool, what: str, done: subprocess.CompletedProcess[str] | None) -> None:
    if done is None:
        run.record(what, status="left out", note="no time")
        return
    text = done.stdout + done.stderr
    print(text, flush=True)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    errors = sum(map(int, summary))
    if done.returncode != 0 or (not summary and not run.rehearsal):
        last = (text.strip().splitlines() or [""])[-1][:200]
        run.record(what, status="failed", note=f"exit code {done.returncode}: {last}")
        return
    run.record(what, errors, tool.finds, status="wrong" if errors else "ok")
