"""Code vectors: the table, its quality, its spreading."""

import math

import numpy as np
import pytest
import torch
from scipy.special import hyp0f1

from gif import resume
from gif.vectors import CodeVectors, judge_vectors, spread_code_vectors, uniform_optimum
from gif.vectors import spread as spread_module
from gif.vectors.plots import plot_nearest_cosines


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

    def test_uniform_vectors_have_no_gap_and_clustered_ones_do(self):
        uniform = judge_vectors(torch.randn(4000, 64))
        assert abs(uniform.gap) < 0.002
        assert uniform.mean_norm < 0.05
        assert judge_vectors(clustered(4000, 64)).gap > 0.5

    def test_order_kept(self):
        table = torch.randn(500, 16)
        same = judge_vectors(table, table * 2)
        assert same.order_kept == 1 and same.neighbors_kept == 1
        other = judge_vectors(table, torch.randn(500, 16))
        assert other.order_kept == pytest.approx(0.5, abs=0.02)
        assert other.neighbors_kept < 0.05
        with pytest.raises(ValueError, match="reference must have 500 rows"):
            judge_vectors(table, table[:3])


class TestSpread:
    def test_three_epochs_close_most_of_the_gap(self):
        vectors = CodeVectors(clustered(3000, 64))
        report = spread_code_vectors(vectors, epochs=5, batch=500)
        assert report.before.gap > 0.5
        assert report.after.gap < 0.1 * report.before.gap
        assert len(report.gaps) == 5 and report.gaps == sorted(report.gaps, reverse=True)
        assert report.after.order_kept > 0.6
        torch.testing.assert_close(vectors.table.norm(dim=1), torch.ones(3000))
        assert report.after.gap == pytest.approx(judge_vectors(vectors.table).gap)

    def test_stops_at_the_target_gap(self):
        report = spread_code_vectors(CodeVectors(clustered(1000, 32)), epochs=50, batch=250, target_gap=0.3)
        assert report.gaps[-1] < 0.3 <= report.gaps[-2]

    def test_every_epoch_uses_each_row_once(self):
        steps = list(spread_module._subsets(103, 5, 10, seed=3, first=0))
        assert [step for step, _ in steps] == list(range(10))
        for epoch in (steps[:5], steps[5:]):
            assert torch.equal(torch.cat([rows for _, rows in epoch]).sort().values, torch.arange(103))
        resumed = list(spread_module._subsets(103, 5, 10, seed=3, first=7))
        assert all(torch.equal(a[1], b[1]) for a, b in zip(resumed, steps[7:], strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_killed_run_continues_to_the_same_result(self, tmp_path, monkeypatch, dtype):
        start = clustered(900, 16).to(dtype)
        whole = CodeVectors(start.clone())
        report = spread_code_vectors(whole, epochs=3, batch=300)

        step, calls = spread_module.uniformity_step_, []

        def killed(*args, **options):
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return step(*args, **options)

        monkeypatch.setattr(spread_module, "uniformity_step_", killed)
        monkeypatch.setattr(resume, "SECONDS", 0.0)
        monkeypatch.setattr(resume, "LARGEST_SHARE", 1e9)
        checkpoint = tmp_path / "spread.partial"
        with pytest.raises(KeyboardInterrupt):
            spread_code_vectors(CodeVectors(start.clone()), epochs=3, batch=300, checkpoint=checkpoint)
        assert checkpoint.exists()
        with pytest.raises(ValueError, match="checkpoint of another run"):
            spread_code_vectors(CodeVectors(start.clone()), epochs=3, batch=300, lr=0.2, checkpoint=checkpoint)
        with pytest.raises(ValueError, match="checkpoint of another run"):
            spread_code_vectors(CodeVectors(start.flip(0)), epochs=3, batch=300, checkpoint=checkpoint)
        resumed = CodeVectors(start.clone())
        again = spread_code_vectors(resumed, epochs=3, batch=300, checkpoint=checkpoint)
        assert len(calls) == 6 + 4
        assert torch.equal(resumed.table, whole.table)
        assert again.gaps == report.gaps and again.before.gap == report.before.gap
        assert not checkpoint.exists()

    def test_errors(self):
        with pytest.raises(ValueError, match="at least 2 vectors"):
            spread_code_vectors(CodeVectors(torch.ones(1, 3)))
        with pytest.raises(ValueError, match="epochs=0"):
            spread_code_vectors(CodeVectors(torch.randn(4, 3)), epochs=0)

    def test_picture(self, tmp_path):
        report = spread_code_vectors(CodeVectors(clustered(300, 16)), epochs=1, batch=100)
        plot_nearest_cosines(report.before, report.after, tmp_path / "p.png")
        assert np.frombuffer((tmp_path / "p.png").read_bytes()[:4], "S4")[0] == b"\x89PNG"
