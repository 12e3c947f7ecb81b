"""`pytest -m gpu` in as many processes as there are cores, with a limit for each test."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.records import ROOT, at_least
from benchmarks.gpu.stage import Run

TEST_SECONDS = 60
MARK = re.compile(r"\bmark\.gpu\b")
TINY = ("tests/gif_kernels/test_triton_code_regression.py", "-k", "empty")


def run(run: Run) -> None:
    """The files that hold tests for a GPU; each that fails is a record."""
    result = run.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=importlib"]
    command += ["-q", "--tb=short", "-rf", f"--junitxml={result}", *run.pick(_files(), list(TINY))]
    command += [*run.device.kernel_flags(), *_plugins(run)]
    print(" ".join(command), flush=True)
    try:
        subprocess.run(command, cwd=ROOT, timeout=max(run.seconds_left, 1.0))
    except subprocess.TimeoutExpired:
        run.record("pytest", status="failed", note="it did not end in time: see tests.log")
        return
    _report(run, result)


def _files() -> list[str]:
    """Only these are collected: others want packages that may not be there."""
    found = (ROOT / "tests").rglob("test_*.py")
    return sorted(str(path.relative_to(ROOT)) for path in found if MARK.search(path.read_text(encoding="utf-8")))


def _plugins(run: Run) -> list[str]:
    found = []
    if run.device.cores > 1 and importlib.util.find_spec("xdist"):
        found += ["-n", str(run.device.cores), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        found += ["--timeout", str(TEST_SECONDS)]
    return found


def _report(run: Run, result: Path) -> None:
    cases = list(ElementTree.parse(result).getroot().iter("testcase"))
    passed = 0
    for case in cases:
        fault = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if fault is not None:
            lines = (fault.get("message") or "").strip().splitlines() or [""]
            run.record(f"{case.get('classname')}::{case.get('name')}", status="wrong", note=lines[0][:200])
        elif case.find("skipped") is None:
            passed += 1
    run.record(
        "tests that pass", passed, "", goal=at_least(1), note=f"of {len(cases)}", status="ok" if passed else "failed"
    )
