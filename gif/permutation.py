"""Permutations that are computed: a place in a shuffled order costs a few multiplications, and no table."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gif.seeds import mix

ROUNDS = 4

Integers = NDArray[np.int64]


class PairPermutation:
    """A permutation of the n^2 ordered pairs of numbers in [0, n): a keyed Feistel network of four rounds.

    A number i in [0, n^2) stands for (i div n, i mod n), and each round takes (a, b) to (b, (a + F(b)) mod n), F being
    SplitMix64 of b with a key of the round's own. A round can be undone whatever F is, so the whole is one to one.

    Args:
        n: in [1, 2^31).
        seed: which permutation.
    """

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._keys = mix(np.arange(1, ROUNDS + 1, dtype=np.uint64) + mix(np.array([seed % 2**64], np.uint64)))

    def __len__(self) -> int:
        return self._n**2

    def pairs(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Which pairs (k,), (k,) are at these places (k,) of the order."""
        first, second = np.divmod(numbers, self._n)
        for key in self._keys:
            first, second = second, self._modulo(first + self._shift(second, key))
        return first, second

    def numbers(self, first: Integers, second: Integers) -> Integers:
        """The places (k,) in the order of pairs (k,), (k,)."""
        for key in self._keys[::-1]:
            first, second = self._modulo(second - self._shift(first, key) + self._n), first
        return first * self._n + second

    def _shift(self, values: Integers, key: np.uint64) -> Integers:
        """F, in [0, n): the high half of SplitMix64's bits, scaled."""
        high = mix(values.view(np.uint64) ^ key) >> np.uint64(32)
        return (high * np.uint64(self._n) >> np.uint64(32)).view(np.int64)

    def _modulo(self, values: Integers) -> Integers:
        """``values`` in [0, 2n), modulo n."""
        return np.where(values >= self._n, values - self._n, values)


class ComputedOrder:
    """The numbers in [0, n) in a shuffled order, of which no table is kept; a slice of it is a tensor.

    It is a `PairPermutation` of the smallest square that holds n, applied again where it leads beyond n: as the square
    is hardly larger, that is rare, and what comes of it is a permutation of [0, n).

    Args:
        n: how many, up to 2^62.
        seed: which order.
    """

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._side = math.isqrt(max(n - 1, 0)) + 1
        self._permutation = PairPermutation(self._side, seed)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, places: slice) -> Tensor:
        """The numbers at some places, (k,) int64."""
        numbers = self._step(np.arange(*places.indices(self._n), dtype=np.int64))
        beyond = np.flatnonzero(numbers >= self._n)
        while len(beyond):
            numbers[beyond] = self._step(numbers[beyond])
            beyond = beyond[numbers[beyond] >= self._n]
        return torch.from_numpy(numbers)

    def _step(self, numbers: Integers) -> Integers:
        first, second = self._permutation.pairs(numbers)
        return first * self._side + second
