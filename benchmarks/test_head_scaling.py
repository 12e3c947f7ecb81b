"""One training step of the head alone against the number of identities: forward, backward, optimizer.

`pytest benchmarks/test_head_scaling.py` to 100 thousand identities, `--full` to 64 million. A head that does not fit in
memory is skipped with the bytes it would need. Memory is that of any step but the first: the optimizer's momentum is
among what is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.harness import DEVICE, measure
from benchmarks.heads import BATCH, FULL, HEADS, POOL, QUICK, WIDTH, Step, label_batches
from benchmarks.memory import kept_bytes, skip_unless_it_fits
from benchmarks.results import Subject

if TYPE_CHECKING:  # what a run on a GPU imports does without it
    from pytest_benchmark.fixture import BenchmarkFixture


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("m", FULL if metafunc.config.getoption("--full") else QUICK)


@pytest.mark.parametrize("provider", HEADS)
def test_head_scaling(benchmark: BenchmarkFixture, tmp_path: Path, m: int, provider: str) -> None:
    head = HEADS[provider]
    if head.missing:
        pytest.skip(head.missing)
    cost = head.cost(m, BATCH)
    skip_unless_it_fits(f"{head.name}, {m:,} identities,", cost.bytes, DEVICE)
    labels = label_batches(m, BATCH)
    embeddings = torch.randn(BATCH, WIDTH, device=DEVICE).requires_grad_()
    steps: list[Step] = []
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        steps[0](embeddings, labels[turn % POOL])
        embeddings.grad = None

    def build() -> None:
        steps.append(head.build(m, labels, tmp_path))
        call()

    kept = kept_bytes(build, DEVICE)
    slow = head.slow(m)
    subject = Subject(
        kernel="head",
        provider=head.name,
        mode="step",
        shape=f"m{m}",
        identities=m,
        flops=cost.flops,
        bytes=cost.traffic,
        kept_bytes=kept,
        needed_bytes=cost.bytes,
    )
    measure(benchmark, call, subject, rounds=5 if slow else 15, warmup_rounds=1 if slow else 3)
