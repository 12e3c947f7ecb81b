"""Scores by the number of images an identity has."""

import pytest
import torch
import torch.nn.functional as F

from gif.evaluation import groups_by_images, judge_group, spread_of_centers


def labels_of(sizes):
    """Shuffled labels, sizes[i] of identity i."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def test_groups_are_equally_many_identities_of_the_right_sizes():
    sizes = [2] * 30 + [3] * 30 + [5] * 50 + [9] * 10 + [20] * 25
    labels = labels_of(sizes)
    groups = groups_by_images(labels)
    assert [group.name for group in groups] == ["2-3 images", "4-7 images", "16+ images"]  # ten of 8-15 are too few
    counts = labels.bincount()
    for group in groups:
        assert len(group.identities) == len(group.identities.unique()) == 25
        assert counts[group.identities].min() >= group.low
        assert group.high is None or counts[group.identities].max() <= group.high
    assert [len(group.identities) for group in groups_by_images(labels, identities=21)] == [21] * 3
    assert groups_by_images(labels, edges=(5, 6))[0].name == "5 images"
    repeated = groups_by_images(labels)
    assert all(torch.equal(a.identities, b.identities) for a, b in zip(groups, repeated, strict=True))
    assert groups_by_images(labels_of([2] * 19)) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_group_is_judged_on_two_images_of_each_identity(seed):
    labels = labels_of([2] * 40 + [17] * 40)
    embeddings = F.one_hot(labels, 80).float()
    for identity in range(40, 80):  # the frequent ones are noise
        rows = (labels == identity).nonzero().flatten()
        embeddings[rows] = torch.randn(len(rows), 80, generator=torch.Generator().manual_seed(identity))
    rare, frequent = groups_by_images(labels)
    assert judge_group(embeddings, labels, rare, seed=seed) == {"rank1": 1.0, "tar": 1.0}
    score = judge_group(embeddings, labels, frequent, seed=seed)
    assert score["rank1"] < 0.2 and score["tar"] < 0.2


def test_every_draw_has_exactly_two_images(monkeypatch):
    from gif.evaluation import rarity

    seen = []
    monkeypatch.setattr(rarity, "rank1", lambda vectors, labels: seen.append(labels) or 0.5)
    labels = labels_of([2] * 20 + [7] * 20)
    embeddings = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0))
    for group in groups_by_images(labels):
        judge_group(embeddings, labels, group)
        for draw in seen:
            identities, counts = draw.unique(return_counts=True)
            assert torch.equal(identities, group.identities) and (counts == 2).all()
        assert len(seen) == rarity.DRAWS
        seen.clear()


def test_spread_of_centers():
    labels = labels_of([2] * 20 + [5] * 20)
    centers = torch.cat([torch.ones(20, 40) + 0.1 * torch.eye(20, 40), 3 * torch.eye(20, 40)])
    rare, frequent = (spread_of_centers(centers, group) for group in groups_by_images(labels))
    assert frequent == {"mean_cosine": pytest.approx(0, abs=1e-7), "nearest_cosine": pytest.approx(0, abs=1e-7)}
    cosine = F.cosine_similarity(centers[0], centers[1], dim=0).item()
    assert rare == {"mean_cosine": pytest.approx(cosine, abs=1e-6), "nearest_cosine": pytest.approx(cosine, abs=1e-6)}
