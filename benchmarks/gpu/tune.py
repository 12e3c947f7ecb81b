"""Tiles of each kernel that compile without spills, timed on this card: rows for `gif_kernels.device.tuning`.

Compiling dominates: all candidates are compiled first, in processes, each into Triton's cache on the disk. Then, alone
on the card, what compiled is held against the shipped tile's results, and timed.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult

import torch

from benchmarks.gpu.cases import Case, Draw
from benchmarks.gpu.device import Device, find_device
from benchmarks.gpu.internals import (
    FUSED,
    architecture_name,
    fused_tile,
    potential_design,
    shared_memory,
    shipped_tile,
    spilled,
    tile_name,
    tile_sizes,
    with_tile,
)
from benchmarks.gpu.stage import Run, relative_error
from gif_kernels import (
    code_regression_loss,
    gaussian_potential,
    max_cosine,
    nearest_centroid,
    token_margin_loss,
)
from gif_kernels.device.tuning import MAX_VOCAB, SMALLEST_BLOCK, TILES, Tile

COMPILING = 0.5
"""Share of the time for the first part."""
MOST_CANDIDATES = 28
ALLOWED = 2e-2
"""Difference to the shipped tile's results, whose sums have another order."""
REPLAYS = 7
MOST_ACCUMULATORS, FEWEST_ACCUMULATORS = 128, 4
"""Numbers of a block that a thread holds."""
DEPTHS = {2: ((64, 3), (64, 2), (64, 4), (128, 2), (128, 3), (32, 4)), 4: ((32, 2), (32, 3), (64, 1), (64, 2), (16, 3))}
"""Width and stages, by bytes of an operand."""
FUSED_WIDTHS = (128, 256, 512)
SMALL = 1024
"""Rows of inputs that are compiled for: what is compiled does not know their number."""


@dataclass(frozen=True)
class Task:
    """A kernel and its operands' bytes, and the calls (at most ``rows`` rows each) that say how fast it is."""

    kernel: str
    operand: int
    cases: Callable[[Draw, int], Iterator[Case]]
    blocks: bool = False
    """Whether the potential is to go in blocks."""

    def __str__(self) -> str:
        return f"{self.kernel}, operands of {self.operand} bytes"

    def design(self) -> AbstractContextManager[None]:
        return potential_design("blocks") if self.blocks else nullcontext()


def _tokens(draw: Draw, rows: int) -> Iterator[Case]:
    for batch in dict.fromkeys(min(rows, x) for x in (1024, 8192)):
        length, vocab, width = (2, 3, 16) if draw.tiny else (5, 20, 512)
        z, w = draw.randn(batch, width), draw.randn(length, vocab, width)
        codes = draw.randint(vocab, batch, length)
        arguments = {"embeddings": z, "centers": w, "codes": codes}
        yield Case(token_margin_loss, f"B {batch}", arguments, ("embeddings", "centers"))


def _wide_tokens(draw: Draw, rows: int) -> Iterator[Case]:
    length, vocab, width = (2, 3, 16) if draw.tiny else (4, MAX_VOCAB, 512)
    batch = min(rows, 1024)
    arguments = {"embeddings": draw.randn(batch, width), "centers": draw.randn(length, vocab, width)}
    arguments["codes"] = draw.randint(vocab, batch, length)
    yield Case(token_margin_loss, f"B {batch}, {vocab} centres", arguments, ("embeddings", "centers"))


def _pairs(draw: Draw, rows: int, sizes: tuple[int, ...] = (8192,)) -> Iterator[Case]:
    for m in dict.fromkeys(min(rows, x) for x in sizes):
        rows_of = draw.randn(m, 512) + 0.3
        yield Case(gaussian_potential, f"{m} rows", {"vectors": rows_of}, ("vectors",))


def _nearest(draw: Draw, rows: int) -> Iterator[Case]:
    for n, k in ((1 << 16, 4096), (1 << 18, 20)):
        vectors = draw.randn(min(rows, n), 512)
        offsets = torch.tensor([0, len(vectors)], device=draw.device)
        arguments = {"vectors": vectors, "centroids": draw.randn(1, k, 512), "offsets": offsets}
        yield Case(nearest_centroid, f"{len(vectors)} x {k}", arguments)


def _largest(draw: Draw, rows: int) -> Iterator[Case]:
    vectors = draw.randn(min(rows, 1 << 14), 512)
    yield Case(max_cosine, f"{len(vectors)} rows", {"vectors": vectors})


def _regression(draw: Draw, rows: int) -> Iterator[Case]:
    arguments = {"embeddings": draw.randn(min(rows, 8192), 512), "targets": draw.randn(min(rows, 8192), 512)}
    yield Case(code_regression_loss, "8,192 rows", arguments, ("embeddings", "targets"))


TASKS = (
    Task("cosine_backward", 2, _tokens),
    Task("token_margin_forward", 2, _tokens),
    Task("gaussian_potential_pairs", 2, _pairs, blocks=True),
    Task(FUSED, 2, partial(_pairs, sizes=(2048, 4096))),
    Task("nearest_centroid", 2, _nearest),
    Task("max_cosine", 2, _largest),
    Task("token_margin_forward", 4, _tokens),
    Task("cosine_backward", 4, _tokens),
    Task("code_regression", 4, _regression),
    Task("token_margin_forward_wide", 2, _wide_tokens),
    Task("nearest_centroid", 4, _nearest),
    Task("max_cosine", 4, _largest),
)
"""In order of worth."""
TINY = (Task("token_margin_forward", 4, _tokens),)


def run(run: Run) -> None:
    """Compile, then time; the rows go into tiles.txt as well."""
    tasks = [task for task in run.pick(TASKS, TINY) if task.kernel in TILES or task.kernel == FUSED]
    for kernel in sorted(set(TILES) - {task.kernel for task in TASKS}):
        run.record(kernel, status="left out", note="no sizes are known to time it at")
    found = {task: candidates(run, task) for task in tasks}
    compiled = _compile(run, found)
    for task in run.points(tasks):
        with run.attempt(str(task)), task.design():
            _time(run, task, [tile for tile in found[task] if compiled.get((task, tile)) == 0])


def candidates(run: Run, task: Task) -> list[Tile]:
    """The shipped tile, then others, those that differ least from it first."""
    if task.kernel == FUSED:
        return _fused_candidates(run)
    own = shipped_tile(task.kernel, task.operand, run.device.name)
    if own.columns == 1:  # rows alone
        found = [replace(own, rows=r, width=w, warps=p) for r, w, p in product((4, 8, 16, 32), (128, 256, 512), (4, 8))]
    else:
        sizes = product(_around(own.rows), _around(own.columns), DEPTHS[task.operand], (4, 8))
        found = [Tile(r, c, w, p, s) for r, c, (w, s), p in sizes if _holds(r, c, w, s, p, task.operand)]
    found.sort(key=lambda tile: sum(tile_sizes(tile)[name] != value for name, value in tile_sizes(own).items()))
    return list(dict.fromkeys([own, *found]))[: run.pick(MOST_CANDIDATES, 2)]


def _around(size: int) -> list[int]:
    return [x for x in (size // 2, size, 2 * size) if SMALLEST_BLOCK <= x <= MAX_VOCAB]


def _holds(rows: int, columns: int, width: int, stages: int, warps: int, operand: int) -> bool:
    """Whether a block of a product fits shared memory and registers, about."""
    held = rows * columns // (32 * warps)
    fits = (rows + columns) * width * operand * stages <= shared_memory()
    return fits and FEWEST_ACCUMULATORS <= held <= MOST_ACCUMULATORS


def _fused_candidates(run: Run) -> list[Tile]:
    width = FUSED_WIDTHS[-1]
    own = fused_tile(width, run.device.name)
    found = [
        Tile(rows, columns, chunk, warps, stages)
        for rows, columns, chunk, warps, stages in product((64, 32), (64, 32, 128), FUSED_WIDTHS, (8, 4), (2, 1))
        if (rows + stages * columns) * width * torch.bfloat16.itemsize <= shared_memory()
        and rows * width // (32 * warps) <= MOST_ACCUMULATORS
    ]
    return list(dict.fromkeys(filter(None, [own, *found])))[:MOST_CANDIDATES]


def _compile(run: Run, found: dict[Task, list[Tile]]) -> dict[tuple[Task, Tile], int]:
    """Registers spilled by each tile that compiled in time, in processes that are gone afterwards."""
    until = time.monotonic() + COMPILING * run.seconds_left
    pairs = [(task, tile) for task, tiles in found.items() for tile in tiles]
    places = {task: place for place, task in enumerate(run.pick(TASKS, TINY))}
    spills: dict[tuple[Task, Tile], int] = {}
    unfit: dict[Task, list[str]] = {}
    with get_context("spawn").Pool(run.device.cores) as pool:  # which ends them all
        jobs: list[AsyncResult[int | str]] = [
            pool.apply_async(_compiled, (places[task], tile, run.rehearsal)) for task, tile in pairs
        ]
        for pair, job in zip(pairs, jobs, strict=True):
            job.wait(max(0.0, until - time.monotonic()))
            if job.ready():
                result = job.get()
                if isinstance(result, int):
                    spills[pair] = result
                else:
                    unfit.setdefault(pair[0], []).append(result)
    for task, tiles in found.items():
        known = [spills.get((task, tile)) for tile in tiles]
        why = f"; {len(unfit[task])} refused, such as: {unfit[task][0]}" if task in unfit else ""
        note = f"of {len(tiles)}, {sum(x is not None for x in known)} compiled{why}"
        run.record(f"{task}: tiles without spills", sum(x == 0 for x in known), "", status="note", note=note)
    return spills


def _compiled(place: int, tile: Tile, rehearsal: bool) -> int | str:
    """In a process of its own: registers that the kernel spills with this tile, or why it does not compile."""
    task, device = (TINY if rehearsal else TASKS)[place], find_device(rehearsal)
    try:
        with task.design(), with_tile(task.kernel, task.operand, tile, device.name):
            count = spilled()
            for case in task.cases(_draw(device, task), 5 if rehearsal else SMALL):
                case.outputs(device)
            return count()
    except Exception as error:
        return f"{tile_name(tile)}: {str(error).strip()[:150]}"


def _draw(device: Device, task: Task) -> Draw:
    low = task.operand == device.low.itemsize or task.kernel == "code_regression"
    return Draw(device.name, device.low if low else torch.float32, random.Random(0), device.name == "cpu")


def _time(run: Run, task: Task, tiles: list[Tile]) -> None:
    """The tile with the least mean of ratios to the shipped one, over the task's calls."""
    groups = [_copies(run, case) for case in task.cases(_draw(run.device, task), run.pick(1 << 20, 5))]
    own = (
        fused_tile(FUSED_WIDTHS[-1], run.device.name)
        if task.kernel == FUSED
        else (shipped_tile(task.kernel, task.operand, run.device.name))
    )
    own = own or tiles[0]
    seconds: dict[Tile, list[float]] = {}
    with with_tile(task.kernel, task.operand, own, run.device.name):
        expected = [group[0].outputs(run.device) for group in groups]
    for tile in run.points(dict.fromkeys([own, *tiles])):
        with run.attempt(f"{task}, {tile_name(tile)}"), with_tile(task.kernel, task.operand, tile, run.device.name):
            if all(_agrees(run, f"{task}, {tile_name(tile)}", g[0], e) for g, e in zip(groups, expected, strict=True)):
                calls = [[partial(case.outputs, run.device) for case in group] for group in groups]
                seconds[tile] = [run.timed(f"{task}, {tile_name(tile)}", group, REPLAYS) for group in calls]
    if own not in seconds:
        return
    scores = {
        tile: math.exp(sum(math.log(a / b) for a, b in zip(taken, seconds[own], strict=True)) / len(taken))
        for tile, taken in seconds.items()
    }
    best = min(scores, key=lambda tile: scores[tile])
    for tile in sorted(scores, key=lambda tile: scores[tile])[:5]:
        times = ", ".join(f"{x * 1e6:.1f} us" for x in seconds[tile])
        run.record(f"{task}: {tile_name(tile)}", scores[tile], "x the shipped", status="note", note=times)
    _row(run, task, best, own, scores[best], seconds)


def _copies(run: Run, case: Case) -> list[Case]:
    size = sum(x.nbytes for x in case.arguments.values() if isinstance(x, torch.Tensor))
    return [case, *(case.mapped(torch.clone) for _ in range(min(run.device.copies(size), 16) - 1))]


def _agrees(run: Run, what: str, case: Case, expected: list[torch.Tensor]) -> bool:
    """With the shipped tile's results, and with itself; of searches the cosines alone, since equal ones are many."""
    first, second = case.outputs(run.device), case.outputs(run.device)
    floats = [(a, b) for a, b in zip(first, expected, strict=True) if a.is_floating_point()]
    error = max(relative_error(a, b) for a, b in floats)
    good = error <= ALLOWED and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if not good:
        run.record(
            what, error, status="note", note=f"differs from the shipped tile, allowed {ALLOWED:g}, or from itself"
        )
    return good


def _row(run: Run, task: Task, best: Tile, own: Tile, score: float, seconds: dict[Tile, list[float]]) -> None:
    key = str(FUSED_WIDTHS[-1]) if task.kernel == FUSED else f'("{architecture_name(run.device.name)}", {task.operand})'
    source = f"measured, {run.record.environment.card}, {time.strftime('%Y-%m-%d')}"
    text = f'{key}: Tile({tile_name(best)}, source="{source}"),'
    what = f"{task}: {'the shipped tile stays' if best == own else 'row'}"
    times = ", ".join(f"{x * 1e6:.1f}" for x in seconds[best])
    run.record(what, score, "x the shipped", status="note", note=f"{times} us; {text}")
    with (run.folder / "tiles.txt").open("a", encoding="utf-8") as file:
        file.write(f'"{task.kernel}": {text}\n')
