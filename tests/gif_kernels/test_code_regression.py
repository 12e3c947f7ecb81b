from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import code_regression_loss

SHAPES = [(1, 1), (1, 7), (7, 1), (13, 5), (31, 64)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def pair(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


@every_shape
def test_value_against_the_formula(shape, impl):
    z, h = pair(shape)
    cosine = (z * h).sum(1).numpy() / np.linalg.norm(z.numpy(), axis=1) / np.linalg.norm(h.numpy(), axis=1)
    given = code_regression_loss(z, h, reduction="none", impl=impl)
    np.testing.assert_allclose(given.numpy(), (cosine - 1) ** 2 / 2, rtol=1e-12, atol=1e-14)


def test_gradient_against_finite_differences(impl):
    loss = partial(code_regression_loss, reduction="none", impl=impl)
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in pair((4, 6))])


@every_shape
def test_values_and_gradients(shape, impl, dtype, differentiate, agree):
    tensors = pair(shape, dtype)
    truth = differentiate(
        partial(code_regression_loss, reduction="none", impl="reference"), *(x.double() for x in tensors)
    )
    given = differentiate(partial(code_regression_loss, reduction="none", impl=impl), *tensors)
    for a, b in zip(given, truth, strict=True):
        # a row of one number, or a short one, makes a gradient of 1 / ||row|| times rounding alone
        agree(a, b, noise=8 * torch.finfo(dtype).eps / min(x.norm(dim=1).min().item() for x in tensors))


def test_cosines_of_exactly_one(impl, dtype, differentiate, agree):
    h = torch.randn(5, 16, dtype=dtype)
    along = differentiate(partial(code_regression_loss, reduction="none", impl=impl), 3 * h, h)
    against = differentiate(partial(code_regression_loss, reduction="none", impl=impl), -3 * h, h)
    agree(along[0], torch.zeros(5))
    agree(against[0], torch.full((5,), 2.0))  # 1/2 (-1 - 1)^2
    for gradient in along[1:] + against[1:]:  # both are stationary
        agree(gradient, torch.zeros(5, 16))


def test_low_precision(impl, low_dtype, differentiate, no_worse_than_pytorch):
    tensors = pair((64, 48), low_dtype)

    def plain(z: Tensor, h: Tensor) -> Tensor:
        return ((F.normalize(z) * F.normalize(h)).sum(1) - 1).square().sum() / 2

    loss = partial(code_regression_loss, reduction="sum")
    truth = differentiate(partial(loss, impl="reference"), *(x.double() for x in tensors))
    given = differentiate(partial(loss, impl=impl), *tensors)
    for a, b, c in zip(given, differentiate(plain, *tensors), truth, strict=True):
        no_worse_than_pytorch(a, b, c)


def test_dtypes_may_differ(impl, differentiate):
    z, h = pair((6, 8), torch.float32)
    loss, z_gradient, h_gradient = differentiate(partial(code_regression_loss, impl=impl), z, h.bfloat16())
    truth = differentiate(partial(code_regression_loss, impl="reference"), z.double(), h.bfloat16().double())
    assert (loss.dtype, z_gradient.dtype, h_gradient.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    torch.testing.assert_close(z_gradient.double(), truth[1], rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(h_gradient.double(), truth[2], rtol=2**-8, atol=1e-6)  # rounded once to 8 bits


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_of_a_table(reduction, impl, dtype, differentiate, agree):
    z, table, rows = torch.randn(6, 5, dtype=dtype), torch.randn(3, 5).half(), torch.tensor([2, -1, 0, 0, 2, -1])

    def gathered(z: Tensor) -> Tensor:
        kept = rows >= 0
        losses = code_regression_loss(z[kept], table[rows[kept]].double(), reduction="none", impl="reference")
        if reduction == "none":
            return losses.new_zeros(6).index_put((kept.nonzero()[:, 0],), losses)
        return losses.mean() if reduction == "mean" else losses.sum()

    loss = partial(code_regression_loss, targets=table, rows=rows, reduction=reduction, impl=impl)
    for a, b in zip(differentiate(loss, z), differentiate(gathered, z.double()), strict=True):
        agree(a, b)


def test_errors_of_rows():
    z, table, rows = torch.randn(2, 5), torch.randn(3, 5), torch.tensor([2, 3])
    with pytest.raises(ValueError, match=r"rows must lie in \[-1, 3\), got values from 2 to 3; -1 ignores a row"):
        code_regression_loss(z, table, rows=rows)
    with pytest.raises(ValueError, match=r"targets are constants where rows are given; detach them"):
        code_regression_loss(z, table.requires_grad_(), rows=rows - 1)
    table = table.detach()
    table[0] = torch.nan  # never read
    assert code_regression_loss(z, table, rows=rows - 1).isfinite()
    with pytest.raises(ValueError, match="targets hold NaN or infinity"):
        code_regression_loss(z, table, rows=rows - 2)


def test_reductions(impl):
    z, h = pair((7, 5))
    rows = code_regression_loss(z, h, reduction="none", impl=impl)
    torch.testing.assert_close(code_regression_loss(z, h, reduction="sum", impl=impl), rows.sum())
    torch.testing.assert_close(code_regression_loss(z, h, impl=impl), rows.mean())


def test_empty_batch(impl, differentiate):
    loss, z_gradient, _ = differentiate(partial(code_regression_loss, impl=impl), *pair((0, 5)))
    assert loss == 0 and z_gradient.shape == (0, 5)


@pytest.mark.parametrize("zeroed", [0, 1])
def test_a_row_of_zeros_costs_a_half_and_gets_no_gradient(zeroed, impl, dtype, differentiate):
    tensors = pair((3, 5), dtype)
    tensors[zeroed][1] = 0
    loss, *gradients = differentiate(partial(code_regression_loss, reduction="none", impl=impl), *tensors)
    assert loss[1] == 0.5  # no direction: a cosine of 0
    assert all(g.isfinite().all() for g in gradients) and (gradients[zeroed][1] == 0).all()


@pytest.mark.parametrize(
    ("impl", "reduction"), [("blocked", "mean"), ("blocked", "sum"), ("blocked", "none"), ("reference", "mean")]
)
def test_compiled_equals_eager(impl, reduction, compiles):
    compiles(partial(code_regression_loss, reduction=reduction, impl=impl), *pair((7, 5), torch.float32))


def test_compiled_equals_eager_with_rows_of_a_table(compiles):
    table, rows = torch.randn(3, 5), torch.tensor([2, -1, 0])
    compiles(lambda z: code_regression_loss(z, table, rows=rows), torch.randn(3, 5))


def test_compiled_takes_other_batches(compiled, agree):
    loss = compiled(code_regression_loss)
    for batch in (7, 5, 1):
        z, h = pair((batch, 6), torch.float32)
        agree(loss(z, h), code_regression_loss(z, h))
