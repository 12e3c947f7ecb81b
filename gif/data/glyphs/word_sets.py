"""Words to train on, and the sets that judge: grids of pairs that share letters, of letters and pairs never seen.

A grid is every pair of one of `GROUP` letters and one of `GROUP` others: 100 words, each of which shares a letter with
18. Pairs drawn at random share none and are told apart by anything (rank-1 0.999), so they judge nothing.

- alike: held-out letters in groups that look alike, the headline;
- new: held-out letters at random;
- recombined: letters that are trained on, at random, in pairs that no training set of any size or seed has;
- alike-recombined: the same, in groups that look alike.

Letters of a third part, for validation, give the first two likewise: settings are chosen there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gif.data.glyphs.halves import GROUP, MIN_DRAWINGS, Halves, glyph_halves
from gif.data.glyphs.look_alikes import Integers
from gif.data.glyphs.words import DrawnPairs, GlyphWords, ListedPairs
from gif.permutation import ComputedOrder

IDENTITIES = 1_000_000
IMAGES_JUDGED = MIN_DRAWINGS  # of each identity
SETS = ("alike", "new", "recombined", "alike-recombined")
HEADLINE = SETS[0]

_RANDOM = 1  # seed of the order of letters at random; that of the letters with groups that look alike is another


def glyph_words(
    identities: int = IDENTITIES, *, size: int = 32, seed: int = 0, cache_dir: str | Path | None = None
) -> GlyphWords:
    """Words of two letters to train on.

    Args:
        identities: how many, up to all pairs of the letters to train on less those that are judged.
        size: height and width in pixels, 32 or 64.
        seed: which words, and how many images each has.
        cache_dir: where the letters' drawings are kept, as for `glyphs_80k`.

    Raises ValueError where an argument is out of range, and as `glyphs_80k` does where glyphs have to be drawn.
    """
    return words_to_train_on(glyph_halves(size=size, cache_dir=cache_dir)["train"], identities, seed)


def glyph_word_sets(*, size: int = 32, cache_dir: str | Path | None = None) -> dict[str, GlyphWords]:
    """What judges, by the names in `SETS`; arguments and errors are those of `glyph_words`."""
    halves = glyph_halves(size=size, cache_dir=cache_dir)
    words = (*words_to_judge(halves["held_out"]), *reversed(words_to_judge(halves["train"])))
    return dict(zip(SETS, words, strict=True))


def glyph_word_validation(*, size: int = 32, cache_dir: str | Path | None = None) -> dict[str, GlyphWords]:
    """What settings are chosen by: "alike" and "new" of letters that are neither trained on nor held out."""
    words = words_to_judge(glyph_halves(size=size, cache_dir=cache_dir)["validation"])
    return dict(zip(SETS, words, strict=False))


def words_to_train_on(letters: Halves, identities: int, seed: int) -> GlyphWords:
    """Words of these letters, without those that `words_to_judge` takes of them."""
    judged = np.concatenate([_grids(groups) for groups in _groups(letters)], axis=1)
    return GlyphWords(letters, DrawnPairs(identities, letters.counts, seed, judged))


def words_to_judge(letters: Halves) -> tuple[GlyphWords, GlyphWords]:
    """Words of these letters in grids: of groups that look alike, and of letters at random."""
    alike, random = (_grids(groups) for groups in _groups(letters))
    return _listed(letters, alike), _listed(letters, random)


def _listed(letters: Halves, pairs: Integers) -> GlyphWords:
    return GlyphWords(letters, ListedPairs(pairs[0], pairs[1], np.full(pairs.shape[1], IMAGES_JUDGED)))


def _groups(letters: Halves) -> tuple[Integers, Integers]:
    """Groups (g, GROUP) of letters that look alike, and as many of letters at random."""
    random = ComputedOrder(len(letters), _RANDOM)[: letters.groups.numel()]
    return letters.groups.numpy(), random.view(letters.groups.shape).numpy()


def _grids(groups: Integers) -> Integers:
    """The pairs (2, k) of a letter of a group and one of the next, of groups two by two."""
    first, second = groups[: len(groups) // 2 * 2].reshape(-1, 2, GROUP).swapaxes(0, 1)
    return np.stack([first.repeat(GROUP, axis=1).ravel(), np.tile(second, GROUP).ravel()])
