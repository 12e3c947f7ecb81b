"""Codes are distinct whatever the vectors, nodes keep their capacities, and similar identities share a prefix."""

import math
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from benchmarks.memory import peak_bytes
from gif.codes import (
    IdentityCodes,
    TokenizeConfig,
    advise,
    clustering,
    code_table,
    judge_codes,
    linear_probe,
    tokenize,
    tree,
)
from gif.codes import blocks as blocks_module
from gif.codes import prices as prices_module
from gif.codes.align import Residuals, match
from gif.codes.clustering import Points, kmeans, split
from gif.codes.nodes import Nodes, Rows, count
from gif.codes.prices import Market, balancing_prices
from gif.codes.segments import sum_of_groups
from gif.codes.splitmix import node_seeds
from gif.codes.tree import Level, direction
from gif.resume import UnfinishedWork
from gif.vectors.store import CodeVectors
from gif_kernels.sphere import inverse_norm, unit

M, V = 20_000, 20
PRICE_RATES = tuple(0.2 * 0.88**i for i in range(30))  # from none to nearly right
tokenize_module = import_module("gif.codes.tokenize")  # the package has the function by that name


def clustered(m: int, d: int = 64, seed: int = 0) -> torch.Tensor:
    """Two levels of clusters of uneven sizes, and noise around them: (m, d) unit rows."""
    generator = torch.Generator().manual_seed(seed)
    rows, node = torch.zeros(m, d), torch.zeros(m, dtype=torch.int64)
    for scale in (1.0, 0.8):
        weights = torch.rand(20, generator=generator) + 0.3
        node = 20 * node + torch.multinomial(weights, m, replacement=True, generator=generator)
        rows += scale * torch.nn.functional.normalize(torch.randn(400, d, generator=generator), dim=1)[node]
    rows += 0.8 * torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small gain nothing from threads, and lose much where other work wants the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vectors():
    return clustered(M)


@pytest.fixture(scope="module")
def codes(vectors):
    return tokenize(vectors, TokenizeConfig(vocab_size=V))


@pytest.fixture(scope="module")
def plain(vectors):
    return tokenize(vectors, TokenizeConfig(vocab_size=V, alignment="none"))


@pytest.fixture(scope="module")
def quality(codes, vectors):
    return judge_codes(codes, vectors)


def assert_capacities(codes, capacity_factor: float) -> None:
    """Every node holds v^(l-j) identities at most, and ceil(capacity_factor n / v) of its parent's n (or one)."""
    v, parents = codes.vocab_size, {0: len(codes)}
    for depth in range(1, codes.length + 1):
        nodes, sizes = codes.prefixes(depth).unique(return_counts=True)
        children = dict(zip(nodes.tolist(), sizes.tolist(), strict=True))
        for node, size in children.items():
            assert size <= v ** (codes.length - depth)
            assert size <= math.ceil(capacity_factor * parents[node // v] / v)
        parents = children


@pytest.mark.parametrize("alignment", ["none", "residual"])
@pytest.mark.parametrize(("v", "length"), [(2, 5), (3, 4), (5, 3), (20, 2), (256, 1)])
def test_full_and_nearly_full_trees(v, length, alignment):
    for m in {1, 2, v, v + 1, v**length - 1, v**length} - {257}:
        codes = tokenize(
            torch.randn(m, 7), TokenizeConfig(vocab_size=v, length=length, alignment=alignment)
        )  # refuses codes alike
        assert codes.codes.shape == (m, length)
        assert_capacities(codes, 1.5)


def hostile(kind: str, m: int, d: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.randn(m, d, generator=generator)
    if kind == "equal":
        rows[:] = rows[0].clone()
    elif kind == "collinear":
        rows = torch.randn(m, 1, generator=generator) * rows[:1]
    elif kind == "one large cluster":
        rows[: 9 * m // 10] = rows[0] + 1e-3 * rows[: 9 * m // 10]
    elif kind == "few points":
        rows = rows[torch.randint(3, (m,), generator=generator) % m]
    return rows


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["random", "equal", "collinear", "one large cluster", "few points"]),
    v=st.integers(2, 9),
    length=st.integers(1, 4),
    fill=st.floats(0, 1),
    d=st.sampled_from([1, 2, 5, 16]),
    capacity_factor=st.sampled_from([1.0, 1.3, 1.5, math.inf]),
    alignment=st.sampled_from(["none", "residual"]),
    seed=st.integers(0, 2**63),
)
def test_distinct_and_within_capacities_whatever_the_vectors(
    kind, v, length, fill, d, capacity_factor, alignment, seed
):
    m = 1 + int(fill * (min(v**length, 700) - 1))
    rows = hostile(kind, m, d, torch.Generator().manual_seed(seed % 1000))
    options = {"capacity_factor": capacity_factor, "alignment": alignment, "seed": seed}
    assert_capacities(
        tokenize(rows, TokenizeConfig(vocab_size=v, length=length, iterations=3, **options)), min(capacity_factor, v)
    )


def test_large_tables_keep_capacities(codes, plain):
    for each in (codes, plain):
        assert len(each) == M
        assert_capacities(each, 1.5)


def test_capacity_factor_one_makes_equal_sizes(vectors):
    codes = tokenize(vectors[:5000], TokenizeConfig(vocab_size=7, capacity_factor=1.0))
    for depth in range(codes.length):
        node, sizes = codes.prefixes(depth + 1).unique(return_counts=True)
        for parent in (node // 7).unique():
            children = sizes[node // 7 == parent]
            smallest = int(children.min()) if len(children) == 7 else 0
            assert int(children.max()) - smallest <= 1


def test_the_seed_decides(vectors, codes):
    rows = vectors[:3000]
    first = tokenize(rows, TokenizeConfig(vocab_size=V, seed=1))
    assert torch.equal(tokenize(rows, TokenizeConfig(vocab_size=V, seed=1)).codes, first.codes)
    assert not torch.equal(tokenize(rows, TokenizeConfig(vocab_size=V, seed=2)).codes, first.codes)
    assert torch.equal(
        tokenize(CodeVectors(rows.clone()), TokenizeConfig(vocab_size=V, seed=1)).codes[:, 0], first.codes[:, 0]
    )


def test_only_directions_matter_and_the_input_is_left_alone(vectors):
    rows = vectors[:2000] * 4  # a power of two: the very same directions
    before = rows.clone()
    assert torch.equal(
        tokenize(rows, TokenizeConfig(vocab_size=V)).codes, tokenize(vectors[:2000], TokenizeConfig(vocab_size=V)).codes
    )
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(vectors, dtype):
    rows = vectors[:2000].to(dtype)
    assert torch.equal(
        tokenize(rows, TokenizeConfig(vocab_size=V)).codes, tokenize(rows.float(), TokenizeConfig(vocab_size=V)).codes
    )


def test_streaming_a_large_node_changes_nothing_but_rounding(vectors, monkeypatch):
    index = torch.arange(3000)[None]
    nodes = [Nodes(vectors, index, torch.ones_like(index, dtype=torch.bool)) for _ in range(2)]
    options: dict[str, Any] = {
        "capacity_factor": 1.5,
        "limit": 400,
        "iterations": 4,
        "seeds": node_seeds(0, 0, index[0, :1].numpy()),
    }
    child, sums = split(nodes[0], V, **options)
    monkeypatch.setattr(blocks_module, "BLOCK_FLOATS", 3000 * V)  # all similarities, and 900 rows
    streamed, streamed_sums = split(nodes[1], V, **options)
    assert (child == streamed).double().mean() > 0.99  # a tie may fall the other way
    torch.testing.assert_close(unit(streamed_sums), unit(sums), atol=0.02, rtol=0)


def test_a_node_of_many_blocks_keeps_capacities_and_quality(vectors, monkeypatch):
    index = torch.arange(M)[None]
    mask = torch.ones_like(index, dtype=torch.bool)
    options: dict[str, Any] = {
        "capacity_factor": 1.0,
        "limit": M,
        "iterations": 4,
        "seeds": node_seeds(0, 0, np.zeros(1)),
    }
    _, sums = split(Nodes(vectors, index, mask), V, **options)
    monkeypatch.setattr(blocks_module, "BLOCK_FLOATS", 2000 * V)  # prices from 2,000 rows, assignment in blocks of 625
    child, streamed = split(Nodes(vectors, index, mask), V, **options)
    assert (count(child, mask, V) == M // V).all()
    # counts of 100 sampled rows a child are off by 10 %, which is what has to move, and each loses a few per cent
    assert streamed.norm(dim=2).sum() > 0.99 * sums.norm(dim=2).sum()


def test_sampled_rounds_keep_the_quality(vectors, quality, monkeypatch):
    monkeypatch.setattr(clustering, "LLOYD_ROWS", 100)
    monkeypatch.setattr(clustering, "SEEDING_ROWS", 10)
    sampled = tokenize(vectors, TokenizeConfig(vocab_size=V))
    assert_capacities(sampled, 1.5)
    # centroids of 100 rows in d = 64 at mean cosine 0.65 are off by 1 - cos = (1/0.65^2 - 1) / 100 / 2, under 1 %; the
    # rest is what one seeding of k-means differs by from another
    assert judge_codes(sampled, vectors).cosine[0] > 0.95 * quality.cosine[0]


def test_a_large_node_takes_the_best_of_its_starts(vectors, monkeypatch):
    monkeypatch.setattr(clustering, "LLOYD_ROWS", 10)
    tried, begun = [], []

    def remember(points, centroids, share, iterations, run=clustering.rounds):
        found = run(points, centroids, share, iterations)
        tried.append((found[0], found[2])) if iterations == clustering.TRIAL_ROUNDS else begun.append(centroids)
        return found

    monkeypatch.setattr(clustering, "rounds", remember)
    index = torch.arange(2000).view(2, 1000)
    mask = torch.arange(1000) < torch.tensor([1000, 790])[:, None]  # 5 samples of 10 rows a child, and 3
    options: dict[str, Any] = {"capacity_factor": 1.5, "limit": 2000, "iterations": 4}
    split(Nodes(vectors, index, mask), V, seeds=node_seeds(0, 1, np.arange(2)), **options)
    ((starts, dual),) = tried  # all at once
    assert len(starts) == len(dual) == 5 + 3
    for node, own in enumerate((range(5), range(5, 8))):
        best = max(own, key=lambda start: float(dual[start]))
        assert torch.equal(begun[0][node], starts[best])


def test_a_node_depends_on_the_nodes_beside_it_by_rounding_alone(vectors):
    agreement = []
    index = torch.randperm(2000, generator=torch.Generator().manual_seed(0)).view(10, 200)
    mask = torch.arange(200) < torch.tensor([200, 190, 170, 150, 120, 101, 80, 61, 40, 21])[:, None]
    options: dict[str, Any] = {"capacity_factor": 1.5, "limit": 400, "iterations": 4}
    seeds = node_seeds(3, 1, torch.arange(10).numpy())
    together, _ = split(Nodes(vectors, index, mask), V, seeds=seeds, **options)
    for i in range(10):
        rows = index[i : i + 1, : int(mask[i].sum())]
        alone = Nodes(vectors, rows, torch.ones_like(rows, dtype=torch.bool))
        child, _ = split(alone, V, seeds=seeds[i : i + 1], **options)
        agreement.append((child[0] == together[i, mask[i]]).double().mean())
    assert sum(share == 1 for share in agreement) >= 8  # a tie may fall the other way under another padding


def exact_optimum(similarity: np.ndarray, capacity: int) -> float:
    """The largest mean similarity (n, k) with at most ``capacity`` rows a child, by minimum-cost flow."""
    n, k = similarity.shape
    rows, children, sink, unit_cost = np.arange(n), n + np.arange(k), n + k, 1e-6
    flow: Any = SimpleMinCostFlow()
    costs = np.round((1 - similarity) / unit_cost).astype(np.int64)
    flow.add_arcs_with_capacity_and_unit_cost(
        np.repeat(rows, k), np.tile(children, n), np.ones(n * k, np.int64), costs.ravel()
    )
    flow.add_arcs_with_capacity_and_unit_cost(children, np.full(k, sink), np.full(k, capacity), np.zeros(k, np.int64))
    flow.set_nodes_supplies(np.arange(n + k + 1), np.array([1] * n + [0] * k + [-n]))
    assert flow.solve() == flow.OPTIMAL
    return 1 - unit_cost * flow.optimal_cost() / n


@pytest.mark.parametrize("start", [1.0, 2.0], ids=["nearly right", "twice too high"])
@pytest.mark.parametrize("capacity_factor", [1.0, 1.125, 1.5])
def test_the_assignment_is_within_a_thousandth_of_the_optimum(vectors, capacity_factor, start):
    n = 6400  # capacities are whole numbers
    index, seeds = torch.arange(n)[None], node_seeds(0, 0, np.zeros(1))
    nodes = Nodes(vectors, index, torch.ones_like(index, dtype=torch.bool))
    centroids = kmeans(nodes, V, 8, seeds)
    similarity = nodes.similarity(centroids)
    capacity = torch.full((1, V), capacity_factor * n / V)
    prices = balancing_prices(Market(similarity, nodes.mask, capacity), torch.zeros(1, V), PRICE_RATES)
    child = clustering.assign(nodes, centroids, start * prices, capacity_factor=capacity_factor, limit=n, seeds=seeds)
    assert (count(child, nodes.mask, V) <= capacity).all()
    optimum = exact_optimum(similarity[0].double().numpy(), int(capacity[0, 0]))
    ours = similarity[0].gather(1, child[0, :, None].long()).double().mean()
    assert optimum + 1e-6 >= ours >= (1 - 1e-3) * optimum  # costs are whole millionths


@pytest.mark.parametrize("cache", [1, 100, 1 << 18])
def test_demand_is_what_rows_want_at_given_prices(cache, monkeypatch):
    monkeypatch.setattr(prices_module, "CACHE_FLOATS", cache)
    mask = torch.arange(53) < torch.tensor([53, 1, 33])[:, None]
    similarity = torch.rand(3, 53, 7) * mask[:, :, None]
    prices, capacity = torch.rand(3, 7) / 4, torch.full((3, 7), 9.0)
    dual, wanted = Market(similarity, mask, capacity).demand(prices)
    score, child = (similarity - prices[:, None]).double().max(2)
    assert torch.equal(wanted, count(child, mask, 7))
    expected = (score * mask).sum(1) + (capacity * prices).double().sum(1)
    torch.testing.assert_close(dual[:, 0].double(), expected, rtol=1e-6, atol=0)  # float32 sums of 53


def test_sums_of_groups_are_of_their_rows_times_their_weights():
    rows, group, weight = torch.randn(300, 9), torch.randint(3, 40, (300,)), torch.rand(300)  # some groups have no row
    sums = sum_of_groups(rows, group, 42, weight)
    expected = torch.zeros(42, 9, dtype=torch.float64).index_add_(0, group, (rows * weight[:, None]).double())
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-5)  # float32 sums of some tens of rows


def test_rows_of_any_length_have_the_cosines_and_sums_of_unit_rows():
    table = torch.randn(60, 5) * 10.0 ** torch.randint(-9, 9, (60, 1))
    nodes = Nodes(table, torch.arange(60).view(2, 30), torch.arange(30) < torch.tensor([30, 7])[:, None])
    centroids, child = unit(torch.randn(2, 4, 5)), torch.randint(4, (2, 30))
    torch.testing.assert_close(nodes.rows.cosines(centroids), centroids @ nodes.rows.unit.mT)
    member = torch.nn.functional.one_hot(child, 4).float().mT
    torch.testing.assert_close(nodes.sums(child, 4), member @ nodes.rows.unit)
    assert (nodes.rows.unit[1, 7:] == 0).all()


def test_each_row_is_with_the_child_it_wants():
    similarity, prices = torch.randn(3, 7, 50), torch.rand(3, 7)
    member = prices_module.takers(similarity, prices)[1]
    assert torch.equal(prices_module.which(member), (similarity - prices[:, :, None]).argmax(1))


def test_similar_identities_share_a_prefix(quality):
    assert quality.kmeans_share[0] > 0.97
    assert list(quality.cosine) == sorted(quality.cosine)
    assert quality.cosine[-1] == 1
    assert quality.neighbor_prefix > 10 * quality.random_prefix
    assert min(quality.entropy) > 0.95
    assert "free k-means" in str(quality)


def test_quality_of_codes_at_random_is_chance(vectors):
    rows = vectors[:8000]
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(20)] * 3)[torch.randperm(8000)], 20)
    quality = judge_codes(codes, rows)
    assert quality.neighbor_prefix < 0.1
    assert quality.kmeans_share[0] < 0.6
    assert max(quality.readout) < 0.1


def test_alignment_makes_later_tokens_readable(quality, plain, vectors):
    aligned, unaligned = quality.readout, linear_probe(plain, vectors)
    chance = 1 / V
    assert aligned[1] > unaligned[1] + 0.05
    assert aligned[2] > 2 * chance > unaligned[2]


def test_matching_leaves_absent_children_the_names_that_remain():
    codebook = torch.eye(4)
    residuals = torch.stack(
        [codebook[[2, 0, 3, 1]], torch.stack([codebook[3], torch.zeros(4), codebook[0], torch.zeros(4)])]
    )
    names = match(residuals @ codebook.mT)
    assert names[0].tolist() == [2, 0, 3, 1]
    assert names[1, [0, 2]].tolist() == [3, 0]
    assert sorted(names[1].tolist()) == [0, 1, 2, 3]


def test_cosines_of_residuals_that_are_not_written():
    rows = 3 * torch.randn(5, 7, 33)
    scale = inverse_norm(rows)[:, :, 0]
    scale[1, 4:] = 0  # padding
    rows[2, 3] = 0
    scale[2, 3] = 0
    residuals = Residuals(Rows(rows, scale), direction(torch.randn(5, 33)))
    directions = torch.nn.functional.normalize(torch.randn(4, 33), dim=1)
    found = residuals.cosines(directions)
    torch.testing.assert_close(found, residuals.unit @ directions.mT, atol=1e-5, rtol=0)
    assert (found[1, 4:] == 0).all() and (found[2, 3] == 0).all() and (residuals.unit[2, 3] == 0).all()
    alone = Residuals(Rows(rows[:1, :1], scale[:1, :1]), rows[:1, 0] * scale[:1, :1])  # the child is the node
    assert alone.cosines(directions).isfinite().all()


@pytest.mark.parametrize("sizes", [[50, 50], [50, 7], [3, 8]], ids=str)
def test_points_are_sampled_as_nodes_are(sizes):
    table, seeds = torch.randn(50, 4), np.array([3, 4], np.uint64)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    nodes = Nodes(table, torch.arange(max(sizes)).expand(2, -1), mask)
    expected = nodes.sample(10, seeds)
    found = Points.sketched(nodes, V).sample(10, seeds)
    torch.testing.assert_close(found.rows, Points.sketched(expected, V).rows)
    assert torch.equal(found.mask, expected.mask)


@pytest.mark.parametrize("index", [[4, 5, 6, 7], [4, 5, 5, 7], [4, 6, 5, 7], [7, 6, 5, 4], [9]], ids=str)
def test_rows_one_after_the_other_are_the_rows_that_are_named(index):
    table = torch.randn(10, 6).half()
    nodes = Nodes(table, torch.tensor([index]), torch.ones(1, len(index), dtype=torch.bool))
    assert torch.equal(nodes.rows.values[0], table[index].float())


def test_centroids_are_the_nodes_means(codes, vectors):
    assert len(codes.centroids) == codes.length - 1
    for depth, centroids in enumerate(codes.centroids, start=1):
        _, node = codes.prefixes(depth).unique(return_inverse=True)
        sums = torch.zeros(len(centroids), vectors.shape[1], dtype=torch.float64).index_add_(0, node, vectors.double())
        cosine = (torch.nn.functional.normalize(sums, dim=1) * centroids.double()).sum(1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=2e-3, rtol=0)  # float16: 2^-11 an entry
    assert tokenize(vectors[:500], TokenizeConfig(vocab_size=V, centroid_levels=0)).centroids == ()


def test_slack_and_length():
    rows = torch.randn(400, 5)
    assert tokenize(rows, TokenizeConfig(vocab_size=20)).length == 2
    assert tokenize(rows, TokenizeConfig(vocab_size=20, slack=0.01)).length == 3
    assert tokenize(rows, TokenizeConfig(vocab_size=20, length=4)).length == 4
    with pytest.raises(ValueError, match=r"400 identities .* take length >= 2 or vocab_size >= 400|take length >= 2$"):
        tokenize(rows, TokenizeConfig(vocab_size=20, length=1))
    with pytest.raises(ValueError, match="take length >= 3 or vocab_size >= 20"):
        tokenize(rows, TokenizeConfig(vocab_size=19, length=2))
    with pytest.raises(ValueError, match="pass 2\\^63"):
        tokenize(rows, TokenizeConfig(vocab_size=20, length=15))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_vectors_without_a_direction_are_refused(value):
    rows = torch.randn(50, 4)
    rows[17] = value
    with pytest.raises(ValueError, match="NaN, infinity or a row of zeros"):
        tokenize(rows, TokenizeConfig(vocab_size=10))


def test_bad_options_are_refused():
    rows = torch.randn(50, 4)
    with pytest.raises(TypeError, match="must be float32"):
        tokenize(rows.long(), TokenizeConfig(vocab_size=10))
    with pytest.raises(ValueError, match=r"shape \(m, d\)"):
        tokenize(rows[0], TokenizeConfig(vocab_size=10))
    with pytest.raises(ValueError, match="'none', 'residual'"):
        tokenize(rows, TokenizeConfig(vocab_size=10, alignment="other"))  # type: ignore[arg-type]
    for options in ({"capacity_factor": 0.9}, {"capacity_factor": math.nan}, {"iterations": -1}):
        with pytest.raises(ValueError, match="wanted capacity_factor >= 1 and iterations >= 0"):
            tokenize(rows, TokenizeConfig(vocab_size=10, **options))
    with pytest.raises(ValueError, match=r"vectors must be \(50, d\)"):
        judge_codes(tokenize(rows, TokenizeConfig(vocab_size=10)), rows[:-1])
    with pytest.raises(ValueError, match=r"centroid_levels must lie in \[0, 2\)"):
        tokenize(rows, TokenizeConfig(vocab_size=10, centroid_levels=2))


class Killed(BaseException):
    pass


def kill_after(levels: int, monkeypatch) -> None:
    """The next run of `tokenize` ends once it has saved so many levels."""
    save, saved = UnfinishedWork.save, []

    def save_and_die(self, tensors):
        save(self, tensors)
        saved.append(1)
        if len(saved) == levels:
            raise Killed

    monkeypatch.setattr(UnfinishedWork, "save", save_and_die)


@pytest.mark.parametrize("alignment", ["residual", "none"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_killed_after_any_level_and_resumed(vectors, levels, alignment, tmp_path, monkeypatch):
    rows, options = vectors[:700], {"vocab_size": 5, "length": 5, "alignment": alignment}
    straight = tokenize(rows, TokenizeConfig(**options))
    checkpoint = tmp_path / "codes.partial"
    with monkeypatch.context() as patch:
        kill_after(levels, patch)
        with pytest.raises(Killed):
            tokenize(rows, TokenizeConfig(**options), checkpoint=checkpoint)
    cut = []
    monkeypatch.setattr(Level, "tokens", lambda self, *a, f=Level.tokens: cut.append(self.depth) or f(self, *a))
    resumed = tokenize(rows, TokenizeConfig(**options), checkpoint=checkpoint)
    assert cut == list(range(levels, 5))  # what was done is not done again
    assert torch.equal(resumed.codes, straight.codes)
    assert all(map(torch.equal, resumed.centroids, straight.centroids))
    assert (resumed.directions is None) == (alignment == "none")
    assert resumed.directions is None or torch.equal(resumed.directions, straight.directions)
    assert not checkpoint.exists()


def test_the_checkpoint_of_another_run_is_refused(vectors, tmp_path, monkeypatch):
    checkpoint = tmp_path / "codes.partial"
    with monkeypatch.context() as patch:
        kill_after(1, patch)
        with pytest.raises(Killed):
            tokenize(vectors[:100], TokenizeConfig(vocab_size=5), checkpoint=checkpoint)
    for rows, options in ((vectors[:100], {"seed": 1}), (vectors[100:200], {}), (vectors[:100], {"slack": 9.0})):
        with pytest.raises(ValueError, match="checkpoint of another run"):
            tokenize(rows, TokenizeConfig(vocab_size=5, **options), checkpoint=checkpoint)


def test_a_memory_mapped_table_gives_the_same_codes(vectors, tmp_path):
    CodeVectors(vectors[:3000].clone()).save(tmp_path / "vectors.safetensors")
    mapped = CodeVectors.load(tmp_path / "vectors.safetensors", mmap=True)
    kept = CodeVectors.load(tmp_path / "vectors.safetensors")
    assert torch.equal(
        tokenize(mapped, TokenizeConfig(vocab_size=V)).codes, tokenize(kept, TokenizeConfig(vocab_size=V)).codes
    )


@pytest.mark.parametrize("levels", [1, None])
def test_what_is_held_beyond_blocks_is_24_bytes_an_identity(levels, monkeypatch):
    """By the allocator's record, which knows every byte: what 20,000 identities more take."""
    block = 1 << 14
    monkeypatch.setattr(blocks_module, "BLOCK_FLOATS", block)
    for module, name in ((tree, "SORTED_ROWS"), (code_table, "_ROWS_A_BLOCK"), (tokenize_module, "ROWS_A_BLOCK")):
        monkeypatch.setattr(module, name, 1000)
    for name, value in (("LLOYD_ROWS", 8), ("SEEDING_ROWS", 8), ("RESTARTS", 1)):
        monkeypatch.setattr(clustering, name, value)
    monkeypatch.setattr(prices_module, "REFINING_ROUNDS", 5)
    config = TokenizeConfig(vocab_size=16, iterations=1, alignment="none", centroid_levels=levels)
    few, many = (peak_bytes(partial(tokenize, clustered(m, 8), config), "cpu") for m in (20_000, 40_000))
    assert many - few < 24 * 20_000
    assert many < 24 * 40_000 + 10 * 4 * block  # similarities, gathered rows, and temporaries of them


def newcomers(codes, vectors, n: int) -> torch.Tensor:
    """Rows near those of the first n identities, but not equal to them."""
    return torch.nn.functional.normalize(vectors[:n] + 0.05 * torch.randn(n, vectors.shape[1]), dim=1)


@pytest.mark.parametrize("alignment", ["residual", "none"])
@pytest.mark.parametrize("levels", [None, 2])
def test_newcomers_take_leaves_near_what_they_resemble(vectors, alignment, levels):
    m, n = 5000, 600
    codes = tokenize(vectors[:m], TokenizeConfig(vocab_size=V, length=4, alignment=alignment, centroid_levels=levels))
    rows = newcomers(codes, vectors, n)
    extended = codes.extend(rows)
    assert torch.equal(extended.codes[:m], codes.codes)  # IdentityCodes has seen to it that the others are distinct
    assert len(extended) == m + n
    assert extended.free == V**4 - m - n
    assert torch.equal(codes.extend(rows).codes, extended.codes)
    shared = (extended.codes[m:] == extended.codes[:n]).long().cumprod(1).sum(1).double().mean()
    assert shared > 1.5  # of at most 3, since no leaf is free twice; pairs at random share 0.06
    for depth, (old, new) in enumerate(zip(codes.centroids, extended.centroids, strict=True), start=1):
        paths = codes.prefixes(depth).unique()
        assert torch.equal(new[torch.isin(extended.prefixes(depth).unique(), paths)], old)


def test_the_last_token_is_that_of_the_free_leaf_the_residual_points_to(vectors):
    m = 2000
    codes = tokenize(vectors[:m], TokenizeConfig(vocab_size=V, length=4))
    for row in newcomers(codes, vectors, 10):
        code = codes.extend(row[None]).codes[m]
        node = codes.prefixes(3) == int((code[:3].long() * V ** torch.tensor([2, 1, 0])).sum())
        base = codes.centroids[-1][codes.prefixes(3).unique() == codes.prefixes(3)[node][0]][0]
        agreement = codes.directions[3].float() @ unit(row - base.float())
        agreement[codes.codes[node, 3].long()] = -torch.inf  # leaves that are taken
        assert agreement.argmax() == code[3]


def test_a_tree_fills_up_to_the_last_leaf(tmp_path):
    codes = tokenize(torch.randn(60, 6), TokenizeConfig(vocab_size=5, length=3))
    codes.save(tmp_path / "codes.safetensors")
    loaded = IdentityCodes.load(tmp_path / "codes.safetensors")
    assert torch.equal(loaded.directions, codes.directions)
    rows = torch.randn(65, 6)
    full = loaded.extend(rows)
    assert torch.equal(full.codes, codes.extend(rows).codes)
    assert full.free == 0
    assert full.codes.unique(dim=0).shape == (125, 3)
    assert torch.equal(full.extend(torch.empty(0, 6)).codes, full.codes)
    with pytest.raises(ValueError, match=r"1 newcomers, but only 0 of 5\^3 codes are free: the tree is full"):
        full.extend(torch.randn(1, 6))


def test_identical_newcomers_still_get_codes_of_their_own():
    rows = torch.randn(40, 6)
    codes = tokenize(rows, TokenizeConfig(vocab_size=4, length=4))
    assert len(codes.extend(rows[:1].expand(150, -1))) == 190  # IdentityCodes refuses codes alike


def test_newcomers_that_cannot_be_placed():
    codes = tokenize(torch.randn(60, 6), TokenizeConfig(vocab_size=5, length=3))
    with pytest.raises(ValueError, match=r"must have shape \(n, 6\)"):
        codes.extend(torch.randn(3, 5))
    with pytest.raises(ValueError, match="a row of zeros"):
        codes.extend(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="no centroids"):
        IdentityCodes(codes.codes, 5).extend(torch.randn(1, 6))
    short = tokenize(torch.randn(3, 6), TokenizeConfig(vocab_size=5))
    assert len(short.extend(torch.randn(2, 6))) == 5  # of one token: no centroids are needed


def test_advice_names_the_smallest_vocabulary_a_length():
    shapes = {shape.length: shape for shape in advise(64_000_000)}
    assert (shapes[6].vocab_size, shapes[6].slack, shapes[6].logits) == (20, 0.0, 120)
    assert (shapes[7].vocab_size, shapes[7].codes) == (14, 14**7)
    for m in (1, 7, 10_000, 2_059_906):
        lengths = [shape.length for shape in advise(m, 0.25)]
        assert lengths == sorted(set(lengths))
        for shape in advise(m, 0.25):
            assert shape.codes == shape.vocab_size**shape.length >= 1.25 * m
            assert shape.slack == shape.codes / m - 1
            assert shape.vocab_size == 5 or (shape.vocab_size - 1) ** shape.length < 1.25 * m
