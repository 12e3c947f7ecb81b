"""A step of spreading among 2,048 rows of a bfloat16 table of up to 64 million: memory, and steps a second (Fig. 7)."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import ceilings
from benchmarks.gpu.records import at_most
from benchmarks.gpu.stage import Run
from gif.experiments.paper.spreaders import LR, ON_ROWS, ON_TABLE, OURS, Shape, Spreader, Spreading
from gif_kernels import uniformity_step_

LARGEST = 64_000_000
FULL = (LARGEST, 10_000, 100_000, 1_000_000, 4_000_000, 16_000_000)
SHAPE = Shape()
TINY = (2 * SHAPE.batch,)
SUBSETS = 16
"""How many sets of rows take turns."""
ALLOWED, BASELINE_ALLOWED = 2.0**-7, 0.1
"""Errors of a coordinate: bfloat16's rounding, and more of autograd, whose gradients are rounded before the step."""
FLAT = at_most(1.1)
"""The step at 64 million over that at 10 thousand."""
STEPS = 100


def run(run: Run) -> None:
    """The largest table first; then the paper's smaller points, and autograd at those where it fits."""
    taken: dict[int, float] = {}
    for m in run.points(run.pick(FULL, TINY)):
        with run.attempt(f"{m:,} rows: ours"):
            _point(run, OURS, m, taken)
    sizes = run.pick(FULL, TINY)
    smallest, largest = min(taken, default=0), max(taken, default=0)
    if smallest < largest == max(sizes):
        ratio = taken[largest] / taken[smallest]
        run.record(f"step at {largest:,} rows over that at {smallest:,}", ratio, "x", goal=FLAT)
    for spreader, m in run.points(itertools.product((ON_ROWS, ON_TABLE), sorted(sizes))):
        with run.attempt(f"{m:,} rows: {spreader.name}", ours=False):
            _point(run, spreader, m, {})


def _point(run: Run, spreader: Spreader, m: int, taken: dict[int, float]) -> None:
    what = f"{m:,} rows: {spreader.name}"
    if not run.fits(what, spreader.memory(m, SHAPE)):
        return
    ours = spreader is OURS
    with tempfile.TemporaryDirectory() as folder:
        spreading = spreader.build(m, replace(SHAPE, device=run.device.name), Path(folder))
    run.device.reset_peak()
    subsets = _subsets(run, spreading.table, m)
    if not _correct(run, what, spreading, subsets[0], ours):
        return
    seeds = itertools.count()
    steps = [_stepped(spreading, index, next(seeds)) for index in subsets]
    if ours:
        floor = max(
            spreader.flops(SHAPE) / ceilings.ceiling(run, ceilings.LOW),
            spreader.traffic(m, SHAPE) / ceilings.ceiling(run, ceilings.COPY),
        )
        taken[m] = run.timed(what, steps)
        run.record(f"{what}: a step", taken[m] * 1e6, "us", floor=floor * 1e6)
    eager = run.device.eager_seconds(lambda: [step() for step in steps], run.pick(STEPS // SUBSETS, 1)) / len(steps)
    run.record(f"{what}: as the host launches them", 1 / eager, "steps/s", status="ok" if ours else "note")
    held, whose = run.device.held_bytes()
    run.record(f"{what}: memory by NVML", held / 2**30, "GiB", status="note", note=whose)
    run.record(f"{what}: of it the table", spreading.table.nbytes / 2**30, "GiB", status="note", detail=True)
    run.record(f"{what}: most allocated by torch", run.device.peak_bytes() / 2**30, "GiB", status="note", detail=True)


def _subsets(run: Run, table: Tensor, m: int) -> list[Tensor]:
    """Distinct random rows, to which random directions about a common one are given."""
    n = min(SHAPE.batch, m // 2)
    found = []
    for _ in range(run.pick(SUBSETS, 2)):
        rows = torch.randint(m, (2 * n,), device=table.device).unique() if m > 4 * n else torch.arange(m)
        rows = rows[torch.randperm(len(rows))[:n].to(rows.device)].to(table.device)
        table[rows] = F.normalize(torch.randn(len(rows), SHAPE.width, device=table.device).add(0.5)).to(table)
        found.append(rows)
    return found


def _correct(run: Run, what: str, spreading: Spreading, index: Tensor, ours: bool) -> bool:
    """Against the specification, on the rows alone, before anything is timed."""
    expected = spreading.table[index].double()
    uniformity_step_(expected, torch.arange(len(expected), device=expected.device), lr=LR, impl="reference")
    spreading.step(index, 0)
    error = float((spreading.table[index].double() - expected).abs().max())
    allowed = ALLOWED if ours else BASELINE_ALLOWED
    good = error <= allowed
    run.record(
        f"{what}: largest error of a coordinate", error, status="ok" if good else "wrong" if ours else "left out",
        note=f"allowed {allowed:g}",
    )  # fmt: skip
    return good


def _stepped(spreading: Spreading, index: Tensor, seed: int) -> Callable[[], None]:
    return lambda: spreading.step(index, seed)
