"""Which vocabulary and length suit a number of identities."""

from __future__ import annotations

from dataclasses import dataclass

from gif.codes.identity_codes import check_code_space, code_length

SMALLEST_VOCAB, LARGEST_VOCAB = 5, 20  # the paper's range


@dataclass(frozen=True)
class CodeShape:
    """Codes of ``length`` tokens of ``vocab_size`` for some number of identities.

    ``codes`` is v^l; ``slack`` the share of the identities there are for which codes are left; ``logits`` l v, what a
    head computes for each sample.
    """

    vocab_size: int
    length: int
    codes: int
    slack: float
    logits: int

    def __str__(self) -> str:
        return (
            f"{self.length} tokens of {self.vocab_size}: {self.codes:,} codes, slack {self.slack:.3g}, "
            f"{self.logits} logits"
        )


def advise(m: int, slack: float = 0.0) -> list[CodeShape]:
    """For each length, the smallest vocabulary in [5, 20] with v^l >= m (1 + slack): shortest codes first.

    Longer codes need fewer logits and more tokens to be right. 20^6 is exactly 64,000,000: without any slack.

    Raises ValueError unless m >= 1 and slack >= 0.
    """
    shapes: dict[int, CodeShape] = {}
    for vocab_size in range(SMALLEST_VOCAB, LARGEST_VOCAB + 1):
        length = code_length(m, vocab_size, slack)
        check_code_space(vocab_size, length)
        codes = vocab_size**length
        shapes.setdefault(length, CodeShape(vocab_size, length, codes, codes / m - 1, vocab_size * length))
    return [shapes[length] for length in sorted(shapes)]
