"""Uniformity step: time and memory of a step among 2,048 rows against the size of the table. Ours should be flat.

`pytest benchmarks/test_uniformity_step.py --benchmark-json=results.json` for tables of 1M and 64M rows; `--full` for
those between. A table that does not fit in memory is skipped with the bytes it would need.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, measure
from benchmarks.memory import skip_unless_it_fits
from benchmarks.results import Subject
from gif.experiments.paper.spreaders import LR, SPREADERS, Shape, Spreading
from gif_kernels import uniformity_step_

if TYPE_CHECKING:  # what a run on a GPU imports does without it
    from pytest_benchmark.fixture import BenchmarkFixture

MILLION = 1_000_000
SHAPE = Shape(device=DEVICE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    metafunc.parametrize("millions", [1, 4, 16, 64] if full else [1, 64], ids=lambda x: f"{x}M")


def check(found: Spreading, index: Tensor) -> None:
    """Against the specification, on the rows alone, before anything is timed."""
    expected = found.table[index].double()
    uniformity_step_(expected, torch.arange(len(expected), device=expected.device), lr=LR, impl="reference")
    found.step(index, 0)
    error = (found.table[index].double() - expected).abs().max()
    assert error < 2.0**-7, f"a coordinate is off by {error:.1e}, more than bfloat16's rounding: no speed to measure"


@pytest.mark.parametrize("provider", SPREADERS)
def test_uniformity_step(benchmark: BenchmarkFixture, millions: int, provider: str, tmp_path: Path) -> None:
    m, n, spreader = millions * MILLION, SHAPE.batch, SPREADERS[provider]
    skip_unless_it_fits(f"{spreader.name}, {m:,} rows,", spreader.memory(m, SHAPE), DEVICE)
    spreading = spreader.build(m, SHAPE, tmp_path)
    generator = torch.Generator().manual_seed(0)
    subsets = [torch.randperm(m, generator=generator)[:n].to(spreading.table.device) for _ in range(2)]
    for index in subsets:
        spreading.table[index] = F.normalize(torch.randn(n, SHAPE.width, generator=generator).add(0.5)).to(
            spreading.table
        )
    check(spreading, subsets[0])
    seeds = itertools.count(1)

    def step() -> None:
        seed = next(seeds)
        spreading.step(subsets[seed % 2], seed)

    subject = Subject(
        kernel="uniformity_step",
        provider=spreader.name,
        mode=f"step of {n} rows",
        shape=f"m{m}-d{SHAPE.width}",
        dtype="bfloat16",
        identities=m,
        flops=spreader.flops(SHAPE),
        bytes=spreader.traffic(m, SHAPE),
        kept_bytes=spreading.held,
        rates=SHAPE.rates(),
    )
    measure(benchmark, step, subject, rounds=5 if spreader.slow else 15, warmup_rounds=1 if spreader.slow else 2)
