"""Angular margins on the device: psi and its slope, in the cheapest form that computes them."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from gif_kernels.margins import COSINE_LIMIT, AngularMargin

LIMIT = tl.constexpr(COSINE_LIMIT)
PI = tl.constexpr(math.pi)


@triton.jit
def _acos(x):
    """acos in float32 without a library call: sqrt(1 - |x|) p(|x|), error 2e-8 (Abramowitz and Stegun 4.4.46)."""
    y = tl.abs(x)
    p = -0.0012624911
    p = p * y + 0.0066700901
    p = p * y - 0.0170881256
    p = p * y + 0.0308918810
    p = p * y - 0.0501743046
    p = p * y + 0.0889789874
    p = p * y - 0.2145988016
    p = p * y + 1.5707963050
    angle = tl.sqrt_rn(1.0 - y) * p
    return tl.where(x < 0, PI - angle, angle)


@triton.jit
def _cos_and_sin(angle):
    """Both in float32 for an angle in [0, pi], error 2e-7: odd and even polynomials about pi / 2 (Chebyshev fit)."""
    t = angle - PI / 2
    x = t * t
    odd = 0.0000026051
    odd = odd * x - 0.0001980902
    odd = odd * x + 0.0083330502
    odd = odd * x - 0.1666665795
    odd = odd * x + 0.9999999957
    even = -0.0000002605
    even = even * x + 0.0000247601
    even = even * x - 0.0013888360
    even = even * x + 0.0416666362
    even = even * x - 0.4999999936
    even = even * x + 0.9999999998
    return -t * odd, even


@triton.jit
def margin_value_and_slope(cosine, m1, m2, cos_m2, sin_m2, drop, MARGIN: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """psi and dpsi/dcos of a block of cosines; arguments as `margin_arguments` gives them."""
    slope = tl.full(cosine.shape, 1.0, tl.float32)
    if MARGIN == "none":
        value = cosine - drop
    else:
        c = tl.clamp(cosine, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        s = tl.sqrt_rn((1.0 - c) * (1.0 + c))
        if MARGIN == "shift":
            past = c <= -cos_m2  # the shifted angle is past pi
            value = c * cos_m2 - s * sin_m2
            value = tl.where(past, -value - 2.0, value) - drop
            true_slope = (s * cos_m2 + c * sin_m2) / s
            true_slope = tl.where(past, -true_slope, true_slope)
        else:
            angle = m1 * _acos(c) + m2
            turns = tl.floor(angle / PI)
            rest = angle - turns * PI  # (-1)^k cos(a) = cos(rest), and so for sin
            cos_rest, sin_rest = _cos_and_sin(rest)
            value = cos_rest - 2.0 * turns - drop
            true_slope = m1 * sin_rest / s
        if not STRAIGHT_THROUGH:
            slope = true_slope
    return value, slope


def margin_arguments(margin: AngularMargin) -> dict[str, Any]:
    """The arguments, by name, that tell a kernel about ``margin``; each form of psi reads some of the numbers.

    MARGIN is the cheapest form that computes psi:

    "none", where the angle stays as it is: cos(theta) - drop.
    "shift", where m1 is 1: cos(theta + m2) - drop by the addition theorem, without the angle (`AngularMargin.shift`).
    "angle": cos(m1 theta + m2) - drop.

    ``drop`` is what is subtracted: m3, and in the second form 2 for each half turn that m2 holds.
    """
    cos_m2, sin_m2, drop = margin.shift
    form = "none" if not margin.bends else "shift" if margin.m1 == 1.0 else "angle"
    return {
        "m1": float(margin.m1),
        "m2": float(margin.m2),
        "cos_m2": cos_m2,
        "sin_m2": sin_m2,
        "drop": float(margin.m3 if form == "angle" else drop),
        "MARGIN": form,
        "STRAIGHT_THROUGH": margin.gradient == "straight_through",
    }
