"""Searches over code vectors, and codes of millions of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.clusters import ROWS_A_BLOCK
from benchmarks.gpu import ceilings
from benchmarks.gpu.device import rotated
from benchmarks.gpu.stage import Run
from benchmarks.heads import VOCAB
from gif import IdentityCodes, TokenizeConfig, tokenize
from gif_kernels import max_cosine, nearest_centroid

NEAREST = ((1 << 20, 20, 512), (1 << 16, 4096, 512), (1 << 20, 256, 64))
LARGEST = ((32768, 512), (8192, 512))
TOKENIZED = ((100_000, 512), (1_000_000, 512), (16_000_000, 64))
"""Rows and width: the first says whether there is time for the others."""
ALLOWED = 1e-2
"""The error of a cosine of bfloat16 rows: much more than rounding leaves, since their products are exact in float32."""
TRUTH_ROWS = 4096
"""How many rows are compared with float64."""
CLUSTERS, NOISE = 1000, 0.5


def run(run: Run) -> None:
    """The two searches, with their share of the ceiling; then tokenising, one run each."""
    for n, k, width in run.points(run.pick(NEAREST, ((20, 3, 16),))):
        with run.attempt(f"nearest centroid {n:,} x {k:,} x {width}"):
            _nearest(run, n, k, width)
    for n, width in run.points(run.pick(LARGEST, ((20, 16),))):
        with run.attempt(f"max cosine {n:,} x {width}"):
            _largest(run, n, width)
    for m, width in run.points(run.pick(TOKENIZED, ((60, 8),))):
        with run.attempt(f"tokenize {m:,} x {width}"):
            _tokenize(run, m, width)


def _rows(run: Run, n: int, width: int) -> Tensor:
    return torch.randn(n, width, device=run.device.name).to(run.device.low)


def _nearest(run: Run, n: int, k: int, width: int) -> None:
    what = f"nearest centroid {n:,} x {k:,} x {width}"
    inputs = rotated(run.device, lambda: [_rows(run, n, width), _rows(run, k, width)])
    offsets = torch.tensor([0, n], device=run.device.name)  # given, so that none need be copied from the host
    rows, centroids = inputs[0]

    def search(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        return nearest_centroid(rows, centroids[None], offsets=offsets, impl=run.device.impl)

    found = search(rows, centroids)
    if not _correct(run, what, rows, centroids, found[1], found[0], search(rows, centroids), own=False):
        return
    moved = rows.nbytes + centroids.nbytes + 16 * n
    _speed(run, what, run.timed(what, [partial(search, *x) for x in inputs]), 2 * n * k * width, moved)


def _largest(run: Run, n: int, width: int) -> None:
    what = f"max cosine {n:,} x {width}"
    inputs = rotated(run.device, lambda: [_rows(run, n, width)])
    search = partial(max_cosine, impl=run.device.impl)
    (rows,) = inputs[0]
    cosine, index = search(rows)
    if not _correct(run, what, rows, rows, cosine, index, search(rows)[::-1], own=True):
        return
    _speed(run, what, run.timed(what, [partial(search, *x) for x in inputs]), 2 * n * n * width, rows.nbytes)


def _correct(
    run: Run,
    what: str,
    rows: Tensor,
    others: Tensor,
    cosine: Tensor,
    index: Tensor,
    again: tuple[Tensor, Tensor],
    own: bool,
) -> bool:
    """Whether the first rows' cosines and those of the rows they name are float64's, and all bits the same twice."""
    few = rows[:TRUTH_ROWS].double()
    few, unit = (torch.nn.functional.normalize(x.double(), dim=1) for x in (few, others))
    truth = few @ unit.T
    if own:
        truth.fill_diagonal_(-torch.inf)
    named = truth.gather(1, index[:TRUTH_ROWS, None])[:, 0]
    pair = (cosine[:TRUTH_ROWS].double(), named)
    good = run.correct(what, lambda: pair, [truth.amax(1)] * 2, ALLOWED)
    if not (torch.equal(again[0], index) and torch.equal(again[1], cosine)):
        run.record(f"{what}: the same bits twice", status="wrong", note="no speed")
        return False
    return good


def _speed(run: Run, what: str, seconds: float, flops: int, moved: int) -> None:
    ceiling = ceilings.ceiling(run, ceilings.LOW)
    floor = max(flops / ceiling, moved / ceilings.ceiling(run, ceilings.COPY))
    run.record(what, seconds * 1e3, "ms", floor=floor * 1e3)
    run.record(f"{what}: of the bf16 ceiling", 100 * flops / seconds / ceiling, "%", status="note")


def _tokenize(run: Run, m: int, width: int) -> None:
    """Vectors in clusters, float16; one run, by events before and after."""
    what = f"tokenize {m:,} x {width}"
    centers = torch.randn(CLUSTERS, width, device=run.device.name)
    table = torch.empty(m, width, dtype=torch.float16, device=run.device.name)
    for rows in table.split(ROWS_A_BLOCK):
        near = centers[torch.randint(CLUSTERS, (len(rows),), device=run.device.name)]
        rows.copy_(torch.randn(rows.shape, device=run.device.name).mul_(NOISE).add_(near))
    run.device.reset_peak()
    found: list[IdentityCodes] = []  # which refuses codes that are not distinct
    seconds = run.device.eager_seconds(lambda: found.append(tokenize(table, TokenizeConfig(vocab_size=VOCAB))), 1)
    run.record(what, seconds, "s", status="note", note=str(found[-1]))
    run.record(f"{what}: identities", m / seconds, "a second", status="note")
    run.record(f"{what}: most allocated by torch", run.device.peak_bytes() / 2**30, "GiB", status="note", detail=True)
