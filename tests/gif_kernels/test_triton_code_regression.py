"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import code_regression_loss, dispatch

kernels = pytest.importorskip("gif_kernels.code_regression.kernels", reason="Triton is not installed")
if not (dispatch.INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it without one", allow_module_level=True)

DEVICE = "cpu" if dispatch.INTERPRETING else "cuda"
pytestmark = [] if dispatch.INTERPRETING else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(dispatch.INTERPRETING, reason="needs a CUDA or ROCm device, not the interpreter")

# blocks are of 8 rows and 256 columns
SHAPES = [(1, 1), (1, 7), (5, 48), (67, 130), (9, 256), (5, 300)]
MANY = [(67, 130), (9, 300)]
"""Of numbers enough to compare two errors: one may be zero by chance."""
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

triton_loss = partial(code_regression_loss, impl="triton")
reference_loss = partial(code_regression_loss, impl="reference")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def pair(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@every_shape
def test_values_and_gradients(shape, differentiate, agree):
    tensors = pair(shape)
    truth = differentiate(partial(reference_loss, reduction="none"), *(x.double() for x in tensors))
    given = differentiate(partial(triton_loss, reduction="none"), *tensors)
    for a, b in zip(given, truth, strict=True):
        # a row of one number, or a short one, makes a gradient of 1 / ||row|| times rounding alone
        agree(a, b, noise=4 * torch.finfo(torch.float32).eps / min(x.norm(dim=1).min().item() for x in tensors))


@pytest.mark.parametrize("shape", MANY, ids=str)
def test_float16(shape, differentiate, no_worse_than_pytorch):
    check_low_precision(shape, torch.float16, differentiate, no_worse_than_pytorch)


@on_a_gpu
@pytest.mark.parametrize("shape", [*MANY, (3000, 768)], ids=str)
def test_bfloat16(shape, differentiate, no_worse_than_pytorch):
    check_low_precision(shape, torch.bfloat16, differentiate, no_worse_than_pytorch)


def check_low_precision(shape, dtype, differentiate, no_worse_than_pytorch):
    def plain(z: Tensor, h: Tensor) -> Tensor:
        return ((F.normalize(z) * F.normalize(h)).sum(1) - 1).square().sum() / 2

    tensors = pair(shape, dtype)
    truth = differentiate(partial(reference_loss, reduction="sum"), *(x.double() for x in tensors))
    given = differentiate(partial(triton_loss, reduction="sum"), *tensors)
    for a, b, c in zip(given, differentiate(plain, *tensors), truth, strict=True):
        no_worse_than_pytorch(a, b, c)


def test_dtypes_may_differ(differentiate, agree):
    z, h = pair((5, 48))
    z = z.half()
    truth = differentiate(reference_loss, z.double(), h.double())
    loss, z_gradient, h_gradient = differentiate(triton_loss, z, h)
    assert z_gradient.dtype == torch.float16
    torch.testing.assert_close(z_gradient.double(), truth[1], rtol=2**-10, atol=1e-5)  # rounded once to 11 bits
    agree(loss, truth[0]), agree(h_gradient, truth[2])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_of_a_table(reduction, differentiate, agree):
    z, table, rows = torch.randn(67, 130), torch.randn(31, 130).half(), torch.randint(31, (67,))
    rows[::5] = -1
    options = {"rows": rows, "reduction": reduction}
    truth = differentiate(lambda z: reference_loss(z, table, **options), z.double())
    for a, b in zip(differentiate(lambda z: triton_loss(z, table, **options), z), truth, strict=True):
        agree(a, b)


def test_rows_out_of_range_make_the_loss_nan(monkeypatch):
    """On an accelerator values are not looked at; the kernel that reads them answers."""
    monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)
    rows = torch.tensor([0, 3, -2, -1, 2])
    losses = triton_loss(torch.randn(5, 48), torch.randn(3, 48), rows=rows, reduction="none")
    assert losses.isnan().tolist() == [False, True, True, False, False]


def test_gradients_where_they_are_asked_for_alone(agree):
    tensors = pair((5, 48))
    leaves = [x.requires_grad_() for x in tensors]
    complete = torch.autograd.grad(triton_loss(*leaves), leaves)
    for wanted in range(2):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
        triton_loss(*leaves).backward()
        agree(leaves[wanted].grad, complete[wanted])  # another compilation, which may fuse other multiply-adds
        assert leaves[1 - wanted].grad is None


def test_without_gradients():
    tensors = pair((5, 48))
    given = triton_loss(*tensors)
    assert not given.requires_grad
    assert torch.equal(given, triton_loss(*(x.requires_grad_() for x in tensors)).detach())


def test_rows_of_zeros_cost_a_half_and_get_no_gradient(differentiate):
    z, h = pair((5, 48))
    z[0], h[1] = 0, 0
    losses, z_gradient, h_gradient = differentiate(partial(triton_loss, reduction="none"), z, h)
    assert losses[:2].tolist() == [0.5, 0.5]
    assert all(x.isfinite().all() for x in (z_gradient, h_gradient))
    assert (z_gradient[0] == 0).all() and (h_gradient[1] == 0).all()


def test_empty_batch(differentiate):
    loss, *gradients = differentiate(triton_loss, *pair((0, 8)))
    assert loss == 0 and all(x.shape == (0, 8) for x in gradients)


def test_non_contiguous(differentiate, agree):
    z, h = pair((5, 48))
    expected = differentiate(triton_loss, z, h)
    for a, b in zip(differentiate(triton_loss, z.T.contiguous().T, h.T.contiguous().T), expected, strict=True):
        agree(a, b)


def test_second_derivative_is_refused_not_wrong():
    z, h = pair((5, 48))
    (gradient,) = torch.autograd.grad(triton_loss(z.requires_grad_(), h), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


def test_compiled_equals_eager(compiles):
    compiles(partial(triton_loss, reduction="none"), *pair((5, 48)))


def test_custom_ops_keep_their_word():
    """Schemas and fake implementations agree with what runs."""
    z, h = pair((5, 48))
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    table, rows = torch.randn(3, 48), torch.arange(5) % 3
    for targets, target_rows in ((h, None), (table, rows)):
        for save, reduction in ((False, "none"), (True, "sum"), (True, "mean")):
            inputs = (z, targets, target_rows, target_rows, reduction, save)
            check(torch.ops.gif_kernels.code_regression_forward.default, inputs)
        _, share, saved = kernels.forward(*inputs)
        for needs in ((True, True), (True, False), (False, True)) if target_rows is None else ((True, False),):
            backward = (z, targets, target_rows, share, saved, torch.ones(()), *needs)
            check(torch.ops.gif_kernels.code_regression_backward.default, backward)


@on_a_gpu
def test_two_launches_forward_and_backward():
    tensors = [x.requires_grad_() for x in pair((512, 512), torch.bfloat16)]

    def step() -> None:
        torch.autograd.grad(triton_loss(*tensors, reduction="none"), tensors, torch.ones(()).expand(512))

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in launched if name.startswith("code_regression")]) == 2
