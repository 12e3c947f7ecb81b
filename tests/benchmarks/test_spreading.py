"""Steps of spreading that are measured: all do the same, and hold what their formulas say."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import peak_bytes
from benchmarks.spreading import PROVIDERS, D, N, planned_bytes, planned_seconds, step_work
from benchmarks.test_uniformity_step import check
from gif.planning import Rates

M = 20_000
RATES = Rates(products=1e11, exponentials=1e9, memory=1e10, pages=1e6, overhead=0.0, capacity=math.inf)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_steps(provider, tmp_path):
    spreading = PROVIDERS[provider](M, tmp_path)
    index = torch.randperm(M)[:N]
    spreading.table[index] = F.normalize(torch.randn(N, D) + 0.5).to(spreading.table)
    check(spreading, index)
    peak = peak_bytes(lambda: spreading.step(index, 1), "cpu")
    assert 0.8 < planned_bytes(provider, M) / (spreading.held + peak) < 1.2  # small buffers are left out
    assert spreading.held == (0 if "file" in provider else 2 * M * D)


def test_what_the_table_costs():
    for provider in PROVIDERS:
        small, large = (planned_seconds(provider, m, RATES) for m in (10**6, 10**7))
        assert (large == small) is (provider != "autograd on the table")
    assert planned_bytes("autograd on the table", 10**7) == 2 * 2 * 10**7 * D  # itself and its gradient
    assert planned_bytes("ours, table in a file", 10**7) == planned_bytes("ours, table in a file", 10**6)
    assert step_work("autograd on the table", M)["bytes"] == 8 * M * D
