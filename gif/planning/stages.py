"""Memory and time of each stage, by formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gif.codes.blocks import BLOCK_FLOATS, DEVICE_BLOCKS
from gif.codes.clustering import LLOYD_ROWS, RESTARTS
from gif.codes.prices import FINAL_RATES
from gif.codes.quality import KMEANS_RESTARTS
from gif.codes.sketch import sketched_width
from gif.codes.tokenize import BLOCKS_HELD, BYTES_A_ROW
from gif.encoders.pixels import ROWS_WHITENED, SIDE
from gif.planning.heads import FLOAT, gif_cost, partial_fc_cost, softmax_cost
from gif.planning.rates import Rates, pages_of_a_row
from gif.vectors.config import SpreadConfig
from gif.vectors.initial import FITTED
from gif.vectors.mean_features import PART
from gif.vectors.quality import SAMPLE
from gif_kernels.gaussian_potential.blocked import TILE

LLOYD_ROUNDS = 8  # `tokenize`'s default
DOUBLE = 8  # bytes of float64
INDEX_BYTES = 8  # of the number of a row
SORT_BYTES = 56  # a row, while a level of random cuts is sorted: two orders, keys and what sorts them
SIMILARITY_BYTES = 16  # of a cosine that is written, scaled and looked through, where it leaves the caches
MEAN_BYTES = 72  # of a feature whose sum is cleared, divided, narrowed, and centred and multiplied in float64
OPERATIONS_A_BLOCK = 3000
"""Of a card, to cut a block of a level; by what a million and 16 million vectors took on an H200."""
OPERATIONS = {"head, GIF": 289, "head, full softmax": 60, "head, Partial FC": 90}
"""Of a card in a step of a head: GIF's were counted, Partial FC's are by the 2.8 ms that a step took on an H200; a
softmax's, which was not timed there, are a guess."""
LEVEL_PASSES = 60  # of a row through memory: a dozen times it is gathered, normalised and multiplied
SUM_BYTES = 12  # of a feature: its sum in float64, and the mean in float32
SAMPLE_RATE = 0.1  # of Partial FC's centres, as its authors recommend


@dataclass(frozen=True)
class StageCost:
    """A stage's bytes of ``memory`` where it computes, those beside it on the ``host``, and ``seconds``.

    ``note`` says what they are of.
    """

    name: str
    memory: float
    host: float
    seconds: float
    note: str

    def in_a_process(self, rates: Rates) -> StageCost:
        """With what its command's process takes to start, and holds then."""
        return replace(self, host=self.host + rates.resident, seconds=self.seconds + rates.start)


def encode_cost(
    m: int, width: int, rates: Rates, *, images: float, encoder_flops: float, read: float = math.inf
) -> StageCost:
    """The encoder makes a forward pass an image; the host holds the vectors, and sums of the features of a part.

    ``read``: images a second that the data give.
    """
    count = m * images
    host = FLOAT * m * width + SUM_BYTES * min(m, PART) * width
    seconds = count * (encoder_flops / rates.products + 1 / read)
    return StageCost("encode", 0.0, host, seconds, f"{count:,.0f} images")


def pixels_cost(m: int, width: int, rates: Rates, *, images: float, read: float = math.inf) -> StageCost:
    """Pixels take no network; what whitens them is fitted to some identities, whose images are read twice.

    Fitting takes 2 e^2 FLOPs an identity and whitening 2 e d, in float64, of which there are half as many a second. The
    host holds the means that are fitted to, and then the vectors.
    """
    features, fitted = SIDE**2, min(m, FITTED)
    count = images * (m + (fitted if fitted < m else 0))
    flops = 2 * features * (features * fitted + width * m)
    seconds = (
        count * (1 / rates.images + 1 / read) + 2 * flops / rates.products + m * features * MEAN_BYTES / rates.memory
    )
    fit = FLOAT * fitted * features + DOUBLE * min(m, ROWS_WHITENED) * features
    host = SUM_BYTES * min(m, PART) * features + max(fit, FLOAT * m * width + DOUBLE * min(m, PART) * features)
    return StageCost("encode", 0.0, host, seconds, f"{count:,.0f} images of pixels")


def spread_memory(m: int, width: int, itemsize: int, batch: int) -> float:
    """Bytes of the table, of a step's rows, twice, with their gradient, and of a tile of pairs.

    What rounds them stochastically works on a part at a time, when the gradient is gone.
    """
    row = width * (2 * itemsize + 4 * FLOAT)
    return m * width * itemsize + batch * row + FLOAT * min(batch, TILE) ** 2


def spread_step_seconds(width: int, itemsize: int, batch: int, rates: Rates, *, in_file: bool) -> float:
    """A step takes 3 n^2 d FLOPs, n^2 / 2 exponentials, its rows a few times through memory, and in a file their pages.

    Rows narrower than float32 are rounded too. The step does not know m.
    """
    products = 3 * batch * batch * width / rates.products
    exponentials = batch * (batch + TILE) / 2 / rates.exponentials
    rows = batch * width * (4 * itemsize + 12 * FLOAT) / rates.memory
    pages = batch * pages_of_a_row(width * itemsize) / rates.pages if in_file else 0.0
    rounding = batch * width / rates.roundings if itemsize < FLOAT else 0.0
    return rates.overhead + products + exponentials + rows + rounding + pages


def spread_cost(
    m: int, width: int, itemsize: int, rates: Rates, *, batch: int, epochs: int, in_file: bool
) -> StageCost:
    """The cost of all epochs and the report. The order of an epoch is on the host, and what near-duplicates take."""
    steps = epochs * max(m // batch, 1)
    step = spread_step_seconds(width, itemsize, batch, rates, in_file=in_file)
    memory = spread_memory(0 if in_file else m, width, itemsize, batch)
    host = m * (FLOAT * _neighbor_depth(m) + SORT_BYTES if m > SAMPLE else INDEX_BYTES)
    seconds = steps * step + spread_report_seconds(m, width, rates)
    return StageCost("spread", memory, host, seconds, f"{steps:,} steps of {1e3 * step:.3g} ms, and the report")


def spread_report_seconds(m: int, width: int, rates: Rates) -> float:
    """Seconds to judge the vectors before and after, and to look for the largest cosine, twice.

    Of a sample of s vectors: three searches of the nearest, 2 s^2 d FLOPs each, whose similarities go through memory,
    and two potentials of s^2 d and s^2 / 2 exponentials. The largest cosine is that of all pairs where all are judged,
    and of more vectors that in the leaves of a tree of random cuts: a sort a level, and a small product a leaf.
    """
    s, depth = min(m, SAMPLE), _neighbor_depth(m)
    judging = 8 * s * s * width / rates.products + s * s / rates.exponentials
    judging += 3 * s * s * SIMILARITY_BYTES / rates.memory
    leaves = 2**depth * rates.overhead + 2 * m * m / 2**depth * width / rates.products
    largest = leaves + m * depth / rates.sorts if m > SAMPLE else 2 * s * s * width / rates.products
    return judging + 2 * largest


def _neighbor_depth(m: int) -> int:
    """Levels of the tree in whose leaves near-duplicates are looked for."""
    return max(0, math.ceil(math.log2(m / SpreadConfig.neighbors)))


def tokenize_cost(
    m: int, width: int, itemsize: int, rates: Rates, *, vocab_size: int, length: int, mapped: bool = False
) -> StageCost:
    """Balanced k-means, of large nodes on samples and several times; passes over all rows; the report's own k-means.

    A round of k-means compares a sketch of a row with v centroids and sums it into one; prices sweep its v cosines. On
    a CPU that is many small steps, whose rate is measured; on a card its host launches some thousand a block of rows,
    and matches names to each node's children.
    ``mapped``: the vectors stay in their file, as they do on a CPU, whose pages are the host's while there is room; one
    process on a card copies them there.
    """
    rounds = LLOYD_ROUNDS + 1
    sweeps = rounds + len(FINAL_RATES)
    columns = sketched_width(width)
    moved = width * itemsize + rounds * columns * FLOAT + sweeps * 3 * FLOAT * vocab_size
    row = max(1 / rates.cuts, rounds * 4 * vocab_size * columns / rates.products + moved / rates.memory)
    rows = kmeans_rows(m, vocab_size, length) + length * min(m, SAMPLE) * KMEANS_RESTARTS
    seconds = rows * row + length * m * LEVEL_PASSES * FLOAT * width / rates.memory
    blocks_cut = length * math.ceil(m * max(width, vocab_size) / (BLOCK_FLOATS * DEVICE_BLOCKS))
    nodes = sum(min(vocab_size**depth, m) for depth in range(length))
    seconds += blocks_cut * OPERATIONS_A_BLOCK * rates.launch + nodes / rates.names
    blocks = FLOAT * BLOCKS_HELD * BLOCK_FLOATS * (1 if mapped else DEVICE_BLOCKS)
    memory = m * (BYTES_A_ROW + (0 if mapped else width * itemsize)) + blocks
    vectors = "the vectors stay in their file" if mapped else "of several processes none copies the vectors"
    pages = m * width * itemsize if mapped else 0.0
    return StageCost("tokenize", memory, pages, seconds, f"{length} tokens of {vocab_size}; {vectors}")


def kmeans_rows(m: int, vocab_size: int, length: int) -> float:
    """Rows that go through k-means, of all levels: of a large node a sample, as often as it is tried."""
    rows, sample = 0.0, LLOYD_ROWS * vocab_size
    for depth in range(length):
        size = m / vocab_size**depth
        if size > vocab_size:  # of a smaller node each row is a child
            rows += m / size * min(size, sample) * min(max(size // sample, 1), RESTARTS)
    return rows


def head_costs(m: int, width: int, rates: Rates, *, batch: int, vocab_size: int) -> list[StageCost]:
    """The cost of one step of training, of each head alone, by `gif.planning.heads`; on a card at least its host's."""
    heads = {
        "head, GIF": gif_cost(m, width=width, batch=batch, vocab_size=vocab_size),
        "head, full softmax": softmax_cost(m, width=width, batch=batch),
        "head, Partial FC": partial_fc_cost(m, SAMPLE_RATE * m, width=width, batch=batch),
    }
    found = []
    for name, cost in heads.items():
        computed, launched = cost.flops / rates.products, OPERATIONS[name] * rates.launch
        note = f"a step of {batch:,} images{', as its host launches it' * (launched > computed)}"
        found.append(StageCost(name, cost.bytes, 0.0, max(computed, launched), note))
    return found
