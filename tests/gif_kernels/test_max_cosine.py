from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from gif_kernels import max_cosine
from gif_kernels.max_cosine import blocked

TILES = [(4, 4), (4, 6), (6, 4), (3, 16)]
"""Square, and both ways of not being so: a tile then meets the diagonal off its own."""


@pytest.fixture(params=TILES, ids=str)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = request.param
    monkeypatch.setattr(blocked, "ROWS", rows)
    monkeypatch.setattr(blocked, "COLUMNS", columns)


def in_numpy(vectors: Tensor, others: Tensor | None) -> np.ndarray:
    """Cosines (n, m), of a row with itself -inf."""
    v, o = (
        x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
        for x in (vectors, vectors if others is None else others)
    )
    cosines = v @ o.T
    if others is None:
        np.fill_diagonal(cosines, -np.inf)
    return cosines


@pytest.mark.parametrize("m", [2, 3, 4, 5, 7, 8, 9, 17])
def test_among_the_vectors_themselves(m, impl, dtype, tiles, agree):
    vectors = torch.randn(m, 6, dtype=dtype)
    cosine, index = max_cosine(vectors, impl=impl)
    cosines = in_numpy(vectors, None)
    agree(cosine, torch.from_numpy(cosines.max(1)))
    assert index.dtype == torch.int64 and (index != torch.arange(m)).all()
    # where two are as near as rounding can tell, either may be named: what is named must be as near as the best
    agree(torch.from_numpy(np.take_along_axis(cosines, index.numpy()[:, None], 1)[:, 0]).to(dtype), cosine.double())


@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 1), (5, 1), (1, 9), (4, 4), (13, 7), (7, 17)])
def test_among_others(n, m, impl, dtype, tiles, agree):
    vectors, others = torch.randn(n, 6, dtype=dtype), torch.randn(m, 6, dtype=dtype)
    cosine, index = max_cosine(vectors, others, impl=impl)
    cosines = in_numpy(vectors, others)
    assert cosine.shape == index.shape == (n,)
    agree(cosine, torch.from_numpy(cosines.max(1)))
    if dtype == torch.float64:
        np.testing.assert_array_equal(index.numpy(), cosines.argmax(1))


def test_no_rows(impl):
    cosine, index = max_cosine(torch.randn(0, 6), impl=impl)
    assert cosine.shape == index.shape == (0,)
    assert (cosine.dtype, index.dtype) == (torch.float32, torch.int64)


def test_a_row_is_left_out_of_its_own_search_and_no_equal_of_it_is(impl, tiles):
    vectors = torch.eye(4)[[0, 1, 0, 2, 1, 3]]
    cosine, index = max_cosine(vectors, impl=impl)
    assert cosine.tolist() == [1, 1, 1, 0, 1, 0]
    assert index.tolist() == [2, 4, 0, 0, 1, 0]  # of equals the lowest
    cosine, index = max_cosine(vectors, vectors, impl=impl)
    assert (cosine == 1).all() and index.tolist() == [0, 1, 0, 3, 1, 5]


def test_of_equals_the_lowest_is_named_across_tiles(impl, tiles):
    others = torch.eye(3)[[2, 2, 1, 0, 1, 0, 2, 0, 1]]
    _, index = max_cosine(torch.eye(3), others, impl=impl)
    assert index.tolist() == [3, 2, 0]


def test_cosines_of_exactly_minus_one(impl, dtype, agree):
    vectors = torch.randn(1, 9, dtype=dtype)
    cosine, index = max_cosine(torch.cat([vectors, -2 * vectors]), impl=impl)
    agree(cosine, -torch.ones(2))
    assert index.tolist() == [1, 0]


def test_lengths_do_not_matter(impl):
    vectors = torch.randn(12, 5, dtype=torch.float64)
    lengths = torch.rand(12, 1, dtype=torch.float64) + 0.01
    for given, expected in zip(max_cosine(lengths * vectors, impl=impl), max_cosine(vectors, impl=impl), strict=True):
        torch.testing.assert_close(given, expected)


def test_rows_of_zeros_have_a_cosine_of_zero(impl, dtype, tiles):
    vectors = torch.randn(5, 4, dtype=dtype)
    vectors[1] = 0
    cosine, index = max_cosine(vectors, impl=impl)
    assert cosine.isfinite().all() and (cosine[1], index[1]) == (0, 0)


def test_low_precision(impl, low_dtype, agree):
    """Products and norms are taken in float32, so rounding of the inputs is all there is."""
    vectors = torch.randn(40, 32).to(low_dtype)
    cosine, _ = max_cosine(vectors, impl=impl)
    assert cosine.dtype == torch.float32
    agree(cosine, max_cosine(vectors.double(), impl="reference")[0])


def test_has_no_gradient(impl):
    assert not max_cosine(torch.randn(3, 4, requires_grad=True), impl=impl)[0].requires_grad


def test_memory_does_not_grow_with_the_pairs(monkeypatch, peak_bytes):
    rows, columns, m, d = 64, 128, 2048, 8
    monkeypatch.setattr(blocked, "ROWS", rows)
    monkeypatch.setattr(blocked, "COLUMNS", columns)
    results = (4 + 8) * m
    working = 4 * (3 * rows * columns + 4 * (rows + columns) * d) + 8 * 8 * rows
    assert peak_bytes(partial(max_cosine, torch.randn(m, d))) <= results + working


@pytest.mark.parametrize("with_others", [False, True])
def test_compiled_equals_eager(with_others, impl, compiled):
    vectors, others = torch.randn(7, 6), torch.randn(4, 6) if with_others else None
    eager = max_cosine(vectors, others, impl=impl)
    for given, expected in zip(compiled(max_cosine)(vectors, others, impl=impl), eager, strict=True):
        assert torch.equal(given, expected)


def test_compiled_takes_other_sizes(compiled):
    search = compiled(max_cosine)
    for n in (7, 5, 2):
        vectors = torch.randn(n, 6)
        for given, expected in zip(search(vectors), max_cosine(vectors), strict=True):
            assert torch.equal(given, expected)


@pytest.mark.parametrize("with_others", [False, True])
def test_custom_op_keeps_its_promises(with_others, impl):
    arguments = (torch.randn(7, 6), torch.randn(4, 6) if with_others else None, impl)
    torch.library.opcheck(torch.ops.gif_kernels.max_cosine.default, arguments)
