from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import AngularMargin, CodeRegression, code_regression_loss, precision, token_margin_loss


@dataclass(frozen=True)
class Case:
    """Random inputs of one shape; ``inner`` is d' where there are projections."""

    batch: int
    length: int
    vocab: int
    width: int
    inner: int | None = None

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """embeddings, centers and, where there are any, projections."""
        z = torch.randn(self.batch, self.width, dtype=dtype)
        w = torch.randn(self.length, self.vocab, self.inner or self.width, dtype=dtype)
        if self.inner is None:
            return z, w
        return z, w, torch.randn(self.length, self.inner, self.width, dtype=dtype)

    def codes(self) -> Tensor:
        """Random codes; every third row is ignored."""
        codes = torch.randint(self.vocab, (self.batch, self.length))
        codes[1::3] = -1
        return codes

    def weights(self) -> Tensor:
        return torch.rand(self.length).softmax(0)


# widths >= 5: on a circle or a line random cosines come so near to +-1 that rounding, not the code, decides the slope
CASES = {
    "one of each": Case(1, 1, 2, 5),
    "primes": Case(7, 3, 5, 11),
    "paper's vocabulary": Case(13, 5, 20, 32),
    "wider projection": Case(5, 2, 3, 7, 13),
    "narrower projection": Case(17, 6, 16, 24, 7),
    "one row projected": Case(1, 1, 2, 5, 5),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def loss_of(codes: Tensor, **options):
    """token_margin_loss of (embeddings, centers) or (embeddings, centers, projections)."""

    def loss(z: Tensor, w: Tensor, p: Tensor | None = None) -> Tensor:
        return token_margin_loss(z, w, codes, projections=p, **options)

    return loss


def in_numpy(psi, codes: Tensor, margin: AngularMargin, scale: float, weights: Tensor, *tensors: Tensor) -> np.ndarray:
    """METHOD's formula, a row and a token at a time."""
    z, w, *rest = (x.numpy() for x in tensors)
    losses = np.zeros(len(z))
    for i, code in enumerate(codes.tolist()):
        for j, own in enumerate(code):
            if own < 0:
                continue
            unit = z[i] / np.linalg.norm(z[i])
            if rest:
                unit = rest[0][j] @ unit
                unit = unit / np.linalg.norm(unit)
            cosine = np.array([unit @ w[j, k] / np.linalg.norm(w[j, k]) for k in range(w.shape[1])])
            logit = scale * cosine
            logit[own] = scale * psi(cosine[own], margin)
            losses[i] += weights[j].item() * (np.log(np.exp(logit - logit.max()).sum()) + logit.max() - logit[own])
    return losses


# ---- the specification


@every_case
def test_value_against_the_formula(case, impl, margin, psi):
    tensors, codes, weights = case.tensors(), case.codes(), case.weights().double()
    expected = in_numpy(psi, codes, margin, 64.0, weights, *tensors)
    given = loss_of(codes, margin=margin, token_weights=weights, reduction="none", impl=impl)(*tensors)
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert (given[codes[:, 0] < 0] == 0).all()


@pytest.mark.parametrize("case", [Case(4, 2, 3, 5), Case(4, 2, 3, 6, 5)], ids=["plain", "projected"])
def test_gradient_against_finite_differences(case, impl, true_margin):
    loss = loss_of(
        case.codes(), margin=true_margin, scale=4.0, token_weights=case.weights(), reduction="none", impl=impl
    )
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in case.tensors()], fast_mode=True)


def test_straight_through_gradient_is_that_of_its_definition(impl, psi, differentiate, agree):
    """dloss/dcosine = scale (softmax - own), with the softmax of the logits that bear the margin."""
    case, margin, scale = Case(6, 1, 4, 7), AngularMargin(m1=1.2, m2=0.4, m3=0.1, gradient="straight_through"), 8.0
    z, w = case.tensors()
    codes = torch.randint(4, (6, 1))
    own = F.one_hot(codes[:, 0], 4).double()

    z.requires_grad_(), w.requires_grad_()
    cosine = F.normalize(z) @ F.normalize(w[0]).T
    bent = torch.from_numpy(psi(cosine.detach().numpy(), margin))
    probability = (scale * torch.where(own.bool(), bent, cosine.detach())).softmax(1)
    expected = torch.autograd.grad(cosine, (z, w), scale * (probability - own))

    loss = loss_of(codes, margin=margin, scale=scale, reduction="sum", impl=impl)
    for given, truth in zip(differentiate(loss, z.detach(), w.detach())[1:], expected, strict=True):
        agree(given, truth)


# ---- both implementations against float64


@every_case
def test_values_and_gradients(case, impl, dtype, margin, differentiate, agree):
    tensors, codes = case.tensors(dtype), case.codes()
    options = {"margin": margin, "token_weights": case.weights(), "reduction": "none"}
    truth = differentiate(loss_of(codes, impl="reference", **options), *(x.double() for x in tensors))
    given = differentiate(loss_of(codes, impl=impl, **options), *tensors)
    for a, b in zip(given, truth, strict=True):
        agree(a, b)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("projected", [False, True])
def test_cosines_of_exactly_one(impl, dtype, margin, sign, projected, differentiate, agree):
    """Each row lies along, or against, the centre it should find."""
    codes = torch.tensor([[0], [2], [1]])
    w = torch.randn(1, 3, 8, dtype=dtype)
    z = 2 * sign * w[0, codes[:, 0]]
    tensors = (z, w, torch.eye(8, dtype=dtype)[None]) if projected else (z, w)
    options = {"margin": margin, "reduction": "sum"}
    truth = differentiate(loss_of(codes, impl="reference", **options), *(x.double() for x in tensors))
    given = differentiate(loss_of(codes, impl=impl, **options), *tensors)
    # the margin's slope, some hundreds there, multiplies a tangent that is zero but for rounding
    slope = margin.value_and_slope(torch.tensor(sign))[1].item()
    noise = 4 * torch.finfo(dtype).eps * 64 * slope
    for a, b in zip(given, truth, strict=True):
        assert a.isfinite().all()
        agree(a, b, noise=noise)


@pytest.mark.parametrize("case", [Case(64, 3, 20, 48), Case(64, 3, 20, 48, 32)], ids=["plain", "projected"])
@pytest.mark.parametrize("autocast", [False, True], ids=["inputs", "autocast"])
def test_low_precision(case, impl, low_dtype, autocast, differentiate, no_worse_than_pytorch):
    margin, codes = AngularMargin(m2=0.0, m3=0.35), case.codes()
    tensors = case.tensors(torch.float32 if autocast else low_dtype)

    def plain(z: Tensor, w: Tensor, p: Tensor | None = None) -> Tensor:
        u = F.normalize(z)[:, None].expand(-1, case.length, -1)
        if p is not None:
            u = F.normalize(torch.einsum("bld,lid->bli", u, p), dim=-1)
        cosine = torch.einsum("bli,lvi->blv", u, F.normalize(w, dim=-1))
        own = F.one_hot(codes.clamp(min=0), case.vocab).bool()
        logits = 64.0 * torch.where(own, cosine - margin.m3, cosine)
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), ignore_index=-1, reduction="none")
        return losses.view(codes.shape).mean(1)

    loss = partial(loss_of, codes, margin=margin, reduction="none")
    truth = differentiate(loss(impl="reference"), *(x.double() for x in tensors))
    with torch.autocast("cpu", low_dtype, enabled=autocast):
        given, naive = differentiate(loss(impl=impl), *tensors), differentiate(plain, *tensors)
    for a, b, c in zip(given, naive, truth, strict=True):
        no_worse_than_pytorch(a, b, c)


def test_dtypes_may_differ(impl, differentiate, agree):
    """bfloat16 embeddings out of autocast, float32 parameters: products in float32, each gradient in its own dtype."""
    case = Case(9, 2, 4, 8, 6)
    (z, w, p), codes = case.tensors(torch.float32), case.codes()
    z = z.bfloat16()
    truth = differentiate(loss_of(codes, impl="reference"), z.double(), w.double(), p.double())
    given = differentiate(loss_of(codes, impl=impl), z, w, p)
    assert [x.dtype for x in given] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip((given[0], *given[2:]), (truth[0], *truth[2:]), strict=True):
        agree(a, b)
    torch.testing.assert_close(given[1].double(), truth[1], rtol=2**-8, atol=1e-5)  # rounded once to 8 bits


@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
@pytest.mark.parametrize("case", [Case(9, 2, 4, 8), Case(9, 2, 4, 8, 6)], ids=["plain", "projected"])
def test_products_round_their_operands_alone(case, native, monkeypatch, differentiate):
    """With or without units for it: bfloat16 operands, sums of 24 bits or, of a CPU's own units, rounded again."""
    monkeypatch.setattr("gif_kernels.precision._NATIVE_ON_CPU", {torch.bfloat16} if native else set())
    tensors, codes = case.tensors(torch.bfloat16), case.codes()
    truth = differentiate(loss_of(codes, impl="reference"), *(x.double() for x in tensors))
    given = differentiate(loss_of(codes), *tensors)
    for a, b in zip(given, truth, strict=True):
        assert (a - b).norm() <= 0.2 * b.norm()  # 64 times a rounding of 2^-8, of few numbers


# ---- the pull towards code vectors


@pytest.mark.parametrize("gathered", [True, False], ids=["rows of a table", "row by row"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", [Case(7, 3, 5, 11), Case(7, 3, 5, 11, 6)], ids=["plain", "projected"])
def test_pulled_is_the_sum_of_both_losses(case, reduction, gathered, impl, differentiate, agree):
    tensors, codes = case.tensors(torch.float32), case.codes()
    targets = torch.randn(4 if gathered else 7, 11)
    rows = torch.tensor([0, 1, 3, 3, -1, 2, 1]) if gathered else None
    regression = CodeRegression(targets, rows, 0.7)
    given = differentiate(loss_of(codes, regression=regression, reduction=reduction, impl=impl), *tensors)

    pulled = torch.arange(7) if rows is None else rows
    pulled = torch.where(codes[:, 0] >= 0, pulled, -1)

    def both(z: Tensor, *rest: Tensor) -> Tensor:
        pull = code_regression_loss(z, targets.double(), rows=pulled, reduction="none", impl="reference")
        pull = pull if reduction == "none" else pull.sum()
        pull = pull / (codes[:, 0] >= 0).sum() if reduction == "mean" else pull
        return loss_of(codes, reduction=reduction, impl="reference")(z, *rest) + 0.7 * pull

    for a, b in zip(given, differentiate(both, *(x.double() for x in tensors)), strict=True):
        agree(a, b)


def test_pull_errors():
    case = Case(7, 3, 5, 11)
    (z, w), codes, targets = case.tensors(), case.codes(), torch.randn(4, 11)
    for regression, message in (
        (CodeRegression(targets), r"targets must have shape \(7, 11\), got \(4, 11\)"),
        (CodeRegression(targets, torch.full((7,), 4)), r"rows must lie in \[-1, 4\), got values from 4 to 4"),
        (CodeRegression(torch.randn(7, 11, requires_grad=True)), "targets are constants of this loss; detach them"),
        (CodeRegression(torch.randn(7, 11), weight=0.0), "weight must be a finite number > 0, got 0.0"),
        (CodeRegression(torch.full((7, 11), torch.nan)), "targets hold NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            token_margin_loss(z, w, codes, regression=regression)


# ---- options


def test_reductions(impl):
    case = Case(8, 2, 4, 6)
    tensors, codes = case.tensors(), case.codes()
    rows = loss_of(codes, reduction="none", impl=impl)(*tensors)
    counted = (codes[:, 0] >= 0).sum()
    assert counted < 8
    torch.testing.assert_close(loss_of(codes, reduction="sum", impl=impl)(*tensors), rows.sum())
    torch.testing.assert_close(loss_of(codes, impl=impl)(*tensors), rows.sum() / counted)


def test_default_weights_are_equal_and_as_exact_as_the_loss(impl, dtype):
    case = Case(5, 3, 4, 6)  # 1/3 differs between float32 and float64
    tensors, codes = case.tensors(dtype), case.codes()
    third = torch.full((3,), 1 / 3, dtype=dtype)
    assert torch.equal(loss_of(codes, impl=impl)(*tensors), loss_of(codes, token_weights=third, impl=impl)(*tensors))


def test_token_weights_weigh_tokens(impl):
    case = Case(5, 3, 4, 6)
    (z, w), codes = case.tensors(), case.codes()
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    expected = sum(
        weights[j] * token_margin_loss(z, w[j : j + 1], codes[:, j : j + 1], impl=impl) for j in range(case.length)
    )
    torch.testing.assert_close(loss_of(codes, token_weights=weights, impl=impl)(z, w), expected)


def test_ignored_rows_are_as_if_they_were_not_there(impl, differentiate):
    case = Case(8, 2, 4, 6)
    (z, w), codes = case.tensors(), case.codes()
    kept = codes[:, 0] >= 0
    loss, z_gradient, w_gradient = differentiate(loss_of(codes, impl=impl), z, w)
    expected, z_expected, w_expected = differentiate(loss_of(codes[kept], impl=impl), z[kept], w)
    torch.testing.assert_close((loss, z_gradient[kept], w_gradient), (expected, z_expected, w_expected))
    assert (z_gradient[~kept] == 0).all()


@pytest.mark.parametrize("rows", [0, 3], ids=["empty batch", "all ignored"])
@pytest.mark.parametrize("case", [Case(0, 2, 4, 6), Case(0, 2, 4, 6, 5)], ids=["plain", "projected"])
def test_nothing_to_learn_from(rows, case, impl, differentiate):
    tensors = list(case.tensors())
    tensors[0] = torch.randn(rows, 6, dtype=torch.float64)
    codes = torch.full((rows, 2), -1)
    for found in differentiate(loss_of(codes, impl=impl), *tensors):
        assert (found == 0).all()
    assert loss_of(codes, impl=impl, reduction="none")(*tensors).shape == (rows,)


@pytest.mark.parametrize(
    ("case", "zeroed"),
    [(Case(4, 2, 3, 6), i) for i in range(2)] + [(Case(4, 2, 3, 6, 5), i) for i in range(3)],
    ids=["plain embedding", "plain centers", "projected embedding", "projected centers", "projection"],
)
def test_rows_of_zeros_have_no_direction_and_get_no_gradient(case, zeroed, impl, dtype, differentiate):
    tensors = list(case.tensors(dtype))
    tensors[zeroed][0] = 0  # an embedding, a token's centres, or a token's projection
    codes = torch.randint(3, (4, 2))
    found = differentiate(loss_of(codes, impl=impl), *tensors)
    assert all(x.isfinite().all() for x in found)
    assert (found[1 + zeroed][0] == 0).all()


def test_a_vocabulary_of_one_costs_nothing(impl, differentiate):
    case = Case(3, 2, 1, 6)
    for found in differentiate(loss_of(torch.zeros(3, 2, dtype=torch.int64), impl=impl), *case.tensors()):
        assert found.abs().max() <= 1e-12


def test_gradients_are_tangent(impl, differentiate):
    """Lengths do not matter to the loss, so no gradient has a part along its row."""
    case = Case(6, 2, 4, 8, 5)
    tensors = case.tensors()
    _, *gradients = differentiate(loss_of(case.codes(), impl=impl), *tensors)
    for x, gradient in zip(tensors[:2], gradients[:2], strict=True):
        assert (x * gradient).sum(-1).abs().max() <= 1e-10


# ---- compilation


@pytest.mark.parametrize(
    ("impl", "case", "options"),
    [
        ("blocked", "primes", {}),
        ("blocked", "primes", {"margin": AngularMargin(m2=0.0, m3=0.3), "reduction": "none"}),
        (
            "blocked",
            "primes",
            {"margin": AngularMargin(gradient="straight_through"), "reduction": "sum", "scale": 30.0},
        ),
        ("blocked", "wider projection", {"margin": AngularMargin(1.2, 0.4), "token_weights": torch.tensor([0.3, 0.7])}),
        ("blocked", "one row projected", {"margin": AngularMargin(m1=4.0, m2=0.0)}),
        ("reference", "wider projection", {}),
    ],
    ids=["default", "CosFace rows", "straight-through sum", "projected and weighed", "one row", "reference"],
)
def test_compiled_equals_eager(impl, case, options, compiles):
    case = CASES[case]
    compiles(loss_of(case.codes(), impl=impl, **options), *case.tensors(torch.float32))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", ["primes", "wider projection"])
def test_compiled_equals_eager_with_a_pull(case, reduction, compiles):
    case = CASES[case]
    regression = CodeRegression(torch.randn(3, case.width), torch.arange(case.batch) % 4 - 1, 0.7)
    compiles(loss_of(case.codes(), regression=regression, reduction=reduction), *case.tensors(torch.float32))


@pytest.mark.parametrize("case", ["primes", "wider projection"])
def test_compiled_equals_eager_under_autocast(case, compiles, monkeypatch):
    """On a processor that does not multiply bfloat16 itself: one that does rounds every result."""
    monkeypatch.setattr(precision, "_NATIVE_ON_CPU", frozenset())
    case = CASES[case]
    with torch.autocast("cpu", torch.bfloat16):
        compiles(loss_of(case.codes()), *case.tensors(torch.float32))


def test_compiled_equals_eager_with_two_dtypes(compiles):
    z, w = Case(7, 3, 5, 11).tensors(torch.float32)
    codes = Case(7, 3, 5, 11).codes()
    compiles(lambda w: token_margin_loss(z.bfloat16(), w, codes), w)


def test_compiled_takes_other_batches_and_scales(compiled, agree):
    """Both change in training: the last batch is short, and a scale may be scheduled."""
    loss = compiled(token_margin_loss)
    for batch, scale in ((7, 64.0), (5, 32.0), (1, 16.0)):
        case = Case(batch, 3, 5, 11)
        (z, w), codes = case.tensors(torch.float32), case.codes()
        agree(loss(z, w, codes, scale=scale), token_margin_loss(z, w, codes, scale=scale))
