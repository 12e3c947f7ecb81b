"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import dispatch, gaussian_potential
from gif_kernels.device.tuning import Tile

kernels = pytest.importorskip("gif_kernels.gaussian_potential.kernels", reason="Triton is not installed")
if not (dispatch.INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it without one", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it where determinism is asked for
DEVICE = "cpu" if dispatch.INTERPRETING else "cuda"
pytestmark = [] if dispatch.INTERPRETING else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(dispatch.INTERPRETING, reason="needs a CUDA or ROCm device, not the interpreter")

SMALL_TILE = Tile(rows=16, columns=16, width=16, warps=4, stages=1)
triton_potential = partial(gaussian_potential, impl="triton")
reference_potential = partial(gaussian_potential, impl="reference")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=["fused", "in blocks"])
def design(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Either design, whatever the table says, with tiles and blocks that few rows pass."""
    fused = request.param == "fused"
    monkeypatch.setattr(kernels, "fused_potential_tile", lambda *_: SMALL_TILE if fused else None)
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 5)
    if not fused:
        monkeypatch.setattr(kernels, "BLOCK", 16)
        monkeypatch.setattr(kernels, "tile", lambda *_: SMALL_TILE)
    kernels.pairs_constants.cache_clear()
    yield
    kernels.pairs_constants.cache_clear()


def short_row(vectors: Tensor) -> float:
    """What rounding leaves in a gradient where one short row makes it 1 / ||row|| times rounding."""
    return 8 * torch.finfo(torch.float32).eps / vectors.norm(dim=1).min().item()


# rows: two, under, at and over one tile or block of 16, over two; widths of one chunk of 16 and more
@pytest.mark.parametrize(("m", "d"), [(2, 16), (3, 48), (15, 16), (16, 48), (17, 16), (33, 48)])
def test_values_and_gradients(m, d, design, differentiate, agree):
    vectors = torch.randn(m, d)
    value, gradient = differentiate(partial(triton_potential, t=1.5), vectors)
    truth = differentiate(partial(reference_potential, t=1.5), vectors.double())
    agree(value, truth[0])
    agree(m * gradient, m * truth[1], noise=m * short_row(vectors))


@pytest.mark.parametrize("d", [1, 7, 130])
def test_any_width_in_blocks(d, differentiate, agree):
    vectors = torch.randn(20, d)
    truth = differentiate(reference_potential, vectors.double())
    for a, b in zip(differentiate(triton_potential, vectors), truth, strict=True):
        agree(a, b, noise=short_row(vectors))


def test_blocks_as_shipped(monkeypatch, differentiate, agree):
    """Tiles of the table, in blocks that do not divide by them."""
    monkeypatch.setattr(kernels, "BLOCK", 70)
    vectors = torch.randn(150, 33)
    truth = differentiate(reference_potential, vectors.double())
    for a, b in zip(differentiate(triton_potential, vectors), truth, strict=True):
        agree(len(vectors) * a, len(vectors) * b, noise=short_row(vectors))


@pytest.mark.parametrize("sizes", [(37,), (16, 1, 20)], ids=str)
def test_shares_of_processes(sizes, design, differentiate, agree):
    vectors = torch.randn(37, 16)
    truth = differentiate(reference_potential, vectors.double())

    def in_shares(vectors: Tensor) -> Tensor:
        gathered, offsets = vectors.detach(), [sum(sizes[:i]) for i in range(len(sizes))]
        shares = zip(vectors.split(sizes), offsets, strict=True)
        return torch.stack([triton_potential(x, gathered, offset=i) for x, i in shares]).logsumexp(0)

    value, gradient = differentiate(in_shares, vectors)
    agree(value, truth[0])
    agree(37 * gradient, 37 * truth[1], noise=37 * short_row(vectors))


def test_without_a_gradient(design):
    vectors = torch.randn(20, 48)
    expected = triton_potential(vectors.clone().requires_grad_())
    given = triton_potential(vectors)
    assert not given.requires_grad
    assert given.item() == pytest.approx(expected.item(), abs=1e-6)  # the fused design sums by rows


def test_float16(design, differentiate, no_worse_than_pytorch):
    check_low_precision(torch.randn(40, 48).half() + 0.3, differentiate, no_worse_than_pytorch)


@on_a_gpu
@pytest.mark.parametrize("width", [48, 384, 400, 512, 640, 768, 1024])
@pytest.mark.parametrize("m", [96, 2500, 9000])
def test_bfloat16(m, width, differentiate, no_worse_than_pytorch):
    check_low_precision((torch.randn(m, width) + 0.3).bfloat16(), differentiate, no_worse_than_pytorch)


def check_low_precision(vectors, differentiate, no_worse_than_pytorch):
    def plain(vectors: Tensor) -> Tensor:
        h = F.normalize(vectors)
        pairs = (-2 * (2 - 2 * h @ h.T)).exp() * (1 - torch.eye(len(h), dtype=h.dtype))
        return pairs.sum().log() - math.log(len(h) * (len(h) - 1))

    truth = differentiate(reference_potential, vectors.double())
    given = differentiate(triton_potential, vectors)
    assert given[1].dtype == vectors.dtype
    for a, b, c in zip(given, differentiate(plain, vectors), truth, strict=True):
        no_worse_than_pytorch(a, b, c)


def test_rows_of_zeros(design, differentiate, agree):
    vectors = torch.randn(20, 16)
    vectors[2] = 0
    value, gradient = differentiate(triton_potential, vectors)
    truth = differentiate(reference_potential, vectors.double())
    agree(value, truth[0])
    agree(gradient, truth[1], noise=short_row(vectors[3:]))
    assert (gradient[2] == 0).all()


def test_wide_potentials_keep_what_a_small_dtype_would_lose(differentiate):
    """exp(-4t) is far below the smallest float16 at t = 10."""
    vectors = torch.randn(40, 512).half()
    (value, gradient), truth = (
        differentiate(partial(kind, t=10.0), x)
        for kind, x in ((triton_potential, vectors), (reference_potential, vectors.double()))
    )
    assert value.item() == pytest.approx(truth[0].item(), abs=1e-2)
    assert (gradient.double() - truth[1]).norm() <= 1e-2 * truth[1].norm()


def test_same_inputs_give_the_same_bits(design):
    vectors = torch.randn(20, 48, requires_grad=True)
    first, second = (torch.autograd.grad(triton_potential(vectors), vectors)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_non_contiguous(design, differentiate):
    vectors = torch.randn(20, 16)
    expected = differentiate(triton_potential, vectors)
    for other in (vectors.T.contiguous().T, torch.cat([vectors, vectors], 1)[:, :16]):
        for a, b in zip(differentiate(triton_potential, other), expected, strict=True):
            assert torch.equal(a, b)


def test_second_derivative_is_refused_not_wrong():
    vectors = torch.randn(5, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(triton_potential(vectors), vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("offset", [None, 4])
def test_compiled_equals_eager(offset, design, compiles):
    vectors = torch.randn(17, 16)
    if offset is None:
        compiles(triton_potential, vectors)
    else:
        compiles(partial(triton_potential, others=vectors, offset=offset), vectors[offset : offset + 2])


@pytest.mark.parametrize("want_gradient", [True, False])
def test_custom_op_keeps_its_promises(want_gradient, design):
    vectors = torch.randn(17, 16)
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    for arguments in ((vectors, None, 0), (vectors[3:5], vectors, 3)):
        check(torch.ops.gif_kernels.gaussian_potential_triton.default, (*arguments, 2.0, want_gradient))


def test_which_design_runs():
    fused = kernels.fused_potential_tile
    assert fused(torch.bfloat16, 512, "sm_90") is not None
    assert fused(torch.bfloat16, 500, "sm_90") is None  # its chunks of 128 do not divide it
    assert fused(torch.bfloat16, 768, "sm_90") is None and fused(torch.bfloat16, 768, "sm_80") is not None
    assert fused(torch.float32, 512, "sm_90") is None and fused(torch.bfloat16, 512, "gfx942") is None


@on_a_gpu
def test_offsets_past_int32():
    """The last rows of others whose elements number more than 2^31."""
    width, rows = 512, 2**22 + 100
    others = torch.randn(rows, width, dtype=torch.bfloat16)
    vectors = others[-100:].clone().requires_grad_()
    share = triton_potential(vectors, others, offset=rows - 100)
    parts = [
        (2 * 2 * (F.normalize(vectors.detach().float()) @ F.normalize(x.float()).T - 1)).exp().sum(dtype=torch.float64)
        for x in others.split(2**16)
    ]
    expected = (torch.stack(parts).sum() - 100).log() - math.log(rows * (rows - 1))
    assert share.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("adds", [True, False])
def test_products_are_added_in_float32_by_each_pytorch(adds, monkeypatch):
    """PyTorch 2.9 multiplies bfloat16 into float32 but refuses to add it there; a CPU does neither: both are played."""

    def addmm(sums, left, right, *, out_dtype, out):
        assert adds, "self and mat2 must have the same dtype, but got Float and BFloat16"
        return out.copy_(sums + left.to(out_dtype) @ right.to(out_dtype))

    monkeypatch.setattr(kernels, "ADDS_TO_FLOAT32", adds)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", lambda left, right, *, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    sums = torch.randn(5, 3)
    pairs, rows = torch.rand(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    wanted = sums + pairs.float() @ rows.float()
    kernels._add_product(sums, pairs, rows)
    assert torch.equal(sums, wanted)
