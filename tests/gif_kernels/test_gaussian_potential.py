from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import gaussian_potential
from gif_kernels.dispatch import Impl
from gif_kernels.gaussian_potential import blocked

ROWS = [2, 3, 4, 5, 7, 8, 9, 13]
"""Below, at and above one, two and three tiles of 4."""


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "TILE", 4)


def in_numpy(vectors: Tensor, t: float) -> np.ndarray:
    """exp(-t ||h_i - h_j||^2) of every pair, i = j too, from the differences themselves."""
    h = vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=1, keepdims=True)
    return np.exp(-t * np.square(h[:, None] - h[None]).sum(-1))


@pytest.mark.parametrize("t", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("m", ROWS)
def test_value_against_the_formula(m, t, impl, small_tiles):
    vectors = torch.randn(m, 6, dtype=torch.float64)
    pairs = in_numpy(vectors, t)
    expected = np.log(pairs[~np.eye(m, dtype=bool)].mean())
    assert gaussian_potential(vectors, t=t, impl=impl).item() == pytest.approx(expected, abs=1e-12)


def test_relation_to_the_papers_form(impl):
    m, t = 11, 2.0
    vectors = torch.randn(m, 5, dtype=torch.float64)
    paper = math.log(in_numpy(vectors, t).sum() / m)
    ours = gaussian_potential(vectors, t=t, impl=impl).item()
    assert paper == pytest.approx(math.log((m - 1) * math.exp(ours) + 1), abs=1e-12)


@pytest.mark.parametrize(
    ("vectors", "t", "expected"),
    [
        ([[1.0, 0.0], [-3.0, 0.0]], 2.0, -8.0),  # antipodal: a squared distance of 4
        ([[1.0, 0.0], [0.0, 5.0]], 2.0, -4.0),
        ([[1.0, 2.0], [2.0, 4.0]], 2.0, 0.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.25, -0.5),
        ([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], 2.0, -6.0),  # a triangle: 3
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], 1.0, math.log((math.exp(-4) + 2 * math.exp(-2)) / 3)),
    ],
)
def test_known_values(vectors, t, expected, impl, dtype):
    given = gaussian_potential(torch.tensor(vectors, dtype=dtype), t=t, impl=impl)
    assert given.item() == pytest.approx(expected, abs=1e-12 if dtype == torch.float64 else 1e-6)


def test_random_directions_are_near_the_uniform_optimum(uniform_potential):
    optimum = uniform_potential(512, 2.0)
    assert optimum == pytest.approx(-3.98438, abs=5e-6)
    # the mean of exp(4 s) over 2e6 pairs, s of deviation 0.044: 1e-4 relative
    assert gaussian_potential(torch.randn(2048, 512)).item() == pytest.approx(optimum, abs=1e-3)


@pytest.mark.parametrize("m", [2, 5, 9])
def test_gradient_against_finite_differences(m, impl, small_tiles):
    vectors = torch.randn(m, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(gaussian_potential, impl=impl), (vectors,))


@pytest.mark.parametrize("d", [2, 5, 31])
@pytest.mark.parametrize("m", ROWS)
def test_values_and_gradients(m, d, impl, dtype, small_tiles, differentiate, agree):
    vectors = torch.randn(m, d, dtype=dtype)
    value, gradient = differentiate(partial(gaussian_potential, impl=impl), vectors)
    truth = differentiate(partial(gaussian_potential, impl="reference"), vectors.double())
    agree(value, truth[0])
    # one short row makes a gradient of 1 / ||row|| times rounding
    agree(gradient, truth[1], noise=8 * torch.finfo(dtype).eps / vectors.norm(dim=1).min().item())


def test_the_shipped_tile_and_what_hangs_over_it(differentiate, agree):
    vectors = torch.randn(blocked.TILE + 3, 5)
    truth = differentiate(partial(gaussian_potential, impl="reference"), vectors.double())
    for a, b in zip(differentiate(partial(gaussian_potential, impl="blocked"), vectors), truth, strict=True):
        agree(a * len(vectors), b * len(vectors))  # a gradient falls as 1 / m


def test_low_precision(impl, low_dtype, differentiate, no_worse_than_pytorch):
    vectors = (torch.randn(96, 48) + 0.3).to(low_dtype)

    def plain(vectors: Tensor) -> Tensor:
        h = F.normalize(vectors)
        pairs = (-2 * (2 - 2 * h @ h.T)).exp() * (1 - torch.eye(len(h), dtype=h.dtype))
        return pairs.sum().log() - math.log(len(h) * (len(h) - 1))

    truth = differentiate(partial(gaussian_potential, impl="reference"), vectors.double())
    given = differentiate(partial(gaussian_potential, impl=impl), vectors)
    for a, b, c in zip(given, differentiate(plain, vectors), truth, strict=True):
        no_worse_than_pytorch(a, b, c)


def test_lengths_do_not_matter_and_the_gradient_is_tangent(impl, differentiate):
    vectors = torch.randn(7, 5, dtype=torch.float64)
    lengths = torch.rand(7, 1, dtype=torch.float64) + 0.1
    value, gradient = differentiate(partial(gaussian_potential, impl=impl), vectors)
    scaled_value, scaled_gradient = differentiate(partial(gaussian_potential, impl=impl), vectors * lengths)
    torch.testing.assert_close(scaled_value, value)
    torch.testing.assert_close(scaled_gradient * lengths, gradient)
    assert (gradient * vectors).sum(1).abs().max() <= 1e-14


def test_a_row_of_zeros_gets_no_gradient(impl, dtype, differentiate):
    vectors = torch.randn(5, 4, dtype=dtype)
    vectors[2] = 0
    value, gradient = differentiate(partial(gaussian_potential, impl=impl), vectors)
    assert value.isfinite() and gradient.isfinite().all() and (gradient[2] == 0).all()


def test_equal_rows_are_stationary(impl, differentiate):
    value, gradient = differentiate(partial(gaussian_potential, impl=impl), torch.ones(6, 3, dtype=torch.float64))
    assert abs(value) <= 1e-14 and gradient.abs().max() <= 1e-14


def test_incoming_gradient_scales(impl):
    vectors = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    (once,) = torch.autograd.grad(gaussian_potential(vectors, impl=impl), vectors)
    (thrice,) = torch.autograd.grad(-3 * gaussian_potential(vectors, impl=impl), vectors)
    torch.testing.assert_close(thrice, -3 * once)


def test_memory_does_not_grow_with_the_pairs(peak_bytes):
    m, d = 4 * blocked.TILE, 64
    vectors = torch.randn(m, d, requires_grad=True)
    tiles = 4 * (blocked.TILE**2 + 6 * blocked.TILE * d)  # the pairs; two tiles of unit rows, and what projecting takes
    gradients = 2 * 4 * m * d  # what forward keeps and what backward returns
    peak = peak_bytes(lambda: gaussian_potential(vectors, impl="blocked").backward())
    assert peak <= tiles + gradients + 2**16
    peak = peak_bytes(lambda: gaussian_potential(vectors.detach(), impl="blocked"))
    assert peak <= tiles + 2**16
    assert peak_bytes(lambda: gaussian_potential(vectors, impl="reference")) >= 4 * m * m  # the measure sees it


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_compiled_equals_eager(t, impl, small_tiles, compiles):
    compiles(partial(gaussian_potential, t=t, impl=impl), torch.randn(9, 5))


def test_compiled_takes_other_sizes_and_widths_of_the_kernel(compiled, agree):
    potential = compiled(gaussian_potential)
    for m, t in ((9, 2.0), (5, 1.0), (2, 0.5)):
        vectors = torch.randn(m, 6)
        agree(potential(vectors, t=t), gaussian_potential(vectors, t=t))


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("want_gradient", [True, False])
def test_custom_op_keeps_its_promises(want_gradient, others, small_tiles):
    vectors = torch.randn(9, 5)
    arguments = (vectors[2:7], vectors, 2) if others else (vectors, None, 0)
    torch.library.opcheck(torch.ops.gif_kernels.gaussian_potential_blocked.default, (*arguments, 2.0, want_gradient))


# ---- shares of several processes


def share(vectors: Tensor, gathered: Tensor, offset: int, impl: Impl) -> Tensor:
    return gaussian_potential(vectors, gathered, offset=offset, impl=impl)


@pytest.mark.parametrize("sizes", [(13,), (1, 12), (5, 4, 4), (4, 3, 6)], ids=str)
def test_shares_sum_to_what_one_process_has(sizes, impl, dtype, small_tiles, differentiate, agree):
    vectors = torch.randn(13, 6, dtype=dtype)
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]

    def in_shares(vectors: Tensor) -> Tensor:
        shares = zip(vectors.split(sizes), offsets, strict=True)
        return torch.stack([share(x, vectors.detach(), i, impl) for x, i in shares]).logsumexp(0)

    truth = differentiate(partial(gaussian_potential, impl="reference"), vectors.double())
    value, gradient = differentiate(in_shares, vectors)
    agree(value, truth[0])
    agree(gradient, truth[1], noise=8 * torch.finfo(dtype).eps / vectors.norm(dim=1).min().item())


def test_a_process_needs_no_more_of_the_others_than_their_values(impl):
    """As on several processes: the others' shares are numbers that arrive, and only one's own has a gradient."""
    vectors = torch.randn(9, 4, dtype=torch.float64)
    whole = vectors.clone().requires_grad_()
    (expected,) = torch.autograd.grad(gaussian_potential(whole, impl="reference"), whole)
    own = vectors[3:7].clone().requires_grad_()
    arrived = [share(vectors[rows], vectors, rows.start, impl) for rows in (slice(0, 3), slice(7, 9))]
    loss = torch.stack([share(own, vectors, 3, impl), *arrived]).logsumexp(0)
    torch.testing.assert_close(torch.autograd.grad(loss, own)[0], expected[3:7])


def test_a_share_compiled_equals_eager(impl, small_tiles, compiles):
    vectors = torch.randn(9, 5)
    compiles(lambda x: share(x, vectors, 2, impl), vectors[2:7])


@pytest.mark.parametrize(
    ("offset", "change", "error", "message"),
    [
        (6, lambda x: x, ValueError, r"offset must lie in \[0, 5\]"),
        (-1, lambda x: x, ValueError, r"offset must lie in \[0, 5\]"),
        (2, lambda x: x, ValueError, "others must hold the vectors from row 2"),
        (1, lambda x: x.double(), TypeError, "others must have the vectors' dtype"),
        (1, lambda x: x[:, :3], ValueError, r"others must have shape \(m, 4\)"),
        (1, lambda x: None, ValueError, "got 1 without others"),
        (1.0, lambda x: x, TypeError, "offset must be an int"),
    ],
)
def test_what_is_not_a_share(offset, change, error, message):
    vectors = torch.randn(9, 4)
    with pytest.raises(error, match=message):
        gaussian_potential(vectors[1:5], change(vectors), offset=offset)
