"""Calls of every op on inputs drawn afresh, and what float64 says of their results."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import Device
from gif_kernels import (
    CodeRegression,
    code_contrast_loss,
    code_regression_loss,
    gaussian_potential,
    gradcheck,
    max_cosine,
    nearest_centroid,
    token_margin_loss,
    uniformity_step_,
    vector_step_,
)

Errors = Iterator[tuple[str, float, float]]
"""Name, error and what is allowed of it."""

COSINE_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Rounded operands are the inputs themselves; what is left is the order of sums, and norms in float32."""
COORDINATE_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
"""A unit in the last place of a coordinate below 1, since rounding is stochastic, and what precedes it."""
TF32_ALLOWED = 5e-3
LOSS_ALLOWED = 5e-3
"""The error of a loss of few rows, which are rounded to bfloat16."""
MAX_RATIO = 3
"""Our largest error may be so many times PyTorch's own: the largest of a few hundred is chance."""
LR = 0.1
IN_PLACE = (uniformity_step_, vector_step_)
"""Ops that change their ``table``."""


@dataclass(frozen=True)
class Case:
    """One call of an op: its arguments by name, of which ``leaves`` get gradients."""

    op: Callable[..., Any]
    what: str
    arguments: dict[str, Any]
    leaves: tuple[str, ...] = ()

    def __str__(self) -> str:
        tensors = [x for x in self.arguments.values() if isinstance(x, Tensor)]
        dtypes = dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point())
        return f"{self.op.__name__} {self.what} {' and '.join(dtypes)}"

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same call with each tensor changed."""
        return replace(self, arguments={name: _changed(x, change) for name, x in self.arguments.items()})

    def strided(self) -> Case:
        """The same values in memory that is not contiguous."""
        return self.mapped(lambda x: torch.stack([x, x], -1)[..., 0])

    def outputs(self, device: Device) -> list[Tensor]:
        """What the kernel gives: a loss and its gradients, what a search finds, or what a step says and its table."""
        if self.op in IN_PLACE:
            given = self.arguments["table"]
            table = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
            table.copy_(given)  # not clone, which makes it contiguous
            return [self.op(**self.arguments | {"table": table}, impl=device.impl), table]
        if not self.leaves:
            return list(self.op(**self.arguments, impl=device.impl))
        leaves = {name: self.arguments[name].detach().requires_grad_() for name in self.leaves}
        value = self.op(**self.arguments | leaves, impl=device.impl)
        slopes = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()), slopes)]

    def errors(self, device: Device) -> Errors:
        """Against float64 on the same rounded inputs."""
        if self.leaves:
            return self._gradients(device)
        if self.op is vector_step_:
            return self._vector_step(device)
        return self._step(device) if self.op is uniformity_step_ else self._search(device)

    def _gradients(self, device: Device) -> Errors:
        leaves = {name: self.arguments[name].detach().requires_grad_() for name in self.leaves}
        for found in gradcheck(self.op, **self.arguments | leaves, impl=device.impl, show=False):
            yield f"{found.name}, rms", found.rms, max(2 * found.torch_rms, found.noise)
            yield f"{found.name}, largest", found.max, max(MAX_RATIO * found.torch_max, found.noise)

    def _search(self, device: Device) -> Errors:
        """The cosines, and those of the rows that were named, to the best there are."""
        found = self.outputs(device)
        index, cosine = found if self.op is nearest_centroid else reversed(found)
        rows = self.arguments["vectors"]
        cosines = self._cosines(F.normalize(rows.double(), dim=-1))
        best, named = cosines.amax(1), cosines.gather(1, index[:, None])[:, 0]
        allowed = _allowed(COSINE_ALLOWED[rows.dtype])
        yield "cosine", float((cosine.double() - best).abs().max()), allowed
        yield "cosine of the index", float((named - best).abs().max()), 2 * allowed

    def _cosines(self, rows: Tensor) -> Tensor:
        others = self.arguments.get("centroids", self.arguments.get("others"))
        if others is None:
            return (rows @ rows.T).fill_diagonal_(-torch.inf)
        others = F.normalize(others.double(), dim=-1)
        if others.ndim == 2:
            return rows @ others.T
        segment = torch.repeat_interleave(self.arguments["offsets"].diff())
        return torch.einsum("nd,nkd->nk", rows, others[segment])

    def _step(self, device: Device) -> Errors:
        """The rows that were named; and that no other was touched."""
        table, index = self.arguments["table"], self.arguments["index"]
        loss, moved = self.outputs(device)
        expected = table[index].double()
        every = torch.arange(len(index), device=table.device)
        truth = uniformity_step_(expected, every, lr=LR, impl="reference")
        allowed = _allowed(COORDINATE_ALLOWED[table.dtype])
        yield "loss", abs(float(loss) - float(truth)), LOSS_ALLOWED
        yield "coordinates", float((moved[index].double() - expected).abs().max()), allowed
        others = torch.ones(len(table), dtype=torch.bool, device=table.device)
        others[index] = False
        yield "rows that stay", float((moved[others] != table[others]).sum()), 0.0

    def _vector_step(self, device: Device) -> Errors:
        """The rows that were named, how many of them stayed, and that no other was touched."""
        table, rows = self.arguments["table"], self.arguments["rows"]
        stayed, moved = self.outputs(device)
        expected = table.double()  # a copy: no table is float64
        truth = vector_step_(**self.arguments | {"table": expected}, impl="reference")
        yield "coordinates", float((moved.double() - expected).abs().max()), COORDINATE_ALLOWED[table.dtype]
        yield "rows that stayed", abs(float(stayed) - float(truth)), 0.0
        others = torch.ones(len(table), dtype=torch.bool, device=table.device)
        others[rows[rows >= 0]] = False
        yield "rows that are not named", float((moved[others] != table[others]).sum()), 0.0


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, CodeRegression):
        return CodeRegression(*(_changed(x, change) for x in value))
    return change(value) if isinstance(value, Tensor) else value


def _allowed(allowed: float) -> float:
    return max(allowed, TF32_ALLOWED) if torch.backends.cuda.matmul.fp32_precision == "tf32" else allowed


@dataclass(frozen=True)
class Draw:
    """How inputs are drawn: on what device, in what dtype, by which generator of sizes. ``tiny``: for a rehearsal."""

    device: str
    dtype: torch.dtype
    sizes: random.Random
    tiny: bool

    def near(self, size: int) -> int:
        """A size about that one, seldom a multiple of anything."""
        return self.sizes.randint(size - size // 16 - 1, size + size // 16 + 1)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device)


def _token_margin(draw: Draw) -> Iterator[Case]:
    full = [(5, 2, 5, 48, 0), (67, 5, 20, 512, 128), (67, 5, 20, 512, 0), (3000, 4, 256, 400, 0), (1000, 5, 20, 512, 0)]
    for size, length, vocab, width, inner in [(5, 2, 3, 20, 0)] if draw.tiny else full:
        batch = draw.near(size)
        centers = draw.randn(length, vocab, inner or width)
        arguments: dict[str, Any] = {"embeddings": draw.randn(batch, width), "centers": centers}
        codes = draw.randint(vocab, batch, length)
        codes[1::3] = -1
        arguments |= {"codes": codes, "reduction": "none"}
        leaves: tuple[str, ...] = ("embeddings", "centers")
        what = f"B {batch}, {length} x {vocab} x {width}"
        if inner:
            arguments["projections"] = draw.randn(length, inner, width) / width**0.5
            leaves, what = (*leaves, "projections"), f"{what} to {inner}"
        yield Case(token_margin_loss, what, arguments, leaves)
    regression = CodeRegression(draw.randn(9, width), draw.randint(9, batch), 0.5)
    pulled = {"regression": regression, "reduction": "mean"}
    yield Case(token_margin_loss, f"{what}, regression, mean", arguments | pulled, leaves)


def _contrast(draw: Draw) -> Iterator[Case]:
    full = [(5, 9, 48), (67, 90, 130), (64, 3072, 512), (1000, 3000, 512), (1024, 3072, 512)]
    for size, others, width in [(5, 9, 20)] if draw.tiny else full:
        batch, count = (draw.near(x) for x in (size, others))
        arguments: dict[str, Any] = {"embeddings": draw.randn(batch, width), "vectors": draw.randn(count, width)}
        arguments |= {"labels": draw.randint(count, batch), "reduction": "none"}
        arguments["labels"][1::3] = -1
        yield Case(code_contrast_loss, f"{batch} x {count} x {width}", arguments, ("embeddings", "vectors"))
    candidates = draw.randint(count, count)
    named = {"candidates": candidates, "labels": candidates[draw.randint(count, batch)], "reduction": "mean"}
    yield Case(
        code_contrast_loss,
        f"{batch} x {count} x {width}, candidates, mean",
        arguments | named,
        ("embeddings", "vectors"),
    )


def _regression(draw: Draw) -> Iterator[Case]:
    full = [(5, 48), (67, 130), (1000, 512), (3000, 768)]
    for size, width in [(5, 20)] if draw.tiny else full:
        batch = draw.near(size)
        arguments: dict[str, Any] = {"embeddings": draw.randn(batch, width), "targets": draw.randn(batch, width)}
        arguments["reduction"] = "none"
        yield Case(code_regression_loss, f"B {batch} x {width}", arguments, ("embeddings", "targets"))
    rows = {"rows": draw.randint(batch, batch), "reduction": "mean"}
    yield Case(code_regression_loss, f"B {batch} x {width}, rows, mean", arguments | rows, ("embeddings",))


def _potential(draw: Draw) -> Iterator[Case]:
    full = [(5, 48), (67, 512), (1050, 512), (2100, 768), (5000, 400), (9000, 512)]
    for size, width in [(17, 16)] if draw.tiny else full:
        m = draw.near(size)
        arguments: dict[str, Any] = {"vectors": draw.randn(m, width) + 0.3}
        yield Case(gaussian_potential, f"{m} x {width}", arguments, ("vectors",))
    n = m // 3
    share = {"vectors": arguments["vectors"][n : 2 * n], "others": arguments["vectors"], "offset": n}
    yield Case(gaussian_potential, f"{n} of {m} x {width}", share, ("vectors",))


def _step(draw: Draw) -> Iterator[Case]:
    full = [(500, 67, 48), (5000, 2049, 512), (9000, 4500, 400)]
    for rows, size, width in [(20, 9, 16)] if draw.tiny else full:
        n = draw.near(size)
        table = F.normalize(draw.randn(rows, width).float() + 0.3, dim=1).to(draw.dtype)
        index = torch.randperm(rows, device=draw.device)[:n]
        yield Case(uniformity_step_, f"{n} of {rows} x {width}", {"table": table, "index": index, "lr": LR})


def _vector_step(draw: Draw) -> Iterator[Case]:
    full = [(500, 67, 48), (5000, 3072, 512), (300, 2049, 2048)]
    for n, size, width in [(20, 9, 16)] if draw.tiny else full:
        count = draw.near(size)
        table = F.normalize(draw.randn(n, width).float(), dim=1).to(draw.dtype)
        rows = draw.randint(n + 1, count) - 1
        gradient = torch.randn(count, width, device=draw.device)
        gradient[0, 0] = torch.nan
        arguments: dict[str, Any] = {"table": table, "rows": rows, "gradient": gradient, "lr": LR}
        yield Case(vector_step_, f"{count} of {n} x {width}", arguments)
    named = {"row_ids": draw.randint(1 << 40, n), "seed": draw.randint(1 << 40)}
    yield Case(vector_step_, f"{count} of {n} x {width}, row_ids", arguments | named)


def _nearest(draw: Draw) -> Iterator[Case]:
    full = [(67, 5, 48), (3000, 20, 512), (3000, 300, 400)]
    for size, count, width in [(9, 3, 20)] if draw.tiny else full:
        n = draw.near(size)
        arguments = {"vectors": draw.randn(n, width), "centroids": draw.randn(count, width)}
        yield Case(nearest_centroid, f"{n} x {count} x {width}", arguments)
    offsets = torch.tensor([0, n // 7, n // 7, n // 2, n], device=draw.device)
    segments = {"centroids": draw.randn(4, count, width), "offsets": offsets}
    yield Case(nearest_centroid, f"{n} in 4 segments x {count} x {width}", arguments | segments)


def _largest(draw: Draw) -> Iterator[Case]:
    full = [(67, 48), (2050, 512), (3000, 400)]
    for size, width in [(9, 20)] if draw.tiny else full:
        n = draw.near(size)
        arguments = {"vectors": draw.randn(n, width)}
        yield Case(max_cosine, f"{n} x {width}", arguments)
    yield Case(max_cosine, f"{n} x {width}, others", arguments | {"others": draw.randn(n // 2, width)})


CASES: dict[str, Callable[[Draw], Iterator[Case]]] = {
    "token_margin_loss": _token_margin,
    "code_contrast_loss": _contrast,
    "gaussian_potential": _potential,
    "uniformity_step_": _step,
    "vector_step_": _vector_step,
    "nearest_centroid": _nearest,
    "max_cosine": _largest,
    "code_regression_loss": _regression,
}
"""Cases by the name of their op, in order of worth."""
