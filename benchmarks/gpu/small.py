"""`python -m benchmarks.gpu.small OP ...`: one small case of each op, forward and backward, for the sanitizer."""

from __future__ import annotations

import os
import random
import sys
from itertools import islice

import torch

from benchmarks.gpu.cases import CASES, Draw
from benchmarks.gpu.device import find_device

CASES_AN_OP = 2
"""The sanitizer is slow; the first are small."""


def main(ops: list[str]) -> None:
    """The first cases of each op in the low precision: a tiny one, and on a card those of some rows."""
    device = find_device(os.environ.get("CUDA_VISIBLE_DEVICES") == "")
    torch.manual_seed(0)
    for op in ops:
        found = CASES[op](Draw(device.name, device.low, random.Random(0), device.name == "cpu"))
        for case in islice(found, CASES_AN_OP):
            print(f"{case}: {[tuple(x.shape) for x in case.outputs(device)]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
