"""The nearest of a gallery: exactly, by products of tiles or by faiss, with the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from gif.errors import InputError
from gif.packages import needs
from gif_kernels import checks

Backend = Literal["auto", "exact", "faiss"]
_QUERIES, _ROWS = 16, 1 << 15  # of a tile
_ROUNDING = 1e-5  # how far apart two float32 sums of the same cosine may be, in whatever order they are


class Match(NamedTuple):
    """A row of the gallery, and the cosine to it."""

    row: int
    cosine: float


def search(queries: Tensor, gallery: Tensor, top: int = 5, *, backend: Backend = "auto") -> list[list[Match]]:
    """For each query the ``top`` rows of the gallery of highest cosine, of equal ones the first.

    Whatever finds the candidates, cosines are computed anew in float64, and the order is theirs: each backend gives the
    same answers.

    Args:
        queries: (q, d) float32, of unit length.
        gallery: (n, d) float32, of unit length.
        top: how many, at least 1; all of them where the gallery has no more.
        backend: "faiss", an exact index of its; "exact", products of tiles; "auto" is faiss where it is installed.

    Raises ValueError for widths that differ, an empty gallery, or faiss where it is not installed.
    """
    checks.choice("backend", backend, get_args(Backend))
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise InputError(f"queries are {tuple(queries.shape)} and the gallery is {tuple(gallery.shape)}: widths differ")
    if not len(gallery) or top < 1:
        raise InputError(f"wanted a gallery of at least one and top >= 1, got {len(gallery)} and {top}")
    top = min(top, len(gallery))
    if backend == "auto":
        backend = "faiss" if _has_faiss() else "exact"
    candidates = _by_faiss if backend == "faiss" else _by_tiles
    matches = []
    for query, rows in zip(queries, candidates(queries, gallery, top), strict=True):
        cosines = gallery[rows].double() @ query.double()
        order = np.lexsort((rows.numpy(), -cosines.numpy()))[:top]
        matches.append([Match(int(rows[place]), float(cosines[place])) for place in order])
    return matches


def _by_tiles(queries: Tensor, gallery: Tensor, top: int) -> Iterator[Tensor]:
    """For each query all rows that may be among the nearest: those as near as the last of them, within rounding."""
    for some in queries.split(_QUERIES):
        cosines = torch.cat([some @ rows.T for rows in gallery.split(_ROWS)], dim=1)
        least = cosines.topk(top).values[:, -1:] - _ROUNDING
        yield from (near.nonzero().flatten() for near in cosines >= least)


def _by_faiss(queries: Tensor, gallery: Tensor, top: int) -> Iterator[Tensor]:
    with needs("gif-recognition[search]", "searching by faiss (--backend exact needs nothing)"):
        import faiss
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.contiguous().numpy())
    least = index.search(queries.contiguous().numpy(), top)[0][:, -1] - _ROUNDING
    for query, radius in zip(queries, least, strict=True):
        _, _, rows = index.range_search(query[None].contiguous().numpy(), float(radius))
        yield torch.from_numpy(rows)


def _has_faiss() -> bool:
    from importlib.util import find_spec

    return find_spec("faiss") is not None
