"""The layer-peeled model: its exact optimum, the threshold of minority collapse, and descents on it."""

import math

import pytest
import torch

from gif.experiments.paper.layer_peeled import (
    HEADS,
    Descent,
    LayerPeeled,
    _log_loss,
    minority_cosine,
    solve,
    threshold,
)

SMALL = LayerPeeled(majority=3, minority=4, bound=2.0, width=8)


@pytest.mark.parametrize("model", [LayerPeeled(), SMALL], ids=["ten and ten", "three and four"])
def test_balanced_classes_are_a_simplex(model):
    assert solve(model, 1.0).cosine == pytest.approx(-1 / (model.classes - 1), abs=1e-4)


def test_the_exact_optimum_is_that_of_descent():
    ratios = (1.0, 3.0, 8.0, 40.0)
    centers = Descent(SMALL, ratios, seed=0, steps=1500).centers("full softmax")
    found = minority_cosine(centers, SMALL).tolist()
    assert found == pytest.approx([solve(SMALL, ratio).cosine for ratio in ratios], abs=5e-3)


def test_at_the_threshold_minority_centres_become_one():
    limit = threshold(SMALL)
    assert 1 < limit < 1000
    assert solve(SMALL, 0.9 * limit).cosine < 0.99 and solve(SMALL, 1.1 * limit).cosine == pytest.approx(1, abs=1e-3)
    looser = LayerPeeled(SMALL.majority, SMALL.minority, 2.5, SMALL.width)
    assert threshold(looser) > limit
    assert threshold(LayerPeeled(SMALL.majority, SMALL.minority, 30.0, SMALL.width)) == math.inf


def test_heads():
    descent = Descent(SMALL, (1.0, 100.0), seed=1, steps=150)
    full, sampled, fixed, live, shipped = (minority_cosine(descent.centers(head), SMALL).tolist() for head in HEADS)
    assert fixed[0] == fixed[1] == pytest.approx(-1 / (SMALL.classes - 1), abs=0.02)  # they know nothing of images
    for moving in (full, sampled, live, shipped):
        assert moving[1] > moving[0] + 0.1
    assert shipped[1] < live[1]
    again = minority_cosine(descent.centers("full softmax"), SMALL).tolist()
    assert again == full


def test_minority_cosine():
    centers = torch.zeros(2, SMALL.classes, SMALL.width)
    centers[0, SMALL.majority :] = torch.eye(4, 8)
    centers[1, SMALL.majority :] = torch.ones(8) * torch.tensor([1.0, 2, 3, 4])[:, None]
    assert minority_cosine(centers, SMALL).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("wrong", [{"majority": 1}, {"bound": 0.0}, {"width": 19}])
def test_wrong_models(wrong):
    with pytest.raises(ValueError, match="wanted at least 2 majority"):
        LayerPeeled(**wrong)


def test_a_search_that_comes_far_from_the_optimum_does_not_overflow():
    """-log p of odds (1 - p) / p that no float holds is their logarithm."""
    for odds in (-50.0, -3.0, 0.0, 600.0):
        assert _log_loss(odds) == pytest.approx(math.log(math.log1p(math.exp(odds))), rel=1e-9)
    assert _log_loss(5000.0) == pytest.approx(math.log(5000.0))
