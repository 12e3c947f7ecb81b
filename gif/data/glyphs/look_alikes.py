"""What can be told apart: characters that look alike are one identity, and no image is there twice.

Latin A, Greek Alpha and Cyrillic A are one picture, and a pair of them called an impostor would make every error rate
wrong. So an identity is what can be seen:

1. Two images look alike when no pixel differs by more than `TOLERANCE`. One outline at two places on the page is drawn
   up to 1.5 pixels apart on a grid `SUPERSAMPLING` times finer than the image (1 because the box of its ink has whole
   pixels, 0.5 because its centre has), so a straight edge differs by up to 1.5 / 8 of 255: 48. Looked at, all pairs up
   to there are one outline moved or barely redrawn, and the number of identities hardly depends on the value (4,998 at
   32, 4,983 at 56). Above, rods, dots and dashes of other lengths join in; at 64 they chain capital I to small l.
2. Two characters are one identity when they look alike in at least half of the fonts they share and in at least
   `MIN_ALIKE`, and so on from character to character. Not in all, because a font may redraw a letter slightly (STIX:
   Greek Beta, Cyrillic Ve): that would make two identities of which most images are equal. Not in any, because Cyrillic
   Te in italics is the Latin m, and one font has an Iota with breve that lacks the breve. Of the 83 pairs that Unicode
   defines as the same character this finds 80. Every group of four or more was looked at; the largest are the acute
   accents (10), the dots on the line (9) and the macrons (9). Position is not visible: comma and closing quote are one.
3. An image that looks like one of another identity shows neither: both are dropped (the italic Te and its m).
4. Of the images of an identity that look alike the first is kept, since a copy is no genuine pair.

The numbers are those of matplotlib's fonts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gif.packages import needs
from gif.progress import progress

SUPERSAMPLING = 8
TOLERANCE = 48  # of 255; this and the next: see the module's docstring
MIN_ALIKE = 2  # fonts

_BLOCK = 1 << 11  # images or pairs looked at together
_GROUP = 64  # images small enough to compare each with each
_SAMPLE = 256  # images that decide where a group is cut
_THRESHOLDS = (64, 96, 128, 160, 192)
_LARGEST_PART = 0.95  # of a group that a cut may leave together

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Distinct:
    """The images that show one identity each, once.

    ``rows`` (k,) are their places among all images, ``labels`` (k,) their identities, from 0, and ``names`` the
    characters of each identity in code point order, so "A" with its look-alikes starts with "A". ``counts`` says what
    became of the rest.
    """

    rows: Integers
    labels: Integers
    names: list[str]
    counts: dict[str, int]


def distinct(
    images: NDArray[np.uint8], characters: Integers, fonts: Integers, rows: Integers | None = None
) -> Distinct:
    """Make characters that look alike one identity, and keep the images that show one identity each, once.

    Args:
        images: (n, size, size), one for each character in each font that has it, drawn with `SUPERSAMPLING`.
        characters: (n,) code points.
        fonts: (n,) numbers of the fonts.
        rows: (r,) ascending, the images that take part; all where not given.
    """
    rows = np.arange(len(images)) if rows is None else rows
    pairs = np.searchsorted(rows, alike(images, rows))
    code_points, character = np.unique(characters[rows], return_inverse=True)
    identity_of = identities(character, fonts[rows], pairs)
    identity = identity_of[character]

    shows_one = np.ones(len(rows), bool)
    same = identity[pairs[:, 0]] == identity[pairs[:, 1]]
    shows_one[pairs[~same]] = False
    copies = same & shows_one[pairs].all(axis=1)
    once = shows_one.copy()
    once[pairs[copies, 1]] = False
    keep = once & (np.bincount(identity[once], minlength=identity.max() + 1)[identity] >= 2)

    kept, labels = np.unique(identity[keep], return_inverse=True)
    members = np.split(np.argsort(identity_of, kind="stable"), np.bincount(identity_of).cumsum()[:-1])
    names: list[str] = ["".join(map(chr, code_points[members[i]])) for i in kept]
    counts = {
        "characters": len(code_points),
        "drawings": len(rows),
        "distinct identities": len(members),
        "of two identities": int((~shows_one).sum()),
        "copies": int((shows_one & ~once).sum()),
        "alone": int((once & ~keep).sum()),
        "images": int(keep.sum()),
        "identities": len(names),
    }
    return Distinct(rows[keep], labels, names, counts)


def alike(images: NDArray[np.uint8], rows: Integers) -> Integers:
    """Return the pairs (p, 2), i < j, of images (n, size, size) in which no pixel differs by more than `TOLERANCE`.

    Of the images the ``rows`` (r,), ascending, are compared. The result is exact, its rows sorted.
    """
    blocks = (images[begin : begin + _BLOCK, ::2, ::2] for begin in range(0, len(images), _BLOCK))
    pixels = np.concatenate([block.reshape(len(block), -1) for block in blocks])  # a quarter of them

    def close(pairs: Integers) -> NDArray[np.bool_]:
        first, second = images[pairs[:, 0]].astype(np.int16), images[pairs[:, 1]]
        return np.abs(first - second).max(axis=(1, 2)) <= TOLERANCE

    found = [np.empty((0, 2), np.int64)]
    for group in _neighbourhoods(pixels, rows):
        pairs = _close_pairs(pixels, group)
        found += [block[close(block)] for block in np.array_split(pairs, len(pairs) // _BLOCK + 1)]
    return np.unique(np.concatenate(found), axis=0)


def _neighbourhoods(pixels: NDArray[np.uint8], rows: Integers) -> Iterator[Integers]:
    """Small groups of ``rows`` (k,), ascending, such that every two that look alike are together in one of them.

    A group is cut in two by the value of one of its ``pixels`` (n, p), at a threshold t: one part is up to t + 24, the
    other from t - 24. What differs by at most 48 is together in the one, or in the other, or in both. Pixels of glyphs
    are mostly black or white, so few are between and belong to both.
    """
    with progress("comparing glyphs", len(rows), "glyphs") as advance:
        groups = [(rows, len(rows))]
        while groups:
            rows, share = groups.pop()  # share: of the progress
            parts = _cut(pixels, rows) if len(rows) > _GROUP else None
            if parts is None:
                yield rows
                advance(share)
                continue
            first, second = parts
            first_share = share * len(first) // (len(first) + len(second))
            groups += [(second, share - first_share), (first, first_share)]


def _cut(pixels: NDArray[np.uint8], rows: Integers) -> tuple[Integers, Integers] | None:
    """Cut a group where that leaves the fewest pairs to compare; None where no cut leaves clearly fewer."""
    sample = pixels[rows[:: -(-len(rows) // _SAMPLE)]]
    up_to = np.stack([(sample <= t + TOLERANCE // 2).mean(axis=0) for t in _THRESHOLDS])
    from_on = np.stack([(sample >= t - TOLERANCE // 2).mean(axis=0) for t in _THRESHOLDS])
    threshold, pixel = np.unravel_index(np.argmin(up_to**2 + from_on**2), up_to.shape)
    values, t = pixels[rows, pixel], _THRESHOLDS[threshold]
    first, second = rows[values <= t + TOLERANCE // 2], rows[values >= t - TOLERANCE // 2]
    return (first, second) if max(len(first), len(second)) <= _LARGEST_PART * len(rows) else None


def _close_pairs(pixels: NDArray[np.uint8], rows: Integers) -> Integers:
    """Pairs of a group in which none of ``pixels`` differs by more than `TOLERANCE`."""
    values = pixels[rows].astype(np.int16)
    found = []
    for i in range(len(rows) - 1):
        near = (np.abs(values[i + 1 :] - values[i]) <= TOLERANCE).all(axis=1)
        found.append(np.stack([np.full(near.sum(), rows[i]), rows[i + 1 :][near]], axis=1))
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def identities(character: Integers, fonts: Integers, pairs: Integers) -> Integers:
    """Return the identity of each character, (c,): one for those alike in half of the fonts they share.

    ``character`` and ``fonts`` (n,) are those of each image, ``pairs`` (p, 2) the images that look alike.
    """
    with needs("scipy", "finding glyphs that look alike"):
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components
    has = np.zeros((character.max() + 1, fonts.max() + 1), bool)
    has[character, fonts] = True
    in_one_font = pairs[fonts[pairs[:, 0]] == fonts[pairs[:, 1]]]
    couples, alike = np.unique(np.sort(character[in_one_font], axis=1), axis=0, return_counts=True)
    shared = (has[couples[:, 0]] & has[couples[:, 1]]).sum(axis=1)
    first, second = couples[(alike >= shared / 2) & (alike >= MIN_ALIKE)].T
    edges = coo_array((np.ones(len(first)), (first, second)), shape=(len(has), len(has)))
    return connected_components(edges, directed=False)[1]
