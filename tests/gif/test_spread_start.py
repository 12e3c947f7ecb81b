"""Closed forms before the first step: centring and whitening, in blocks, against float64."""

import pytest
import torch

from gif.vectors import CodeVectors, SpreadConfig, closed_form, judge_vectors, spread_code_vectors


def clustered(m, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(max(m // 20, 1), d, generator=generator) + 1
    rows = centers[torch.randint(len(centers), (m,), generator=generator)]
    return torch.nn.functional.normalize(rows + 0.3 * torch.randn(m, d, generator=generator), dim=1)


def exact(table, start):
    rows = table.double()
    centered = rows - rows.mean(0)
    if start == "whiten":
        covariance = centered.T @ centered / len(rows)
        ridge = closed_form.RIDGE * covariance.trace() / len(covariance)
        values, axes = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance)))
        centered = centered @ (axes / values.sqrt() @ axes.T)
    return torch.nn.functional.normalize(centered, dim=1)


@pytest.mark.parametrize("start", ["center", "whiten"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_against_float64(monkeypatch, start, dtype, tolerance):
    monkeypatch.setattr(closed_form, "ROWS_A_BLOCK", 64)
    table = clustered(517, 24).to(dtype)
    wanted = exact(table, start)
    spread_code_vectors(CodeVectors(table, normalized=True), SpreadConfig(epochs=0, start=start))
    # float32: a row near the mean loses digits in the subtraction; bfloat16: half a unit in the last place
    torch.testing.assert_close(table.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("start", "share"), [("center", 0.25), ("whiten", 0.15)])
def test_closes_most_of_the_gap_before_the_first_step(start, share):
    vectors = CodeVectors(clustered(2000, 64))
    before = judge_vectors(vectors.table).gap
    report = spread_code_vectors(vectors, SpreadConfig(epochs=0, start=start))
    assert report.gaps == [] and report.after.gap < share * before
    assert report.after.mean_norm < 0.1 < report.before.mean_norm


@pytest.mark.parametrize("start", ["center", "whiten"])
def test_rows_without_a_direction_of_their_own_stay(start):
    table = torch.zeros(4, 3)
    table[:, 0] = 1
    spread_code_vectors(CodeVectors(table), SpreadConfig(epochs=0, start=start))
    assert torch.equal(table, torch.tensor([[1.0, 0, 0]]).expand(4, 3))
