"""One training step of the head alone against the number of identities: forward, backward, optimizer.

`pytest benchmarks/test_head_scaling.py` to 100 thousand identities, `--full` to 64 million. Baselines are at their
best: one product, gradients in place, and Partial FC keeps gradients and momentum of the sampled rows only. One that
does not fit in memory is skipped with the bytes it would need. GIF's vectors lie in a sparse memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import DEVICE, measure
from benchmarks.memory import kept_bytes
from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.codes import code_length
from gif_kernels import AngularMargin, code_contrast_loss

BATCH, WIDTH, VOCAB = 256, 512, 20
MARGIN, SCALE = AngularMargin(m2=0.5), 64.0
POOL = 16  # batches that take turns
QUICK = (10_000, 100_000)
FULL = (10_000, 100_000, 1_000_000, 10_000_000, 64_000_000)
FLOAT = 4

Step = Callable[[Tensor, Tensor], None]


def gif_step(recipe: str) -> Callable[[int, list[Tensor], Path], Step]:
    """GIFLoss and its optimizer; codes are the numbers of the identities in base v."""

    def build(m: int, labels: list[Tensor], folder: Path) -> Step:
        length = code_length(m, VOCAB)
        codes = torch.empty(m, length, dtype=torch.uint8)
        rest = torch.arange(m)
        for place in reversed(range(length)):
            codes[:, place] = rest % VOCAB
            rest //= VOCAB
        raw = np.memmap(folder / f"{recipe}-{m}", np.float32, "w+", shape=(m, WIDTH))
        head = GIFLoss(
            IdentityCodes(codes, VOCAB), CodeVectors(torch.from_numpy(raw), normalized=True), WIDTH, recipe=recipe
        )
        for batch in labels:  # only the rows that the pool of batches reads are written: the file stays sparse
            rows = torch.cat([batch.cpu(), head.codes.siblings(batch.cpu(), head.recipe.siblings).flatten()]).unique()
            raw[rows.numpy()] = F.normalize(torch.randn(len(rows), WIDTH), dim=1).numpy()
        return _trained(head.to(DEVICE))

    return build


def _trained(head: nn.Module) -> Step:
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, fused=True)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        head(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def full_softmax(m: int, labels: list[Tensor], folder: Path) -> Step:
    """A centre an identity, all of them in every step."""
    weight = nn.Parameter(torch.randn(m, WIDTH, device=DEVICE) / 100)
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, fused=True)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        code_contrast_loss(embeddings, weight, labels, margin=MARGIN, scale=SCALE).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def partial_fc(rate: float) -> Callable[[int, list[Tensor], Path], Step]:
    """The batch's centres and others at random; only their rows get gradients and move."""

    def build(m: int, labels: list[Tensor], folder: Path) -> Step:
        weight = torch.randn(m, WIDTH, device=DEVICE) / 100
        momentum = torch.zeros_like(weight)

        def step(embeddings: Tensor, labels: Tensor) -> None:
            chosen = torch.cat([labels, torch.randint(m, (int(rate * m),), device=DEVICE)]).unique()
            rows = weight[chosen].requires_grad_()
            code_contrast_loss(embeddings, rows, labels, candidates=chosen, margin=MARGIN, scale=SCALE).backward()
            moved = momentum[chosen].mul_(0.9).add_(rows.grad)
            momentum[chosen] = moved
            weight[chosen] = rows.detach().sub_(moved, alpha=0.1)

        return step

    return build


def adaptive_softmax(m: int, labels: list[Tensor], folder: Path) -> Step:
    """torch.nn.AdaptiveLogSoftmaxWithLoss: frequent classes first, rare ones in clusters of smaller width."""
    layer = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, m, cutoffs=[m // 50, m // 5], div_value=4.0).to(DEVICE)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, fused=True)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        layer(embeddings, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


PROVIDERS: dict[str, Callable[[int, list[Tensor], Path], Step]] = {
    "GIF": gif_step("live"),
    "GIF, published losses": gif_step("paper"),
    "full softmax": full_softmax,
    "Partial FC 0.1": partial_fc(0.1),
    "Partial FC 0.3": partial_fc(0.3),
    "adaptive softmax": adaptive_softmax,
}


def needed_bytes(provider: str, m: int) -> int:
    """Memory of a step by formula: what is kept of m identities, and logits with their gradient."""
    row = WIDTH * FLOAT
    if provider.startswith("GIF"):
        return m * code_length(m, VOCAB) + 8 * BATCH * 3 * (row + 3 * BATCH * FLOAT)
    if provider == "adaptive softmax":
        shortlist, middle = m // 50, m // 5 - m // 50
        kept = shortlist * row + middle * row // 4 + (m - m // 5) * row // 16
        return 3 * kept + 3 * BATCH * m * FLOAT
    if provider == "full softmax":
        return 3 * m * row + 3 * BATCH * m * FLOAT
    rate = float(provider.split()[-1])
    return 2 * m * row + int(rate * m) * (4 * row + 3 * BATCH * FLOAT)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("m", FULL if metafunc.config.getoption("--full") else QUICK)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_head_scaling(benchmark, tmp_path, m: int, provider: str) -> None:
    needed = needed_bytes(provider, m)
    free = torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else psutil.virtual_memory().available
    if needed > 0.9 * free:
        pytest.skip(f"{provider} needs {needed / 1e9:.0f} GB for {m:,} identities, {free / 1e9:.0f} GB are free")
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(m, (BATCH,), generator=generator).to(DEVICE) for _ in range(POOL)]
    embeddings = torch.randn(BATCH, WIDTH, generator=generator).to(DEVICE).requires_grad_()
    steps: list[Step] = []
    kept = kept_bytes(lambda: steps.append(PROVIDERS[provider](m, labels, tmp_path)), DEVICE)
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        steps[0](embeddings, labels[turn % POOL])
        embeddings.grad = None

    slow = not provider.startswith("GIF") and m > 100_000
    measure(
        benchmark,
        call,
        kernel="head",
        provider=provider,
        mode="step",
        shape=f"m{m}",
        rounds=5 if slow else 15,
        warmup_rounds=1 if slow else 3,
        identities=m,
        kept_bytes=kept,
        needed_bytes=needed,
    )
