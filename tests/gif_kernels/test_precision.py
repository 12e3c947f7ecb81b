"""Products: operands rounded, sums wide, and the library that multiplies them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gif_kernels import precision
from gif_kernels.precision import add_products, operand_dtype, product

LARGE = (160, 256, 272)  # of a size that oneDNN may take
OPERANDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def matrix(rows: int, columns: int, transposed: bool = False) -> Tensor:
    return torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN preferred, whatever this CPU is; the shapes that it multiplied."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    seen = []
    multiply = torch.ops.mkldnn._linear_pointwise

    class Recorded:
        @staticmethod
        def _linear_pointwise(left: Tensor, right: Tensor, *rest: object) -> Tensor:
            seen.append((*left.shape, len(right)))
            return multiply(left, right, *rest)

    monkeypatch.setattr(precision, "PREFERS_ONEDNN", True)
    monkeypatch.setattr(torch.ops, "mkldnn", Recorded)
    return seen


@pytest.mark.parametrize("transposed", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("size", [LARGE, (160, 256, 136), (7, 5, 3), (0, 4, 3)])
def test_onednn_multiplies_what_is_large(onednn, size, transposed, no_worse_than_pytorch):
    n, k, m = size
    left, right = matrix(n, k, transposed[0]), matrix(k, m, transposed[1])
    found = product(left, right, torch.float32)
    assert onednn == [size] * (size == LARGE or (n * k * m > 2**21 and not transposed[0]))
    assert (found.shape, found.dtype) == ((n, m), torch.float32)
    if n:
        no_worse_than_pytorch(found, left @ right, left.double() @ right.double())


@pytest.mark.filterwarnings("ignore:TF32")
def test_pytorch_s_own_switch_turns_onednn_off(onednn):
    left, right = matrix(*LARGE[:2]), matrix(*LARGE[1:])
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(product(left, right, torch.float32), left @ right)
    assert not onednn


def test_not_finite_operands_reach_the_result(onednn):
    left, right = matrix(*LARGE[:2]), matrix(*LARGE[1:])
    left[3, 5] = torch.nan
    right[2, 7] = torch.inf
    found = product(left, right, torch.float32)
    assert onednn
    assert torch.equal(found.isfinite(), (left @ right).isfinite())


@pytest.mark.parametrize("operand", OPERANDS, ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "a batch"])
def test_operands_are_rounded_and_sums_are_wide(operand, batch):
    left, right = torch.randn(*batch, 40, 300), torch.randn(*batch, 300, 24)
    found = product(left, right, operand)
    assert found.dtype == (torch.float64 if operand == torch.float64 else torch.float32)
    exact = left.to(operand).double() @ right.to(operand).double()
    native = operand in precision._NATIVE_ON_CPU  # it rounds the result as well
    tolerance = torch.finfo(operand).eps if native else 16 * torch.finfo(found.dtype).eps
    assert (found.double() - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("operand", OPERANDS[:1] + OPERANDS[2:], ids=str)
def test_products_add_into_the_memory_they_are_given(operand):
    total, left, right = torch.randn(20, 3, 24).transpose(0, 1), torch.randn(3, 20, 9), torch.randn(3, 9, 24)
    expected = total + product(left, right, operand)
    found = add_products(total, left, right, operand)
    assert found.data_ptr() == total.data_ptr()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


def test_the_dtype_of_operands():
    single, half, double = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)
    assert operand_dtype(half, None, half) == torch.bfloat16
    assert operand_dtype(half, single) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operand_dtype(single, None) == torch.bfloat16
        assert operand_dtype(single, double) == torch.float64


def test_compiled_as_eager(onednn):
    left, right = matrix(*LARGE[:2]), matrix(*LARGE[1:])
    compiled = torch.compile(lambda: product(left, right, torch.float32), fullgraph=True, backend="aot_eager")()
    assert not onednn
    torch.testing.assert_close(compiled, product(left, right, torch.float32), rtol=1e-5, atol=1e-4)
    assert onednn
