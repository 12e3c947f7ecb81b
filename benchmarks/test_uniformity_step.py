"""Uniformity step: time and memory of a step among 2,048 rows, whatever the size of the table. It should be flat.

`pytest benchmarks/test_uniformity_step.py --benchmark-json=results.json` for tables of 1M and 64M rows; `--full` for
those between. The table is a memory-mapped sparse file, of which only the rows that are stepped take room on the disk.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, measure
from gif_kernels import uniformity_step_

D, N, LR = 512, 2048, 0.1
MILLION = 1_000_000
STEPS = 15


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    metafunc.parametrize("millions", [1, 4, 16, 64] if full else [1, 64], ids=lambda x: f"{x}M")


def check(table: Tensor, index: Tensor) -> None:
    """Against the specification, on the rows alone, before anything is timed."""
    rows = table[index]
    expected = rows.double()
    loss = uniformity_step_(expected, torch.arange(len(rows), device=rows.device), lr=LR, impl="reference")
    found = uniformity_step_(table, index, lr=LR)
    assert abs(found.double() - loss) < 1e-3 * abs(loss), f"the loss is {found:.5f}, not {loss:.5f}"
    error = (table[index].double() - expected).abs().max()
    assert error < 2.0**-7, f"a coordinate is off by {error:.1e}: more than bfloat16's rounding"


@pytest.mark.parametrize("where", ["mapped", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_uniformity_step(benchmark, millions: int, where: str, tmp_path: Path) -> None:
    m = millions * MILLION
    if where == "cuda":
        if DEVICE != "cuda" or 2 * m * D > torch.cuda.mem_get_info()[0]:
            pytest.skip("needs a CUDA or ROCm device that holds the table")
        table = torch.empty(m, D, dtype=torch.bfloat16, device=DEVICE)
    else:
        table = torch.from_file(str(tmp_path / "table"), shared=True, size=m * D, dtype=torch.bfloat16).view(m, D)
    generator = torch.Generator().manual_seed(0)
    subsets = [torch.randperm(m, generator=generator)[:N].to(table.device) for _ in range(2)]
    for index in subsets:
        table[index] = torch.randn(N, D, generator=generator).add(0.5).to(table)
    check(table, subsets[0])

    seeds = iter(range(1, 1000))

    def step() -> None:
        uniformity_step_(table, subsets[next(seeds) % 2], lr=LR, seed=next(seeds))
        if where == "cuda":
            torch.cuda.synchronize()

    measure(
        benchmark,
        step,
        kernel="uniformity_step",
        provider=where,
        mode=f"step of {N} rows",
        shape=f"m{m}-d{D}",
        dtype="bfloat16",
        rounds=STEPS,
        warmup_rounds=2,
        flops=3 * N * N * D,
    )
