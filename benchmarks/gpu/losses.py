"""The losses forward and backward: launches, time in graphs over inputs that take turns, and what others write.

Every form is timed alike: one graph of all the inputs' steps. The speed of torch.compile is thus under CUDA graphs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import ceilings
from benchmarks.gpu.device import rotated, tf32
from benchmarks.gpu.records import Goal, at_least, at_most
from benchmarks.gpu.stage import Run
from benchmarks.heads import MARGIN, SCALE
from benchmarks.test_token_margin import batched_eager
from gif_kernels import code_contrast_loss, code_regression_loss, token_margin_loss

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
TF32_ALLOWED = 1e-2
BASELINE_ALLOWED = 0.2
"""What others write in bfloat16 rounds cosines that are multiplied by 64."""
MOST_LAUNCHES, FASTER, NO_SLOWER = at_most(3), at_least(1.5), at_least(1)

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """A loss at one size. ``leaves`` of its arguments have gradients; ``same``: what others write for it."""

    what: str
    loss: Loss
    make: Callable[[], list[Tensor]]
    leaves: int
    dtype: torch.dtype
    same: Loss | None
    flops: int
    tf32: bool = False
    launches: Goal | None = None
    faster: Goal | None = None

    @property
    def allowed(self) -> float:
        return TF32_ALLOWED if self.tf32 else ALLOWED[self.dtype]


def run(run: Run) -> None:
    """Ours at every setting first; then the others, which take longest to compile."""
    taken: dict[str, float] = {}
    found = list(_settings(run))
    for setting in run.points(found):
        with run.attempt(setting.what), tf32(setting.tf32):
            _ours(run, setting, taken)
    for setting in run.points(found):
        if setting.same is not None and setting.what in taken:
            with tf32(setting.tf32):
                _theirs(run, setting, taken[setting.what])
    _libraries(run)


def _settings(run: Run) -> Iterator[Setting]:
    """One of each loss first: what others write is compiled anew for each, which takes 15 s."""
    low, full = run.device.low, torch.float32
    batch, large = run.pick((1024, [8192]), (5, []))
    yield _token(run, low, batch, False)
    yield _contrast(run, low, False)
    yield _regression(run, low)
    yield from (_token(run, low, size, False) for size in large)
    yield _token(run, low, batch, True)
    yield from (_token(run, full, size, False) for size in [batch, *large])
    yield _token(run, full, batch, True)
    yield from (_contrast(run, full, allowed) for allowed in (False, True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(run: Run, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=run.device.name).to(dtype)


def _token(run: Run, dtype: torch.dtype, batch: int, projected: bool) -> Setting:
    length, vocab, width = run.pick((5, 20, 512), (2, 3, 16))

    def make() -> list[Tensor]:
        z = _random(run, batch, width, dtype=dtype)
        w = _random(run, length, vocab, width, dtype=dtype)
        codes = torch.randint(vocab, (batch, length), device=run.device.name)
        return [z, w, *([_random(run, length, width, width, dtype=dtype)] if projected else []), codes]

    def ours(z: Tensor, w: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        *projections, codes = rest
        return token_margin_loss(z, w, codes, projections=projections[0] if projections else None, **options)

    def same(z: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        *projections, codes = rest
        if dtype == torch.float32:
            return batched_eager(z, w, codes, projections[0] if projections else None)
        return _low_tokens(z, w, codes, projections[0] if projections else None)

    products = batch * length * width * (vocab + (width if projected else 0))
    what = f"token margin {_name(dtype)} B {batch:,}{', projected' if projected else ''}"
    return Setting(
        what, ours, make, 3 if projected else 2, dtype, same, 6 * products,
        launches=None if projected else MOST_LAUNCHES, faster=None if projected else FASTER,
    )  # fmt: skip


def _low_tokens(z: Tensor, w: Tensor, codes: Tensor, projections: Tensor | None) -> Tensor:
    """What `batched_eager` computes, with products of the inputs' own precision."""
    z, w = F.normalize(z.float(), dim=1).to(z.dtype), F.normalize(w.float(), dim=2).to(w.dtype)
    if projections is None:
        cosine = torch.einsum("bd,lvd->blv", z, w).float()
    else:
        u = (z @ projections.flatten(0, 1).T).view(len(z), len(w), -1)
        cosine = torch.einsum("bli,lvi->blv", F.normalize(u.float(), dim=2).to(w.dtype), w).float()
    own = F.one_hot(codes, w.shape[1]).bool()
    logits = SCALE * torch.where(own, _margin(cosine), cosine)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def _margin(cosine: Tensor) -> Tensor:
    angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6)) + MARGIN.m2
    return torch.where(angle > torch.pi, -torch.cos(angle) - 2, torch.cos(angle))


def _contrast(run: Run, dtype: torch.dtype, allowed: bool) -> Setting:
    batch, count, width = run.pick((1024, 3072, 512), (5, 9, 16))

    def make() -> list[Tensor]:
        z, h = _random(run, batch, width, dtype=dtype), _random(run, count, width, dtype=dtype)
        return [z, h, torch.randint(count, (batch,), device=run.device.name)]

    def same(z: Tensor, h: Tensor, labels: Tensor) -> Tensor:
        unit = (F.normalize(x.float(), dim=1).to(dtype) for x in (z, h))
        cosine = (next(unit) @ next(unit).T).float()
        target = _margin(cosine.gather(1, labels[:, None]))
        return F.cross_entropy(SCALE * cosine.scatter(1, labels[:, None], target), labels)

    name = "TF32" if allowed else _name(dtype)
    what = f"contrast {name} {batch:,} x {count:,}"
    return Setting(
        what, code_contrast_loss, make, 2, dtype, same, 6 * batch * count * width, tf32=allowed, faster=NO_SLOWER
    )


def _regression(run: Run, dtype: torch.dtype) -> Setting:
    batch, width = run.pick((8192, 512), (5, 16))

    def make() -> list[Tensor]:
        return [_random(run, batch, width, dtype=dtype) for _ in range(2)]

    def same(z: Tensor, h: Tensor) -> Tensor:
        return 0.5 * (F.cosine_similarity(z.float(), h.float()) - 1).square().mean()

    what = f"regression {_name(dtype)} B {batch:,}"
    return Setting(what, code_regression_loss, make, 2, dtype, same, 8 * batch * width, faster=FASTER)


def _step(setting: Setting, loss: Loss, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients, as a training step asks for them: what comes in from above is there already."""
    leaves = [x.detach().requires_grad_() for x in inputs[: setting.leaves]]
    rest = inputs[setting.leaves :]
    one = torch.ones((), device=leaves[0].device, dtype=torch.promote_types(leaves[0].dtype, torch.float32))

    def step() -> tuple[Tensor, ...]:
        value = loss(*leaves, *rest)
        return value.detach(), *torch.autograd.grad(value, leaves, one.expand(value.shape))

    return step


def _truth(setting: Setting, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    return _step(setting, partial(setting.loss, impl="reference"), wide)()


def _ours(run: Run, setting: Setting, taken: dict[str, float]) -> None:
    loss = partial(setting.loss, impl=run.device.impl)
    inputs = rotated(run.device, setting.make)
    steps = [_step(setting, loss, x) for x in inputs]
    if not run.correct(setting.what, steps[0], _truth(setting, inputs[0]), setting.allowed):
        return
    rows = _step(setting, partial(loss, reduction="none"), inputs[0])
    launched = run.device.launches(rows)
    run.record(f"{setting.what}: launches, loss of each row", launched, "", goal=setting.launches)
    run.record(f"{setting.what}: launches, mean", run.device.launches(steps[0]), "", status="note")
    taken[setting.what] = run.timed(setting.what, steps)
    run.record(setting.what, taken[setting.what] * 1e6, "us", floor=_floor(run, setting, inputs[0]) * 1e6)
    run.record(
        f"{setting.what}: as the host launches it", run.device.eager_seconds(steps[0]) * 1e6, "us", status="note"
    )


def _floor(run: Run, setting: Setting, inputs: Sequence[Tensor]) -> float:
    """Seconds of the products at the ceiling of their precision, or of reading inputs and writing gradients."""
    ceiling = ceilings.ceiling(run, ceilings.LOW if setting.dtype != torch.float32 else ceilings.TF32)
    if setting.dtype == torch.float32 and not setting.tf32:  # three products in TF32 give one in float32
        ceiling = max(ceilings.ceiling(run, ceilings.FLOAT32), ceiling / 3)
    moved = sum(x.nbytes for x in inputs) + sum(x.nbytes for x in inputs[: setting.leaves])
    return max(setting.flops / ceiling, moved / ceilings.ceiling(run, ceilings.COPY))


def _theirs(run: Run, setting: Setting, ours: float) -> None:
    assert setting.same is not None
    inputs = rotated(run.device, setting.make)
    torch.compiler.reset()
    compiled = run.device.compile(setting.same)
    for name, loss, goal in (("eager", setting.same, None), ("torch.compile", compiled, setting.faster)):
        what = f"{setting.what}: {name}"
        with run.attempt(what, ours=False):
            steps = [_step(setting, loss, x) for x in inputs]
            if run.correct(what, steps[0], _truth(setting, inputs[0]), BASELINE_ALLOWED, ours=False):
                taken = run.timed(what, steps)
                run.record(what, taken * 1e6, "us", status="note")
                run.record(f"{setting.what}: faster than {name}", taken / ours, "x", goal=goal)


def _libraries(run: Run) -> None:
    """Cross entropies that never hold the logits, on unit rows times the scale, without a margin: where they are."""
    for name, loss in (("liger_kernel", _liger), ("cut_cross_entropy", _cce)):
        if importlib.util.find_spec(name) is None:
            run.record(f"contrast: {name}", status="missing")
            continue
        setting = _contrast(run, run.device.low, False)
        with run.attempt(f"contrast: {name}", ours=False):
            steps = [_step(setting, loss, x) for x in rotated(run.device, setting.make)]
            run.record(
                f"contrast: {name}", run.device.seconds(steps) * 1e6, "us", status="note", note="without a margin"
            )


def _unit(rows: Tensor, scale: float = 1.0) -> Tensor:
    return (scale * F.normalize(rows.float(), dim=1)).to(rows.dtype)


def _liger(z: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(_unit(h), _unit(z, SCALE), labels)
    return loss


def _cce(z: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(_unit(z, SCALE), _unit(h), labels)
    return loss
