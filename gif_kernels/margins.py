"""The field's angular margins: one family, with both gradients that its implementations use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gif_kernels.errors import InputError

COSINE_LIMIT = 1.0 - 2.0**-20
"""acos sees cosines clamped to [-COSINE_LIMIT, COSINE_LIMIT].

At +-1 the angle's derivative 1 / sin(theta) is infinite, and in float32 the angle itself is rounding noise below 1e-3.
The clamp bounds sin(theta) by 1.4e-3 from below, so gradients stay finite; it moves a logit by at most 1.4e-3 m1 scale,
7e-4 scale with the default margin. Every dtype down to float32 holds it exactly, so all clamp at one angle.
"""


@dataclass(frozen=True)
class AngularMargin:
    """Target logit psi(theta) = cos(m1 theta + m2) - m3, continued past pi so that it keeps falling.

    With a = m1 theta + m2 and k = floor(a / pi):  psi = (-1)^k cos(a) - 2k - m3  (SphereFace's continuation).

    Args:
        m1: factor of the angle (SphereFace), > 0. 1 leaves the angle as it is.
        m2: angle added, radians (ArcFace).
        m3: cosine subtracted (CosFace).
        gradient: "true" differentiates psi; "straight_through" takes dpsi/dcos = 1, as the most used PyTorch
            implementation of ArcFace does.

    Raises ValueError for a value that is not finite, m1 <= 0, or an unknown gradient.
    """

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    gradient: Literal["true", "straight_through"] = "true"

    def __post_init__(self) -> None:
        for name in ("m1", "m2", "m3"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.m1 <= 0:
            raise InputError(f"m1 must be > 0, got {self.m1}; 1.0 leaves the angle as it is")
        if self.gradient not in ("true", "straight_through"):
            raise InputError(f'gradient must be "true" or "straight_through", got {self.gradient!r}')

    @property
    def bends(self) -> bool:
        """Whether psi needs the angle at all; without m1 and m2 it is cos(theta) - m3."""
        return self.m1 != 1.0 or self.m2 != 0.0

    @property
    def shift(self) -> tuple[float, float, float]:
        """cos(rest), sin(rest) and 2 turns + m3, where m2 = turns pi + rest and 0 <= rest < pi: psi for m1 = 1.

        The angle is never needed: cos(theta + rest) follows by the addition theorem, and passes pi where
        cos(theta) <= -cos(rest).
        """
        turns = math.floor(self.m2 / math.pi)
        rest = self.m2 - turns * math.pi
        return math.cos(rest), math.sin(rest), 2 * turns + self.m3

    def __call__(self, cosine: Tensor) -> Tensor:
        """psi of ``cosine`` (any shape), differentiable by autograd: the specification."""
        if not self.bends:
            return cosine - self.m3
        clamped = cosine.clamp(-COSINE_LIMIT, COSINE_LIMIT)
        # the clamp bounds the slope; it must not cut the gradient off
        angle = torch.acos(cosine + (clamped - cosine).detach())
        shifted = self.m1 * angle + self.m2
        turns = torch.floor(shifted / math.pi).detach()
        psi = (1 - 2 * (turns % 2)) * torch.cos(shifted) - 2 * turns - self.m3
        return psi if self.gradient == "true" else cosine + (psi - cosine).detach()

    def value_and_slope(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """psi and dpsi/dcos of ``cosine`` in closed form: dpsi/dcos = (-1)^k m1 sin(a) / sin(theta)."""
        if not self.bends:
            return cosine - self.m3, torch.ones_like(cosine)
        cosine = cosine.clamp(-COSINE_LIMIT, COSINE_LIMIT)
        if self.m1 == 1.0:
            cos_rest, sin_rest, drop = self.shift
            sine = (1 - cosine).mul_(1 + cosine).sqrt_()
            sign = torch.where(cosine <= -cos_rest, -1.0, 1.0)
            value = (cosine * cos_rest).sub_(sine, alpha=sin_rest).add_(1).mul_(sign).sub_(1 + drop)  # -cos - 2 past pi
            slope = (cosine / sine).mul_(sin_rest).add_(cos_rest).mul_(sign)
        else:
            angle = torch.acos(cosine)
            shifted = self.m1 * angle + self.m2
            turns = torch.floor(shifted / math.pi)
            sign = 1 - 2 * (turns % 2)
            value = sign * torch.cos(shifted) - 2 * turns - self.m3
            slope = sign * self.m1 * torch.sin(shifted) / torch.sin(angle)
        return value, torch.ones_like(cosine) if self.gradient == "straight_through" else slope
