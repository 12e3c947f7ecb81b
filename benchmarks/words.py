"""`python -m benchmarks.words`: letters and words of glyph-words, what composing them costs, and what is distinct.

Times are processor time of one thread. The halves are made anew, from glyphs-80k, and those of the cache folder are
used. Memory is what NumPy has allocated; the drawings are mapped besides.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli

from gif.data.glyphs.from_debian import all_glyphs_80k
from gif.data.glyphs.halves import GROUP, Halves, choose_letters, glyph_halves, save_halves
from gif.data.glyphs.word_sets import glyph_word_sets, words_to_train_on
from gif.data.glyphs.words import GlyphWords
from gif.encoders import PixelEncoder
from gif.plotting import figure, save_figure
from gif.progress import say
from gif.vectors.initial import FITTED

ROUNDS = 101
PAIRS = 3000  # identities of which all pairs are compared
SHOWN = 5  # first letters of a grid
GAP = 2  # pixels between images


def words(
    *,
    identities: tuple[int, ...] = (1_000_000, 64_000_000),
    batches: tuple[int, ...] = (128, 1024),
    distinct: int = 10_000_000,
    whitened: int = 200_000,
    picture: Path = Path("docs/pictures/glyph-words.png"),
) -> None:
    """Measure and print, and draw the sets that judge.

    Args:
        identities: of the data sets whose images are counted and composed, and whose memory is measured.
        batches: images that are composed at once.
        distinct: identities whose pairs are compared.
        whitened: identities to all of which pixels are whitened, beside the whitening that `gif vectors` fits to some.
        picture: of a grid of words of each set that judges.
    """
    torch.set_num_threads(1)
    _make()
    parts = glyph_halves()
    for name, letters in parts.items():
        say(f"{name}: {len(letters):,} letters, {len(letters.drawings):,} drawings")
    for number in identities:
        _measure(parts["train"], number, batches)
    _count_distinct(parts["train"], distinct)
    _draw(picture)
    _whiten(parts["train"], whitened)


def _make() -> None:
    glyphs = all_glyphs_80k()
    begin = time.process_time()
    letters, rows, ends = choose_letters(glyphs)
    with tempfile.TemporaryDirectory() as folder:
        save_halves(Path(folder) / "halves", glyphs, letters, rows, ends)
    say(f"choosing, squeezing and grouping letters takes {time.process_time() - begin:.0f} s")


def _measure(letters: Halves, number: int, batches: tuple[int, ...]) -> None:
    tracemalloc.start()
    begin = time.process_time()
    data = words_to_train_on(letters, number, seed=0)
    seconds = time.process_time() - begin
    data.batch([0, len(data) - 1])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    say(f"{number:,} identities: {len(data):,} images, opened in {seconds:.1f} s, {held / 1e6:.1f} MB")
    counts = data.image_counts()
    shares = ", ".join(f"{share:.1%} have {few}" for few, share in enumerate(counts.bincount() / number) if share > 0)
    say(f"  {counts.double().mean():.3f} images an identity: {shares}")
    for size in batches:
        say(f"  batches of {size:,}: {_composed(data, size):,.0f} images a second")


def _composed(data: GlyphWords, size: int) -> float:
    """Images a second, at places drawn at random; the median."""
    generator = np.random.default_rng(0)
    seconds = []
    for _ in range(ROUNDS):
        places = generator.integers(0, len(data), size).tolist()
        begin = time.process_time()
        data.batch(places)
        seconds.append(time.process_time() - begin)
    return size / statistics.median(seconds)


def _count_distinct(letters: Halves, number: int) -> None:
    first, second = words_to_train_on(letters, number, seed=0).pairs.letters(np.arange(number))
    say(f"of {number:,} identities {len(np.unique(first * len(letters) + second)):,} are distinct pairs of letters")
    images = torch.cat([images for data in glyph_word_sets().values() for images in data.image_batches(1 << 12)])
    different = len({image.tobytes() for image in images.numpy()})
    say(f"of {len(images):,} images that judge {different:,} are distinct")


def _draw(path: Path) -> None:
    """The first image of words of each set's first grid: a row a first letter, a column a second."""
    sets = glyph_word_sets()
    drawing, panels = figure(12, 2, columns=len(sets))
    for axes, (name, data) in zip(panels, sets.items(), strict=True):
        images, _ = data.batch([data.images_between(word, word + 1)[0] for word in range(SHOWN * GROUP)])
        cells = torch.nn.functional.pad(images[:, 0], (0, GAP, 0, GAP))
        sheet = cells.view(SHOWN, GROUP, *cells.shape[1:]).transpose(1, 2).flatten(2).flatten(0, 1)
        axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[], title=name)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    save_figure(drawing, path)


def _whiten(letters: Halves, number: int) -> None:
    """Cosines of pairs where the whitening is fitted to some of the identities, and where it is to all."""
    data, encoder = words_to_train_on(letters, number, seed=0), PixelEncoder()
    sums = torch.zeros(number, encoder(data.batch([0])[0]).shape[1])
    for places in torch.arange(len(data)).split(1 << 12):
        images, labels = data.batch(places.tolist())
        sums.index_add_(0, labels, encoder(images))
    means = sums.div_(data.image_counts()[:, None])
    shown = means[torch.randperm(number)[:PAIRS]]
    cosines = []
    for fitted in (means[torch.arange(FITTED) * number // FITTED], means):
        vectors = torch.nn.functional.normalize(encoder.fit(fitted)(shown))
        cosines.append((vectors @ vectors.T)[torch.ones(PAIRS, PAIRS).triu(1).bool()])
    correlation = torch.corrcoef(torch.stack(cosines))[0, 1]
    say(f"whitened by {FITTED:,} of {number:,} identities and by all: cosines of pairs correlate by {correlation:.4f}")


if __name__ == "__main__":
    auto_cli(words, as_positional=False)
