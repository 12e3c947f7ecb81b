"""The settings of spreading: whatever changes the result makes the run another one."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from gif.vectors import CodeVectors, SpreadConfig, spread_code_vectors

BASE = SpreadConfig(epochs=2, batch=100, neighbor_epochs=1, neighbors=16)
OTHER: dict[str, Any] = {
    "epochs": 3,
    "batch": 60,
    "lr": 0.2,
    "t": 3.0,
    "start": "center",
    "neighbor_epochs": 2,
    "neighbors": 8,
    "target_gap": 10.0,
    "minutes": 60.0,
    "seed": 1,
}
"""Another value of each field, which changes the result if any does."""


def spread(config, **options):
    vectors = CodeVectors(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) + 1)
    report = spread_code_vectors(vectors, config, **options)
    return vectors.table, report


@pytest.mark.parametrize("name", [field.name for field in fields(SpreadConfig)])
def test_a_run_with_another_result_is_another_run(name, tmp_path):
    other = replace(BASE, **{name: OTHER[name]})
    (table, report), (other_table, other_report) = spread(BASE), spread(other)
    differs = not torch.equal(table, other_table) or report.to_dict() != other_report.to_dict()
    assert differs == (name != "minutes")
    assert differs == (other.settings() != BASE.settings())
    spread(BASE, checkpoint=tmp_path / "s.partial", keep_checkpoint=True)
    if differs:
        with pytest.raises(ValueError, match=f"checkpoint of another run .*{name}"):
            spread(other, checkpoint=tmp_path / "s.partial")
    else:
        assert torch.equal(spread(other, checkpoint=tmp_path / "s.partial")[0], table)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"start": "middle"}, "start must be one of 'none', 'center', 'whiten', got 'middle'"),
        ({"lr": 0.0}, "lr must be a finite number > 0"),
        ({"t": float("nan")}, "t must be a finite number > 0"),
        ({"epochs": -1}, "wanted epochs >= 0, .* got epochs=-1"),
        ({"batch": 1}, "got .*batch=1"),
    ],
)
def test_a_value_out_of_range_is_refused_before_work(field, message):
    with pytest.raises(ValueError, match=message):
        SpreadConfig(**field)
