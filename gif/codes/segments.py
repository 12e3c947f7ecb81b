"""Sums of unit rows over the nodes of a tree whose rows stand in order: streamed, and the same on every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gif.codes.blocks import block_floats, take
from gif_kernels.sphere import inverse_norm, unit


def offsets_of(sizes: Tensor) -> Tensor:
    """Where segments of ``sizes`` (n,) begin, and the last one ends: (n + 1,) int64."""
    offsets = sizes.new_zeros(len(sizes) + 1)
    torch.cumsum(sizes, 0, dtype=sizes.dtype, out=offsets[1:])
    return offsets


def whole_segments(offsets: Tensor, rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the segments [offsets[i], offsets[i + 1]) and of their rows: ``rows`` at most, or one that has more."""
    bounds = offsets.cpu().numpy()
    begin = 0
    while begin < len(bounds) - 1:
        most = bounds.dtype.type(min(int(bounds[begin]) + rows, int(bounds[-1])))
        end = int(np.searchsorted(bounds, most, side="right")) - 1
        end = max(begin + 1, end)
        yield slice(begin, end), slice(int(bounds[begin]), int(bounds[end]))
        begin = end


def counting_sort(blocks: Callable[[], Iterator[tuple[Tensor, Tensor]]], keys: int) -> tuple[Tensor, Tensor]:
    """Values in the order of their keys, those of one key in the order given, and how many there are of each.

    ``blocks()`` gives all values and their keys, integers in [0, keys), a block at a time; it is asked twice. What is
    held is the values, (n,), and a block.
    """
    counts, n = torch.zeros(keys, dtype=torch.int64), 0
    values = torch.empty(0)
    for values, key in blocks():
        counts += key.bincount(minlength=keys).cpu()
        n += len(values)
    ordered = values.new_empty(n)
    place = offsets_of(counts).tolist()
    for values, key in blocks():
        key, rank = key.sort(stable=True)
        for i, part in enumerate(values[rank].split(key.bincount(minlength=keys).tolist())):
            ordered[place[i] : place[i] + len(part)] = part
            place[i] += len(part)
    return ordered, counts


def sum_of_groups(rows: Tensor, group: Tensor, groups: int, weight: Tensor) -> Tensor:
    """Sums (groups, d) of ``rows`` (n, d) float32, times ``weight`` (n,), that have each ``group`` (n,).

    In the order of the rows. Rows are read where they are, once.
    """
    ordered, order = group.sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(groups, device=group.device, dtype=group.dtype))
    return embedding_bag(order, rows, begins, mode="sum", per_sample_weights=weight[order])


def ancestors(paths: Tensor, vocab_size: int, depth: int) -> list[Tensor]:
    """Paths of the nodes of depths 1 to ``depth``, given those of ``depth`` (n,), which increase."""
    levels = [paths]
    for _ in range(depth - 1):
        levels.insert(0, (levels[0] // vocab_size).unique_consecutive())
    return levels


def tree_sums(
    table: Tensor, order: Tensor, offsets: Tensor, levels: Sequence[Tensor], vocab_size: int
) -> Iterator[tuple[int, slice, Tensor]]:
    """Sums of unit rows of ``table`` (m, d) over the nodes of each depth, the deepest first, where ``order`` is.

    Yields a depth, a slice of its nodes, and their sums (g, d) float32. ``levels`` are `ancestors`; node i of the
    deepest holds rows order[offsets[i]:offsets[i + 1]], read once, a block at a time. Each sum has a fixed order,
    without atomic additions.
    """
    *upper, deepest = levels
    above = torch.zeros(len(upper[-1]) if upper else 0, table.shape[1], device=order.device)
    for nodes, sums in _segment_sums(table, order, offsets):
        yield len(levels), nodes, sums
        if upper:
            parents, sizes = (deepest[nodes] // vocab_size).unique_consecutive(return_counts=True)
            first = int(torch.searchsorted(upper[-1], parents[0]))
            above[first : first + len(sizes)] += torch.segment_reduce(sums, "sum", lengths=sizes, axis=0)
    while upper:
        yield len(upper), slice(0, len(above)), above
        paths = upper.pop()
        if upper:
            sizes = (paths // vocab_size).unique_consecutive(return_counts=True)[1]
            above = torch.segment_reduce(above, "sum", lengths=sizes, axis=0)


def _segment_sums(table: Tensor, order: Tensor, offsets: Tensor) -> Iterator[tuple[slice, Tensor]]:
    block = max(1, block_floats(order.device) // table.shape[1])
    for nodes, members in whole_segments(offsets, block):
        sizes = offsets[nodes.start : nodes.stop + 1].diff().long()
        sums = torch.zeros(len(sizes), table.shape[1], device=order.device)
        if len(sizes) > 1:
            rows = take(table, order[members])
            place = torch.arange(len(rows), device=rows.device)
            begins = offsets_of(sizes)[:-1]
            sums += embedding_bag(place, rows, begins, mode="sum", per_sample_weights=inverse_norm(rows)[:, 0])
        else:
            for part in order[members].split(block):
                sums[0] += unit(take(table, part)).sum(0)
        yield nodes, sums
