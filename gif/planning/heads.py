"""What a head costs in a step of training: memory at the peak of a step, and work, by formula.

This is the one model of heads: `gif plan` prints it, the benchmarks skip by it what does not fit and draw it beside
what they measured, and the tests hold it against those measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from gif.codes import code_length
from gif.codes.code_table import table_bytes
from gif.losses.recipes import RECIPES, Recipe

FLOAT = 4
"""Bytes of a number in float32, which parameters, gradients, momentum and activations are."""
SOFTMAX_ROWS = 2
"""Arrays as large as the centres that take part in a step, at the peak of its backward pass: their gradient, and the
products of its numbers with theirs, whose sum over a row is what lies along the centre."""
GATHERED_ROWS = 1 + SOFTMAX_ROWS
"""The same where the rows are first copied out of a larger table."""
CONTRAST_LOGITS = 1
"""Arrays as large as the logits of the contrast: the logits, which become its slopes in their place."""


@dataclass(frozen=True)
class HeadCost:
    """Memory in bytes and work of a head alone in one training step, in float32 and with momentum.

    Args:
        parameters: bytes of the weights that are trained.
        momentum: bytes of the optimizer's momentum, a number a weight. It is there from the end of the first step on.
        tables: bytes that are kept beside these: the code table, or centres that the head itself moves, and momentum.
        step: bytes that a step takes beside these at its peak: gradients, logits, candidate rows and other activations.
        weights: how many weights, on average, a row of the batch is multiplied by; as many move in a step.
        batch: rows of the batch.
    """

    parameters: float
    momentum: float
    tables: float
    step: float
    weights: float
    batch: int

    @property
    def bytes(self) -> float:
        """The most that is held at once, of any step but the first."""
        return self.parameters + self.momentum + self.tables + self.step

    @property
    def flops(self) -> float:
        """How many the three products take (forward, and the gradients of both factors), two a multiply-add."""
        return 6 * self.batch * self.weights

    @property
    def traffic(self) -> float:
        """Bytes that must move at least: the weights that take part and their momentum are read and written."""
        return 4 * FLOAT * self.weights


def softmax_cost(m: int, *, width: int = 512, batch: int = 1024) -> HeadCost:
    """A centre an identity, all of which take part in every step, with a logit for each of them and each row."""
    centres = FLOAT * m * width
    step = SOFTMAX_ROWS * centres + FLOAT * batch * (m + width)
    return HeadCost(centres, centres, 0.0, step, m * width, batch)


def partial_fc_cost(m: int, samples: float, *, width: int = 512, batch: int = 1024) -> HeadCost:
    """A centre an identity, of which a sample is copied, takes part in a step and moves; all are kept, with momentum.

    Both are tables, and no optimizer knows them. The batch's own centres come on top of the ``samples`` at random,
    which is the most that they can be; the work is that of the sample alone, the least that it can be.
    """
    centres, sampled = FLOAT * m * width, min(m, samples)
    rows = min(m, sampled + batch)
    step = FLOAT * (GATHERED_ROWS * rows * width + batch * (rows + width))
    return HeadCost(0.0, 0.0, 2 * centres, step, sampled * width, batch)


def gif_cost(
    m: int, *, width: int = 512, batch: int = 1024, vocab_size: int = 20, recipe: Recipe = RECIPES["live"]
) -> HeadCost:
    """l tokens of v centres and a projection a token; the code table in memory, which `gif train` leaves in its file.

    The table of code vectors is not counted: it may stay on the host or in a file, and a step reads the rows of its
    candidates, which are the batch's identities, their siblings and the negatives. A step holds most at one of two
    moments:

    - in the contrast, which is differentiated in the forward pass: the candidates' rows as `GATHERED_ROWS` says, the
      logits of the batch with all candidates, and what the tokens' loss has kept, which are the projected rows;
    - at the end of the backward pass: the gradients of all parameters, of the projected rows beside these, of the
      tokens' logits beside those, and the step of the candidates that is to come.
    """
    length = code_length(m, vocab_size)
    parameters = length * width * (vocab_size + width)
    candidates = batch * (1 + recipe.siblings) + min(recipe.negatives, m) if recipe.contrast_weight > 0 else 0
    projected = batch * length * width
    of_embeddings = 2 * batch * width  # at unit length, and their gradient
    contrast = candidates * (GATHERED_ROWS * width + CONTRAST_LOGITS * batch) + projected + of_embeddings
    tokens = 2 * projected + of_embeddings + 2 * batch * length * vocab_size
    backward = parameters + tokens + (candidates + (batch if candidates else 0)) * width
    return HeadCost(
        parameters=FLOAT * parameters,
        momentum=FLOAT * parameters,
        tables=table_bytes(m, vocab_size, length),
        step=FLOAT * max(contrast if candidates else 0, backward),
        weights=parameters + candidates * width,
        batch=batch,
    )
