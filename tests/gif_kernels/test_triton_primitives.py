"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

import pytest
import torch

from gif_kernels import dispatch, token_margin_loss

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not (dispatch.INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it without one", allow_module_level=True)

import triton.language as tl  # noqa: E402

from gif_kernels.device.primitives import dot  # noqa: E402

DEVICE = "cpu" if dispatch.INTERPRETING else "cuda"
pytestmark = [] if dispatch.INTERPRETING else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(dispatch.INTERPRETING, reason="needs a CUDA or ROCm device, not the interpreter")
SIZE = 16


@triton.jit
def times_identity(p_left, p_out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, SIZE)
    p = o[:, None] * SIZE + o[None, :]
    b_identity = (o[:, None] == o[None, :]).to(tl.float32)
    b_out = dot(tl.load(p_left + p), b_identity, tl.zeros((SIZE, SIZE), tl.float32), PRECISION)
    tl.store(p_out + p, b_out)


def test_operands_of_tf32_are_the_nearest():
    """Half a unit above a number of TF32 goes up: matrix units would drop it, and all products be too short."""
    unit = 2.0**-10
    steps = torch.arange(SIZE * SIZE, device=DEVICE).view(SIZE, SIZE)
    left = (1 + steps * unit) * torch.where(steps % 2 == 0, 1, -1)
    above = torch.tensor([0.0, 0.25, 0.5, 0.75], device=DEVICE)[steps % 4]
    found = torch.empty_like(left)
    times_identity[(1,)](left + left.sign() * above * unit, found, SIZE, "tf32")
    nearest = left + left.sign() * (above >= 0.5) * unit
    assert torch.equal(found, nearest)


def test_what_is_no_number_stays():
    left = torch.ones(SIZE, SIZE, device=DEVICE)
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32, device=DEVICE)
    left[:4] = bits.view(torch.float32)[:, None]
    found = torch.empty_like(left)
    times_identity[(1,)](left, found, SIZE, "tf32")  # infinity times zero is NaN too
    assert found[:4].isnan().all() and torch.equal(found[4:], left[4:])


@on_a_gpu
def test_tf32_has_the_error_of_pytorch_s():
    z, w = torch.randn(512, 256, device=DEVICE), torch.randn(5, 20, 256, device=DEVICE)
    codes = torch.randint(20, (512, 5), device=DEVICE)
    truth = token_margin_loss(z.double(), w.double(), codes, impl="reference", reduction="none")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ours, plain = (token_margin_loss(z, w, codes, impl=impl, reduction="none") for impl in ("triton", "reference"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    error, theirs = ((x.double() - truth).square().mean().sqrt() for x in (ours, plain))
    assert error <= 2 * theirs
