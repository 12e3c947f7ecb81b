"""One training step of the head alone against the number of identities: forward, backward, optimizer.

`pytest benchmarks/test_head_scaling.py` to 100 thousand identities, `--full` to 64 million. A head that does not fit in
memory is skipped with the bytes it would need.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import DEVICE, measure
from benchmarks.heads import (
    BATCH,
    FULL,
    POOL,
    PROVIDERS,
    QUICK,
    WIDTH,
    Step,
    is_slow,
    label_batches,
    needed_bytes,
    step_work,
)
from benchmarks.memory import kept_bytes, skip_unless_it_fits


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("m", FULL if metafunc.config.getoption("--full") else QUICK)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_head_scaling(benchmark, tmp_path, m: int, provider: str) -> None:
    needed = needed_bytes(provider, m)
    skip_unless_it_fits(f"{provider}, {m:,} identities,", needed, DEVICE)
    labels = label_batches(m, BATCH)
    embeddings = torch.randn(BATCH, WIDTH, device=DEVICE).requires_grad_()
    steps: list[Step] = []
    kept = kept_bytes(lambda: steps.append(PROVIDERS[provider](m, labels, tmp_path)), DEVICE)
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        steps[0](embeddings, labels[turn % POOL])
        embeddings.grad = None

    slow = is_slow(provider, m)
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
        **step_work(provider, m),
    )
