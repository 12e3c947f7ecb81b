"""The contrast of code vectors that move: loss, both gradients and the step of the candidates, beside its products.

`pytest benchmarks/test_live_contrast.py --benchmark-json=results.json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import DEVICE, measure
from benchmarks.heads import BATCH, MARGIN, SCALE, WIDTH
from benchmarks.results import Subject
from gif_kernels import code_contrast_gradients, vector_step_
from gif_kernels.precision import product

if TYPE_CHECKING:  # what a run on a GPU imports does without it
    from pytest_benchmark.fixture import BenchmarkFixture

CANDIDATES = 4096
LEARNING_RATE = 0.1


class Step:
    """A step of the contrast, and its products alone, on the same inputs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.z = torch.randn(BATCH, WIDTH, generator=generator).to(DEVICE)
        self.table = F.normalize(torch.randn(2 * CANDIDATES, WIDTH, generator=generator), dim=1).to(DEVICE)
        self.rows = torch.randperm(len(self.table), generator=generator)[:CANDIDATES].to(DEVICE)
        self.labels = torch.arange(BATCH, device=DEVICE)
        self.slopes = torch.randn(BATCH, CANDIDATES, generator=generator).to(DEVICE)

    def gradients(self, impl: str) -> tuple[torch.Tensor, ...]:
        """The losses and both gradients."""
        h = self.table.index_select(0, self.rows)
        return code_contrast_gradients(self.z, h, self.labels, margin=MARGIN, scale=SCALE, impl=impl)  # type: ignore[arg-type]

    def ours(self) -> None:
        """What a training step does."""
        *_, of_vectors = self.gradients("auto")
        vector_step_(self.table, self.rows, of_vectors, lr=LEARNING_RATE)

    def products(self) -> None:
        """The three products that no implementation can do without."""
        h = self.table[: len(self.rows)]
        product(self.z, h.T, torch.float32, wide=True)
        product(self.slopes, h, torch.float32)
        product(self.slopes.T, self.z, torch.float32)


@pytest.mark.parametrize("provider", ["ours", "products"])
def test_live_contrast(benchmark: BenchmarkFixture, provider: str) -> None:
    step = Step()
    for found, wanted in zip(step.gradients("auto"), step.gradients("reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    subject = Subject(
        kernel="live_contrast",
        provider=provider,
        mode="forward+backward+move",
        shape=f"B{BATCH}-K{CANDIDATES}-d{WIDTH}",
        flops=6 * BATCH * CANDIDATES * WIDTH,
        bytes=4 * step.z.nbytes + 3 * CANDIDATES * WIDTH * 4,
    )
    measure(benchmark, step.ours if provider == "ours" else step.products, subject)
