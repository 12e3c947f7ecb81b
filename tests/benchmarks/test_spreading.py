"""Steps of spreading that are measured: all do the same, and hold what their formulas say."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import peak_bytes
from benchmarks.test_uniformity_step import check
from gif.experiments.paper.spreaders import IN_FILE, ON_TABLE, SPREADERS, Shape
from gif.planning import Rates

M, SHAPE = 20_000, Shape()
N, D = SHAPE.batch, SHAPE.width
RATES = Rates(products=1e11, exponentials=1e9, memory=1e10, pages=1e6, overhead=0.0, capacity=math.inf)


@pytest.mark.parametrize("spreader", SPREADERS.values(), ids=repr)
def test_steps(spreader, tmp_path):
    spreading = spreader.build(M, SHAPE, tmp_path)
    index = torch.randperm(M)[:N]
    spreading.table[index] = F.normalize(torch.randn(N, D) + 0.5).to(spreading.table)
    check(spreading, index)
    peak = peak_bytes(lambda: spreading.step(index, 1), "cpu")
    assert 0.8 < spreader.memory(M, SHAPE) / (spreading.held + peak) < 1.2  # small buffers are left out
    assert spreading.held == (0 if spreader is IN_FILE else 2 * M * D)


def test_what_the_table_costs():
    for spreader in SPREADERS.values():
        small, large = (spreader.seconds(m, SHAPE, RATES) for m in (10**6, 10**7))
        assert (large == small) is (spreader is not ON_TABLE)
    assert ON_TABLE.memory(10**7, SHAPE) == 2 * 2 * 10**7 * D  # itself and its gradient
    assert IN_FILE.memory(10**7, SHAPE) == IN_FILE.memory(10**6, SHAPE)
    assert ON_TABLE.traffic(M, SHAPE) == 8 * M * D
