from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gif_kernels import AngularMargin
from gif_kernels.margins import COSINE_LIMIT

POLES = torch.tensor([1.0, -1.0, 1.0 + 1e-7, -1.0 - 1e-7], dtype=torch.float64)
"""Cosines of exactly +-1, and what rounding makes of them."""

POLE_SINE = math.sqrt(1 - COSINE_LIMIT**2)


def cosines(count: int = 1001) -> torch.Tensor:
    """From just inside 1 to just inside -1, evenly in angle, so that the angle grows."""
    return torch.linspace(0.002, math.pi - 0.002, count, dtype=torch.float64).cos()


def test_equals_the_closed_formula(margin, psi):
    cosine = cosines()
    # acos loses eps / sin(theta) = 1e-13 at the ends
    np.testing.assert_allclose(margin(cosine).numpy(), psi(cosine.numpy(), margin), rtol=0, atol=1e-11)
    np.testing.assert_allclose(margin.value_and_slope(cosine)[0].numpy(), psi(cosine.numpy(), margin), atol=1e-11)


@pytest.mark.parametrize(
    ("margin", "angle", "logit"),
    [
        (AngularMargin(m2=0.0, m3=0.25), math.pi / 3, 0.25),
        (AngularMargin(m2=math.pi / 6), math.pi / 3, 0.0),
        (AngularMargin(m1=2.0, m2=0.0), math.pi / 3, -0.5),
        (AngularMargin(m1=4.0, m2=0.0), math.pi / 2, -3.0),  # a = 2 pi, k = 2: cos(2 pi) - 4
        (AngularMargin(m1=2.0, m2=0.0), 3 * math.pi / 4, -2.0),  # a = 3 pi / 2, k = 1: -cos(3 pi / 2) - 2
        (AngularMargin(m1=1.0, m2=math.pi / 2, m3=0.5), 3 * math.pi / 4, math.sqrt(0.5) - 2.5),
    ],
)
def test_known_values(margin, angle, logit):
    cosine = torch.tensor(math.cos(angle), dtype=torch.float64)
    assert margin(cosine).item() == pytest.approx(logit, abs=1e-12)


def test_falls_as_the_angle_grows_past_pi_too(margin):
    assert (margin(cosines()).diff() < 0).all()
    assert (margin(torch.linspace(1, -1, 5001, dtype=torch.float32)).diff() <= 1e-6).all()  # float32's rounding


def test_gradient_against_finite_differences(true_margin):
    cosine = (torch.rand(64, dtype=torch.float64) * 1.98 - 0.99).requires_grad_()
    assert torch.autograd.gradcheck(true_margin, (cosine,))


def test_straight_through_has_the_true_value_and_slope_one():
    straight = AngularMargin(m1=1.2, m2=0.4, m3=0.1, gradient="straight_through")
    cosine = torch.cat([cosines(), POLES]).requires_grad_()
    # (psi - cos) + cos is psi to the last digits
    torch.testing.assert_close(straight(cosine), AngularMargin(1.2, 0.4, 0.1)(cosine), rtol=0, atol=1e-14)
    (slope,) = torch.autograd.grad(straight(cosine).sum(), cosine)
    assert torch.equal(slope, torch.ones_like(cosine))
    assert torch.equal(straight.value_and_slope(cosine.detach())[1], slope)


def test_value_and_slope_is_what_autograd_finds(margin):
    cosine = torch.cat([cosines(), POLES]).requires_grad_()
    expected = margin(cosine)
    (expected_slope,) = torch.autograd.grad(expected.sum(), cosine)
    value, slope = margin.value_and_slope(cosine.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-11)
    # sin(acos(c)) and sqrt(1 - c^2) differ by eps / sin^2(theta) = 1e-10 at the clamp, relatively
    torch.testing.assert_close(slope, expected_slope, rtol=1e-9, atol=1e-11)


def test_gradients_are_finite_at_the_poles(margin, dtype):
    cosine = POLES.to(dtype).requires_grad_()
    value = margin(cosine)
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    for computed in (slope, *margin.value_and_slope(cosine.detach())):
        assert computed.isfinite().all()
    # the clamp's own bound, and float32's rounding of acos there
    assert slope.abs().max() <= max(1.0, 1.001 * margin.m1 / POLE_SINE)


def test_clamp_moves_a_logit_by_no_more_than_its_angle(margin, psi):
    poles = torch.tensor([1.0, -1.0], dtype=torch.float64)
    moved = np.abs(margin(poles).numpy() - psi(poles.numpy(), margin))
    assert moved.max() <= margin.m1 * math.acos(COSINE_LIMIT)


def test_every_dtype_clamps_at_the_same_angle(margin):
    """At the poles a logit in float32 is the rounded logit in float64: another clamp would show as 4e-6."""
    single, double = (margin(torch.tensor([1.0, -1.0], dtype=dtype)) for dtype in (torch.float32, torch.float64))
    # psi is at most a few units of 1e0, rounded a few times
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-6)


def test_default_clamp_moves_a_logit_by_less_than_documented(psi):
    poles = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert np.abs(AngularMargin()(poles).numpy() - psi(poles.numpy(), AngularMargin())).max() <= 7e-4


def test_without_bend_the_cosine_is_not_clamped():
    cosine = torch.tensor([1.0, -1.0])
    assert torch.equal(AngularMargin(m2=0.0)(cosine), cosine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m1": 0.0}, r"m1 must be > 0, got 0\.0; 1\.0 leaves"),
        ({"m1": -1.0}, r"m1 must be > 0, got -1\.0"),
        ({"m1": math.inf}, "m1 must be a finite number, got inf"),
        ({"m2": math.nan}, "m2 must be a finite number, got nan"),
        ({"m3": -math.inf}, "m3 must be a finite number, got -inf"),
        ({"gradient": "none"}, 'gradient must be "true" or "straight_through", got \'none\''),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AngularMargin(**arguments)


def test_equal_margins_are_equal_and_do_not_change():
    assert AngularMargin(m2=0.5) == AngularMargin() and hash(AngularMargin(m2=0.5)) == hash(AngularMargin())
    with pytest.raises(AttributeError):
        AngularMargin().m1 = 2.0  # type: ignore[misc]
