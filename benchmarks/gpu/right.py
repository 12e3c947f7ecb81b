"""Every op in every dtype, and with every tile that is shipped for operands of its size, against float64.

Each op and dtype is a process: an illegal access in one loses no other. Memory is poisoned, so an output that nobody
wrote is NaN. Each case must give the same bits twice, the same errors from memory with strides, and the same bits on a
stream that is not the default one, behind inputs that are still being written there; and, where there are two cards, on
the one that is not current.
"""

from __future__ import annotations

import os
import random
import secrets
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from benchmarks.gpu.cases import CASES, Case, Draw
from benchmarks.gpu.device import tf32
from benchmarks.gpu.internals import fused_tiles, looked_up, potential_design, shipped_tiles, tile_name, with_tile
from benchmarks.gpu.records import ROOT
from benchmarks.gpu.stage import Run
from gif_kernels import gaussian_potential
from gif_kernels.device.tuning import Tile

PRECISIONS = ("bfloat16", "float32", "float16", "TF32", "autocast")
TINY = ("float16",)
WITHOUT_AUTOCAST = (
    "gaussian_potential",
    "uniformity_step_",
    "vector_step_",
    "nearest_centroid",
    "max_cosine",
    "code_regression_loss",
)
"""Ops that compute in their inputs' dtype, with autocast or without."""
SMALL_TILE = Tile(rows=16, columns=16, width=16, warps=4, stages=1)


def run(run: Run) -> None:
    """All parts, so many side by side as there are cores; in a rehearsal all in one process."""
    parts = [
        f"{op}:{precision}"
        for precision in run.pick(PRECISIONS, TINY)
        for op in CASES
        if precision != "autocast" or op not in WITHOUT_AUTOCAST
    ]
    together = run.pick(1, len(parts))
    chunks = [parts[i : i + together] for i in range(0, len(parts), together)]
    with ThreadPoolExecutor(run.device.cores) as pool:
        jobs = {pool.submit(_process, run, chunk): chunk for chunk in chunks}
        for job in as_completed(jobs):
            code = job.result()
            if code != 0:
                name = ", ".join(jobs[job])
                run.record(name, status="left out" if code is None else "failed", note=_why(code))


def _process(run: Run, parts: list[str]) -> int | None:
    """Its exit code; None where there was no time to begin, or to end."""
    seconds = run.seconds_left
    if seconds <= 0:
        return None
    command = [sys.executable, "-m", "benchmarks.gpu.stage", "right", "--output", str(run.folder), "--parts", *parts]
    command += ["--seconds", str(seconds), "--commit", run.record.environment.commit]
    command += ["--rehearse"] if run.rehearsal else []
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None


def _why(code: int | None) -> str:
    if code is None:
        return "no time"
    return f"crashed by signal {-code}" if code < 0 else "see the records before, and right.log"


def run_parts(run: Run, parts: list[str]) -> None:
    """Some ops, each in one precision: "token_margin_loss:bfloat16"."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it where determinism is asked for
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for part in parts:
        op, precision = part.split(":")
        seed = secrets.randbits(31)
        torch.manual_seed(seed)
        found = list(CASES[op](Draw(run.device.name, _dtype(run, precision), random.Random(seed), run.rehearsal)))
        with tf32(precision == "TF32"):
            right = sum([_check(run, f"{case}, {precision}", case, precision) for case in run.points(found)])
            run.record(f"{op}, {precision}: right", right, "cases", note=f"of {len(found)}, seed {seed}")
            if precision in ("bfloat16", "float32", *run.pick((), TINY)):
                _every_tile(run, found, precision)


def _dtype(run: Run, precision: str) -> torch.dtype:
    if precision == "autocast":
        return run.device.low
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)


def _check(run: Run, what: str, case: Case, precision: str) -> bool:
    """Whether a case is right in all respects; a record of each in which it is not."""
    before = run.record.failures
    if precision == "autocast":  # parameters stay float32 there
        case = _parameters_in_float32(case)
    with run.attempt(what), _autocast(run, precision):
        _errors(run, what, case)
        first = case.outputs(run.device)
        _same(run, f"{what}, twice", first, case.outputs(run.device))
        _errors(run, f"{what}, strided", case.strided())
        _same(run, f"{what}, on another stream", first, run.device.beside(lambda: _late(case).outputs(run.device)))
        for card in range(torch.cuda.device_count())[1:2]:
            with torch.cuda.device(card):
                _same(run, f"{what}, on a card that is not current", first, case.outputs(run.device))
    return run.record.failures == before


def _autocast(run: Run, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(run.device.name, run.device.low) if precision == "autocast" else nullcontext()


def _parameters_in_float32(case: Case) -> Case:
    arguments = {name: x.float() if name in case.leaves[1:] else x for name, x in case.arguments.items()}
    return Case(case.op, case.what, arguments, case.leaves)


def _late(case: Case) -> Case:
    """Its tensors, written by the current stream: whoever reads them in another finds poison."""
    return case.mapped(lambda x: torch.empty_like(x).copy_(x))


def _errors(run: Run, what: str, case: Case) -> None:
    for name, error, allowed in case.errors(run.device):
        if not error <= allowed:  # NaN is not
            run.record(f"{what}: {name}", error, status="wrong", note=f"allowed {allowed:.3g}")


def _same(run: Run, what: str, first: list[Tensor], second: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(a, b):
            differ = int((a != b).sum())
            run.record(f"{what}: other bits", differ, "numbers", status="wrong", note=f"output {i}, of {a.numel()}")


def _every_tile(run: Run, found: list[Case], precision: str) -> None:
    """The last cases with each tile of each kernel that they use, also those of other cards, if they compile here."""
    operand = _dtype(run, precision).itemsize
    kernels: set[str] = set()
    last = found[-run.pick(2, 1) :]
    with looked_up(kernels):
        for case in last:
            case.outputs(run.device)
    for kernel, tile, own in run.points(_tiles(run, sorted(kernels), operand)):
        for case in last:
            what = f"{case}, {kernel}: {tile_name(tile)}"
            with with_tile(kernel, operand, tile, run.device.name):
                _check_tile(run, what, case, own)
    if any(case.op is gaussian_potential for case in found):
        for architecture, width, tile in run.pick(fused_tiles(), [("", 16, SMALL_TILE)]):
            draw = Draw(run.device.name, _dtype(run, precision), random.Random(width), run.rehearsal)
            if precision != "bfloat16" and not run.rehearsal:
                continue
            m = run.pick(draw.near(1000), 17)
            case = Case(gaussian_potential, f"{m} x {width}", {"vectors": draw.randn(m, width) + 0.3}, ("vectors",))
            with potential_design("fused", tile=tile):
                _check_tile(run, f"{case}, fused, {architecture}: {tile_name(tile)}", case, False)


def _tiles(run: Run, kernels: list[str], operand: int) -> Iterator[tuple[str, Tile, bool]]:
    for kernel in kernels:
        try:
            found = shipped_tiles(kernel, operand, run.device.name)
        except KeyError:  # this kernel has no operands of that size
            continue
        for tile, own in run.pick(found, found[:1]):
            yield kernel, tile, own


def _check_tile(run: Run, what: str, case: Case, own: bool) -> None:
    """Its errors, and its bits twice; where a tile of another card does not fit this one, that is no fault."""
    try:
        _errors(run, what, case)
        _same(run, f"{what}, twice", case.outputs(run.device), case.outputs(run.device))
    except Exception as error:
        if run.device.lost(error):
            raise
        no_fit = not own and "out of resource" in str(error)
        run.record(what, status="left out" if no_fit else "failed", note=str(error).strip()[:200])
