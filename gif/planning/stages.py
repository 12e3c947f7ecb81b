"""Memory and time of each stage, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from gif.codes.blocks import BLOCK_FLOATS, DEVICE_BLOCKS
from gif.codes.clustering import BALANCING_ROUNDS
from gif.codes.prices import FINAL_RATES, PRICE_RATES
from gif.codes.tokenize import BLOCKS_HELD, BYTES_A_ROW
from gif.planning.heads import FLOAT, gif_cost, partial_fc_cost, softmax_cost
from gif.planning.rates import Rates, pages_of_a_row
from gif.vectors.mean_features import PART
from gif_kernels.gaussian_potential.blocked import TILE

ROUNDING_BYTES = 16  # an int64 hash of stochastic rounding and what is shifted of it, an element of a step's rows
LLOYD_ROUNDS = 8  # `tokenize`'s default
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


def encode_cost(m: int, width: int, rates: Rates, *, images: int, encoder_flops: float) -> StageCost:
    """The encoder makes a forward pass an image; the host holds the vectors, and sums of the features of a part."""
    count = m * images
    host = FLOAT * m * width + SUM_BYTES * min(m, PART) * width
    return StageCost("encode", 0.0, host, count * encoder_flops / rates.products, f"{count:,} images")


def spread_memory(m: int, width: int, itemsize: int, batch: int) -> float:
    """Bytes of the table, of a step's rows, twice, with their gradient and what rounds them, and of a tile of pairs."""
    row = width * (2 * itemsize + 4 * FLOAT + (ROUNDING_BYTES if itemsize < FLOAT else 0))
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
    """The cost of all epochs. The order of an epoch is on the host."""
    steps = epochs * max(m // batch, 1)
    step = spread_step_seconds(width, itemsize, batch, rates, in_file=in_file)
    memory = spread_memory(0 if in_file else m, width, itemsize, batch)
    return StageCost("spread", memory, 8 * m, steps * step, f"{steps:,} steps of {1e3 * step:.3g} ms")


def tokenize_cost(
    m: int, width: int, itemsize: int, rates: Rates, *, vocab_size: int, length: int, mapped: bool = False
) -> StageCost:
    """Each round of a level compares every row with v centroids and sums rows into them; prices sweep m x v cosines.

    Of the rounds on a sample of the rows, which the first levels have, as much is counted: an upper estimate there.
    ``mapped``: the vectors stay in their file, as they do on a CPU; one process on a card copies them there.
    """
    rounds = LLOYD_ROUNDS + BALANCING_ROUNDS + 1
    flops = length * rounds * 2 * 2 * m * vocab_size * width
    sweeps = (BALANCING_ROUNDS * len(PRICE_RATES) + len(FINAL_RATES)) * 3 * FLOAT * m * vocab_size
    moved = length * (rounds * m * width * itemsize + sweeps)
    blocks = FLOAT * BLOCKS_HELD * BLOCK_FLOATS * (1 if mapped else DEVICE_BLOCKS)
    memory = m * (BYTES_A_ROW + (0 if mapped else width * itemsize)) + blocks
    seconds = flops / rates.products + moved / rates.memory
    vectors = "the vectors stay in their file" if mapped else "of several processes none copies the vectors"
    return StageCost("tokenize", memory, 0.0, seconds, f"{length} tokens of {vocab_size}; {vectors}")


def head_costs(m: int, width: int, rates: Rates, *, batch: int, vocab_size: int) -> list[StageCost]:
    """The cost of one step of training, of each head alone, by `gif.planning.heads`."""
    heads = {
        "head, GIF": gif_cost(m, width=width, batch=batch, vocab_size=vocab_size),
        "head, full softmax": softmax_cost(m, width=width, batch=batch),
        "head, Partial FC": partial_fc_cost(m, SAMPLE_RATE * m, width=width, batch=batch),
    }
    return [
        StageCost(name, cost.bytes, 0.0, cost.flops / rates.products, f"a step of {batch:,} images")
        for name, cost in heads.items()
    ]
