"""Gaussian potential and its gradient: ours beside what a user would write, and beside its own products alone.

`pytest benchmarks/test_gaussian_potential.py --benchmark-json=results.json` for 2,048 rows; `--full` for the whole
grid, of which `-k m8192-d512` picks one size.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import DEVICE, measure
from benchmarks.memory import skip_unless_it_fits
from benchmarks.spreading import PAIRS_HELD, T, dense_potential
from gif_kernels import gaussian_potential

CHUNK = 1024
"""Rows of pairs that the chunked form holds at once."""
LARGE = 8192
"""Rows from which a call takes seconds on a CPU: fewer repetitions."""


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

    total = sum(checkpoint(chunk_sum, rows, h, use_reentrant=False) for rows in h.split(CHUNK))
    return ((total - m) / (m * (m - 1))).log()


@functools.cache
def compiled() -> Callable[[Tensor], Tensor]:
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


def products(vectors: Tensor) -> None:
    """3 m^2 d FLOPs of matrix products: half of the pairs once for P, twice for the gradient."""
    half = vectors[: len(vectors) // 2]
    workspace = vectors.new_empty(CHUNK, len(half))
    for _ in range(3):
        for rows in vectors.split(CHUNK):
            torch.mm(rows, half.T, out=workspace[: len(rows)])


PROVIDERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "ours": lambda: ours,
    "compiled": compiled,
    "dense": lambda: dense_potential,
    "checkpointed": lambda: checkpointed,
    "pdist": lambda: pdist,
    "keops": lambda: keops,
}
HELD = {"compiled": 4, "dense": PAIRS_HELD, "pdist": 3}
"""How many arrays of m x m float32 a provider holds at once, about."""


@pytest.fixture(autouse=True)
def _single_precision_is_exact():
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


def step(loss: Callable[[Tensor], Tensor], vectors: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradient."""
    value = loss(vectors)
    return value.detach(), *torch.autograd.grad(value, vectors)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", FULL if metafunc.config.getoption("--full") else QUICK, ids=str)


@pytest.mark.parametrize("provider", [*PROVIDERS, "products"])
def test_gaussian_potential(benchmark, shape: Shape, provider: str) -> None:
    if provider == "keops" and importlib.util.find_spec("pykeops") is None:
        pytest.skip("pykeops is not installed")
    skip_unless_it_fits(f"{provider}, {shape.m:,} rows,", HELD.get(provider, 0) * 4 * shape.m**2, DEVICE)
    vectors = inputs(shape)
    facts: dict[str, float] = {}
    if provider == "products":
        call = functools.partial(products, vectors.detach())
    else:
        loss = PROVIDERS[provider]()
        allowed = 2e-2 if shape.dtype != torch.float32 else 1e-4
        for name, found, wanted in zip(("loss", "gradient"), step(loss, vectors), exact(shape), strict=True):
            error = float((found.double() - wanted).norm() / wanted.norm())
            assert error < allowed, f"{provider} is wrong by {error:.1e}, so its speed means nothing"
            assert math.isfinite(error)
            facts[f"{name}_error"] = error
        call = functools.partial(step, loss, vectors)
    large = shape.m >= LARGE and DEVICE == "cpu"
    measure(
        benchmark,
        call,
        kernel="gaussian_potential",
        provider=provider,
        mode="loss+gradient",
        shape=f"m{shape.m}-d{shape.d}",
        dtype=str(shape.dtype).removeprefix("torch."),
        rounds=3 if large else 15,
        warmup_rounds=0 if large else 2,
        flops=3 * shape.m**2 * shape.d,
        bytes=2 * shape.m * shape.d * shape.dtype.itemsize,
        identities=shape.m,
        headline=shape.d == 512,
        **facts,
    )
