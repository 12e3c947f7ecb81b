"""Pull and push at each centre, against autograd in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gif import MarginSoftmax, PartialFC
from gif.losses import pull_and_push
from gif_kernels import AngularMargin

B, C, D, SCALE = 23, 11, 7, 12.0
MARGINS = {
    "none": AngularMargin(m2=0.0),
    "cosface": AngularMargin(m2=0.0, m3=0.3),
    "arcface": AngularMargin(m2=0.5),
    "sphereface": AngularMargin(m1=1.7, m2=0.0),
    "straight through": AngularMargin(m2=0.5, gradient="straight_through"),
}
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # float64 through a softmax


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(B, D, generator=generator, dtype=torch.float64)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(C - 1, (B,), generator=generator)  # the last class has no image: it is only pushed
    labels[3] = -1
    return z, w, labels


def by_paths(logits_of, w, labels):
    """Minus the gradient of the summed cross entropy at w: through own logits alone, and through the others'."""
    w = w.clone().requires_grad_()
    found = []
    for through_own in (True, False):
        logits = logits_of(w)
        own = torch.zeros_like(logits, dtype=torch.bool)
        own[labels >= 0, labels[labels >= 0]] = True
        chosen = torch.where(own == through_own, logits, logits.detach())
        loss = F.cross_entropy(chosen, labels, ignore_index=-1, reduction="sum")
        found.append(-torch.autograd.grad(loss, w)[0])
    return found


def margin_logits(z, w, labels, margin):
    cosine = F.normalize(z) @ F.normalize(w).T
    own = F.one_hot(labels.clamp(min=0), len(w)).bool()
    return SCALE * torch.where(own, margin(cosine), cosine)


def test_plain_softmax(batch):
    z, w, labels = batch
    bias = torch.linspace(-1, 1, C, dtype=torch.float64)
    forces = pull_and_push(z @ w.T + bias, z, labels.to(torch.int8))
    for force, expected in zip(forces, by_paths(lambda w: z @ w.T + bias, w, labels), strict=True):
        torch.testing.assert_close(force, expected, **EXACT)
    assert not forces.pull[-1].any() and forces.push[-1].norm() > 0
    p = (z @ w.T + bias).softmax(1)
    mine = labels == 4
    torch.testing.assert_close(forces.pull[4], ((1 - p[mine, 4])[:, None] * z[mine]).sum(0), **EXACT)  # Eq. 12
    others = (labels != 4) & (labels >= 0)
    torch.testing.assert_close(forces.push[4], -(p[others, 4][:, None] * z[others]).sum(0), **EXACT)


@pytest.mark.parametrize("name", MARGINS)
def test_margin_softmax(batch, name):
    z, w, labels = batch
    margin = MARGINS[name]
    forces = pull_and_push(margin_logits(z, w, labels, margin), z, labels, centers=w, margin=margin, scale=SCALE)
    expected = by_paths(lambda w: margin_logits(z, w, labels, margin), w, labels)
    for force, wanted in zip(forces, expected, strict=True):
        torch.testing.assert_close(force, wanted, **EXACT)
        assert (force * w).sum(1).abs().max() < 1e-12  # at a right angle: a direction alone counts


def test_a_sample_of_the_classes(batch):
    z, w, labels = batch
    labels = torch.where(labels >= 0, 3 * labels + 5, -1)  # classes have other numbers than columns
    candidates = torch.cat([3 * torch.arange(C) + 5, torch.tensor([1, 100])])[torch.randperm(C + 2)]
    w = torch.randn(C + 2, D, dtype=torch.float64)
    columns = torch.tensor([-1 if y < 0 else int((candidates == y).nonzero()) for y in labels])
    forces = pull_and_push(z @ w.T, z, labels, candidates=candidates)
    for force, expected in zip(forces, by_paths(lambda w: z @ w.T, w, columns), strict=True):
        torch.testing.assert_close(force, expected, **EXACT)


def test_the_gradients_of_the_heads(batch):
    z, w, labels = batch
    counted = int((labels >= 0).sum())
    margin = AngularMargin(m2=0.0, m3=0.2)
    full = MarginSoftmax(C, D, margin=margin, scale=SCALE, centers=w).double()
    full(z, labels).backward()
    logits = margin_logits(z, full.weight.detach(), labels, margin)
    forces = pull_and_push(logits, z, labels, centers=full.weight, margin=margin, scale=SCALE)
    torch.testing.assert_close(-full.weight.grad * counted, sum(forces), **EXACT)

    sampled = PartialFC(C, D, samples=3, margin=margin, scale=SCALE, weight_decay=0.0).double()
    classes, weight = sampled.sample(labels), sampled.weight.clone()
    sampled(z.requires_grad_(), labels).backward()
    places = torch.searchsorted(classes, labels)
    logits = margin_logits(z.detach(), weight[classes], torch.where(labels < 0, -1, places), margin)
    forces = pull_and_push(
        logits, z.detach(), labels, candidates=classes, centers=weight[classes], margin=margin, scale=SCALE
    )
    torch.testing.assert_close(-sampled.momentum[classes] * counted, sum(forces), **EXACT)


def test_what_is_nearly_certain_still_pulls():
    z = torch.ones(1, 2)
    forces = pull_and_push(torch.tensor([[30.0, 0.0]]), z, torch.tensor([0]))
    assert forces.pull[0, 0] == pytest.approx(torch.tensor(-30.0).exp().item(), rel=1e-5)  # 1 - p is 0 in float32
    torch.testing.assert_close(forces.pull[0], -forces.push[1])


def test_a_centre_of_zeros_and_an_empty_batch():
    z, w = torch.randn(4, 3), torch.zeros(2, 3)
    forces = pull_and_push(torch.zeros(4, 2), z, torch.tensor([0, 1, 1, 0]), centers=w, scale=2.0)
    assert not forces.pull.any() and not forces.push.any()
    forces = pull_and_push(torch.zeros(0, 2), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert forces.pull.shape == forces.push.shape == (2, 3) and not forces.pull.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, r"labels must lie in \[-1, 3\)"),
        ({"labels": torch.tensor([0, 1])}, r"labels must have shape \(3\)"),
        ({"logits": torch.full((3, 3), torch.nan)}, "logits hold NaN"),
        ({"embeddings": torch.zeros(2, 4)}, r"embeddings must have shape \(3, d\)"),
        ({"scale": 2.0}, "give its centers too"),
        ({"centers": torch.zeros(3, 5)}, r"centers must have shape \(3, 4\)"),
        ({"candidates": torch.tensor([0, 1, 1])}, "name a class twice"),
        ({"candidates": torch.tensor([0, 1, 9])}, "label 2 is none of the 3 candidates"),
        ({"centers": torch.ones(3, 4), "scale": 0.0}, "scale must be a finite number > 0"),
    ],
)
def test_errors(change, message):
    given = {"logits": torch.zeros(3, 3), "embeddings": torch.zeros(3, 4), "labels": torch.arange(3), **change}
    with pytest.raises(ValueError, match=message):
        pull_and_push(**given)
