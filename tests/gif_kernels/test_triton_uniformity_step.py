"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from gif_kernels import checks, dispatch, uniformity_step_
from gif_kernels.dispatch import Impl
from gif_kernels.rounding import stochastic_round

kernels = pytest.importorskip("gif_kernels.uniformity_step.kernels", reason="Triton is not installed")
if not (dispatch.INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it without one", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from gif_kernels.device import rounding  # noqa: E402

DEVICE = "cpu" if dispatch.INTERPRETING else "cuda"
pytestmark = [] if dispatch.INTERPRETING else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(dispatch.INTERPRETING, reason="needs a CUDA or ROCm device, not the interpreter")
LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def stepped(table: Tensor, index: Tensor, impl: Impl, lr: float = 0.1, **options) -> tuple[Tensor, Tensor]:
    table = table.clone()
    return table, uniformity_step_(table, index, lr=lr, impl=impl, **options)


@pytest.mark.parametrize("n", [2, 17, 40])
@pytest.mark.parametrize("d", [1, 48])
def test_moves_the_named_rows_and_no_other(n, d, agree):
    table, index = torch.randn(90, d), torch.randperm(90)[:n]
    expected, expected_loss = stepped(table.double(), index, "reference", t=1.5)
    given, loss = stepped(table, index, "triton", t=1.5)
    agree(given[index], expected[index])
    agree(loss, expected_loss)
    untouched = torch.ones(90, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(given[untouched], table[untouched])


def test_float16_steps_like_the_reference():
    check_low_precision(torch.float16)


@on_a_gpu
def test_bfloat16_steps_like_the_reference():
    check_low_precision(torch.bfloat16)


def check_low_precision(dtype):
    table, index = torch.randn(60, 48).to(dtype), torch.randperm(60)[:30]
    given, _ = stepped(table, index, "triton", lr=0.01, seed=5)
    expected, _ = stepped(table, index, "reference", lr=0.01, seed=5)
    another, _ = stepped(table, index, "triton", lr=0.01, seed=6)
    # the same random numbers: unit rows of the dtype's digits move a coordinate by some hundredths of its unit, and as
    # seldom tip it; other numbers would round a third of them elsewhere
    assert (given != expected).double().mean() <= 0.05
    assert (given != another).double().mean() >= 0.1  # of half of the rows
    # products of unit rows of the dtype's digits move a step, some hundredths long, by so much of it
    torch.testing.assert_close(given, expected, rtol=2 * torch.finfo(dtype).eps, atol=0.01 * torch.finfo(dtype).eps)


@triton.jit
def round_rows(p_x, p_rows, p_out, seed, WIDTH: tl.constexpr, DIGITS: tl.constexpr, LOWEST: tl.constexpr):
    i = tl.program_id(0)
    o_d = tl.arange(0, WIDTH)
    x = tl.load(p_x + i * WIDTH + o_d)
    tl.store(p_out + i * WIDTH + o_d, kernels_round(x, tl.load(p_rows + i), o_d, seed, DIGITS, LOWEST))


kernels_round = rounding.stochastic_round


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40 + 3])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounding_is_that_of_the_other_implementations_to_the_bit(dtype, seed):
    values = torch.randn(8, 64) * torch.logspace(-5, 2, 8)[:, None]
    values[0, :4] = torch.tensor([0.0, 1.0, -1.0, 2.0**-20])
    rows = torch.tensor([0, 1, 2**20, 2**31, 2**32 + 5, 2**33, 7, 10**12])
    given = torch.empty_like(values)
    round_rows[(8,)](
        p_x=values,
        p_rows=rows,
        p_out=given,
        seed=kernels._signed(kernels.mixed_seed(seed)),
        WIDTH=64,
        DIGITS=rounding.SIGNIFICAND_BITS[dtype],
        LOWEST=rounding.LOWEST_EXPONENT[dtype],
    )
    assert torch.equal(given.to(dtype), stochastic_round(values, dtype, rows, seed))
    assert torch.equal(given, given.to(dtype).float())


def test_writes_through_a_view():
    whole = torch.randn(6, 8)
    before = whole.clone()
    uniformity_step_(whole[1:, ::2], torch.tensor([0, 4]), lr=0.1, impl="triton")
    changed = whole != before
    assert changed[1, ::2].any() and changed[5, ::2].any()
    changed[1, ::2] = changed[5, ::2] = False
    assert not changed.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_nothing(bad, monkeypatch):
    monkeypatch.setattr(checks, "looks_at_values", lambda tensor: False)
    table = torch.randn(6, 5)
    table[4, 2] = bad
    before = table.clone()
    uniformity_step_(table, torch.tensor([0, 2, 4, 5]), lr=0.1, impl="triton")
    assert torch.equal(table.nan_to_num(7), before.nan_to_num(7))


def test_a_row_of_zeros_stays():
    table = torch.randn(5, 4)
    table[3] = 0
    uniformity_step_(table, torch.arange(5), lr=0.1, impl="triton")
    assert table.isfinite().all() and (table[3] == 0).all()


def test_compiled_equals_eager(compiled):
    table, index = torch.randn(20, 8), torch.tensor([7, 0, 3, 4])
    step = partial(stepped, impl="triton", seed=4)
    for given, eager in zip(compiled(step)(table, index), step(table, index), strict=True):
        assert torch.equal(given, eager)


@on_a_gpu
def test_offsets_past_int32():
    """The last rows of a table whose elements number more than 2^31."""
    table = torch.zeros(2**22 + 100, 512, dtype=torch.bfloat16)
    table[-100:] = torch.randn(100, 512).bfloat16()
    index = torch.arange(len(table) - 100, len(table))
    expected, _ = stepped(table[-100:].float(), torch.arange(100), "reference")
    uniformity_step_(table, index, lr=0.1, impl="triton")
    assert (table[-100:].float() - expected).abs().max() <= 2.0**-8
    assert (table[:1000] == 0).all()
