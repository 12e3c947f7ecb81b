"""Gaussian potential and its gradient: ours beside what a user would write, and beside its own products alone.

`pytest benchmarks/test_gaussian_potential.py --benchmark-json=results.json` for 2,048 rows; `--full` for the whole
grid, of which `-k m8192-d512` picks one size.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import DEVICE, measure
from benchmarks.memory import skip_unless_it_fits
from benchmarks.results import Subject
from gif.experiments.paper.spreaders import PAIRS_HELD, T, dense_potential
from gif.planning.heads import FLOAT
from gif_kernels import gaussian_potential

if TYPE_CHECKING:  # what a run on a GPU imports does without it
    from pytest_benchmark.fixture import BenchmarkFixture

CHUNK = 1024
"""Rows of pairs that the chunked form holds at once."""
LARGE = 8192
"""Rows from which a call takes seconds on a CPU: fewer repetitions."""
HEADLINE_WIDTH = 512

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One point of the grid."""

    m: int
    d: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"m{self.m}-d{self.d}-{str(self.dtype).removeprefix('torch.')}"


DTYPES = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)
QUICK = [Shape(2048, d, torch.float32) for d in (128, 512)]
FULL = [Shape(m, d, dtype) for m, d, dtype in itertools.product((2048, 8192, 32768, 65536), (128, 512, 768), DTYPES)]


def pdist(vectors: Tensor) -> Tensor:
    """Wang and Isola's uniformity loss as they print it."""
    return torch.pdist(F.normalize(vectors.float())).square().mul(-T).exp().mean().log()


def checkpointed(vectors: Tensor) -> Tensor:
    """Chunks of rows against all, computed again for the gradient: memory for one chunk."""
    h = F.normalize(vectors.float())
    m = len(h)

    def chunk_sum(rows: Tensor, h: Tensor) -> Tensor:
        return torch.exp(2 * T * (rows @ h.T - 1)).sum()

    chunks = (checkpoint(chunk_sum, rows, h, use_reentrant=False) for rows in h.split(CHUNK))
    total = sum(chunks, start=h.new_zeros(()))
    return ((total - m) / (m * (m - 1))).log()


@functools.cache
def compiled() -> Loss:
    """`dense_potential` through torch.compile."""
    return torch.compile(dense_potential)


def keops(vectors: Tensor) -> Tensor:
    """KeOps' lazy pairs, on the squared distance."""
    from pykeops.torch import LazyTensor

    h = F.normalize(vectors.float())
    m = len(h)
    squared = ((LazyTensor(h[:, None]) - LazyTensor(h[None])) ** 2).sum(-1)
    return (((-T * squared).exp().sum(1).sum() - m) / (m * (m - 1))).log()


def ours(vectors: Tensor) -> Tensor:
    """gif_kernels, as it runs by default on this device."""
    return gaussian_potential(vectors, t=T)


def products(vectors: Tensor) -> tuple[()]:
    """3 m^2 d FLOPs of matrix products: half of the pairs once for P, twice for the gradient."""
    half = vectors[: len(vectors) // 2]
    workspace = vectors.new_empty(CHUNK, len(half))
    for _ in range(3):
        for rows in vectors.split(CHUNK):
            torch.mm(rows, half.T, out=workspace[: len(rows)])
    return ()


@dataclass(frozen=True)
class Provider:
    """A way to compute the potential, to be measured.

    Args:
        name: in reports.
        prepare: from the vectors to the call that is timed; it returns the loss and its gradient.
        held: how many arrays of m x m float32 the call holds at once, about.
        package: what must be installed for it.
        computes: whether the call gives a loss and a gradient, which are checked; products alone give nothing.
    """

    name: str
    prepare: Callable[[Tensor], Callable[[], tuple[Tensor, ...]]]
    held: int = 0
    package: str = ""
    computes: bool = True


def _loss(name: str, make: Callable[[], Loss], *, held: int = 0, package: str = "") -> Provider:
    """One that autograd differentiates; ``make`` is called when it is wanted, since compiling takes long."""
    return Provider(name, lambda vectors: functools.partial(step, make(), vectors), held, package)


PROVIDERS = {
    provider.name: provider
    for provider in (
        _loss("ours", lambda: ours),
        _loss("compiled", compiled, held=4),
        _loss("dense", lambda: dense_potential, held=PAIRS_HELD),
        _loss("checkpointed", lambda: checkpointed),
        _loss("pdist", lambda: pdist, held=3),
        _loss("keops", lambda: keops, package="pykeops"),
        Provider("products", lambda vectors: functools.partial(products, vectors.detach()), computes=False),
    )
}


@pytest.fixture(autouse=True)
def _single_precision_is_exact() -> None:
    torch.set_float32_matmul_precision("highest")


@functools.cache
def inputs(shape: Shape) -> Tensor:
    """Rows about a common direction, as code vectors are before they are spread."""
    vectors = torch.randn(shape.m, shape.d, generator=torch.Generator().manual_seed(0)) + 0.3
    return vectors.to(DEVICE, shape.dtype).requires_grad_()


@functools.lru_cache(maxsize=1)
def exact(shape: Shape) -> tuple[Tensor, ...]:
    vectors = inputs(shape).detach().double().requires_grad_()
    return step(functools.partial(gaussian_potential, t=T, impl="blocked"), vectors)


def step(loss: Loss, vectors: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradient."""
    value = loss(vectors)
    return value.detach(), *torch.autograd.grad(value, vectors)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", FULL if metafunc.config.getoption("--full") else QUICK, ids=str)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_gaussian_potential(benchmark: BenchmarkFixture, shape: Shape, provider: str) -> None:
    form = PROVIDERS[provider]
    if form.package and importlib.util.find_spec(form.package) is None:
        pytest.skip(f"{form.package} is not installed")
    skip_unless_it_fits(f"{form.name}, {shape.m:,} rows,", form.held * FLOAT * shape.m**2, DEVICE)
    vectors = inputs(shape)
    call = form.prepare(vectors)
    errors = _errors(form, call(), shape) if form.computes else {}
    large = shape.m >= LARGE and DEVICE == "cpu"
    subject = Subject(
        kernel="gaussian_potential",
        provider=form.name,
        mode="loss+gradient",
        shape=f"m{shape.m}-d{shape.d}",
        dtype=str(shape.dtype).removeprefix("torch."),
        headline=shape.d == HEADLINE_WIDTH,
        identities=shape.m,
        flops=3 * shape.m**2 * shape.d,
        bytes=2 * shape.m * shape.d * shape.dtype.itemsize,
        loss_error=errors.get("loss"),
        gradient_error=errors.get("gradient"),
    )
    measure(benchmark, call, subject, rounds=3 if large else 15, warmup_rounds=0 if large else 2)


def _errors(form: Provider, found: tuple[Tensor, ...], shape: Shape) -> dict[str, float]:
    """Relative errors of the loss and of the gradient against float64; AssertionError where one is too large."""
    allowed = 2e-2 if shape.dtype != torch.float32 else 1e-4
    errors = {}
    for name, given, wanted in zip(("loss", "gradient"), found, exact(shape), strict=True):
        errors[name] = error = float((given.double() - wanted).norm() / wanted.norm())
        assert error < allowed, f"{form.name} is wrong by {error:.1e}, so its speed means nothing"
    return errors
