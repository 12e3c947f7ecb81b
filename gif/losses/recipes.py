"""The terms of GIFLoss and their weights, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from gif.errors import InputError
from gif_kernels import AngularMargin

RecipeName = Literal["live", "paper"]
LEAST_SCALE = 12.0


def fitted_scale(identities: int) -> float:
    """sqrt(2) ln(m - 1), AdaCos's fixed scale for m identities (Zhang et al., CVPR 2019); 12 at least."""
    return max(LEAST_SCALE, math.sqrt(2) * math.log(max(2, identities) - 1))


@dataclass(frozen=True)
class Recipe:
    """L = alpha L_C + gamma L_AR + beta L_CC, and how the code vectors move.

    Args:
        code_weight: alpha, of the tokens' cross entropy L_C.
        scale: s of L_C.
        margin: of L_C.
        regression_weight: gamma, of the pull towards the own code vector L_AR.
        contrast_weight: beta, of the cross entropy L_CC between the code vectors of the batch and of their siblings.
        contrast_scale: s of L_CC; 0: what `fitted_scale` gives for the identities there are.
        contrast_margin: of L_CC.
        siblings: negatives that each identity of the batch brings to L_CC: its neighbours in the order of the codes,
            which share the longest prefix with it.
        negatives: identities drawn at random in each step, the same for all rows and processes, that are negatives in
            L_CC too. They cost what so many candidates cost, whatever m is; from m on all identities are.
        fades: over what share of the run, from its beginning, alpha and gamma fall to 0, linearly; then the contrast is
            alone. 0: they stay as they are.
        vector_lr: rate at which the code vectors in L_CC follow its gradient (of the batch's mean), at unit length and
            where the optimizer's schedule has its peak; 0 fixes them.

    Raises ValueError for a weight, a scale of the contrast, a rate or a number of siblings or negatives below 0, for
    ``fades`` outside of [0, 1], or no term at all.
    """

    code_weight: float
    scale: float
    margin: AngularMargin
    regression_weight: float
    contrast_weight: float = 0.0
    contrast_scale: float = 0.0
    contrast_margin: AngularMargin = AngularMargin(m2=0.0, m3=0.2)  # noqa: RUF009 (frozen)
    siblings: int = 2
    negatives: int = 0
    fades: float = 0.0
    vector_lr: float = 0.0

    def __post_init__(self) -> None:
        for name in ("siblings", "negatives"):
            number = getattr(self, name)
            if number != int(number):
                raise InputError(f"{name} must be a whole number, got {number}")
            object.__setattr__(self, name, int(number))  # a config gives 2.0
        at_least_zero = ("code_weight", "regression_weight", "contrast_weight", "contrast_scale")
        for name in (*at_least_zero, "siblings", "negatives", "vector_lr"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.fades <= 1:
            raise InputError(f"fades must lie in [0, 1], got {self.fades}: a share of the run")
        if self.code_weight + self.regression_weight + self.contrast_weight == 0:
            raise InputError("all weights are 0, so there is nothing to learn; give at least one term a weight")

    def fitted(self, identities: int) -> Recipe:
        """The recipe with the scale for so many identities, where it contrasts them and has none of its own."""
        if self.contrast_scale or not self.contrast_weight:
            return self
        return replace(self, contrast_scale=fitted_scale(identities))

    @property
    def needs_vectors(self) -> bool:
        """Whether some term reads code vectors."""
        return self.regression_weight + self.contrast_weight > 0

    @property
    def draws_negatives(self) -> bool:
        """Whether training draws identities at random."""
        return self.contrast_weight > 0 and self.negatives > 0

    @property
    def moves_vectors(self) -> bool:
        """Whether training changes code vectors."""
        return self.contrast_weight > 0 and self.vector_lr > 0


RECIPES: dict[RecipeName, Recipe] = {
    "paper": Recipe(code_weight=1.0, scale=64.0, margin=AngularMargin(m2=0.5), regression_weight=1.0),
    "live": Recipe(
        code_weight=0.3,
        scale=16.0,
        margin=AngularMargin(m2=0.0, m3=0.1),
        regression_weight=1.0,
        contrast_weight=1.0,
        negatives=4096,
        fades=0.5,
        vector_lr=24.0,
    ),
}
"""paper: the two losses as published. live: with contrast against code vectors that move, at a cost that knows no m."""
