"""What a head costs in a step of training, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from gif.codes import code_length

FLOAT = 4  # bytes


@dataclass(frozen=True)
class HeadCost:
    """Memory and work of a head alone in one training step, float32 with momentum.

    ``bytes``: weights, gradients and momentum, and the logits with their gradient. ``flops``: three products (forward,
    and the gradients of both factors), two FLOPs a multiply-add.
    """

    bytes: float
    flops: float


def softmax_cost(m: int, *, width: int = 512, batch: int = 1024, sample_rate: float = 1.0) -> HeadCost:
    """A centre an identity. With sampling, all centres and their momentum stay, and a sample takes part in a step."""
    taking_part = sample_rate * m
    kept = (3 if sample_rate == 1 else 2) * m * width + (0 if sample_rate == 1 else 2 * taking_part * width)
    return HeadCost(FLOAT * (kept + 2 * batch * taking_part), 6 * batch * taking_part * width)


def gif_cost(m: int, *, width: int = 512, batch: int = 1024, vocab_size: int = 20) -> HeadCost:
    """l tokens of v centres, a projection a token; the code table, one byte a token, is counted too."""
    length = code_length(m, vocab_size)
    parameters = length * vocab_size * width + length * width * width
    activations = 2 * batch * length * (vocab_size + width)
    return HeadCost(FLOAT * (3 * parameters + activations) + m * length, 6 * batch * parameters)
