"""Training heads to measure: GIF's, and others, each at its best; their memory and work by formula.

A step is head(embeddings, labels), backward, optimizer. The gradient goes on into whatever the embeddings come from.
Baselines: one product, fused optimizers, and Partial FC keeps gradients of the sampled rows only, which alone move.
GIF's vectors lie in a sparse memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import DEVICE
from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.codes import code_length
from gif.losses.recipes import RECIPES
from gif_kernels import AngularMargin, code_contrast_loss

BATCH, WIDTH, VOCAB = 256, 512, 20
MARGIN, SCALE = AngularMargin(m2=0.5), 64.0
POOL = 16  # batches that take turns
QUICK = (10_000, 100_000)
FULL = (10_000, 100_000, 1_000_000, 10_000_000, 64_000_000)
FLOAT = 4
ORDER_BYTES = 8
"""An identity's place in the order of the codes, both ways."""
SIBLINGS = RECIPES["live"].siblings

Step = Callable[[Tensor, Tensor], None]
Builder = Callable[[int, list[Tensor], Path], Step]


def gif_step(recipe: str) -> Builder:
    """GIFLoss and its optimizer, its code vectors in a sparse memory-mapped file."""

    def build(m: int, labels: list[Tensor], folder: Path) -> Step:
        raw = np.memmap(folder / f"{recipe}-{m}", np.float32, "w+", shape=(m, WIDTH))
        return _gif(m, labels, recipe, torch.from_numpy(raw))

    return build


def gif_on_device(m: int, labels: list[Tensor], folder: Path) -> Step:
    """GIFLoss with the code table and bfloat16 code vectors on the device."""
    return _gif(m, labels, "live", torch.empty(m, WIDTH, dtype=torch.bfloat16, device=DEVICE))


def _gif(m: int, labels: list[Tensor], recipe: str, table: Tensor) -> Step:
    codes = IdentityCodes(identity_codes(m, table.device), VOCAB)
    head = GIFLoss(codes, CodeVectors(table, normalized=True), WIDTH, recipe=recipe)
    for batch in labels:  # only the rows that the pool of batches reads are written: a file stays sparse
        own = batch.to(table.device)
        rows = torch.cat([own, codes.siblings(own, head.recipe.siblings).flatten()]).unique()
        table[rows] = F.normalize(torch.randn(len(rows), WIDTH, device=table.device), dim=1).to(table.dtype)
    return _trained(head.to(DEVICE))


def identity_codes(m: int, device: str | torch.device) -> Tensor:
    """The numbers of m identities in base v: (m, l) uint8."""
    length = code_length(m, VOCAB)
    codes = torch.empty(m, length, dtype=torch.uint8, device=device)
    rest = torch.arange(m, device=device)
    for place in reversed(range(length)):
        codes[:, place] = rest % VOCAB
        rest //= VOCAB
    return codes


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
        optimizer.zero_grad()

    return step


def partial_fc(rate: float) -> Builder:
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


def cutoffs(m: int) -> list[int]:
    """The adaptive softmax's: 2 % of the classes come first, the next 18 % in a quarter of the width."""
    return [m // 50, m // 5]


def adaptive_softmax(m: int, labels: list[Tensor], folder: Path) -> Step:
    """torch.nn.AdaptiveLogSoftmaxWithLoss: frequent classes first, rare ones in clusters of smaller width."""
    layer = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, m, cutoffs=cutoffs(m), div_value=4.0).to(DEVICE)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, fused=True)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        layer(embeddings, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


PROVIDERS: dict[str, Builder] = {
    "GIF": gif_step("live"),
    "GIF, published losses": gif_step("paper"),
    "full softmax": full_softmax,
    "Partial FC 0.1": partial_fc(0.1),
    "Partial FC 0.3": partial_fc(0.3),
    "adaptive softmax": adaptive_softmax,
}


def _gif_parameters(provider: str, m: int, batch: int) -> int:
    """Centres and projections of the tokens; with the live recipe also the code vectors that a step reads and moves."""
    length = code_length(m, VOCAB)
    candidates = 0 if "published" in provider else (1 + SIBLINGS) * batch
    return length * WIDTH * (VOCAB + WIDTH) + candidates * WIDTH


def _clusters(m: int) -> list[tuple[int, int]]:
    """Classes and width of the adaptive softmax's parts."""
    first, second = cutoffs(m)
    return [(first, WIDTH), (second - first, WIDTH // 4), (m - second, WIDTH // 16)]


BACKBONE_ALONE = "backbone alone"
"""A whole step without a head."""


def needed_bytes(provider: str, m: int, batch: int = BATCH) -> int:
    """Memory of these steps by formula: what is kept of m identities, and what a step holds at its peak beside it."""
    row, logits = WIDTH * FLOAT, batch * FLOAT
    if provider.startswith("GIF"):
        return m * (code_length(m, VOCAB) + ORDER_BYTES) + 3 * FLOAT * _gif_parameters(provider, m, batch)
    if provider == "adaptive softmax":  # three of all parameters; the logits of a cluster's share of the batch, twice
        return sum(3 * size * width * FLOAT + 2 * size * size * logits // m for size, width in _clusters(m))
    rate = sample_rate(provider)
    if rate == 1:  # centres and momentum; centres of unit length and their gradient, twice
        return m * (2 * row + 3 * row + logits)
    return 2 * m * row + int(rate * m) * (4 * row + logits)  # a copy of the rows beside these


def step_parameters(provider: str, m: int, batch: int = BATCH) -> float:
    """Weights that a row of the batch is multiplied by on average, and that a step moves.

    Labels are uniform here: each cluster of the adaptive softmax sees its share of the classes in the batch.
    """
    if provider.startswith("GIF"):
        return _gif_parameters(provider, m, batch)
    if provider == "adaptive softmax":
        (shortlist, _), *tails = _clusters(m)
        return (shortlist + len(tails)) * WIDTH + sum(size / m * (size + WIDTH) * width for size, width in tails)
    return sample_rate(provider) * m * WIDTH


def sample_rate(provider: str) -> float:
    """Share of the centres that take part in a step."""
    return 1.0 if provider == "full softmax" else float(provider.split()[-1])


def step_work(provider: str, m: int, batch: int = BATCH) -> dict[str, float]:
    """FLOPs of the products, and bytes that must move at least: weights and momentum, read and written."""
    parameters = step_parameters(provider, m, batch)
    return {"flops": 6 * batch * parameters, "bytes": 4 * FLOAT * parameters}


def is_slow(provider: str, m: int) -> bool:
    """Whether a step takes seconds on a CPU: fewer repetitions."""
    return provider in PROVIDERS and not provider.startswith("GIF") and m >= 100_000


def label_batches(m: int, batch: int) -> list[Tensor]:
    """Uniform labels, a pool of batches that take turns."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(m, (batch,), generator=generator).to(DEVICE) for _ in range(POOL)]
