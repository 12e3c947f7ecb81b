"""Words of two glyphs: as many identities as there are ordered pairs of letters, composed when they are looked at.

An identity is an ordered pair of letters, and an image of it both letters side by side, each at half its width, in a
drawing of its own. Which pairs an identity's number stands for, how many images it has and which drawings those take
follow from its number and the seed, so that a data set of any size is a rule and the drawings of its letters.

- Number to pair: a `PairPermutation` of the C^2 pairs, less those that are put away to be judged on. The identities of
  a small set are the first of a large one.
- Images of an identity: min(2 + g, n_a, n_b, `MOST_IMAGES`), where g is geometric, `MORE` being the probability of each
  further image, and n_a, n_b are the letters' numbers of drawings. 45 % have two: a long tail, as faces have it.
- Image k takes drawings (s + k) mod n_a and (s + k) mod n_b, s being the pair's own: no image is there twice.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gif.data.glyphs.halves import Halves
from gif.data.glyphs.look_alikes import Integers
from gif.data.identities import Names
from gif.data.images import IdentityDataset
from gif.errors import InputError
from gif.permutation import PairPermutation
from gif.seeds import mix

MORE = 0.55
FEWEST_IMAGES, MOST_IMAGES = 2, 12

_IDENTITIES_A_MARK = 16  # of which the first image's place is kept; the others' follow from the rule
_BLOCK = 1 << 20  # identities looked at together
_DRAWING = np.uint64(
    0x9E3779B97F4A7C15
)  # keeps what decides an identity's drawings apart from what decides their number
# Another image follows as long as 32 random bits lie below these: MORE, MORE^2, ...
_FURTHER = np.array([int(MORE**k * 2**32) for k in range(1, MOST_IMAGES - FEWEST_IMAGES + 1)], np.uint32)


class Pairs(ABC):
    """Which pair of letters each of m identities is, and how many images it has."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def letters(self, identities: Integers) -> tuple[Integers, Integers]:
        """Numbers of the first and of the second letter, (k,), of identities (k,)."""

    @abstractmethod
    def counts(self, identities: Integers) -> Integers:
        """How many images identities of any shape have, in that shape."""

    @abstractmethod
    def settings(self) -> str:
        """What they follow from."""


class DrawnPairs(Pairs):
    """The first m pairs of a permutation of all that may be drawn.

    Args:
        number: m.
        drawings: (C,) how many each letter has.
        seed: which permutation, and how many images identities have.
        without: (2, e), pairs that are never drawn, whatever the seed.

    Raises ValueError for fewer than 2 identities, or more than there are pairs.
    """

    def __init__(self, number: int, drawings: Integers, seed: int, without: Integers) -> None:
        self._number, self._drawings, self._seed = number, drawings, seed
        self._permutation = PairPermutation(len(drawings), seed)
        away = np.unique(self._permutation.numbers(*without))
        self._without = away - np.arange(len(away))
        most = len(self._permutation) - len(away)
        if not 2 <= number <= most:
            raise InputError(f"identities is {number:,}; {len(drawings):,} letters give from 2 to {most:,} words")
        self._key = mix(np.array([~seed % 2**64], np.uint64))

    def __len__(self) -> int:
        return self._number

    def letters(self, identities: Integers) -> tuple[Integers, Integers]:
        return self._permutation.pairs(identities + np.searchsorted(self._without, identities, side="right"))

    def counts(self, identities: Integers) -> Integers:
        bits = (mix(identities.view(np.uint64) ^ self._key) >> np.uint64(32)).astype(np.uint32)
        images = np.full(bits.shape, FEWEST_IMAGES, np.uint8)
        for limit in _FURTHER:  # a few comparisons of many at once are faster than a search
            images += bits < limit
        counts = images.astype(np.int64)
        many = counts > self._fewest_drawings  # the others need no look at their letters
        first, second = self.letters(identities[many])
        counts[many] = np.minimum(counts[many], np.minimum(self._drawings[first], self._drawings[second]))
        return counts

    @cached_property
    def _fewest_drawings(self) -> int:
        return int(self._drawings.min())

    def settings(self) -> str:
        return f"{self._number} {self._seed} {hashlib.sha256(self._without.data).hexdigest()}"


class ListedPairs(Pairs):
    """Pairs that are kept in a table.

    Args:
        first, second: (m,) numbers of the letters.
        counts: (m,) how many images each identity has.
    """

    def __init__(self, first: Integers, second: Integers, counts: Integers) -> None:
        self._first, self._second, self._counts = first, second, counts

    def __len__(self) -> int:
        return len(self._counts)

    def letters(self, identities: Integers) -> tuple[Integers, Integers]:
        return self._first[identities], self._second[identities]

    def counts(self, identities: Integers) -> Integers:
        return self._counts[identities]

    def settings(self) -> str:
        return hashlib.sha256(np.stack([self._first, self._second, self._counts]).data).hexdigest()


class GlyphWords(IdentityDataset):
    """Words of two glyphs, (1, size, size), composed when they are looked at.

    What is kept beside the drawings is the place of every 16th identity's first image: half a byte an identity. The
    images of an identity follow each other. ``labels`` (8 bytes an image) and the bytes of ``names`` (14 an identity)
    are made when they are asked for, as a whole.

    Args:
        halves: the letters and their drawings.
        pairs: which words there are.
    """

    computed = True

    def __init__(self, halves: Halves, pairs: Pairs) -> None:
        self._halves, self.pairs = halves, pairs
        self.names = WordNames(halves.letters, pairs)
        marks = [np.zeros(1, np.int64)]
        for identities in _blocks(len(pairs)):
            counts = pairs.counts(identities)
            padded = np.pad(counts, (0, -len(counts) % _IDENTITIES_A_MARK))
            marks.append(padded.reshape(-1, _IDENTITIES_A_MARK).sum(axis=1))
        self._marks = np.concatenate(marks).cumsum()

    def __len__(self) -> int:
        return int(self._marks[-1])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width = self._halves.drawings.shape
        return 1, height, 2 * width

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([range(len(self))[index]])
        return images[0], labels[0]

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        identities, numbers = self._locate(np.array(indices, np.int64))
        first, second = self.pairs.letters(identities)
        pair = (first * len(self._halves) + second).view(np.uint64)
        drawing = (mix(pair ^ _DRAWING) >> np.uint64(32)).view(np.int64) + numbers
        lines = self._halves.lines
        images = np.empty((len(indices), lines.shape[1], 2), lines.dtype)
        for side, letters in enumerate((first, second)):
            images[:, :, side] = lines[self._halves.begins[letters] + drawing % self._halves.counts[letters]]
        pixels = torch.from_numpy(images.view(np.uint8))
        return pixels.view(len(indices), *self.image_shape), torch.from_numpy(identities)

    def _locate(self, indices: Integers) -> tuple[Integers, Integers]:
        """Whom images (k,) show, and which of that identity's images they are, from 0."""
        order = indices.argsort()  # places in order are found in less than half the time
        mark = np.empty_like(indices)
        mark[order] = np.searchsorted(self._marks, indices[order], side="right") - 1
        members = mark[:, None] * _IDENTITIES_A_MARK + np.arange(_IDENTITIES_A_MARK)
        inside = np.minimum(members, len(self.pairs) - 1)  # those beyond the last change no place before them
        ends = self.pairs.counts(inside).cumsum(axis=1)
        left = indices - self._marks[mark]
        place = (ends <= left[:, None]).sum(axis=1)
        begins = np.where(place > 0, ends[np.arange(len(place)), place - 1], 0)
        return members[:, 0] + place, left - begins

    def broken(self, indices: Tensor) -> Tensor:
        """None: (k,) of False."""
        return torch.zeros(len(indices), dtype=torch.bool)

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]  # made when it is asked for
        return torch.arange(len(self.pairs)).repeat_interleave(self.image_counts())

    def image_counts(self) -> Tensor:
        return torch.from_numpy(np.concatenate([self.pairs.counts(some) for some in _blocks(len(self.pairs))]))

    def images_between(self, begin: int, end: int) -> range:
        return range(self._first_image(begin), self._first_image(end))

    def _first_image(self, identity: int) -> int:
        """The place of an identity's first image; of the number of identities, the number of images."""
        mark, more = divmod(identity, _IDENTITIES_A_MARK)
        before = np.arange(identity - more, identity, dtype=np.int64)
        return int(self._marks[mark] + self.pairs.counts(before).sum())

    def of_identities(self, identities: Tensor) -> Self:
        numbers = identities.sort().values.numpy()
        listed = ListedPairs(*self.pairs.letters(numbers), self.pairs.counts(numbers))
        part = type(self)(self._halves, listed)
        part.origin, part.splits = self.origin, self.splits
        return part

    def summary(self) -> dict[str, Any]:
        """What tells this data set from another: of all drawings and of the rule, not of a sample."""
        return {
            "identities": self.num_identities,
            "images": len(self),
            "drawings": self._halves.fingerprint[:16],
            "words": hashlib.sha256(self.pairs.settings().encode()).hexdigest()[:16],
            "read as": self.image_settings,
        }


class WordNames(Names):
    """What words are called: their two letters. The bytes of all are made when they are asked for.

    Args:
        letters: the C letters.
        pairs: which words there are.
    """

    def __init__(self, letters: str, pairs: Pairs) -> None:
        self._letters, self._pairs = letters, pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return super().__getitem__(index)
        sides = self._pairs.letters(np.array([range(len(self))[index]], np.int64))
        return "".join(self._letters[int(side[0])] for side in sides)

    @property
    def data(self) -> Tensor:  # type: ignore[override]  # made when it is asked for
        return self._packed[0]

    @property
    def ends(self) -> Tensor:  # type: ignore[override]
        return self._packed[1]

    @cached_property
    def _packed(self) -> tuple[Tensor, Tensor]:
        encoded = [letter.encode() for letter in self._letters]
        letters = np.array(encoded, "S").view(np.uint8).reshape(len(encoded), -1)  # zeros after each
        data, lengths = [], []
        for identities in _blocks(len(self)):
            words = np.concatenate([letters[side] for side in self._pairs.letters(identities)], axis=1)
            data.append(words[words > 0])
            lengths.append((words > 0).sum(axis=1))
        return torch.from_numpy(np.concatenate(data)), torch.from_numpy(np.concatenate(lengths).cumsum())


def _blocks(number: int) -> Iterator[Integers]:
    """The numbers in [0, ``number``), some at a time; one empty block where there are none."""
    for begin in range(0, max(number, 1), _BLOCK):
        yield np.arange(begin, min(begin + _BLOCK, number), dtype=np.int64)
