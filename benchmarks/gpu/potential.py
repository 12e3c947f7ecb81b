"""The Gaussian potential and its gradient at d = 512: both designs against the ceiling, and what others write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import ceilings
from benchmarks.gpu.device import rotated
from benchmarks.gpu.internals import fused_tile, fused_up_to, potential_design
from benchmarks.gpu.records import at_least
from benchmarks.gpu.stage import Run
from gif.experiments.paper.spreaders import PAIRS_HELD, T, dense_potential
from gif.planning.heads import FLOAT
from gif_kernels import gaussian_potential
from gif_kernels.device.tuning import Tile

FULL = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TINY = (20,)
COMPILED = (2048, 8192, 32768)
"""Each is compiled anew."""
BLOCKS = (4096, 8192)
MOST_PDIST = 2048
"""Rows above which its gradient takes tens of milliseconds."""
GOAL_ROWS, GOAL = 32768, at_least(60)
"""Rows from which the potential is to reach this share of the bf16 ceiling, in %."""
ALLOWED, BASELINE_ALLOWED = 1e-2, 1e-1
"""Errors: terms rounded to bfloat16 leave 2e-4 to 3e-3; what others write in it has a few times that."""

Loss = Callable[[Tensor], Tensor]
Design = Literal["as shipped", "fused", "blocks"]


@dataclass(frozen=True)
class Choice:
    """The kernels' way: one of their designs, in blocks of so many rows where these are given."""

    design: Design
    block: int = 0

    def __str__(self) -> str:
        return f"{self.design} of {self.block:,}" if self.block else self.design


AS_SHIPPED, FUSED = Choice("as shipped"), Choice("fused")


@dataclass(frozen=True)
class Form:
    """What others write. ``held(m, width)``: numbers in float32 that it holds at once, about; ``most``: rows."""

    name: str
    loss: Loss
    held: Callable[[int, int], int]
    most: float = math.inf


def run(run: Run) -> None:
    """Time, by the number of rows, ours as it runs by default and by each design, and the others where they fit."""
    width = run.pick(512, 16)
    taken: dict[Choice, dict[int, float]] = {}
    for m in run.points(run.pick(FULL, TINY)):
        inputs = rotated(run.device, partial(_vectors, run, m, width))
        with run.attempt(f"m {m:,}: truth"):
            truth = _step(partial(gaussian_potential, t=T, impl="blocked"), inputs[0][0].double())
            for choice, design in _designs(run, m, width):
                with run.attempt(f"m {m:,}: {choice}"), design:
                    _ours(run, m, choice, inputs, truth, taken.setdefault(choice, {}))
            del truth
    _crossing(run, taken)
    forms = [
        Form("dense bf16", _low_potential, _pairs_held),
        Form("dense", dense_potential, _pairs_held),
        # its gradient holds each row's differences to all others
        Form("pdist", _pdist, lambda m, width: width * m * m, most=MOST_PDIST),
    ]
    for m in run.points(run.pick(FULL, TINY)):
        _others(run, m, width, forms)
    compiled = [Form("compiled bf16", run.device.compile(_low_potential), _pairs_held)]
    for m in run.points(run.pick(COMPILED, TINY), takes=run.pick(5.0, 0.0)):
        _others(run, m, width, compiled)


def _vectors(run: Run, m: int, width: int) -> list[Tensor]:
    """Rows about a common direction, as code vectors are before they are spread."""
    return [(torch.randn(m, width, device=run.device.name) + 0.3).to(run.device.low)]


def _pairs_held(m: int, width: int) -> int:
    return PAIRS_HELD * m * m


def _designs(run: Run, m: int, width: int) -> Iterator[tuple[Choice, AbstractContextManager[None]]]:
    yield AS_SHIPPED, potential_design("shipped")
    tile = run.pick(fused_tile(width, run.device.name), Tile(16, 16, 16, 4, 1))
    if tile is not None:
        yield FUSED, potential_design("fused", tile=tile)
    for block in run.pick(BLOCKS, (16,)):
        if block <= 2 * m:
            yield Choice("blocks", block), potential_design("blocks", block=block)


def _step(loss: Loss, vectors: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradient."""
    leaf = vectors.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), *torch.autograd.grad(value, leaf)


def _ours(
    run: Run, m: int, choice: Choice, inputs: list[Sequence[Tensor]], truth: tuple[Tensor, ...], taken: dict[int, float]
) -> None:
    loss = partial(gaussian_potential, t=T, impl=run.device.impl)
    what = f"m {m:,}: {choice}"
    if not run.correct(what, partial(_step, loss, inputs[0][0]), truth, ALLOWED):
        return
    taken[m] = run.timed(what, [partial(_step, loss, x) for (x,) in inputs])
    work = 3 * m * m * inputs[0][0].shape[1]
    ceiling = ceilings.ceiling(run, ceilings.LOW)
    run.record(what, taken[m] * 1e3, "ms", floor=work / ceiling * 1e3)
    goal = GOAL if choice == AS_SHIPPED and m >= GOAL_ROWS else None
    run.record(f"{what}: 3 m^2 d over the bf16 ceiling", 100 * work / taken[m] / ceiling, "%", goal=goal)


def _crossing(run: Run, taken: dict[Choice, dict[int, float]]) -> None:
    """Say from how many rows on half of the pairs, in blocks, cost less than all of them in the fused design."""
    fused = taken.get(FUSED, {})
    for choice in (choice for choice in taken if choice.design == "blocks"):
        both = sorted(set(fused) & set(taken[choice]))
        pays = next((m for m in both if taken[choice][m] < fused[m]), None)
        note = f"the kernels take blocks above {fused_up_to():,}" + ("" if pays else "; at none of these sizes")
        run.record(f"{choice} are faster than the fused design from", pays, "rows", status="note", note=note)


def _low_potential(vectors: Tensor) -> Tensor:
    """`dense_potential` with products of the vectors' own precision, as under autocast."""
    h = F.normalize(vectors.float()).to(vectors.dtype)
    pairs = torch.exp(2 * T * ((h @ h.T).float() - 1))
    m = len(h)
    return ((pairs.sum() - pairs.diagonal().sum()) / (m * (m - 1))).log()


def _pdist(vectors: Tensor) -> Tensor:
    """Wang and Isola's uniformity loss as they print it."""
    return torch.pdist(F.normalize(vectors.float())).square().mul(-T).exp().mean().log()


def _others(run: Run, m: int, width: int, forms: Sequence[Form]) -> None:
    inputs = rotated(run.device, partial(_vectors, run, m, width))
    truth = _step(partial(gaussian_potential, t=T, impl="blocked"), inputs[0][0].double())
    for form in (form for form in forms if m <= form.most):
        _other(run, f"m {m:,}: {form.name}", form, inputs, truth)


def _other(run: Run, what: str, form: Form, inputs: list[Sequence[Tensor]], truth: tuple[Tensor, ...]) -> None:
    if not run.fits(what, FLOAT * form.held(*inputs[0][0].shape)):
        return
    with run.attempt(what, ours=False):
        if run.correct(what, partial(_step, form.loss, inputs[0][0]), truth, BASELINE_ALLOWED, ours=False):
            taken = run.timed(what, [partial(_step, form.loss, x) for (x,) in inputs], 5)
            run.record(what, taken * 1e3, "ms", status="note")
