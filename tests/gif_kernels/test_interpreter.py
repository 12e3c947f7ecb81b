"""The kernels' own tests without a GPU. Triton interprets if told so before it is imported: in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

FILES = sorted(Path(__file__).parent.glob("test_triton_*.py"))


def test_kernels_in_the_interpreter(seed):
    environment = os.environ | {"TRITON_INTERPRET": "1", "GIF_TEST_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, FILES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout
