"""Where the Triton kernels run, and what is said where they cannot: no GPU needed to ask."""

from __future__ import annotations

import platform
import re
import subprocess
import sys

import pytest
import torch

from gif_kernels import code_regression_loss, dispatch, token_margin_loss

OP = "code_regression_loss"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
with_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")


@with_triton
def test_auto_is_triton_on_a_gpu():
    assert dispatch.choose(OP, CUDA) == ("triton", "Triton runs on cuda")
    assert dispatch.select(OP, "auto", CUDA).__module__ == "gif_kernels.code_regression.function"


@with_triton
def test_float64_is_blocked_on_a_gpu_and_says_why():
    assert dispatch.choose(OP, CUDA, torch.float64) == (
        "blocked",
        "the Triton kernels compute in float32, an input is float64",
    )
    with pytest.raises(ValueError, match="compute in float32, an input is float64; use impl="):
        dispatch.select(OP, "triton", CUDA, torch.float64)


@with_triton
def test_inputs_that_are_not_for_the_kernel_are_blocked_on_a_gpu_and_say_why():
    reason = "at most 256 centers a token, got 257"
    assert dispatch.choose(OP, CUDA, obstacle=reason) == ("blocked", reason)
    with pytest.raises(ValueError, match=f'impl="triton": {reason}; use impl="auto" or impl="blocked"'):
        dispatch.select(OP, "triton", CUDA, obstacle=reason)


@with_triton
@pytest.mark.parametrize(("vocab", "name"), [(256, "triton"), (257, "blocked")])
def test_large_vocabularies_run_in_blocks(vocab, name, monkeypatch):
    """As on a GPU: what would run there for so many centres a token."""
    chosen = []

    def resolve(op, impl, device, dtype, *, obstacle=""):
        chosen.append(dispatch.choose(op, CUDA, dtype, obstacle=obstacle)[0])
        return "blocked"

    monkeypatch.setattr(dispatch, "resolve", resolve)
    token_margin_loss(torch.randn(2, 8), torch.randn(1, vocab, 8), torch.tensor([[vocab - 1], [0]]))
    assert chosen == [name]


@with_triton
def test_the_interpreter_runs_on_the_cpu_when_asked_for_alone(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    assert dispatch.select(OP, "triton", CPU).__module__ == "gif_kernels.code_regression.function"
    assert dispatch.choose(OP, CPU) == ("blocked", "Triton's interpreter is for tests")
    with pytest.raises(ValueError, match="an input is float64"):
        code_regression_loss(torch.ones(1, 2).double(), torch.ones(1, 2), impl="triton")


@with_triton
@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.5.1", "2.4.6", False), ("3.6.0+git1", "2.10.0", False), ("3.6.0", "2.3.5", True), ("3.8.0", "2.5.5", True)],
)
def test_an_interpreter_that_numpy_is_too_new_for(triton, numpy, works, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    monkeypatch.setattr(dispatch, "_versions", lambda: (triton, numpy))
    assert dispatch.choose(OP, CUDA)[0] == "triton"
    if works:
        assert dispatch.resolve(OP, "triton", CPU) == "triton"
    else:
        assert dispatch.resolve(OP, "auto", CPU) == "blocked"
        with pytest.raises(ValueError, match=f"Triton {re.escape(triton)} needs NumPy before 2.4, not {numpy}"):
            code_regression_loss(torch.ones(1, 2), torch.ones(1, 2), impl="triton")


def test_without_triton_the_package_works_and_says_so():
    program = f"""
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from gif_kernels import code_regression_loss, dispatch
x = torch.ones(2, 3)
assert code_regression_loss(x, x) < 1e-12
assert dispatch.choose({OP!r}, torch.device("cuda")) == ("blocked", "Triton is not installed ({platform.system()})")
try:
    code_regression_loss(x, x, impl="triton")
except ValueError as error:
    assert "Triton is not installed" in str(error)
else:
    raise AssertionError("ran without Triton")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
