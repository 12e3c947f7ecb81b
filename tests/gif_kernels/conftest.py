"""What the tests of the ops share: seeds, the rule of agreement, gradients, compilation, memory."""

from __future__ import annotations

import math
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gif_kernels import AngularMargin

MARGINS = {
    "default": AngularMargin(),
    "none": AngularMargin(m2=0.0),
    "SphereFace": AngularMargin(m1=1.7, m2=0.0),
    "SphereFace past 3 pi": AngularMargin(m1=4.0, m2=0.0),
    "ArcFace": AngularMargin(m2=0.3),
    "CosFace": AngularMargin(m2=0.0, m3=0.35),
    "combined": AngularMargin(m1=1.2, m2=0.4, m3=0.1),
    "negative m2": AngularMargin(m2=-0.2),
    "straight-through": AngularMargin(gradient="straight_through"),
    "straight-through combined": AngularMargin(m1=1.2, m2=0.4, m3=0.1, gradient="straight_through"),
}
TRUE_MARGINS = {name: margin for name, margin in MARGINS.items() if margin.gradient == "true"}

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
"""The project's own criterion. float32: a cosine's rounding (6e-8 times a few) is multiplied by the scale (64) and by
the margin's slope, m1 sin(a) / sin(theta), some tens near the poles; float64 has nine digits more."""

NEGLIGIBLE = 0.1
"""An RMS below this is what cancellation left of terms as large as the scale, as in softmax - 1 of a row that is
already right, and is compared absolutely: 2e-4 times this is 64 times float32's rounding, times a few."""


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Random inputs, the same in every run; GIF_TEST_SEED=fresh draws others, =N repeats a failure."""
    given = os.environ.get("GIF_TEST_SEED", "")
    own = zlib.crc32(request.node.nodeid.encode()) >> 1
    value = secrets.randbits(31) if given == "fresh" else int(given or own)
    torch.manual_seed(value)
    print(f"GIF_TEST_SEED={value}")
    return value


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: handing them to other threads costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN, or the largest integer: an output that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "blocked"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def low_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=MARGINS.values(), ids=list(MARGINS))
def margin(request: pytest.FixtureRequest) -> AngularMargin:
    return request.param


@pytest.fixture(params=TRUE_MARGINS.values(), ids=list(TRUE_MARGINS))
def true_margin(request: pytest.FixtureRequest) -> AngularMargin:
    return request.param


@pytest.fixture
def psi() -> Callable[[np.ndarray, AngularMargin], np.ndarray]:
    """The margin's formula as METHOD prints it, on cosines of any shape, in NumPy and without the clamp."""

    def closed_form(cosine: np.ndarray, margin: AngularMargin) -> np.ndarray:
        angle = margin.m1 * np.arccos(np.clip(cosine, -1, 1)) + margin.m2
        turns = np.floor(angle / np.pi)
        return np.cos(np.pi * turns) * np.cos(angle) - 2 * turns - margin.m3

    return closed_form


@pytest.fixture
def agree() -> Callable[..., None]:
    return _agree


def _agree(given: Tensor, truth: Tensor, *, noise: float = 0.0) -> None:
    """Maximum error within the dtype's tolerance of the largest true value (or of 1), RMS error of the true RMS.

    ``noise`` is what a test can say that rounding must leave in each element.
    """
    assert given.shape == truth.shape
    if truth.numel() == 0:
        return
    error, truth = (given.double() - truth.double()), truth.double()
    tolerance = TOLERANCE[given.dtype]
    assert error.abs().max() <= tolerance * max(1.0, truth.abs().max().item()) + noise
    assert _rms(error) <= tolerance * max(NEGLIGIBLE, _rms(truth)) + noise


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.fixture
def no_worse_than_pytorch() -> Callable[[Tensor, Tensor, Tensor], None]:
    """FlashAttention's rule: RMS error at most twice that of plain PyTorch in the same dtype, the largest three times.

    The largest of a few hundred errors is chance: of two equally good computations one may have twice the other's.
    Float32's rounding is granted besides, since one number of low precision may come out right by chance. The truth
    is float64 on the same rounded inputs, so the rounding of the inputs counts for neither.
    """

    def rule(given: Tensor, plain: Tensor, truth: Tensor) -> None:
        ours, theirs = given.double() - truth, plain.double() - truth
        assert ours.abs().max() <= 3 * theirs.abs().max() + 1e-6 * truth.abs().max()
        assert _rms(ours) <= 2 * _rms(theirs) + 1e-6 * _rms(truth)

    return rule


@pytest.fixture
def differentiate() -> Callable[..., list[Tensor]]:
    return _differentiate


def _differentiate(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """[function(*inputs), its gradient with respect to each input]; rows of an unreduced loss weigh differently."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(*leaves)
    incoming = torch.linspace(-1, 2, len(loss), dtype=loss.dtype) if loss.ndim else torch.ones_like(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, incoming)]


@pytest.fixture
def compiled() -> Iterator[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Compile a function as a whole: a graph break is an error."""
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def compiles(compiled: Callable[..., Any]) -> Callable[..., None]:
    """Assert that a differentiable function compiles and then gives what it gives in eager mode."""

    def check(function: Callable[..., Tensor], *inputs: Tensor) -> None:
        given, eager = _differentiate(compiled(function), *inputs), _differentiate(function, *inputs)
        for a, b in zip(given, eager, strict=True):
            _agree(a, b)  # decompositions may add in another order

    return check


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], Any]], int]:
    """The most memory, in bytes, that a call holds at once beyond what was there before it, by PyTorch's allocator."""

    def measure(function: Callable[[], Any]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = np.cumsum([e.nbytes() for e in sorted(records, key=lambda e: e.start_ns())])
        return int(held.max())

    return measure


@pytest.fixture
def uniform_potential() -> Callable[[int, float], float]:
    """The potential of the uniform measure on the sphere in d dimensions: -2t + log 0F1(; d/2; t^2), by its series."""

    def closed_form(d: int, t: float) -> float:
        term = total = 1.0
        for k in range(1, 40):
            term *= t * t / (k * (d / 2 + k - 1))
            total += term
        return -2 * t + math.log(total)

    return closed_form
