"""What the tests of all packages share."""

from __future__ import annotations

import pytest
import torch

FAKES_WITHOUT_A_DRIVER = (2, 10)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs fake CUDA tensors where PyTorch is too old to make them without a driver."""
    if item.get_closest_marker("fake_cuda") is None or torch.cuda.is_available():
        return
    if tuple(map(int, torch.__version__.split(".")[:2])) < FAKES_WITHOUT_A_DRIVER:
        pytest.skip(f"PyTorch {torch.__version__} makes no fake CUDA tensors without a driver")
