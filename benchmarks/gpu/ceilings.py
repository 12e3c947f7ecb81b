"""What the card gives at best: what every other number is a share of."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.device import tf32
from benchmarks.gpu.records import read_records
from benchmarks.gpu.stage import Run

LOW, TF32, FLOAT32, COPY = "bf16 product", "TF32 product", "float32 product", "copy"
COLUMNS = 512
"""The width of the code vectors, which the pairs are multiplied by."""
PAIRS = (4096, 8192)
REPEATS = 8


def run(run: Run) -> None:
    """Products of two square matrices, a copy, and the products of pairs with code vectors as libraries do them."""
    for name in (LOW, TF32, FLOAT32, COPY):
        with run.attempt(name):
            measure(run, name)
    for m in run.points(run.pick(PAIRS, (64,))):
        with run.attempt(f"products of {m} x {m} pairs"):
            _library_products(run, m)


def ceiling(run: Run, name: str) -> float:
    """A ceiling of this run by its name, FLOP/s or bytes/s: measured now unless it is known."""
    known = [r for r in read_records(run.record.path) if r.what == name and r.value]
    return float(known[-1].value or 0) * 1e12 if known else measure(run, name)


def measure(run: Run, name: str) -> float:
    """FLOP/s of a product, bytes/s of a copy; recorded in TFLOP/s and TB/s."""
    amount, call = _copy(run) if name == COPY else _product(run, name)
    with tf32(name == TF32):
        rate = amount / run.timed(name, [call], REPEATS)
    run.record(name, rate / 1e12, "TB/s" if name == COPY else "TFLOP/s", status="note")
    return rate


def _product(run: Run, name: str) -> tuple[int, Callable[[], object]]:
    n = run.pick(8192, 64)
    dtype = run.device.low if name == LOW else torch.float32
    a, b = (torch.randn(n, n, device=run.device.name).to(dtype) for _ in range(2))
    found = torch.empty_like(a)
    return 2 * n**3, lambda: torch.mm(a, b, out=found)


def _copy(run: Run) -> tuple[int, Callable[[], object]]:
    source = torch.ones(run.pick(2 << 30, 1 << 16), dtype=torch.uint8, device=run.device.name)
    target = torch.empty_like(source)
    return 2 * source.nbytes, lambda: target.copy_(source)


def _library_products(run: Run, m: int) -> None:
    """Time P @ H and P^T @ H, added to float32, which are two thirds of the potential's gradient in blocks."""
    pairs = torch.rand(m, m, device=run.device.name).to(run.device.low)
    rows = torch.randn(m, COLUMNS, device=run.device.name).to(run.device.low)
    total = torch.zeros(m, COLUMNS, device=run.device.name)
    for name, factor in (("plain", pairs), ("transposed", pairs.T)):
        what = f"{m} x {m} pairs x {COLUMNS}, {name}, float32 sums"
        rate = 2 * m * m * COLUMNS / run.timed(what, [_added(total, factor, rows)], REPEATS)
        run.record(what, rate / 1e12, "TFLOP/s", status="note")


def _added(total: torch.Tensor, factor: torch.Tensor, rows: torch.Tensor) -> Callable[[], object]:
    if not total.is_cuda:
        return lambda: total.add_(factor.float() @ rows.float())
    return lambda: torch.addmm(total, factor, rows, out_dtype=torch.float32, out=total)
