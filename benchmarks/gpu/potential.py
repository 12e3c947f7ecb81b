"""The Gaussian potential and its gradient at d = 512: both designs against the ceiling, and what others write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import ceilings
from benchmarks.gpu.device import rotated
from benchmarks.gpu.internals import fused_tile, fused_up_to, potential_design
from benchmarks.gpu.stage import Run
from benchmarks.spreading import PAIRS_HELD, T, dense_potential
from gif_kernels import gaussian_potential
from gif_kernels.device.tuning import Tile

FULL = (2048, 4096, 8192, 16384, 32768, 65536)
TINY = (20,)
COMPILED = (2048, 8192, 32768)
"""Each is compiled anew."""
BLOCKS = (4096, 8192)
GOAL_ROWS, GOAL = 32768, ">= 60"
"""Rows from which the potential is to reach this share of the bf16 ceiling, in %."""
ALLOWED, BASELINE_ALLOWED = 1e-2, 1e-1
"""Errors: terms rounded to bfloat16 leave 2e-4 to 3e-3; what others write in it has a few times that."""

Loss = Callable[[Tensor], Tensor]


def run(run: Run) -> None:
    """By rows: ours as it runs by default, by each design, and the others where they fit."""
    width = run.pick(512, 16)
    taken: dict[str, dict[int, float]] = {}
    for m in run.points(run.pick(FULL, TINY)):
        inputs = rotated(run.device, partial(_vectors, run, m, width))
        with run.attempt(f"m {m:,}: truth"):
            truth = _step(partial(gaussian_potential, t=T, impl="blocked"), inputs[0][0].double())
            for name, design in _designs(run, m, width):
                with run.attempt(f"m {m:,}: {name}"), design:
                    _ours(run, m, name, inputs, truth, taken.setdefault(name, {}))
            del truth
    _crossing(run, taken)
    forms: dict[str, Loss] = {"dense bf16": _low_potential, "dense": dense_potential, "pdist": _pdist}
    for m in run.points(run.pick(FULL, TINY)):
        _others(run, m, width, forms)
    compiled = {"compiled bf16": run.device.compile(_low_potential)}
    for m in run.points(run.pick(COMPILED, TINY), takes=run.pick(5.0, 0.0)):
        _others(run, m, width, compiled)


def _vectors(run: Run, m: int, width: int) -> list[Tensor]:
    """Rows about a common direction, as code vectors are before they are spread."""
    return [(torch.randn(m, width, device=run.device.name) + 0.3).to(run.device.low)]


def _designs(run: Run, m: int, width: int) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    yield "as shipped", potential_design("shipped")
    tile = run.pick(fused_tile(width, run.device.name), Tile(16, 16, 16, 4, 1))
    if tile is not None:
        yield "fused", potential_design("fused", tile=tile)
    for block in run.pick(BLOCKS, (16,)):
        if block <= 2 * m:
            yield f"blocks of {block:,}", potential_design("blocks", block=block)


def _step(loss: Loss, vectors: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradient."""
    leaf = vectors.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), *torch.autograd.grad(value, leaf)


def _ours(
    run: Run, m: int, name: str, inputs: list[Sequence[Tensor]], truth: tuple[Tensor, ...], taken: dict[int, float]
) -> None:
    loss = partial(gaussian_potential, t=T, impl=run.device.impl)
    what = f"m {m:,}: {name}"
    if not run.correct(what, partial(_step, loss, inputs[0][0]), truth, ALLOWED):
        return
    taken[m] = run.timed(what, [partial(_step, loss, x) for (x,) in inputs])
    work = 3 * m * m * inputs[0][0].shape[1]
    ceiling = run.ceiling(ceilings.LOW)
    run.record(what, taken[m] * 1e3, "ms", floor=work / ceiling * 1e3)
    goal = GOAL if name == "as shipped" and m >= GOAL_ROWS else ""
    run.record(f"{what}: 3 m^2 d over the bf16 ceiling", 100 * work / taken[m] / ceiling, "%", goal=goal)


def _crossing(run: Run, taken: dict[str, dict[int, float]]) -> None:
    """From how many rows on half of the pairs, in blocks, cost less than all of them fused."""
    fused = taken.get("fused", {})
    for name in (name for name in taken if name.startswith("blocks")):
        both = sorted(set(fused) & set(taken[name]))
        pays = next((m for m in both if taken[name][m] < fused[m]), None)
        note = f"the kernels take blocks above {fused_up_to():,}" + ("" if pays else "; at none of these sizes")
        run.record(f"{name} are faster than the fused design from", pays, "rows", status="note", note=note)


def _low_potential(vectors: Tensor) -> Tensor:
    """`dense_potential` with products of the vectors' own precision, as under autocast."""
    h = F.normalize(vectors.float()).to(vectors.dtype)
    pairs = torch.exp(2 * T * ((h @ h.T).float() - 1))
    m = len(h)
    return ((pairs.sum() - pairs.diagonal().sum()) / (m * (m - 1))).log()


def _pdist(vectors: Tensor) -> Tensor:
    """Wang and Isola's uniformity loss as they print it."""
    return torch.pdist(F.normalize(vectors.float())).square().mul(-T).exp().mean().log()


def _others(run: Run, m: int, width: int, forms: dict[str, Loss]) -> None:
    inputs = rotated(run.device, partial(_vectors, run, m, width))
    truth = _step(partial(gaussian_potential, t=T, impl="blocked"), inputs[0][0].double())
    for name, loss in forms.items():
        _other(run, f"m {m:,}: {name}", loss, inputs, truth)


def _other(run: Run, what: str, loss: Loss, inputs: list[Sequence[Tensor]], truth: tuple[Tensor, ...]) -> None:
    m, width = inputs[0][0].shape
    held = width if loss is _pdist else PAIRS_HELD  # pdist's gradient holds a row's differences to all others
    if not run.fits(what, 4.0 * held * m * m):
        return
    with run.attempt(what, ours=False):
        if run.correct(what, partial(_step, loss, inputs[0][0]), truth, BASELINE_ALLOWED, ours=False):
            taken = run.timed(what, [partial(_step, loss, x) for (x,) in inputs], 5)
            run.record(what, taken * 1e3, "ms", status="note")
