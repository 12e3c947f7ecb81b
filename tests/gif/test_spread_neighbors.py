"""Near-duplicates, which random subsets leave as they are, and epochs of neighbours part."""

import math

import pytest
import torch

from gif.vectors import CodeVectors, SpreadConfig, spread_code_vectors
from gif.vectors import spread as spread_module
from gif.vectors.distributed_table import DistributedTable
from gif.vectors.neighbors import leaf_bounds, neighbor_order, project
from gif_kernels import max_cosine


def planted(m, d, pairs, cosine, seed=0):
    """Unit rows (m, d) about a mean, of which ``pairs`` pairs have this cosine: the rows, and the pairs' indices."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(m, d, generator=generator) + 0.7, dim=1)
    left, right = torch.randperm(m, generator=generator)[: 2 * pairs].chunk(2)
    noise = torch.randn(pairs, d, generator=generator)
    noise -= (noise * rows[left]).sum(1, keepdim=True) * rows[left]
    noise = torch.nn.functional.normalize(noise, dim=1)
    rows[right] = cosine * rows[left] + math.sqrt(1 - cosine**2) * noise
    return rows, left, right


def test_neighbors_part_what_random_subsets_do_not():
    rows, left, right = planted(6000, 48, pairs=100, cosine=0.995)

    def cosines(vectors):
        return (vectors.table[left] * vectors.table[right]).sum(1)

    vectors = CodeVectors(rows)
    random = spread_code_vectors(vectors, SpreadConfig(epochs=6, batch=1000))
    assert random.after.gap < 0.01  # nothing more to gain in the potential,
    assert cosines(vectors).mean() > 0.97  # and the pairs are where they were
    parted = spread_code_vectors(vectors, SpreadConfig(epochs=0, neighbor_epochs=6))
    assert cosines(vectors).mean() < 0.7 and cosines(vectors).median() < 0.65
    assert parted.neighbor_cosines[0] > 0.97
    assert parted.after.gap < random.after.gap + 0.002
    assert parted.after.order_kept > 0.9


@pytest.mark.parametrize(("m", "size"), [(5, 64), (64, 64), (65, 64), (1000, 7), (4097, 32)])
def test_leaves_are_balanced(m, size):
    bounds = leaf_bounds(m, size)
    depth = int(math.log2(len(bounds) - 1))
    order = neighbor_order(torch.randn(m, depth, generator=torch.Generator().manual_seed(m)))
    assert torch.equal(order.sort().values, torch.arange(m))
    sizes = bounds.diff()
    assert int(sizes.sum()) == m and int(sizes.max()) <= size
    assert len(sizes) == 1 or int(sizes.min()) >= size // 2


def test_a_node_is_halved_at_its_median():
    projections = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))
    order = neighbor_order(projections)
    first, second = order[:500], order[500:]
    assert projections[first, 0].max() <= projections[second, 0].min()
    for half in (first, second):
        assert projections[half[:250], 1].max() <= projections[half[250:], 1].min()
        for quarter in half.chunk(2):
            assert projections[quarter[:125], 2].max() <= projections[quarter[125:], 2].min()


def test_equal_projections_are_cut_all_the_same():
    assert torch.equal(neighbor_order(torch.zeros(10, 2)), torch.arange(10))


@pytest.mark.parametrize(("cosine", "share"), [(0.995, 0.65), (0.9, 0.15)])
def test_near_duplicates_mostly_share_a_leaf(cosine, share):
    rows, left, right = planted(16_384, 64, pairs=1000, cosine=cosine)
    leaf = torch.empty(len(rows), dtype=torch.int64)
    depth = 8  # leaves of 64 rows: two at random share one of 256
    leaf[neighbor_order(project(DistributedTable(rows, rows.device), depth, seed=2))] = torch.arange(len(rows)) // 64
    assert float((leaf[left] == leaf[right]).float().mean()) > share


def test_the_largest_cosine_of_a_large_table_is_found(monkeypatch):
    rows, _, _ = planted(3000, 32, pairs=200, cosine=0.999)
    exact = float(max_cosine(rows)[0].max())
    monkeypatch.setattr(spread_module, "SAMPLE", 1000)
    report = spread_code_vectors(CodeVectors(rows.clone()), SpreadConfig(epochs=0))
    assert report.largest_before == pytest.approx(exact, abs=1e-4) and report.largest_before <= exact
