"""Code vectors: the table, its quality, its spreading."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.special import hyp0f1
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gif import resume
from gif.codes import IdentityCodes
from gif.vectors import (
    CodeVectors,
    SpreadConfig,
    judge_vectors,
    largest_uniform_cosine,
    spread_code_vectors,
    stages,
    uniform_optimum,
)
from gif.vectors.plots import plot_gaps, plot_nearest_cosines


def clustered(m, d, seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(max(m // 20, 1), d, generator=generator) + 1
    rows = centers[torch.randint(len(centers), (m,), generator=generator)]
    return rows + spread * torch.randn(m, d, generator=generator)


class TestStore:
    def test_rows_are_normalised_in_place(self):
        table = torch.randn(5, 8) * 3
        vectors = CodeVectors(table)
        assert vectors.table.data_ptr() == table.data_ptr()
        torch.testing.assert_close(table.norm(dim=1), torch.ones(5))
        assert len(vectors) == 5 and vectors.width == 8

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mmap", [False, True])
    def test_round_trip(self, tmp_path, dtype, mmap):
        vectors = CodeVectors(torch.randn(7, 6).to(dtype))
        vectors.save(tmp_path / "v.safetensors")
        loaded = CodeVectors.load(tmp_path / "v.safetensors", mmap=mmap)
        assert loaded.table.dtype == dtype
        assert torch.equal(loaded.table, vectors.table)
        assert torch.equal(loaded.lookup(torch.tensor([3, 0, 3])), vectors.table[[3, 0, 3]])

    def test_only_a_writable_map_changes_the_file(self, tmp_path):
        path = tmp_path / "v.safetensors"
        CodeVectors(torch.randn(4, 3)).save(path)
        before = path.read_bytes()
        CodeVectors.load(path, mmap=True).table[0] = 5.0
        assert path.read_bytes() == before
        CodeVectors.load(path, mmap=True, writable=True).table[0] = 5.0
        assert torch.equal(CodeVectors.load(path).table[0], torch.full((3,), 5.0))

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="NaN or infinity"):
            CodeVectors(torch.tensor([[1.0, math.nan]]))
        with pytest.raises(ValueError, match="all zeros"):
            CodeVectors(torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"must be \(m, d\) floating point, got \(3,\)"):
            CodeVectors(torch.ones(3))
        vectors = CodeVectors(torch.randn(4, 3))
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), got \[-1, 4\]"):
            vectors.lookup(torch.tensor([4, -1]))
        with pytest.raises(FileNotFoundError, match="no file"):
            CodeVectors.load(tmp_path / "none", mmap=True)


class TestQuality:
    @pytest.mark.parametrize(("width", "expected"), [(128, -3.93753), (512, -3.98438)])
    def test_uniform_optimum(self, width, expected):
        assert uniform_optimum(width) == pytest.approx(expected, abs=5e-6)
        assert uniform_optimum(width, 0.7) == pytest.approx(-1.4 + math.log(hyp0f1(width / 2, 0.49)), abs=1e-12)

    @pytest.mark.parametrize(("m", "expected"), [(10_000, 0.242), (1_000_000, 0.302), (64_000_000, 0.346)])
    def test_largest_cosine_of_uniform_points(self, m, expected):
        assert largest_uniform_cosine(m, 512) == pytest.approx(expected, abs=5e-4)

    @pytest.mark.parametrize(("m", "width"), [(40, 3), (300, 24)])
    def test_largest_cosine_of_uniform_points_is_its_median(self, m, width):
        draws = torch.randn(400, m, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        rows = torch.nn.functional.normalize(draws, dim=2)
        largest = (rows @ rows.mT - 2 * torch.eye(m)).amax((1, 2))
        below = float((largest < largest_uniform_cosine(m, width)).double().mean())
        assert below == pytest.approx(0.5, abs=0.1)  # 4 deviations of 400 draws; pairs are not independent, quite

    def test_two_uniform_points_are_at_right_angles(self):
        assert largest_uniform_cosine(2, 16) == 0

    def test_ten_neighbors_kept(self):
        table, other = torch.randn(60, 8), torch.randn(60, 8)
        other[:, :4] = table[:, :4]

        def ten(points):
            points = torch.nn.functional.normalize(points, dim=1).double()
            cosine = points @ points.T - 2 * torch.eye(60)
            return [set(row.tolist()) for row in cosine.topk(10).indices]

        kept = [len(a & b) / 10 for a, b in zip(ten(table), ten(other), strict=True)]
        assert judge_vectors(table, other).ten_neighbors_kept == pytest.approx(sum(kept) / 60)
        assert judge_vectors(table[:3], other[:3]).ten_neighbors_kept == 1  # all the others are among the ten

    def test_uniform_vectors_have_no_gap_and_clustered_ones_do(self):
        uniform = judge_vectors(torch.randn(4000, 64))
        assert abs(uniform.gap) < 0.002
        assert uniform.mean_norm < 0.05
        assert judge_vectors(clustered(4000, 64)).gap > 0.5

    def test_order_kept(self):
        table = torch.randn(500, 16)
        same = judge_vectors(table, table * 2)
        assert same.order_kept == 1 and same.neighbors_kept == 1 and same.ten_neighbors_kept == 1
        other = judge_vectors(table, torch.randn(500, 16))
        assert other.order_kept == pytest.approx(0.5, abs=0.02)
        assert other.neighbors_kept < 0.05 and other.ten_neighbors_kept < 0.05
        with pytest.raises(ValueError, match="reference must have 500 rows"):
            judge_vectors(table, table[:3])


class TestSpread:
    def test_three_epochs_close_most_of_the_gap(self):
        vectors = CodeVectors(clustered(3000, 64))
        report = spread_code_vectors(vectors, SpreadConfig(epochs=5, batch=500))
        assert report.before.gap > 0.5
        assert report.after.gap < 0.1 * report.before.gap
        assert len(report.gaps) == 5 and report.gaps == sorted(report.gaps, reverse=True)
        assert report.after.order_kept > 0.6
        torch.testing.assert_close(vectors.table.norm(dim=1), torch.ones(3000))
        assert report.after.gap == pytest.approx(judge_vectors(vectors.table).gap)

    def test_stops_at_the_target_gap(self):
        report = spread_code_vectors(
            CodeVectors(clustered(1000, 32)), SpreadConfig(epochs=50, batch=250, target_gap=0.3)
        )
        assert report.gaps[-1] < 0.3 <= report.gaps[-2]

    def test_every_epoch_uses_each_row_once(self):
        epochs = [stages.random_subsets(103, 5, seed=3, epoch=epoch) for epoch in range(2)]
        for subsets in epochs:
            assert [len(rows) for rows in subsets] == [21, 21, 21, 20, 20]
            assert torch.equal(torch.cat(subsets).sort().values, torch.arange(103))
        assert not torch.equal(epochs[0][0], epochs[1][0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_killed_run_continues_to_the_same_result(self, tmp_path, monkeypatch, dtype):
        start = clustered(900, 16).to(dtype)
        whole = CodeVectors(start.clone())
        report = spread_code_vectors(whole, SpreadConfig(epochs=3, batch=300))

        step, calls = stages.uniformity_step_, []

        def killed(*args, **options):
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return step(*args, **options)

        monkeypatch.setattr(stages, "uniformity_step_", killed)
        monkeypatch.setattr(resume, "SECONDS", 0.0)
        monkeypatch.setattr(resume, "LARGEST_SHARE", 1e9)
        checkpoint = tmp_path / "spread.partial"
        with pytest.raises(KeyboardInterrupt):
            spread_code_vectors(CodeVectors(start.clone()), SpreadConfig(epochs=3, batch=300), checkpoint=checkpoint)
        assert checkpoint.exists()
        with pytest.raises(ValueError, match="checkpoint of another run"):
            spread_code_vectors(
                CodeVectors(start.clone()), SpreadConfig(epochs=3, batch=300, lr=0.2), checkpoint=checkpoint
            )
        with pytest.raises(ValueError, match="checkpoint of another run"):
            spread_code_vectors(CodeVectors(start.flip(0)), SpreadConfig(epochs=3, batch=300), checkpoint=checkpoint)
        resumed = CodeVectors(start.clone())
        again = spread_code_vectors(resumed, SpreadConfig(epochs=3, batch=300), checkpoint=checkpoint)
        assert len(calls) == 6 + 4
        assert torch.equal(resumed.table, whole.table)
        assert again.gaps == report.gaps and again.before.gap == report.before.gap
        assert not checkpoint.exists()

    def test_errors(self):
        with pytest.raises(ValueError, match="at least 2 vectors"):
            spread_code_vectors(CodeVectors(torch.ones(1, 3)))
        with pytest.raises(ValueError, match="epochs=-1"):
            spread_code_vectors(CodeVectors(torch.randn(4, 3)), SpreadConfig(epochs=-1))
        with pytest.raises(ValueError, match="neighbors=3"):
            spread_code_vectors(CodeVectors(torch.randn(4, 3)), SpreadConfig(neighbors=3))
        with pytest.raises(ValueError, match="start must be one of"):
            spread_code_vectors(CodeVectors(torch.randn(4, 3)), SpreadConfig(start="middle"))  # type: ignore[arg-type]

    def test_picture(self, tmp_path):
        report = spread_code_vectors(CodeVectors(clustered(300, 16)), SpreadConfig(epochs=1, batch=100))
        plot_nearest_cosines(report.before, report.after, tmp_path / "p.png")
        plot_gaps(report, tmp_path / "g.png")
        for name in ("p.png", "g.png"):
            assert np.frombuffer((tmp_path / name).read_bytes()[:4], "S4")[0] == b"\x89PNG"

    def test_a_budget_of_time_ends_it(self):
        start = clustered(1000, 16)
        none = CodeVectors(start.clone())
        spread_code_vectors(none, SpreadConfig(epochs=5, batch=100, minutes=0.0))
        assert torch.equal(none.table, CodeVectors(start.clone()).table)
        report = spread_code_vectors(none, SpreadConfig(epochs=2, batch=100, minutes=60.0))
        assert len(report.gaps) == 2

    def test_report_as_json(self):
        report = spread_code_vectors(
            CodeVectors(clustered(300, 16)), SpreadConfig(epochs=2, batch=100, neighbor_epochs=1)
        )
        saved = json.loads(json.dumps(report.to_dict()))
        assert saved["gaps"] == report.gaps and len(saved["gaps"]) == 2
        assert saved["largest_cosine"]["before"] == pytest.approx(float(report.before.nearest.max()))
        assert saved["largest_cosine"]["after"] == pytest.approx(float(report.after.nearest.max()))
        assert saved["before"]["order_kept"] is None and saved["after"]["order_kept"] == report.after.order_kept
        assert len(saved["neighbor_cosines"]) == 1

    def test_near_duplicates_are_named(self):
        table = torch.randn(50, 16)
        table[1] = table[0] * (1 + 1e-3)
        report = spread_code_vectors(CodeVectors(table), SpreadConfig(epochs=0))
        assert "neighbor_epochs" in str(report) and report.largest_after == pytest.approx(1)
        assert "neighbor_epochs" not in str(
            spread_code_vectors(CodeVectors(torch.randn(50, 64)), SpreadConfig(epochs=1))
        )


class TestWithoutWaiting:
    """On an accelerator a step reads nothing that the host would wait for."""

    def test_repeated_rows_move_as_on_a_cpu(self, monkeypatch):
        table, labels, gradient = torch.randn(20, 8), torch.tensor([3, 5, 3, 0, 19, 5, 3]), torch.randn(7, 8)
        gradient[4, 2] = torch.nan
        expected, given = CodeVectors(table.clone()), CodeVectors(table.clone())
        assert expected.move_(labels, gradient, 0.1) == 1
        monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)
        assert given.move_(labels, gradient, 0.1) == 1
        assert torch.equal(given.table, expected.table)

    @pytest.mark.fake_cuda
    def test_no_value_is_read(self):
        codes = IdentityCodes(torch.tensor([[i // 5, i % 5] for i in range(20)]), 5)
        with FakeTensorMode(allow_non_fake_inputs=False) as fake:
            tables = (codes.table.numbers, codes.table.order, codes.table.starts)
            numbers, order, starts = (fake.from_tensor(each).to("cuda") for each in tables)
            codes.table = dataclasses.replace(codes.table, numbers=numbers, order=order, starts=starts)
            vectors = CodeVectors(torch.empty(20, 8, device="cuda", dtype=torch.bfloat16), normalized=True)
            labels = torch.empty(6, device="cuda", dtype=torch.int64)
            assert codes.lookup(labels).shape == (6, 2)
            assert codes.siblings(labels, 3).shape == (6, 3)
            assert vectors.lookup(labels).shape == (6, 8)
            seed = torch.empty((), device="cuda", dtype=torch.int64)
            stayed = vectors.move_(labels, torch.empty(6, 8, device="cuda"), 0.1, seed=seed)
            assert stayed.device.type == "cuda"
            with pytest.raises(DataDependentOutputException):
                stayed.item()
