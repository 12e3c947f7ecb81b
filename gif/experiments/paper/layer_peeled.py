"""The layer-peeled model: features and centres are free, within bounded norms; classes differ in their images alone.

Fang, He, Long and Su (PNAS 2021, doi 10.1073/pnas.2103091118) minimise over centres w_k and features h_k

    sum_k n_k / N  CE(W h_k, k)      with    mean_k ||w_k||^2 <= E,    mean_k ||h_k||^2 <= E

(the features of a class are equal at the optimum, so there is one a class). K_A majority classes have R times as many
images as each of K_B minority classes. With the logits Z = W H it is a convex program: the norms allow exactly those Z
whose nuclear norm is at most T = K E. Its solution may be averaged over the classes of a kind, so that six numbers say
it all; the logits of a sample sum to 0, which leaves four: the gaps alpha of a majority logit to those of other
majority classes, beta likewise of the minority, and the logits c of a minority class for majority samples, and e of a
majority class for minority ones. The nuclear norm is then

    (K_A - 1) |alpha| + (K_B - 1) |beta| + sqrt(K (K_B c^2 + K_A e^2))

and the minority's centres are one vector exactly where beta = 0. They are for R >= R_0, the threshold: the slope of the
loss along beta at 0 is -(K_B - 1) n_B / N, that of the norm K_B - 1, so beta = 0 is the solution where the norm's
multiplier mu >= n_B / N. mu = (n_A / N) (1 - p_a + p_b) by the slope along alpha, with p_a, p_b the probabilities of a
majority sample's own class and of another majority class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from gif.errors import InputError
from gif.losses import RECIPES
from gif.packages import needs
from gif.progress import progress
from gif.vectors import CodeVectors, SpreadConfig, spread_code_vectors

SMALL_ODDS = -30.0  # logarithm, below which -log p is the odds within rounding
LARGEST_RATIO = 1e6  # up to which the threshold is looked for
SPREAD_EPOCHS = 100  # of a table of a few rows, one step each
PEAK = 0.05  # of Adam's rate, which falls to 0 by a cosine
DRAWN = 0.3  # share of the classes that Partial FC draws in a step
BATCH = 8  # images whose classes it has beside them
LIVE = RECIPES["live"].fitted(0)  # of few identities


@dataclass(frozen=True)
class LayerPeeled:
    """How many classes there are of each kind, E (``bound``) of both norms, and the width of the factorised form.

    Raises ValueError for fewer than two classes of a kind, a bound that is not > 0, or a width below all classes.
    """

    majority: int = 10
    minority: int = 10
    bound: float = 3.0
    width: int = 32

    def __post_init__(self) -> None:
        if min(self.majority, self.minority) < 2 or not self.bound > 0 or self.width < self.classes:
            raise InputError(
                "wanted at least 2 majority and 2 minority classes, a bound > 0 and a width of at least as many as "
                f"classes, got {self.majority}, {self.minority}, {self.bound}, {self.width}"
            )

    @property
    def classes(self) -> int:
        return self.majority + self.minority

    def shares(self, ratio: float) -> NDArray[np.float64]:
        """n_k / N (K,) of the classes, the majority's first, at R = ``ratio``."""
        images = np.repeat([ratio, 1.0], [self.majority, self.minority])
        return images / images.sum()


@dataclass(frozen=True)
class Solution:
    """``cosine`` between the centres of two minority classes, and ``collapse`` = mu N / n_B where beta is held at 0."""

    cosine: float
    collapse: float


def solve(model: LayerPeeled, ratio: float, *, collapsed: bool = False) -> Solution:
    """The optimum of the convex program at R = ``ratio``, in float64; ``collapsed`` holds beta at 0."""
    with needs("scipy", "the layer-peeled model"):
        from scipy.optimize import minimize
        from scipy.special import expit
    ka, kb, k = model.majority, model.minority, model.classes
    log_share_a, log_share_b = np.log(ka * model.shares(ratio)[0]), np.log(kb * model.shares(ratio)[-1])
    total = k * model.bound

    def logits(x: NDArray[np.float64]) -> tuple[float, float, float, float]:
        """Own and other logit, of a majority sample among its kind and of a minority sample among its own."""
        alpha, beta, c, e = x
        mean_a, mean_b = -kb * c / ka, -ka * e / kb
        return mean_a + (ka - 1) / ka * alpha, mean_a - alpha / ka, mean_b + (kb - 1) / kb * beta, mean_b - beta / kb

    def log_odds(x: NDArray[np.float64]) -> tuple[float, float]:
        """Logarithm of (1 - p) / p of a majority sample's own class, and of a minority sample's."""
        a, b, f, g = logits(x)
        others_a = np.logaddexp(math.log(ka - 1) + b - a, math.log(kb) + x[2] - a)
        return float(others_a), float(np.logaddexp(math.log(kb - 1) + g - f, math.log(ka) + x[3] - f))

    def log_loss(x: NDArray[np.float64]) -> float:  # the loss itself is tiny where the bound is large
        odds_a, odds_b = log_odds(x)
        return float(np.logaddexp(log_share_a + _log_loss(odds_a), log_share_b + _log_loss(odds_b)))

    def trivial(x: NDArray[np.float64]) -> float:
        return math.sqrt(k * (kb * x[2] ** 2 + ka * x[3] ** 2))

    start = 0.9 * np.array([total / k, 0 if collapsed else total / k, -total / k**2, -total / k**2])
    found = minimize(
        log_loss,
        start,
        method="SLSQP",
        bounds=[(0, None), (0, 0 if collapsed else None), (None, None), (None, None)],
        constraints=[{"type": "ineq", "fun": lambda x: total - (ka - 1) * x[0] - (kb - 1) * x[1] - trivial(x)}],
        options={"maxiter": 300, "ftol": 1e-12},
    ).x
    # centres W W^T ~ (Z Z^T)^(1/2), whose minority block has beta on what differs, trivial(x) on what is shared
    shared, beta = trivial(found) * ka / k, float(found[1])
    a, b, *_ = logits(found)
    odds = log_odds(found)[0]
    pull = float(expit(odds) + expit(-odds) * math.exp(b - a))  # 1 - p_a + p_b
    return Solution((shared - beta) / (shared + (kb - 1) * beta), ratio * pull)


def _log_loss(log_odds: float) -> float:
    """Logarithm of -log p, of the logarithm of (1 - p) / p."""
    return log_odds if log_odds < SMALL_ODDS else math.log(np.logaddexp(0.0, log_odds))


def threshold(model: LayerPeeled) -> float:
    """R_0, from which all minority centres are one vector; infinity where that is beyond a million."""
    with needs("scipy", "the layer-peeled model"):
        from scipy.optimize import brentq

    def excess(log_ratio: float) -> float:
        return solve(model, math.exp(log_ratio), collapsed=True).collapse - 1

    if excess(math.log(LARGEST_RATIO)) < 0:
        return math.inf
    return math.exp(brentq(excess, 0.0, math.log(LARGEST_RATIO), xtol=1e-4))


@cache
def spread_centers(model: LayerPeeled, seed: int) -> Tensor:
    """Unit code vectors (K, width) float64, spread from random ones: what the number of images has no part in."""
    generator = torch.Generator().manual_seed(seed)
    vectors = CodeVectors(torch.randn(model.classes, model.width, generator=generator))
    spread_code_vectors(vectors, SpreadConfig(epochs=SPREAD_EPOCHS, seed=seed))
    return vectors.table.double()


def minority_cosine(centers: Tensor, model: LayerPeeled) -> Tensor:
    """Mean cosine between the centres (..., K, d) of two minority classes, (...)."""
    unit = normalize(centers[..., model.majority :, :].double(), dim=-1)
    k = model.minority
    return (unit.sum(-2).square().sum(-1) - k) / (k * (k - 1))


@dataclass(frozen=True)
class Descent:
    """Descent on the factorised model, at several ratios at once, each with parameters of its own.

    Args:
        model: the model.
        ratios: R, n of them.
        seed: of initial values and samples.
        steps: of the optimizer.
    """

    model: LayerPeeled
    ratios: Sequence[float]
    seed: int
    steps: int

    def centers(self, head: str) -> Tensor:
        """Centres (n, K, d) float64 in the end, by a name of `HEADS`."""
        return HEADS[head](self, torch.Generator().manual_seed(self.seed))

    @property
    def shares(self) -> Tensor:
        """n_k / N at each ratio, (n, K) float64."""
        return torch.stack([torch.from_numpy(self.model.shares(ratio)) for ratio in self.ratios])

    def random(self, generator: torch.Generator) -> Tensor:
        """Initial values (n, K, d) float64."""
        shape = len(self.ratios), self.model.classes, self.model.width
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def spread(self) -> Tensor:
        """Spread code vectors at each ratio, (n, K, d) float64."""
        return spread_centers(self.model, self.seed).repeat(len(self.ratios), 1, 1)

    def follow(self, parameters: list[Tensor], loss: Callable[[float], Tensor]) -> None:
        """Adam on the sum of ``loss`` (n,), which is given the share of its peak that the rate has."""
        optimizer = torch.optim.Adam(parameters, PEAK)
        with progress(f"layer-peeled model, seed {self.seed}", self.steps, "steps") as advance:
            for step in range(self.steps):
                share = (1 + math.cos(math.pi * step / self.steps)) / 2
                optimizer.param_groups[0]["lr"] = PEAK * share
                optimizer.zero_grad()
                loss(share).sum().backward()
                optimizer.step()
                advance(1)


def _softmax(descent: Descent, generator: torch.Generator, drawn: float | None = None) -> Tensor:
    """Centres and features free; with ``drawn`` against a sample of the classes, as in Partial FC."""
    centers, features = descent.random(generator), descent.random(generator)
    shares, model = descent.shares, descent.model
    own = torch.eye(model.classes, dtype=torch.bool)

    def sample() -> Tensor:
        """Which classes (n, 1, K) compete at each ratio: some at random, and those of a batch's images."""
        places = torch.rand(shares.shape, generator=generator).argsort(1)[:, : round((drawn or 1) * model.classes)]
        batch = shares.multinomial(BATCH, replacement=True, generator=generator)
        there = torch.zeros(shares.shape, dtype=torch.bool)
        return there.scatter(1, torch.cat([places, batch], 1), True)[:, None]

    def loss(_: float) -> Tensor:
        logits = _bounded(features, model.bound) @ _bounded(centers, model.bound).mT
        if drawn is not None:
            logits = logits.masked_fill(~(sample() | own), -math.inf)
        return -(shares * logits.log_softmax(2).diagonal(dim1=1, dim2=2)).sum(1)

    descent.follow([centers, features], loss)
    return centers.detach()


def _partial_fc(descent: Descent, generator: torch.Generator) -> Tensor:
    return _softmax(descent, generator, DRAWN)


def _fixed(descent: Descent, generator: torch.Generator) -> Tensor:
    """Spread code vectors, which no image moves."""
    return descent.spread()


def _live(descent: Descent, generator: torch.Generator, scale: float | None = None) -> Tensor:
    """Code vectors that take the steps of the default recipe: by the gradient at their own length, which grows.

    Features and directions have unit length, so that the ``scale``, E where none is given, bounds each logit.
    """
    vectors, features = descent.spread().requires_grad_(), descent.random(generator)
    shares, scale = descent.shares, scale or descent.model.bound
    margins = LIVE.contrast_margin.m3 * torch.eye(descent.model.classes, dtype=torch.float64)

    def loss(share: float) -> Tensor:
        if vectors.grad is not None:
            with torch.no_grad():
                vectors.sub_(vectors.grad, alpha=LIVE.vector_lr * share)
            vectors.grad = None
        cosines = normalize(features, dim=2) @ normalize(vectors, dim=2).mT
        return -(shares * (scale * (cosines - margins)).log_softmax(2).diagonal(dim1=1, dim2=2)).sum(1)

    descent.follow([features], loss)
    return vectors.detach()


def _live_as_shipped(descent: Descent, generator: torch.Generator) -> Tensor:
    return _live(descent, generator, LIVE.contrast_scale)


def _bounded(rows: Tensor, bound: float) -> Tensor:
    """Rows (n, K, d) scaled to a mean squared norm of ``bound``: the optimum lies there."""
    return rows * (math.sqrt(bound * rows.shape[1]) / torch.linalg.matrix_norm(rows))[:, None, None]


HEADS: dict[str, Callable[[Descent, torch.Generator], Tensor]] = {
    "full softmax": _softmax,
    f"Partial FC {DRAWN:g}": _partial_fc,
    "code vectors, fixed": _fixed,
    "code vectors, live": _live,
    f"code vectors, live, scale {LIVE.contrast_scale:g}": _live_as_shipped,
}
"""How centres are treated: free ones, those of a sample, and code vectors that begin spread."""
