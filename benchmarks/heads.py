"""Training heads to measure: GIF's, and others, each at its best; what they cost is `gif.planning.heads`'.

A step is head(embeddings, labels), backward, optimizer. The gradient goes on into whatever the embeddings come from.
Baselines: one product and fused optimizers; of Partial FC the sampled rows alone have gradients and move.
GIF's vectors lie in a sparse memory-mapped file.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import DEVICE
from gif import CodeVectors, GIFLoss, IdentityCodes, PartialFC
from gif.codes import code_length
from gif.losses.recipes import RECIPES, Recipe
from gif.planning.heads import FLOAT, HeadCost, gif_cost, partial_fc_cost, softmax_cost
from gif_kernels import AngularMargin, code_contrast_loss

BATCH, WIDTH, VOCAB = 256, 512, 20
MARGIN, SCALE = AngularMargin(m2=0.5), 64.0
POOL = 16  # batches that take turns
QUICK = (10_000, 100_000)
FULL = (10_000, 100_000, 1_000_000, 10_000_000, 64_000_000)
SAMPLES = 10_000
"""Of Partial FC, whatever the number of identities."""
SLOW_FROM = 100_000
"""Identities from which a softmax takes seconds on a CPU."""
ADAPTIVE_WIDTHS = (WIDTH // 4, WIDTH // 16)
"""Widths of the adaptive softmax's clusters."""
ADAPTIVE_LOGITS = 3
"""Arrays as large as the adaptive softmax's logits that are held at once: these, their logarithms, the gradient."""

FUSED_ROWS = 5
"""Arrays as large as the centres that a fused softmax holds at its peak, of which autograd differentiates the norms."""

Step = Callable[[Tensor, Tensor], None]
LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The loss of rows (B, d), weights (m, d) and labels (B,)."""
Builder = Callable[[int, list[Tensor], Path], Step]


def gif_step(recipe: Recipe) -> Builder:
    """GIFLoss and its optimizer, its code vectors in a sparse memory-mapped file."""

    def build(m: int, labels: list[Tensor], folder: Path) -> Step:
        name = f"contrast-{recipe.contrast_weight:g}-negatives-{recipe.negatives}-{m}"
        raw = np.memmap(folder / name, np.float32, "w+", shape=(m, WIDTH))
        return _gif(m, labels, recipe, torch.from_numpy(raw))

    return build


def gif_on_device(m: int, labels: list[Tensor], folder: Path) -> Step:
    """GIFLoss with the code table and bfloat16 code vectors on the device."""
    return _gif(m, labels, RECIPES["live"], torch.empty(m, WIDTH, dtype=torch.bfloat16, device=DEVICE))


def _gif(m: int, labels: list[Tensor], recipe: Recipe, table: Tensor) -> Step:
    return trained(gif_head(m, labels, table, recipe))


def gif_head(m: int, labels: list[Tensor], table: Tensor, recipe: Recipe = RECIPES["live"]) -> GIFLoss:
    """GIFLoss of m identities with code vectors in ``table``, of which it draws what the pool of ``labels`` reads."""
    codes = IdentityCodes(identity_codes(m, table.device), VOCAB)
    head = GIFLoss(codes, CodeVectors(table, normalized=True), WIDTH, recipe=recipe)
    for batch in labels:  # only the rows that the pool of batches reads are written: a file stays sparse
        own = batch.to(table.device)
        rows = torch.cat([own, codes.siblings(own, head.recipe.siblings).flatten()]).unique()
        table[rows] = F.normalize(torch.randn(len(rows), WIDTH, device=table.device), dim=1).to(table.dtype)
    return head.to(DEVICE)


def identity_codes(m: int, device: str | torch.device) -> Tensor:
    """The numbers of m identities in base v: (m, l) uint8."""
    length = code_length(m, VOCAB)
    codes = torch.empty(m, length, dtype=torch.uint8, device=device)
    rest = torch.arange(m, device=device)
    for place in reversed(range(length)):
        codes[:, place] = rest % VOCAB
        rest //= VOCAB
    return codes


def trained(head: nn.Module) -> Step:
    """A step of the ``head``, and of the optimizer of its parameters."""
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


def fused_softmax(loss: Callable[[], LinearCrossEntropy]) -> Builder:
    """A centre an identity, through a cross entropy that takes embeddings and centres and holds no logits of all.

    Such losses know no margin: cosines times the scale, both sides at unit length. ``loss`` imports it.
    """

    def build(m: int, labels: list[Tensor], folder: Path) -> Step:
        weight = nn.Parameter(torch.randn(m, WIDTH, device=DEVICE) / 100)
        optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, fused=True)
        cross_entropy = loss()

        def step(embeddings: Tensor, labels: Tensor) -> None:
            cross_entropy(SCALE * F.normalize(embeddings, dim=1), F.normalize(weight, dim=1), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


def of_torch() -> LinearCrossEntropy:
    """PyTorch's, in chunks of the batch: of 64 rows, as its own choice takes five times as long on a CPU."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=64)
    return lambda rows, weight, labels: F.linear_cross_entropy(rows, weight, labels, options=options)


def of_liger() -> LinearCrossEntropy:
    """Liger's, arXiv 2410.10989: Triton kernels, in chunks of the batch."""
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda rows, weight, labels: loss(weight, rows, labels)


def of_cut() -> LinearCrossEntropy:
    """Cut cross entropy, arXiv 2411.09009: Triton kernels, in blocks of batch and classes; of bfloat16."""
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda rows, weight, labels: loss(rows.bfloat16(), weight.bfloat16(), labels)


def partial_fc(**drawn: Any) -> Builder:
    """The batch's centres and others at random, as ``sample_rate`` or ``samples`` of `PartialFC` say."""

    def build(m: int, labels: list[Tensor], folder: Path) -> Step:
        with torch.device(DEVICE):  # random numbers for gigabytes of centres would take a host a minute
            head = PartialFC(m, WIDTH, margin=MARGIN, scale=SCALE, **drawn)

        def step(embeddings: Tensor, labels: Tensor) -> None:
            head(embeddings, labels).backward()

        return step

    return build


def fused_softmax_cost(m: int, batch: int) -> HeadCost:
    """As a full softmax's, but for the logits, of which there are few at a time."""
    return replace(softmax_cost(m, width=WIDTH, batch=batch), step=FLOAT * WIDTH * (FUSED_ROWS * m + batch))


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


def adaptive_softmax_cost(m: int, batch: int) -> HeadCost:
    """Each cluster compares its share of the batch, as labels are uniform here.

    The shortlist, with a class a cluster, is compared with every row.
    """
    first, second = cutoffs(m)
    shortlist = first + len(ADAPTIVE_WIDTHS)
    tails = dict(zip(ADAPTIVE_WIDTHS, (second - first, m - second), strict=True))
    parameters = FLOAT * (shortlist * WIDTH + sum((size + WIDTH) * width for width, size in tails.items()))
    compared = shortlist + sum(size * size / m for size in tails.values())
    weights = shortlist * WIDTH + sum(size / m * (size + WIDTH) * width for width, size in tails.items())
    return HeadCost(parameters, parameters, 0.0, FLOAT * ADAPTIVE_LOGITS * batch * compared, weights, batch)


@dataclass(frozen=True, repr=False)
class Head:
    """A head to measure.

    Args:
        name: in reports and pictures.
        build: the head of so many identities, ready to train on batches of some labels; a folder holds what lies in
            files. It returns the step.
        cost: of so many identities and a batch of so many rows, by formula.
        slow_from: the number of identities from which a step takes seconds on a CPU.
        missing: what it lacks here, where it does not run.
    """

    name: str
    build: Builder
    cost: Callable[[int, int], HeadCost]
    slow_from: float = math.inf
    missing: str = ""

    def __repr__(self) -> str:
        return repr(self.name)

    def slow(self, m: int) -> bool:
        """Whether a step takes seconds on a CPU, so that it is repeated less often."""
        return m >= self.slow_from


def _gif_head(name: str, recipe: Recipe) -> Head:
    def cost(m: int, batch: int) -> HeadCost:
        return gif_cost(m, width=WIDTH, batch=batch, vocab_size=VOCAB, recipe=recipe)

    return Head(name, gif_step(recipe), cost)


def _fused_head(name: str, loss: Callable[[], LinearCrossEntropy], missing: str) -> Head:
    return Head(name, fused_softmax(loss), fused_softmax_cost, SLOW_FROM, missing)


def _kernels_of(package: str) -> str:
    """What is missing to run the Triton kernels of ``package``."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return "" if DEVICE == "cuda" else f"the kernels of {package} want a GPU"


def _partial_fc_head(rate: float) -> Head:
    def cost(m: int, batch: int) -> HeadCost:
        return partial_fc_cost(m, rate * m, width=WIDTH, batch=batch)

    return Head(f"Partial FC {rate:g}", partial_fc(sample_rate=rate), cost, SLOW_FROM)


GIF = _gif_head("GIF", RECIPES["live"])
WITHOUT_NEGATIVES = _gif_head("GIF, no negatives", replace(RECIPES["live"], negatives=0))
PUBLISHED = _gif_head("GIF, published losses", RECIPES["paper"])
FULL_SOFTMAX = Head("full softmax", full_softmax, lambda m, batch: softmax_cost(m, width=WIDTH, batch=batch), SLOW_FROM)
CHUNKED_SOFTMAX = _fused_head(
    "softmax in chunks",
    of_torch,
    "" if hasattr(F, "linear_cross_entropy") else "PyTorch has linear_cross_entropy from 2.13 on",
)
LIGER = _fused_head("softmax by Liger", of_liger, _kernels_of("liger_kernel"))
CUT = _fused_head("softmax by cut cross entropy", of_cut, _kernels_of("cut_cross_entropy"))
FUSED = (CHUNKED_SOFTMAX, LIGER, CUT)
PARTIAL_FC = _partial_fc_head(0.1)
PARTIAL_FC_OF_SAMPLES = Head(
    f"Partial FC {SAMPLES:,}",
    partial_fc(samples=SAMPLES),
    lambda m, batch: partial_fc_cost(m, SAMPLES, width=WIDTH, batch=batch),
)
ADAPTIVE = Head("adaptive softmax", adaptive_softmax, adaptive_softmax_cost, SLOW_FROM)
PARTIAL_FCS = (PARTIAL_FC, _partial_fc_head(0.3), PARTIAL_FC_OF_SAMPLES)
HEADS = {head.name: head for head in (GIF, WITHOUT_NEGATIVES, PUBLISHED, FULL_SOFTMAX, *FUSED, *PARTIAL_FCS, ADAPTIVE)}
BACKBONE_ALONE = "backbone alone"
"""A whole step without a head."""


def label_batches(m: int, batch: int) -> list[Tensor]:
    """Uniform labels, a pool of batches that take turns."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(m, (batch,), generator=generator).to(DEVICE) for _ in range(POOL)]
