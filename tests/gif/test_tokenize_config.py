"""The settings of tokenising: whatever changes the codes makes the run another one."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from benchmarks.clusters import clustered
from gif.codes import TokenizeConfig, tokenize

BASE = TokenizeConfig(vocab_size=5)
OTHER: dict[str, Any] = {
    "vocab_size": 6,
    "length": 5,
    "slack": 3.0,
    "iterations": 1,
    "capacity_factor": 1.0,
    "alignment": "none",
    "centroid_levels": 1,
    "seed": 1,
}
"""Another value of each field, which changes the codes if any does."""


@pytest.mark.parametrize("name", [field.name for field in fields(TokenizeConfig)])
def test_a_run_with_other_codes_is_another_run(name, tmp_path):
    vectors, other = clustered(300, 16), replace(BASE, **{name: OTHER[name]})
    codes, other_codes = tokenize(vectors, BASE), tokenize(vectors, other)
    differs = not torch.equal(codes.codes, other_codes.codes)
    assert differs == (name != "centroid_levels")
    tokenize(vectors, BASE, checkpoint=tmp_path / "c.partial", keep_checkpoint=True)
    if differs:
        with pytest.raises(ValueError, match="checkpoint of another run"):
            tokenize(vectors, other, checkpoint=tmp_path / "c.partial")
    else:  # the checkpoint holds the tree; how much of it stays with the codes is decided when they are made
        continued = tokenize(vectors, other, checkpoint=tmp_path / "c.partial")
        assert torch.equal(continued.codes, codes.codes) and len(continued.centroids) == 1


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"vocab_size": 1}, r"vocab_size must be an integer in \[2, 256\], got 1"),
        ({"alignment": "other"}, "alignment must be one of 'none', 'residual', got 'other'"),
        ({"capacity_factor": 0.5}, "wanted capacity_factor >= 1"),
        ({"iterations": -1}, "iterations >= 0"),
    ],
)
def test_a_value_out_of_range_is_refused_before_work(field, message):
    with pytest.raises(ValueError, match=message):
        TokenizeConfig(**field)
