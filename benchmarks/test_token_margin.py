"""Token-margin loss: ours beside what a user would write, and beside its own matrix products alone.

`pytest benchmarks/test_token_margin.py --benchmark-json=results.json` for one shape; `--full` varies one property of it
at a time, with and without projections, in both dtypes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, measure
from benchmarks.heads import MARGIN, SCALE
from benchmarks.results import Subject
from gif_kernels import token_margin_loss
from gif_kernels.precision import PREFERS_ONEDNN, product

if TYPE_CHECKING:  # what a run on a GPU imports does without it
    from pytest_benchmark.fixture import BenchmarkFixture


@dataclass(frozen=True)
class Shape:
    """One point of the grid."""

    batch: int
    width: int
    length: int
    vocab: int
    projected: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.sizes}-{self.dtype_name}"

    @property
    def sizes(self) -> str:
        """All but the dtype."""
        projected = "-projected" if self.projected else ""
        return f"B{self.batch}-d{self.width}-l{self.length}-v{self.vocab}{projected}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def flops(self, backward: bool) -> int:
        """How many the products with the centres and the projections take: one forward, two backward."""
        compared = self.batch * self.length * self.vocab * self.width
        projected = self.batch * self.length * self.width**2 if self.projected else 0
        return 2 * (3 if backward else 1) * (compared + projected)

    def bytes(self, backward: bool) -> int:
        """How many must move at least: each input is read once, and each gradient is written once."""
        rows = self.batch + self.length * self.vocab + (self.length * self.width if self.projected else 0)
        return (2 if backward else 1) * rows * self.width * self.dtype.itemsize


BASE = Shape(1024, 512, 5, 20, False, torch.float32)
VARIED = [
    *(replace(BASE, batch=batch) for batch in (128, 512, 1024, 2048, 8192)),
    *(replace(BASE, width=width) for width in (256, 768)),
    *(replace(BASE, length=length, vocab=vocab) for length, vocab in ((7, 10), (10, 5))),
]
QUICK = [replace(BASE, projected=projected) for projected in (False, True)]
FULL = [
    replace(shape, projected=projected, dtype=dtype)
    for dtype, projected, shape in itertools.product((torch.float32, torch.bfloat16), (False, True), VARIED)
]

Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Products(Protocol):
    """The matrix products of a loss."""

    def __call__(self, z: Tensor, w: Tensor, projections: Tensor | None, *, backward: bool) -> None: ...


def reference_loop(z: Tensor, w: Tensor, codes: Tensor, projections: Tensor | None) -> Tensor:
    """A head a token, one after another."""
    return token_margin_loss(z, w, codes, projections=projections, margin=MARGIN, scale=SCALE, impl="reference")


def batched_eager(z: Tensor, w: Tensor, codes: Tensor, projections: Tensor | None) -> Tensor:
    """All tokens in one product, autograd for the rest: what a careful user writes."""
    z = F.normalize(z.float(), dim=1)
    w = F.normalize(w.float(), dim=2)
    if projections is None:
        cosine = torch.einsum("bd,lvd->blv", z, w)
    else:
        flat = projections.float().flatten(0, 1)
        u = F.normalize((z @ flat.T).view(len(z), len(w), -1), dim=2)
        cosine = torch.einsum("bli,lvi->blv", u, w)
    own = F.one_hot(codes, w.shape[1]).bool()
    angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6)) + MARGIN.m2
    past = angle > math.pi
    target = torch.where(past, -torch.cos(angle) - 2, torch.cos(angle))
    logits = SCALE * torch.where(own, target, cosine)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def compiled() -> Loss:
    """`batched_eager` through torch.compile, for one shape alone."""
    torch.compiler.reset()
    return torch.compile(batched_eager, dynamic=False)


def ours(z: Tensor, w: Tensor, codes: Tensor, projections: Tensor | None) -> Tensor:
    """gif_kernels, as it runs by default on this device."""
    return token_margin_loss(z, w, codes, projections=projections, margin=MARGIN, scale=SCALE)


def torch_products(z: Tensor, w: Tensor, projections: Tensor | None, *, backward: bool) -> None:
    """The matrix products alone as PyTorch multiplies, at the shapes of the loss: the floor of what a user writes."""
    _products(z, w, projections, torch.matmul, backward)


def own_products(z: Tensor, w: Tensor, projections: Tensor | None, *, backward: bool) -> None:
    """The same as the loss on a CPU multiplies: the floor of its implementation."""
    _products(z, w, projections, functools.partial(product, operand=z.dtype), backward)


def _products(
    z: Tensor, w: Tensor, projections: Tensor | None, multiply: Callable[[Tensor, Tensor], Tensor], backward: bool
) -> None:
    length, vocab, inner = w.shape
    if projections is None:
        flat = w.reshape(length * vocab, inner)
        cosine = multiply(flat, z.T).to(z.dtype)
        if backward:
            multiply(cosine, z)
            multiply(cosine.T, flat)
        return
    matrix = projections.reshape(length * inner, -1)
    u = multiply(z, matrix.T).to(z.dtype).view(len(z), length, inner).transpose(0, 1)
    cosine = multiply(w, u.transpose(1, 2)).to(z.dtype)
    if backward:
        multiply(cosine, u)
        raw = multiply(cosine.transpose(1, 2), w).to(z.dtype).transpose(0, 1).reshape(len(z), -1)
        multiply(raw.T, z)
        multiply(raw, matrix)


class Inputs(NamedTuple):
    """What the loss is given: embeddings (B, d), centres (l, v, d), codes (B, l), perhaps projections (l, d, d)."""

    z: Tensor
    w: Tensor
    codes: Tensor
    projections: Tensor | None


@dataclass(frozen=True)
class Provider:
    """A way to compute the loss, to be measured.

    Args:
        name: in reports.
        prepare: from the inputs, and whether gradients are wanted, to the call that is timed. It returns the loss, and
            the gradients where they are wanted.
        computes: whether the call gives these, which are checked; products alone give nothing.
        available: whether it says anything here.
    """

    name: str
    prepare: Callable[[Inputs, bool], Callable[[], list[Tensor]]]
    computes: bool = True
    available: Callable[[], bool] = lambda: True


def _loss(name: str, make: Callable[[], Loss]) -> Provider:
    """One that autograd differentiates; ``make`` is called when it is wanted, since compiling takes long."""
    return Provider(name, lambda tensors, backward: functools.partial(step, make(), tensors, backward))


def _products_alone(name: str, multiply: Products, available: Callable[[], bool] = lambda: True) -> Provider:
    def prepare(tensors: Inputs, backward: bool) -> Callable[[], list[Tensor]]:
        projections = None if tensors.projections is None else tensors.projections.detach()
        z, w = tensors.z.detach(), tensors.w.detach()

        def call() -> list[Tensor]:
            multiply(z, w, projections, backward=backward)
            return []

        return call

    return Provider(name, prepare, computes=False, available=available)


def _multiplies_otherwise() -> bool:
    """Whether the loss multiplies by another library than PyTorch does."""
    return PREFERS_ONEDNN and bool(torch.backends.mkldnn.enabled)


PROVIDERS = {
    provider.name: provider
    for provider in (
        _loss("ours", lambda: ours),
        _loss("compiled", compiled),
        _loss("batched eager", lambda: batched_eager),
        _loss("loop", lambda: reference_loop),
        _products_alone("products", torch_products),
        _products_alone("own products", own_products, _multiplies_otherwise),
    )
}


@pytest.fixture(autouse=True)
def _single_precision_is_exact() -> None:
    torch.set_float32_matmul_precision("highest")


def inputs(shape: Shape) -> Inputs:
    """Random ones, the same each time."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE, shape.dtype).requires_grad_()

    z, w = normal(shape.batch, shape.width), normal(shape.length, shape.vocab, shape.width)
    projections = normal(shape.length, shape.width, shape.width) if shape.projected else None
    codes = torch.randint(shape.vocab, (shape.batch, shape.length), generator=generator).to(DEVICE)
    return Inputs(z, w, codes, projections)


def step(loss: Loss, tensors: Inputs, backward: bool) -> list[Tensor]:
    """The loss, and its gradients where they are wanted."""
    if not backward:
        with torch.no_grad():
            return [loss(*tensors)]
    value = loss(*tensors)
    wanted = [tensors.z, tensors.w] if tensors.projections is None else [tensors.z, tensors.w, tensors.projections]
    return [value, *torch.autograd.grad(value, wanted)]


@functools.lru_cache(maxsize=1)  # one after another, the providers of a point ask for the same
def exact(shape: Shape, backward: bool) -> list[Tensor]:
    """`step` of the reference in float64."""
    z, w, codes, projections = inputs(shape)

    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    doubles = Inputs(double(z), double(w), codes, None if projections is None else double(projections))
    return step(reference_loop, doubles, backward)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = FULL if metafunc.config.getoption("--full") else QUICK
    metafunc.parametrize("shape", shapes, ids=str)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_token_margin(benchmark: BenchmarkFixture, shape: Shape, mode: str, provider: str) -> None:
    form, backward = PROVIDERS[provider], mode == "forward+backward"
    if not form.available():
        pytest.skip("PyTorch multiplies as the loss does")
    call = form.prepare(inputs(shape), backward)
    if form.computes:
        _check(form, call(), shape, backward)
    subject = Subject(
        kernel="token_margin",
        provider=form.name,
        mode=mode,
        shape=shape.sizes,
        dtype=shape.dtype_name,
        headline=shape in QUICK,
        flops=shape.flops(backward),
        bytes=shape.bytes(backward),
    )
    measure(benchmark, call, subject)


def _check(form: Provider, results: list[Tensor], shape: Shape, backward: bool) -> None:
    """Against float64, before anything is timed."""
    allowed = 2e-2 if shape.dtype != torch.float32 else 1e-4
    for found, wanted in zip(results, exact(shape, backward), strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < allowed, f"{form.name} is wrong by {error:.1e}, so its speed means nothing"
