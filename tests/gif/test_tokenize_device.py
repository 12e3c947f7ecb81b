"""Cutting codes on an accelerator, as far as a machine without one can tell: few operations, no waiting, same codes."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.clusters import clustered
from gif.codes import IdentityCodes, TokenizeConfig, clustering, judge_codes, tokenize, tree
from gif.codes import blocks as blocks_module
from gif.codes import prices as prices_module
from gif.codes.clustering import DISTANCE_UNIT, split
from gif.codes.commands import tokenize_command
from gif.codes.nodes import Nodes
from gif.codes.prices import Market, dearest
from gif.codes.sketch import WIDTH, sketch
from gif.codes.splitmix import node_seeds
from gif.codes.tokenize import working_device
from gif.vectors import CodeVectors

V = 20


class Operations(TorchDispatchMode):
    """The operations that are done, by name, with the dtype of their first argument."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = args[0].dtype if args and isinstance(args[0], torch.Tensor) else None
        self.done.append((function.overloadpacket._qualified_op_name, first))
        return function(*args, **(kwargs or {}))

    @property
    def work(self):
        """Without what makes no kernel: views, allocations."""
        views = ("view", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "empty", "detach", "alias")
        names = [name.split("::")[1] for name, _ in self.done]
        return [name for name in names if not name.startswith(views) and name not in ("t", "permute", "lift_fresh")]


def meta_nodes(g, rows, d=64):
    index = torch.empty(g, rows, dtype=torch.int64, device="meta")
    return Nodes(torch.empty(10**6, d, device="meta"), index, torch.empty(g, rows, dtype=torch.bool, device="meta"))


def test_demand_on_a_device_takes_a_few_operations():
    similarity = torch.empty(64, 5120, V, device="meta")  # 6.5 million
    mask = torch.empty(64, 5120, dtype=torch.bool, device="meta")
    market = Market(similarity, mask, torch.empty(64, V, device="meta"))
    with Operations() as operations:
        market.demand(torch.empty(64, V, device="meta"))
    assert len(operations.work) < 20, operations.work


def test_rounds_of_clustering_wait_for_nothing():
    """A tensor without data cannot be looked at: bool(x), x.tolist(), x.nonzero() and x[mask] would all fail."""
    sample, seeds = meta_nodes(64, 5120), np.arange(64, dtype=np.uint64)
    with Operations() as operations:
        points = clustering.Points.sketched(sample, V)
        clustering.rounds(points, clustering.seed_centroids(points, V, seeds), torch.empty(64, 1, device="meta"), 8)
    cumulated = [dtype for name, dtype in operations.done if name == "aten::cumsum"]
    assert cumulated == [torch.int64] * V  # PyTorch has no deterministic sum of floats there
    assert len(operations.work) < 1500  # 8 rounds at 40, 20 of seeding at 30


def test_looking_for_the_dearest_child_does_not_wait():
    found = dearest(torch.empty(3, 100, V, device="meta"), torch.empty(3, V, device="meta"))
    assert found.shape == (3, 100)


def patched(monkeypatch, block, at_once):
    monkeypatch.setattr(blocks_module, "BLOCK_FLOATS", block)
    for module in (blocks_module, tree):
        monkeypatch.setattr(module, "blocks_at_once", lambda device: at_once)
    monkeypatch.setattr(prices_module, "CACHE_FLOATS", block * at_once if at_once > 1 else 1 << 12)


@pytest.mark.parametrize("d", [8, 64])
def test_codes_do_not_depend_on_the_block(d, monkeypatch):
    """Nodes beyond a block, and chunks of nodes of one block and of many; d < v has more similarities than rows."""
    vectors = clustered(12_000, d)
    found, quality = [], []
    for at_once in (1, 8):
        patched(monkeypatch, 1 << 16, at_once)
        found.append(tokenize(vectors, TokenizeConfig(vocab_size=V, alignment="none")).codes)
        quality.append(judge_codes(tokenize(vectors, TokenizeConfig(vocab_size=V)), vectors).cosine)
    same = (found[0] == found[1]).double()
    assert (same[:, 0] == 1).all()
    assert same.amin(1).mean() > 0.97  # sums in another order let ties fall the other way, and a node is cut anew
    np.testing.assert_allclose(quality[0], quality[1], rtol=2e-3)


def test_a_sampled_node_does_not_depend_on_the_nodes_beside_it(monkeypatch):
    """Those beside it decide what it is padded to: beyond the sample, though it is smaller itself."""
    monkeypatch.setattr(clustering, "LLOYD_ROWS", 7)
    monkeypatch.setattr(clustering, "SEEDING_ROWS", 6)
    vectors = clustered(1000, 64)
    index = torch.arange(540).view(3, 180)
    mask = torch.arange(180) < torch.tensor([180, 139, 121])[:, None]  # samples of 140, and of 120 to seed with
    options: dict[str, Any] = {"capacity_factor": 1.5, "limit": 400, "iterations": 4}
    seeds = node_seeds(3, 1, np.arange(3))
    together, _ = split(Nodes(vectors, index, mask), V, seeds=seeds, **options)
    for i in range(3):
        rows = index[i : i + 1, : int(mask[i].sum())]
        alone = Nodes(vectors, rows, torch.ones_like(rows, dtype=torch.bool))
        child, _ = split(alone, V, seeds=seeds[i : i + 1], **options)
        assert (child[0] == together[i, mask[i]]).double().mean() > 0.98


def test_a_sample_has_all_rows_of_a_small_node_and_a_stratum_each_of_a_large_one():
    index = torch.arange(60).view(2, 30)
    mask = torch.arange(30) < torch.tensor([30, 7])[:, None]
    nodes = Nodes(torch.randn(60, 3), index, mask)
    sample = nodes.sample(10, np.arange(2, dtype=np.uint64))
    assert sample.mask.tolist() == [[True] * 10, [True] * 7 + [False] * 3]
    assert (sample.index[0] // 3).tolist() == list(range(10))
    assert sample.index[1, :7].tolist() == list(range(30, 37))
    assert nodes.sample(30, np.arange(2, dtype=np.uint64)) is nodes


def test_distances_are_whole_multiples_of_a_unit():
    """So that sums of integers lose nothing, and are the same in any order."""
    cosine = torch.cat([torch.rand(10**5) * 2 - 1, 1 - torch.rand(10**4) * 1e-6, torch.rand(10**4) * 1e-6])
    distance = (1 - cosine).clamp_min(0)
    units = distance.double() / DISTANCE_UNIT
    assert torch.equal(units, units.round())
    assert torch.equal((distance / DISTANCE_UNIT).long().double(), units)


@pytest.mark.parametrize("d", [256, 300, 512])
def test_a_sketch_keeps_products_in_the_mean_over_pairs(d):
    rows = torch.nn.functional.normalize(torch.randn(500, d, dtype=torch.float64), dim=1)
    short = sketch(rows)
    assert short.shape == (500, WIDTH)
    error = (short @ short.T - rows @ rows.T)[~torch.eye(500, dtype=torch.bool)]
    assert error.abs().mean() < WIDTH**-0.5  # of standard deviation 1 / sqrt(WIDTH) at most
    assert abs(error.mean()) < 0.1 * WIDTH**-0.5
    inside = rows * (torch.arange(d) < WIDTH)
    torch.testing.assert_close(sketch(inside) @ sketch(inside).T, inside @ inside.T)  # nothing is folded onto them


def test_short_rows_are_not_sketched():
    rows = torch.randn(3, 2 * WIDTH - 1)
    assert sketch(rows) is rows


class TestDevice:
    table = torch.randn(500, 16)

    def test_where_the_vectors_are_by_default(self):
        assert working_device(self.table, None).type == "cpu"
        assert working_device(self.table.to("meta"), None).type == "meta"

    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert working_device(self.table, "auto").type == "cpu"
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(ValueError, match=r'device "cuda" was asked for, and PyTorch sees 0 GPUs'):
            tokenize(self.table, TokenizeConfig(vocab_size=V), device="cuda")
        with pytest.raises(ValueError, match='unknown device "gpu"'):
            tokenize(self.table, TokenizeConfig(vocab_size=V), device="gpu")
        expected = tokenize(self.table, TokenizeConfig(vocab_size=V)).codes
        for device in ("auto", "cpu", torch.device("cpu")):
            assert torch.equal(tokenize(self.table, TokenizeConfig(vocab_size=V), device=device).codes, expected)

    def test_a_gpu_with_and_without_room(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(import_module("gif.codes.tokenize"), "check_device", lambda device: None)
        table = torch.empty(64_000_000, 512, dtype=torch.bfloat16, device="meta")
        for free, place in ((80 << 30, "cuda"), (60 << 30, "cpu")):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
            assert working_device(table, "auto").type == place
        with pytest.raises(ValueError, match=r"\(64000000, 512\) vectors of torch.bfloat16 need 67.5 GiB, 60.0 GiB"):
            working_device(table, "cuda:0")

    def test_the_command_passes_it_on(self, tmp_path, monkeypatch, gif):
        CodeVectors(self.table.clone()).save(tmp_path / "v.safetensors")
        run = ["tokenize", "--vectors", tmp_path / "v.safetensors", "--output", tmp_path / "c.safetensors"]
        code, printed = gif(*run, "--device", "auto")
        assert code == 0, printed
        assert len(IdentityCodes.load(tmp_path / "c.safetensors")) == 500
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(ValueError, match="PyTorch sees 0 GPUs"):
            tokenize_command(tmp_path / "v.safetensors", tmp_path / "d.safetensors", device="cuda")
