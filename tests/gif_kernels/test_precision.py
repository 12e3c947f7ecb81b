"""Products: operands rounded, sums wide, and the library that multiplies them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gif_kernels import code_contrast_loss, precision, token_margin_loss
from gif_kernels.precision import add_products, in_range, operand_dtype, product

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


def test_wide_results_are_not_rounded_by_a_cpu_s_own_product(monkeypatch):
    """Which rounds 64 times a cosine to 0.1, at a relative 2^-9."""
    monkeypatch.setattr(precision, "_NATIVE_ON_CPU", {torch.bfloat16})
    left, right = matrix(40, 300), matrix(300, 24)
    rounded = left.bfloat16().float() @ right.bfloat16().float()
    assert torch.equal(product(left, right, torch.bfloat16, wide=True), rounded)
    assert (product(left, right, torch.bfloat16) - rounded).abs().max() > 2**-10 * rounded.abs().max()


# ---- float16's range


def losses() -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Losses of rows and of centres that do not depend on either's length."""
    codes, labels, projections = torch.tensor([[0, 2], [1, 0], [3, 1]]), torch.tensor([0, 7, 3]), torch.randn(2, 16, 16)
    return [
        lambda z, w: token_margin_loss(z, w.view(2, 4, 16), codes),
        lambda z, w: token_margin_loss(z, w.view(2, 4, 16), codes, projections=projections / 4),
        lambda z, w: code_contrast_loss(z, w, labels),
    ]


@pytest.mark.parametrize("power", [-70, -30, -10, 14, 30, 70])  # beyond, small numbers are no normal float32
@pytest.mark.parametrize("which", [0, 1, 2], ids=["tokens", "projected tokens", "contrast"])
def test_length_is_lost_to_float16_and_direction_is_not(which, power):
    """Rows and centres times a power of two: the same loss, bit by bit, and gradients over it."""
    loss_of = losses()[which]
    z, w = torch.randn(3, 16), torch.randn(8, 16)
    found = []
    for factor in (1.0, 2.0**power):
        rows, centers = (factor * z).requires_grad_(), (factor * w).requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(rows, centers)
        of_rows, of_centers = torch.autograd.grad(loss, (rows, centers))
        assert loss.isfinite() and of_rows.isfinite().all() and of_rows.any()
        found.append((loss.detach(), of_rows * factor, of_centers * factor))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    exact = loss_of(z.double(), w.double())
    assert abs(found[0][0] - exact) < 64 * 4 * 2**-11 * (which + 1)  # s times what three roundings do to a cosine


def test_in_range():
    rows = torch.tensor([[3.0, -70_000.0], [0.0, 0.0], [1e-38, 1e-39], [torch.nan, 1.0], [0.75, 0.1]])
    found = in_range(rows, torch.float16)
    largest = found.abs().amax(1)
    assert largest[[0, 2, 4]].ge(0.5).all() and largest[[0, 2, 4]].lt(1).all()
    assert not found[1].any() and found[3, 0].isnan()
    scale = found[[0, 2, 4], 0] / rows[[0, 2, 4], 0]
    assert torch.equal(scale, scale.log2().round().exp2())
    assert in_range(rows, torch.bfloat16) is rows and in_range(rows, torch.float32) is rows
    assert in_range(rows.half(), torch.float16).dtype == torch.float16
    assert in_range(rows.bfloat16(), torch.float16).dtype == torch.bfloat16


def test_compiled_as_eager(onednn):
    left, right = matrix(*LARGE[:2]), matrix(*LARGE[1:])
    compiled = torch.compile(lambda: product(left, right, torch.float32), fullgraph=True, backend="aot_eager")()
    assert not onednn
    torch.testing.assert_close(compiled, product(left, right, torch.float32), rtol=1e-5, atol=1e-4)
    assert onednn
