from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import AngularMargin, code_contrast_loss
from gif_kernels.autograd import with_row_gradients


@dataclass(frozen=True)
class Case:
    """Random inputs of one shape: a batch, and candidates of which some stand twice."""

    batch: int
    count: int
    width: int

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return torch.randn(self.batch, self.width, dtype=dtype), torch.randn(self.count, self.width, dtype=dtype)

    def candidates(self) -> Tensor:
        """Identities in no order, far apart; a third of the rows repeat another's."""
        identities = torch.randint(10**15, (self.count,))
        repeats = torch.arange(2, self.count, 3)
        identities[repeats] = identities[torch.randint(self.count, repeats.shape)]
        return identities

    def labels(self, candidates: Tensor) -> Tensor:
        """A candidate for each row; every third is ignored."""
        labels = candidates[torch.randint(self.count, (self.batch,))]
        labels[1::3] = -1
        return labels


# widths >= 5: on a circle or a line random cosines come so near to +-1 that rounding, not the code, decides the slope
CASES = {
    "one against one": Case(1, 2, 5),
    "primes": Case(7, 11, 13),
    "more rows than candidates": Case(31, 5, 16),
    "more candidates than rows": Case(3, 64, 32),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def loss_of(labels: Tensor, **options):
    return lambda z, h: code_contrast_loss(z, h, labels, **options)


def in_numpy(psi, z: Tensor, h: Tensor, labels: Tensor, candidates: Tensor, margin: AngularMargin, scale: float):
    """METHOD's formula over a dictionary of identities, a row at a time."""
    first: dict[int, np.ndarray] = {}
    for identity, row in zip(candidates.tolist(), h.numpy(), strict=True):
        first.setdefault(identity, row / np.linalg.norm(row))
    losses = np.zeros(len(z))
    for i, label in enumerate(labels.tolist()):
        if label < 0:
            continue
        unit = z[i].numpy() / np.linalg.norm(z[i].numpy())
        logit = {k: scale * (psi(unit @ row, margin) if k == label else unit @ row) for k, row in first.items()}
        top = max(logit.values())
        losses[i] = np.log(sum(np.exp(x - top) for x in logit.values())) + top - logit[label]
    return losses


@every_case
def test_value_against_the_formula(case, impl, margin, psi):
    (z, h), candidates = case.tensors(), case.candidates()
    labels = case.labels(candidates)
    expected = in_numpy(psi, z, h, labels, candidates, margin, 64.0)
    options = {"candidates": candidates, "margin": margin, "reduction": "none", "impl": impl}
    np.testing.assert_allclose(code_contrast_loss(z, h, labels, **options).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_gradient_against_finite_differences(impl, true_margin):
    case = Case(4, 5, 6)
    candidates = case.candidates()
    options = {"candidates": candidates, "margin": true_margin, "scale": 4.0, "reduction": "none", "impl": impl}
    loss = loss_of(case.labels(candidates), **options)
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in case.tensors()], fast_mode=True)


@every_case
def test_values_and_gradients(case, impl, dtype, margin, differentiate, agree):
    tensors, candidates = case.tensors(dtype), case.candidates()
    labels = case.labels(candidates)
    options = {"candidates": candidates, "margin": margin, "reduction": "none"}
    truth = differentiate(loss_of(labels, impl="reference", **options), *(x.double() for x in tensors))
    given = differentiate(loss_of(labels, impl=impl, **options), *tensors)
    for a, b in zip(given, truth, strict=True):
        agree(a, b)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cosines_of_exactly_one(impl, dtype, margin, sign, differentiate, agree):
    labels = torch.tensor([2, 0, 1])
    h = torch.randn(4, 8, dtype=dtype)
    z = 2 * sign * h[labels]
    options = {"margin": margin, "reduction": "sum"}
    truth = differentiate(loss_of(labels, impl="reference", **options), z.double(), h.double())
    given = differentiate(loss_of(labels, impl=impl, **options), z, h)
    # the margin's slope, some hundreds there, multiplies a tangent that is zero but for rounding
    noise = 4 * torch.finfo(dtype).eps * 64 * margin.value_and_slope(torch.tensor(sign))[1].item()
    for a, b in zip(given, truth, strict=True):
        assert a.isfinite().all()
        agree(a, b, noise=noise)


@pytest.mark.parametrize("autocast", [False, True], ids=["inputs", "autocast"])
def test_low_precision(impl, low_dtype, autocast, differentiate, no_worse_than_pytorch):
    tensors, labels = Case(64, 96, 48).tensors(torch.float32 if autocast else low_dtype), torch.randint(96, (64,))

    def plain(z: Tensor, h: Tensor) -> Tensor:
        cosine = F.normalize(z) @ F.normalize(h).T
        own = F.one_hot(labels, 96).bool()
        return F.cross_entropy(64.0 * torch.where(own, cosine - 0.35, cosine), labels, reduction="none")

    options = {"margin": AngularMargin(m2=0.0, m3=0.35), "reduction": "none"}
    truth = differentiate(loss_of(labels, impl="reference", **options), *(x.double() for x in tensors))
    with torch.autocast("cpu", low_dtype, enabled=autocast):
        given, naive = differentiate(loss_of(labels, impl=impl, **options), *tensors), differentiate(plain, *tensors)
    for a, b, c in zip(given, naive, truth, strict=True):
        no_worse_than_pytorch(a, b, c)


def test_dtypes_may_differ(impl, differentiate, agree):
    """bfloat16 embeddings out of autocast against float32 vectors: each gradient in its own dtype."""
    (z, h), labels = Case(6, 5, 8).tensors(torch.float32), torch.tensor([0, 4, 2, 2, -1, 1])
    truth = differentiate(loss_of(labels, impl="reference"), z.bfloat16().double(), h.double())
    given = differentiate(loss_of(labels, impl=impl), z.bfloat16(), h)
    assert [x.dtype for x in given] == [torch.float32, torch.bfloat16, torch.float32]
    agree(given[0], truth[0])
    agree(given[2], truth[2])
    torch.testing.assert_close(given[1].double(), truth[1], rtol=2**-8, atol=1e-5)  # rounded once to 8 bits


def test_without_candidates_rows_are_numbered(impl, differentiate):
    (z, h), labels = Case(5, 4, 6).tensors(), torch.tensor([3, 0, -1, 2, 2])
    given = differentiate(loss_of(labels, impl=impl), z, h)
    named = differentiate(loss_of(labels, candidates=torch.arange(4), impl=impl), z, h)
    assert all(torch.equal(a, b) for a, b in zip(given, named, strict=True))


def test_an_identity_that_stands_twice_counts_once_by_its_first_row(impl, differentiate):
    z, h = Case(3, 5, 6).tensors()
    candidates = torch.tensor([7, 3, 7, 9, 3])
    labels = torch.tensor([3, 7, 9])
    loss, z_gradient, h_gradient = differentiate(loss_of(labels, candidates=candidates, impl=impl), z, h)
    first = [0, 1, 3]
    expected = differentiate(loss_of(labels, candidates=candidates[first], impl=impl), z, h[first])
    torch.testing.assert_close([loss, z_gradient, h_gradient[first]], expected)
    assert (h_gradient[[2, 4]] == 0).all()


def test_the_order_of_candidates_does_not_matter(impl):
    case = CASES["primes"]
    z, h = case.tensors()
    candidates = torch.randperm(case.count)
    labels = case.labels(candidates)
    order = torch.randperm(case.count)
    given = code_contrast_loss(z, h[order], labels, candidates=candidates[order], impl=impl)
    torch.testing.assert_close(given, code_contrast_loss(z, h, labels, candidates=candidates, impl=impl))


def test_reductions(impl):
    (z, h), labels = Case(6, 5, 8).tensors(), torch.tensor([0, 4, -1, 2, -1, 1])
    rows = code_contrast_loss(z, h, labels, reduction="none", impl=impl)
    assert (rows[[2, 4]] == 0).all()
    torch.testing.assert_close(code_contrast_loss(z, h, labels, reduction="sum", impl=impl), rows.sum())
    torch.testing.assert_close(code_contrast_loss(z, h, labels, impl=impl), rows.sum() / 4)


def test_ignored_rows_are_as_if_they_were_not_there(impl, differentiate):
    (z, h), labels = Case(6, 5, 8).tensors(), torch.tensor([0, 4, -1, 2, -1, 1])
    kept = labels >= 0
    loss, z_gradient, h_gradient = differentiate(loss_of(labels, impl=impl), z, h)
    expected = differentiate(loss_of(labels[kept], impl=impl), z[kept], h)
    torch.testing.assert_close([loss, z_gradient[kept], h_gradient], expected)
    assert (z_gradient[~kept] == 0).all()


@pytest.mark.parametrize("rows", [0, 3], ids=["empty batch", "all ignored"])
@pytest.mark.parametrize("candidates", [None, torch.tensor([8, 3, 5, 8])], ids=["numbered", "named"])
def test_nothing_to_learn_from(rows, candidates, impl, differentiate):
    z, h = Case(rows, 4, 6).tensors()
    labels = torch.full((rows,), -1)
    for found in differentiate(loss_of(labels, candidates=candidates, impl=impl), z, h):
        assert (found == 0).all()


@pytest.mark.parametrize("zeroed", [0, 1])
def test_rows_of_zeros_have_no_direction_and_get_no_gradient(zeroed, impl, dtype, differentiate):
    tensors = Case(3, 4, 6).tensors(dtype)
    tensors[zeroed][1] = 0
    found = differentiate(loss_of(torch.tensor([1, 3, 1]), impl=impl), *tensors)
    assert all(x.isfinite().all() for x in found)
    assert (found[1 + zeroed][1] == 0).all()


def test_one_candidate_costs_nothing(impl, differentiate):
    for found in differentiate(loss_of(torch.zeros(3, dtype=torch.int64), impl=impl), *Case(3, 1, 6).tensors()):
        assert found.abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("impl", "options"),
    [
        ("blocked", {}),
        ("blocked", {"candidates": torch.tensor([5, 3, 5, 9])}),
        ("blocked", {"margin": AngularMargin(m2=0.0, m3=0.3), "reduction": "none"}),
        (
            "blocked",
            {"margin": AngularMargin(1.2, 0.4, gradient="straight_through"), "reduction": "sum", "scale": 30.0},
        ),
        ("reference", {"candidates": torch.tensor([5, 3, 5, 9])}),
    ],
    ids=["default", "candidates", "CosFace rows", "straight-through sum", "reference"],
)
def test_compiled_equals_eager(impl, options, compiles):
    labels = torch.tensor([3, 9, -1, 5]) if "candidates" in options else torch.tensor([3, 0, -1, 1])
    compiles(loss_of(labels, impl=impl, **options), *Case(4, 4, 6).tensors(torch.float32))


def test_compiled_takes_other_batches_candidates_and_scales(compiled, agree):
    loss = compiled(code_contrast_loss)
    for batch, count, scale in ((7, 11, 64.0), (5, 9, 32.0), (1, 4, 16.0)):
        case = Case(batch, count, 6)
        (z, h), candidates = case.tensors(torch.float32), case.candidates()
        labels = case.labels(candidates)
        given = loss(z, h, labels, candidates=candidates, scale=scale)
        agree(given, code_contrast_loss(z, h, labels, candidates=candidates, scale=scale))


def test_row_gradients_that_are_known():
    """A graph that was differentiated where it was made is not differentiated again."""
    z, weights = torch.randn(5, 3, requires_grad=True), torch.rand(5)
    known = with_row_gradients(z.detach().square().sum(1), z, 2 * z.detach())
    torch.testing.assert_close(torch.autograd.grad(known @ weights, z)[0], 2 * z.detach() * weights[:, None])
    known = with_row_gradients(z.detach().square().sum(1), z, 2 * z.detach())
    (gradient,) = torch.autograd.grad(known.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
