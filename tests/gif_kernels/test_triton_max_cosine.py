"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gif_kernels import dispatch, max_cosine
from gif_kernels.device.tuning import Tile

kernels = pytest.importorskip("gif_kernels.max_cosine.kernels", reason="Triton is not installed")
if not (dispatch.INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it without one", allow_module_level=True)

DEVICE = "cpu" if dispatch.INTERPRETING else "cuda"
pytestmark = [] if dispatch.INTERPRETING else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(dispatch.INTERPRETING, reason="needs a CUDA or ROCm device, not the interpreter")

triton_search = partial(max_cosine, impl="triton")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16 x 32, in several parts of the columns."""
    monkeypatch.setattr(kernels, "tile", lambda *_: Tile(rows=16, columns=32, width=16, warps=4, stages=1))
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 6)
    kernels.search_constants.cache_clear()
    yield
    kernels.search_constants.cache_clear()


def check(given, vectors, others, agree):
    cosine, index = given
    truth, _ = max_cosine(vectors.double(), None if others is None else others.double(), impl="reference")
    assert (cosine.dtype, index.dtype) == (torch.float32, torch.int64)
    agree(cosine, truth)
    if others is None:
        assert (index != torch.arange(len(index))).all()
    # where two are as near as rounding can tell, either may be named: what is named must be as near as the best
    named = F.normalize((vectors if others is None else others).double())[index]
    agree((F.normalize(vectors.double()) * named).sum(1).float(), truth)


@pytest.mark.parametrize("m", [2, 15, 32, 33, 130])
def test_among_the_vectors_themselves(m, small_tiles, agree):
    vectors = torch.randn(m, 20)
    check(triton_search(vectors), vectors, None, agree)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 1), (1, 70), (40, 130)])
def test_among_others(n, m, small_tiles, agree):
    vectors, others = torch.randn(n, 20), torch.randn(m, 20)
    check(triton_search(vectors, others), vectors, others, agree)


@pytest.mark.parametrize("d", [1, 7, 48, 130])
def test_tiles_as_shipped(d, agree):
    vectors = torch.randn(150, d)
    check(triton_search(vectors), vectors, None, agree)


def test_float16_and_what_differs_from_it(agree):
    vectors, others = torch.randn(40, 32).half(), torch.randn(50, 32)
    check(triton_search(vectors), vectors, None, agree)
    check(triton_search(vectors, others), vectors, others, agree)


@on_a_gpu
def test_bfloat16(agree):
    vectors = torch.randn(3000, 512).bfloat16()
    check(triton_search(vectors), vectors, None, agree)


def test_no_rows():
    cosine, index = triton_search(torch.randn(0, 6))
    assert cosine.shape == index.shape == (0,)
    assert (cosine.dtype, index.dtype) == (torch.float32, torch.int64)


def test_of_equals_the_lowest_is_named_across_tiles_and_parts(small_tiles):
    others = torch.eye(3).repeat(40, 1)
    cosine, index = triton_search(torch.eye(3), others)
    assert cosine.tolist() == [1, 1, 1] and index.tolist() == [0, 1, 2]
    _, index = triton_search(others)
    assert index.tolist() == [3, 4, 5] + [i % 3 for i in range(3, 120)]


def test_rows_of_zeros_have_a_cosine_of_zero(small_tiles):
    vectors = torch.randn(40, 4)
    vectors[1] = 0
    cosine, index = triton_search(vectors)
    assert cosine.isfinite().all() and (cosine[1], index[1]) == (0, 0)


def test_negative_cosines():
    vectors = torch.randn(1, 9)
    cosine, index = triton_search(torch.cat([vectors, -2 * vectors]))
    torch.testing.assert_close(cosine, -torch.ones(2))
    assert index.tolist() == [1, 0]


def test_non_contiguous():
    vectors = torch.randn(20, 16)
    for a, b in zip(triton_search(vectors.T.contiguous().T), triton_search(vectors), strict=True):
        assert torch.equal(a, b)


def test_compiled_equals_eager(compiled):
    vectors, others = torch.randn(7, 6), torch.randn(4, 6)
    for given, eager in zip(compiled(triton_search)(vectors, others), triton_search(vectors, others), strict=True):
        assert torch.equal(given, eager)


@on_a_gpu
def test_offsets_past_int32():
    others = torch.zeros(2**22 + 100, 512, dtype=torch.bfloat16)
    others[-100:] = torch.randn(100, 512).bfloat16()
    cosine, index = triton_search(others[-100:].clone(), others)
    assert (cosine > 0.99).all() and torch.equal(index, torch.arange(100) + 2**22)
