"""Options of the benchmarks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import CLOCK


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the whole grid of shapes, which takes long")
    parser.addoption("--without-onednn", action="store_true", help="multiply in MKL on a CPU, as PyTorch does")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its own
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_timer = f"time.{CLOCK.__name__}"
    if config.getoption("--without-onednn"):
        torch.backends.mkldnn.set_flags(_enabled=False)
