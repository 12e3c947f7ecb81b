"""Uniformity step: time and memory of a step among 2,048 rows against the size of the table. Ours should be flat.

`pytest benchmarks/test_uniformity_step.py --benchmark-json=results.json` for tables of 1M and 64M rows; `--full` for
those between. A table that does not fit in memory is skipped with the bytes it would need.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, measure
from benchmarks.memory import skip_unless_it_fits
from benchmarks.spreading import LR, PROVIDERS, D, N, Spreading, planned_bytes, rates, step_work
from gif_kernels import uniformity_step_

MILLION = 1_000_000


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


@pytest.mark.parametrize("provider", PROVIDERS)
def test_uniformity_step(benchmark, millions: int, provider: str, tmp_path: Path) -> None:
    m = millions * MILLION
    skip_unless_it_fits(f"{provider}, {m:,} rows,", planned_bytes(provider, m), DEVICE)
    spreading = PROVIDERS[provider](m, tmp_path)
    generator = torch.Generator().manual_seed(0)
    subsets = [torch.randperm(m, generator=generator)[:N].to(spreading.table.device) for _ in range(2)]
    for index in subsets:
        spreading.table[index] = F.normalize(torch.randn(N, D, generator=generator).add(0.5)).to(spreading.table)
    check(spreading, subsets[0])
    seeds = itertools.count(1)

    def step() -> None:
        seed = next(seeds)
        spreading.step(subsets[seed % 2], seed)

    slow = provider == "autograd on the table"
    known = rates()
    measure(
        benchmark,
        step,
        kernel="uniformity_step",
        provider=provider,
        mode=f"step of {N} rows",
        shape=f"m{m}-d{D}",
        dtype="bfloat16",
        rounds=5 if slow else 15,
        warmup_rounds=1 if slow else 2,
        identities=m,
        kept_bytes=spreading.held,
        rates=None if known is None else asdict(known),
        **step_work(provider, m),
    )
