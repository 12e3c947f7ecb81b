from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from gif_kernels import nearest_centroid
from gif_kernels.nearest_centroid import blocked

SEGMENTS = {
    "one": [7],
    "equal": [4, 4, 4],
    "uneven": [1, 13, 3, 3, 7, 2],
    "empty ones": [0, 5, 0, 0, 3, 0],
    "none": [0, 0],
    "over a tile": [8, 9, 17, 1],
    "many small": [1] * 23,
}
every_segmentation = pytest.mark.parametrize("sizes", SEGMENTS.values(), ids=SEGMENTS.keys())


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "ROWS", 8)


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(sizes).tolist()])


def in_numpy(vectors: Tensor, centroids: Tensor, sizes: list[int]) -> np.ndarray:
    """Cosines (n, k) of each row with the centroids of its segment."""
    v, c = vectors.double().numpy(), centroids.double().numpy()
    segment = np.repeat(np.arange(len(sizes)), sizes)
    v, c = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (v, c))
    return np.einsum("nd,nkd->nk", v, c[segment])


@every_segmentation
@pytest.mark.parametrize("k", [1, 3, 5])
def test_segments_against_the_formula(sizes, k, impl, dtype, small_tiles, agree):
    vectors, centroids = torch.randn(sum(sizes), 6, dtype=dtype), torch.randn(len(sizes), k, 6, dtype=dtype)
    index, cosine = nearest_centroid(vectors, centroids, offsets=offsets_of(sizes), impl=impl)
    cosines = in_numpy(vectors, centroids, sizes)
    agree(cosine, torch.from_numpy(cosines.max(1)))
    # where two are as near as rounding can tell, either may be named: what is named must be as near as the best
    assert index.dtype == torch.int64
    agree(torch.from_numpy(np.take_along_axis(cosines, index.numpy()[:, None], 1)[:, 0]).to(dtype), cosine.double())


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 25])
@pytest.mark.parametrize("k", [1, 2, 20])
def test_one_set_of_centroids(n, k, impl, dtype, small_tiles, agree):
    vectors, centroids = torch.randn(n, 5, dtype=dtype), torch.randn(k, 5, dtype=dtype)
    index, cosine = nearest_centroid(vectors, centroids, impl=impl)
    cosines = in_numpy(vectors, centroids[None], [n])
    assert index.shape == cosine.shape == (n,)
    agree(cosine, torch.from_numpy(cosines.max(1)))
    if dtype == torch.float64:
        np.testing.assert_array_equal(index.numpy(), cosines.argmax(1))


def test_more_centroids_than_rows_in_a_tile(impl, small_tiles):
    sizes = [3, 2, 0, 4]
    vectors, centroids = torch.randn(9, 6, dtype=torch.float64), torch.randn(4, 31, 6, dtype=torch.float64)
    index, _ = nearest_centroid(vectors, centroids, offsets=offsets_of(sizes), impl=impl)
    np.testing.assert_array_equal(index.numpy(), in_numpy(vectors, centroids, sizes).argmax(1))


def test_of_equal_centroids_the_lowest_is_named(impl, small_tiles):
    vectors = torch.eye(4).repeat(5, 1)  # products of 0 and 1 are exact, so equal is equal
    centroids = torch.eye(4)[[2, 0, 2, 1, 0, 3, 3]]
    index, cosine = nearest_centroid(vectors, centroids, impl=impl)
    assert index.tolist() == [1, 3, 0, 5] * 5 and (cosine == 1).all()


def test_cosines_of_exactly_one(impl, dtype, agree):
    centroids = torch.randn(6, 9, dtype=dtype)
    index, cosine = nearest_centroid(3 * centroids, centroids, impl=impl)
    assert index.tolist() == list(range(6))
    agree(cosine, torch.ones(6))
    agree(nearest_centroid(-3 * centroids[:1], centroids[:1], impl=impl)[1], -torch.ones(1))


def test_lengths_do_not_matter(impl):
    vectors, centroids = torch.randn(30, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    index, cosine = nearest_centroid(vectors, centroids, impl=impl)
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.01
    scaled_index, scaled_cosine = nearest_centroid(1e3 * vectors, lengths * centroids, impl=impl)
    assert torch.equal(index, scaled_index)
    torch.testing.assert_close(cosine, scaled_cosine)


def test_rows_of_zeros_have_a_cosine_of_zero(impl, dtype):
    vectors, centroids = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    vectors[1] = 0
    index, cosine = nearest_centroid(vectors, centroids, impl=impl)
    assert (index[1], cosine[1]) == (0, 0)
    _, cosine = nearest_centroid(-centroids[:1], torch.stack([centroids[0], torch.zeros(4, dtype=dtype)]), impl=impl)
    assert cosine[0] == 0  # nearer than what lies opposite


def test_low_precision(impl, low_dtype, agree):
    """Products and norms are taken in float32, so rounding of the inputs is all there is."""
    vectors, centroids = torch.randn(40, 32).to(low_dtype), torch.randn(6, 32).to(low_dtype)
    _, cosine = nearest_centroid(vectors, centroids, impl=impl)
    assert cosine.dtype == torch.float32
    agree(cosine, nearest_centroid(vectors.double(), centroids.double(), impl="reference")[1])


def test_dtypes_may_differ(impl, agree):
    vectors, centroids = torch.randn(9, 6).bfloat16(), torch.randn(4, 6)
    _, cosine = nearest_centroid(vectors, centroids, impl=impl)
    agree(cosine, nearest_centroid(vectors.double(), centroids.double(), impl="reference")[1])


def test_has_no_gradient(impl):
    _, cosine = nearest_centroid(torch.randn(3, 4, requires_grad=True), torch.randn(2, 4), impl=impl)
    assert not cosine.requires_grad


@pytest.mark.parametrize(
    ("segments", "size", "k"),
    [(1, 2**14, 16), (1024, 1, 16), (128, 128, 1)],
    ids=["one of many rows", "many of one row", "many of half a tile"],
)
def test_memory_is_bounded_by_the_tile(segments, size, k, monkeypatch, peak_bytes):
    rows, d = 256, 8
    monkeypatch.setattr(blocked, "ROWS", rows)
    vectors, centroids = torch.randn(segments * size, d), torch.randn(segments, k, d)
    offsets = offsets_of([size] * segments)
    results = (8 + 4) * len(vectors) + 4 * 8 * segments  # index and cosine; sizes, their order and what sorting takes
    gathered = 4 * (4 * rows * d + 2 * rows * d + 3 * rows * k)  # rows, centroids, similarities, and temporaries
    assert peak_bytes(partial(nearest_centroid, vectors, centroids, offsets=offsets)) <= results + gathered


@pytest.mark.parametrize("offsets", [None, [0, 3, 7]], ids=["one set", "segments"])
def test_compiled_equals_eager(offsets, impl, compiled):
    vectors, centroids = torch.randn(7, 6), torch.randn(4, 6) if offsets is None else torch.randn(2, 4, 6)
    options = {"offsets": offsets and torch.tensor(offsets), "impl": impl}
    eager = nearest_centroid(vectors, centroids, **options)
    for given, expected in zip(compiled(nearest_centroid)(vectors, centroids, **options), eager, strict=True):
        assert torch.equal(given, expected)


def test_compiled_takes_other_sizes(compiled):
    search = compiled(nearest_centroid)
    for n, k in ((7, 4), (5, 3), (1, 2)):
        vectors, centroids = torch.randn(n, 6), torch.randn(k, 6)
        eager = nearest_centroid(vectors, centroids)
        for given, expected in zip(search(vectors, centroids), eager, strict=True):
            assert torch.equal(given, expected)


def test_custom_op_keeps_its_promises(impl):
    arguments = (torch.randn(7, 6), torch.randn(2, 4, 6).bfloat16(), torch.tensor([0, 3, 7]), impl)
    torch.library.opcheck(torch.ops.gif_kernels.nearest_centroid.default, arguments)
