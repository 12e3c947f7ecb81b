"""How to cut identity codes: every number of a run in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gif.codes.align import ALIGNMENTS, Alignment
from gif.codes.identity_codes import LARGEST_VOCAB, check_code_space, check_vocab_size, code_length
from gif.errors import InputError
from gif_kernels import checks

_BESIDE_THE_TREE = ("slack", "centroid_levels")


@dataclass(frozen=True)
class TokenizeConfig:
    """How to cut identity codes: their shape, and the balanced k-means of each node of the tree.

    Args:
        vocab_size: v, the values a token can take, 5 to 20 in the paper.
        length: l, the tokens of a code; the shortest that fits where it is not given.
        slack: room for identities that arrive later, as a share of those there are.
        iterations: Lloyd rounds a node.
        capacity_factor: how much larger than the mean a branch of the code tree may be; 1 makes them equal.
        alignment: "residual" numbers branches so that a token means the same direction everywhere; "none" at random.
        centroid_levels: keep the centroids of nodes of this many tokens and fewer with the codes, as float16, for
            `IdentityCodes.extend`; all but the leaves' where it is not given. The last of them, of l - 1 tokens, take
            most room.
        seed: of the clustering.

    Raises ValueError for a number out of its range.
    """

    vocab_size: int = 20
    length: int | None = None
    slack: float = 0.0
    iterations: int = 8
    capacity_factor: float = 1.5
    alignment: Alignment = "residual"
    centroid_levels: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)
        checks.choice("alignment", self.alignment, ALIGNMENTS)
        if not (self.capacity_factor >= 1 and self.iterations >= 0):
            raise InputError(
                f"wanted capacity_factor >= 1 and iterations >= 0, got {self.capacity_factor} and {self.iterations}"
            )

    def settings(self) -> dict[str, Any]:
        """The fields that decide the tree, once the length is given.

        ``slack`` is in the length, and ``centroid_levels`` says only what of the tree is kept with the codes.
        """
        return {name: value for name, value in asdict(self).items() if name not in _BESIDE_THE_TREE}

    def length_for(self, m: int) -> int:
        """The length of the codes of m identities. Raises ValueError if they do not fit."""
        shortest = code_length(m, self.vocab_size, self.slack)
        length = shortest if self.length is None else self.length
        if length < shortest:
            sizes = range(self.vocab_size + 1, LARGEST_VOCAB + 1)
            fits = (v for v in sizes if code_length(m, v, self.slack) <= length)
            larger = next((f" or vocab_size >= {v}" for v in fits), "")
            raise InputError(
                f"{m} identities with slack {self.slack} do not fit in codes of {length} tokens of {self.vocab_size}; "
                f"take length >= {shortest}{larger}"
            )
        check_code_space(self.vocab_size, length)
        return length

    def centroid_levels_for(self, length: int) -> int:
        """Of how many levels the centroids are kept with codes of ``length`` tokens."""
        levels = length - 1 if self.centroid_levels is None else self.centroid_levels
        if not 0 <= levels < length:
            raise InputError(f"centroid_levels must lie in [0, {length}), the tokens of a code, got {levels}")
        return levels
