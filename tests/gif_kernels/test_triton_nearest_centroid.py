"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import dispatch, nearest_centroid
from gif_kernels.device.tuning import Tile

kernels = pytest.importorskip("gif_kernels.nearest_centroid.kernels", reason="Triton is not installed")
if not (dispatch.INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it without one", allow_module_level=True)

DEVICE = "cpu" if dispatch.INTERPRETING else "cuda"
pytestmark = [] if dispatch.INTERPRETING else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(dispatch.INTERPRETING, reason="needs a CUDA or ROCm device, not the interpreter")

triton_search = partial(nearest_centroid, impl="triton")

SEGMENTS = {
    "one": [7],
    "equal to a block": [16, 16],
    "uneven": [1, 33, 3, 17, 16, 2],
    "empty ones": [0, 5, 0, 0, 20, 0],
    "none": [0, 0],
    "many small": [1] * 23,
}


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16 rows, 32 centroids, 16 columns of both."""
    monkeypatch.setattr(kernels, "tile", lambda *_: Tile(rows=16, columns=32, width=16, warps=4, stages=1))
    kernels.search_constants.cache_clear()
    yield
    kernels.search_constants.cache_clear()


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def check(given, vectors, centroids, sizes, agree):
    index, cosine = given
    segment = torch.repeat_interleave(torch.tensor(sizes))
    products = F.normalize(vectors.double())[:, None] * F.normalize(centroids.double(), dim=2)[segment]
    cosines = products.sum(2)
    assert (index.dtype, cosine.dtype) == (torch.int64, torch.float32)
    agree(cosine, cosines.amax(1))
    # where two are as near as rounding can tell, either may be named: what is named must be as near as the best
    agree(cosines.gather(1, index[:, None])[:, 0].float(), cosines.amax(1))


@pytest.mark.parametrize("sizes", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize(("k", "width"), [(1, 7), (20, 48), (33, 20), (70, 16)])
def test_segments_against_float64(sizes, k, width, small_tiles, agree):
    vectors, centroids = torch.randn(sum(sizes), width), torch.randn(len(sizes), k, width)
    check(triton_search(vectors, centroids, offsets=offsets_of(sizes)), vectors, centroids, sizes, agree)


@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 1), (67, 20, 130), (130, 70, 48), (0, 3, 5)])
def test_one_set_of_centroids(n, k, width, agree):
    vectors, centroids = torch.randn(n, width), torch.randn(k, width)
    check(triton_search(vectors, centroids), vectors, centroids[None], [n], agree)


def check_low_precision(dtype):
    """Products of low operands are exact in float32, so rounding of the inputs, in the truth too, is all there is."""
    vectors, centroids = torch.randn(70, 48).to(dtype), torch.randn(3, 20, 48).to(dtype)
    sizes = [30, 0, 40]
    _, cosine = triton_search(vectors, centroids, offsets=offsets_of(sizes))
    truth = nearest_centroid(vectors.double(), centroids.double(), offsets=offsets_of(sizes), impl="reference")[1]
    torch.testing.assert_close(cosine.double(), truth, atol=1e-6, rtol=1e-6)  # float32, some tens of terms


def test_float16(small_tiles):
    check_low_precision(torch.float16)


@on_a_gpu
def test_bfloat16():
    check_low_precision(torch.bfloat16)


def test_dtypes_may_differ(small_tiles, agree):
    vectors, centroids = torch.randn(9, 48).half(), torch.randn(1, 5, 48)
    check(triton_search(vectors, centroids, offsets=offsets_of([9])), vectors, centroids, [9], agree)


def test_non_contiguous(small_tiles):
    vectors, centroids = torch.randn(48, 9), torch.randn(48, 5)
    expected = triton_search(vectors.T.contiguous(), centroids.T.contiguous())
    for given, wanted in zip(triton_search(vectors.T, centroids.T), expected, strict=True):
        assert torch.equal(given, wanted)


def test_of_equal_centroids_the_lowest_is_named(small_tiles):
    vectors = torch.eye(4).repeat(5, 1)  # products of 0 and 1 are exact, so equal is equal
    centroids = torch.eye(4)[[2, 0, 2, 1, 0, 3, 3] * 6]  # in two blocks of centroids
    index, cosine = triton_search(vectors, centroids)
    assert index.tolist() == [1, 3, 0, 5] * 5 and (cosine == 1).all()


def test_rows_of_zeros_have_a_cosine_of_zero(small_tiles):
    vectors, centroids = torch.randn(3, 4), torch.randn(5, 4)
    vectors[1] = 0
    index, cosine = triton_search(vectors, centroids)
    assert (index[1], cosine[1]) == (0, 0)
    _, cosine = triton_search(-centroids[:1], torch.stack([centroids[0], torch.zeros(4)]))
    assert cosine[0] == 0  # nearer than what lies opposite


def test_compiled_equals_eager(compiled, small_tiles):
    vectors, centroids, offsets = torch.randn(20, 16), torch.randn(2, 5, 16), offsets_of([3, 17])
    eager = triton_search(vectors, centroids, offsets=offsets)
    for given, expected in zip(compiled(triton_search)(vectors, centroids, offsets=offsets), eager, strict=True):
        assert torch.equal(given, expected)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="compute in float32"):
        triton_search(torch.randn(3, 4).double(), torch.randn(2, 4))


@on_a_gpu
def test_the_host_does_not_wait():
    vectors, centroids, offsets = torch.randn(5000, 64), torch.randn(3, 20, 64), offsets_of([10, 4000, 990])
    kernels.nearest_centroid(vectors, centroids, offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.nearest_centroid(vectors, centroids, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
