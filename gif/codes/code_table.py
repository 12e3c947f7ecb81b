"""The codes of many identities as one number each, and their order: what lookups and siblings read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from gif.files import check_mapped

BUCKETS = 1 << 20  # of the numbers' range at most: what a search need not look at
_A_BUCKET = 16  # codes, on average
_LOOKED_AT = 16  # at once, where a search ends
_ROWS_A_BLOCK = 1 << 20
_UNSIGNED = (1 << 32) - 1


@dataclass(frozen=True, eq=False)
class CodeTable:
    """Codes of m identities as numbers in base v, c = sum_j c_j v^(l - 1 - j), and the identities in their order.

    Eight bytes an identity where v^l <= 2^32 and m < 2^31: four of the number and four of the order. An identity's
    place in the order is not kept but found, by a search of a few steps that are the same for all, so that nothing
    waits for a device. The tensors may lie in a memory map: what is not looked at is not read.

    Args:
        numbers: (m,) int32, of which the bits are those of a number without sign, or int64 where v^l > 2^32; or the
            tokens (m, l) uint8 themselves, as they lie in a file.
        order: (m,) identities by increasing number, int32 or int64.
        starts: (buckets + 1,) how many numbers are smaller than each of equal steps through [0, v^l), and m.
        vocab_size: v.
        length: l.
        largest_bucket: the most codes that lie between two steps: a number, so that a search waits for no device.
    """

    numbers: Tensor
    order: Tensor
    starts: Tensor
    vocab_size: int
    length: int
    largest_bucket: int

    @classmethod
    def of(cls, codes: Tensor, vocab_size: int) -> Self:
        """The table of ``codes`` (m, l), whose tokens lie in [0, v); codes that are alike stand side by side."""
        m, length = codes.shape
        numbers = torch.empty(m, dtype=torch.int64, device=codes.device)
        for begin in range(0, m, _ROWS_A_BLOCK):
            block = slice(begin, begin + _ROWS_A_BLOCK)
            numbers[block] = number_of(codes[block], vocab_size)
        order = numbers.sort(stable=True)[1].to(index_dtype(m))
        return cls.ordered(numbers.to(number_dtype(vocab_size, length)), order, vocab_size, length)

    @classmethod
    def ordered(cls, numbers: Tensor, order: Tensor, vocab_size: int, length: int) -> Self:
        """The table of ``numbers`` (m,), of `number_dtype`, whose ``order`` (m,) is known; nothing is copied."""
        m, codes_there_are = len(numbers), vocab_size**length
        buckets = _buckets(m)
        width = _bucket_width(codes_there_are, buckets)
        counts = torch.zeros(buckets, dtype=torch.int64, device=numbers.device)
        for block in numbers.split(_ROWS_A_BLOCK):
            counts += (_without_sign(block) // width).bincount(minlength=buckets)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(index_dtype(m))
        return cls(numbers, order, starts, vocab_size, length, largest_bucket(starts))

    def to(self, device: torch.device | str) -> Self:
        """The table on ``device``; this one if it is there."""
        if self.numbers.device == torch.device(device):
            return self
        numbers, order, starts = (each.to(device) for each in (self.numbers, self.order, self.starts))
        return replace(self, numbers=numbers, order=order, starts=starts)

    def number(self, identities: Tensor) -> Tensor:
        """The number of each of ``identities`` (any shape), int64."""
        check_mapped(self.numbers)
        if self.numbers.ndim == 2:
            tokens = self.numbers[identities.flatten()]
            return number_of(tokens, self.vocab_size).view(identities.shape)
        return _without_sign(self.numbers[identities])

    def tokens(self, identities: Tensor) -> Tensor:
        """The tokens of each of ``identities`` (n,), (n, l) int64."""
        if self.numbers.ndim == 2:
            check_mapped(self.numbers)
            return self.numbers[identities].long()
        places = self.vocab_size ** torch.arange(self.length - 1, -1, -1, device=self.numbers.device)
        return self.number(identities)[:, None] // places % self.vocab_size

    def codes(self) -> Tensor:
        """All tokens, (m, l) uint8."""
        if self.numbers.ndim == 2:
            return self.numbers
        codes = torch.empty(len(self), self.length, dtype=torch.uint8, device=self.numbers.device)
        for rows in torch.arange(len(self), device=codes.device).split(_ROWS_A_BLOCK):
            codes[rows[0] : rows[-1] + 1] = self.tokens(rows)
        return codes

    def smaller(self, numbers: Tensor) -> Tensor:
        """How many identities have a number below each of ``numbers`` (n,): where it stands, or would, (n,) int64."""
        width = _bucket_width(self.vocab_size**self.length, len(self.starts) - 1)
        bucket = (numbers // width).clamp_(0, len(self.starts) - 2)
        begin, end = self.starts[bucket].long(), self.starts[bucket + 1].long()
        most = self.largest_bucket
        while most > _LOOKED_AT:  # a binary search, whose steps are few and the same for all
            most -= most // 2
            middle = torch.minimum(begin + (end - begin) // 2, end - 1).clamp_min(0)
            below = (self.number(self.at(middle)) < numbers) & (begin < end)
            begin, end = torch.where(below, middle + 1, begin), torch.where(below, end, middle)
        places = begin[:, None] + torch.arange(most, device=begin.device)
        there = places < end[:, None]
        below = self.number(self.at(torch.where(there, places, 0))) < numbers[:, None]
        return begin + (below & there).sum(1)

    def at(self, places: Tensor) -> Tensor:
        """The identities at ``places`` in the order, int64."""
        check_mapped(self.order)
        return self.order[places].long()

    def __len__(self) -> int:
        return len(self.numbers)


def table_bytes(m: int, vocab_size: int, length: int) -> int:
    """Memory of a `CodeTable` in memory; one in a memory map has none."""
    index = index_dtype(m).itemsize
    return m * (number_dtype(vocab_size, length).itemsize + index) + (_buckets(m) + 1) * index


def largest_bucket(starts: Tensor) -> int:
    """The most codes that lie between two of ``starts`` (buckets + 1,)."""
    return int(starts.diff().max())


def number_of(codes: Tensor, vocab_size: int) -> Tensor:
    """``codes`` (n, l) as numbers in base v, (n,) int64."""
    numbers = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    for tokens in codes.unbind(1):
        numbers.mul_(vocab_size).add_(tokens)
    return numbers


def _buckets(m: int) -> int:
    return max(1, min(BUCKETS, m // _A_BUCKET))


def number_dtype(vocab_size: int, length: int) -> torch.dtype:
    """What numbers of codes of ``length`` tokens are kept in: int32, as bits without sign, where they fit."""
    return torch.int32 if vocab_size**length <= _UNSIGNED + 1 else torch.int64


def _without_sign(numbers: Tensor) -> Tensor:
    """``numbers`` as they are kept, as int64."""
    return numbers.long() & _UNSIGNED if numbers.dtype == torch.int32 else numbers


def _bucket_width(numbers: int, buckets: int) -> int:
    return -(-numbers // buckets)


def index_dtype(m: int) -> torch.dtype:
    """What m identities are numbered in."""
    return torch.int32 if m <= torch.iinfo(torch.int32).max else torch.int64
