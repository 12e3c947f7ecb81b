"""The identity codes c^y: each identity's tokens, fixed before training, no two identities alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gif.codes.extend import place_newcomers
from gif.codes.segments import offsets_of
from gif.data.identities import Identities, check_count
from gif.errors import InputError
from gif.files import load_tensors, save_tensors
from gif.vectors.store import CodeVectors
from gif_kernels import checks

FORMAT = "gif.identity_codes/1"
LARGEST_VOCAB = 256  # a token is one byte
_LARGEST_KEY = torch.iinfo(torch.int64).max
_ROWS_A_BLOCK = 1 << 22


class IdentityCodes:
    """Codes of m identities: l tokens each, every token in [0, v), all codes distinct (METHOD: c^y).

    Args:
        codes: (m, l) integers; kept as uint8, the very tensor where it is one.
        vocab_size: v, in [2, 256]; v^l must fit int64.
        centroids: unit vectors of the tree's nodes where `tokenize` made the codes: tensor j is (nodes, d), a row for
            each prefix of j + 1 tokens in use, in increasing order of the prefixes. May stop at any level.
        directions: (l, v, d) what each token means under every prefix, where `tokenize` aligned them: the direction of
            a child from its parent.
        identities: whose they are, where that is known; kept in files.

    Besides the codes it holds 4 bytes an identity: their order; and 4 more from the first call of `siblings` on.

    Raises TypeError if the codes are not an integer tensor, ValueError if a token is out of range, two identities share
    a code, or the centroids, directions or identities do not belong to the codes.
    """

    def __init__(
        self,
        codes: Tensor,
        vocab_size: int,
        *,
        centroids: Sequence[Tensor] | None = None,
        directions: Tensor | None = None,
        identities: Identities | None = None,
    ) -> None:
        check_vocab_size(vocab_size)
        for rows in codes.split(_ROWS_A_BLOCK) if isinstance(codes, Tensor) and codes.ndim else (codes,):
            hint = "give the vocab_size the codes were made with"
            checks.integer("codes", rows, ("m", "l"), low=0, high=vocab_size, hint=hint)
        check_code_space(vocab_size, codes.shape[1])
        check_count("codes", identities, len(codes))
        self.codes = codes.to(torch.uint8)
        self.vocab_size = vocab_size
        self.centroids = tuple(centroids or ())
        self.directions = directions
        self.identities = identities
        keys, order = self._keys(self.codes).sort(stable=True)
        self._check_distinct(keys, order)
        self._check_centroids(keys)
        self._check_directions()
        self._order = order.to(_index_dtype(len(self)))

    @classmethod
    def load(cls, path: str | Path) -> IdentityCodes:
        """Read codes from ``path``.

        Raises FileNotFoundError, or ValueError if the file is truncated, damaged or of another kind.
        """
        tensors, metadata = load_tensors(path, format=FORMAT)
        if "codes" not in tensors or not metadata.get("vocab_size", "").isdecimal():
            raise InputError(f"{path} has no codes or no vocab_size; make it again with IdentityCodes.save")
        centroids = [tensors[_centroids(level)] for level in range(len(tensors)) if _centroids(level) in tensors]
        return cls(
            tensors["codes"],
            int(metadata["vocab_size"]),
            centroids=centroids,
            directions=tensors.get("directions"),
            identities=Identities.read(path, tensors, metadata),
        )

    def save(self, path: str | Path) -> None:
        """Write codes, centroids and directions where there are any, and whose they are, as safetensors, atomically."""
        tensors = {"codes": self.codes} | {_centroids(level): rows for level, rows in enumerate(self.centroids)}
        if self.directions is not None:
            tensors["directions"] = self.directions
        metadata = {"vocab_size": str(self.vocab_size)}
        if self.identities is not None:
            tensors |= self.identities.tensors()
            metadata |= self.identities.metadata()
        save_tensors(path, tensors, format=FORMAT, **metadata)

    def lookup(self, labels: Tensor) -> Tensor:
        """Codes of identities ``labels`` (B,) as (B, l) int64, on the labels' device; label -1 gives a row of -1.

        Raises TypeError for labels that are not integers, ValueError for another shape or a label outside [-1, m).
        """
        index = self._index(labels, low=-1, hint=" (-1 marks a row to ignore)")
        rows = self.codes[index.clamp_min(0)].long()
        return rows.masked_fill((index < 0)[:, None], -1).to(labels.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Identities (n,) int64 that own ``codes`` (n, l), on the codes' device; -1 where no identity does.

        Raises TypeError for codes that are not integers, ValueError for another shape.
        """
        every = torch.iinfo(torch.int64)
        hint = "give rows of tokens"
        tokens = checks.integer("codes", codes, ("n", self.length), low=every.min, high=every.max, hint=hint)
        tokens = tokens.to(self.codes.device)
        wanted = self._keys(tokens)
        place = torch.zeros_like(wanted)  # of codes that are smaller: a binary search, so that no keys need be kept
        for step in (1 << bit for bit in reversed(range(len(self).bit_length()))):
            further = place + step
            inside = further <= len(self)
            smaller = self._keys(self.codes[self._order[torch.where(inside, further, 1) - 1]]) < wanted
            place = torch.where(inside & smaller, further, place)
        identities = self._order[place.clamp_max(len(self) - 1)].long()
        valid = ((tokens >= 0) & (tokens < self.vocab_size)).all(1)
        return torch.where(valid & (self._keys(self.codes[identities]) == wanted), identities, -1).to(codes.device)

    def prefixes(self, tokens: int) -> Tensor:
        """The first ``tokens`` tokens of each code as a number in base v, (m,) int64: its node at that depth."""
        return self._keys(self.codes[:, :tokens])

    def siblings(self, labels: Tensor, count: int) -> Tensor:
        """Neighbours in the order of the codes, which share the longest prefixes: (B, count) int64 for labels (B,).

        The next, the one before, the second next and so on, around the ends; with few identities some may repeat.
        """
        index = self._index(labels, low=0)
        turn = torch.arange(count, device=index.device)
        steps = (turn // 2 + 1) * (1 - turn % 2 * 2)
        place = (self._rank[index].long()[:, None] + steps) % len(self)
        return self._order[place].long().to(labels.device)

    def nodes(self, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tree's nodes of ``depth`` tokens: identities by code (m,), offsets (n + 1,), paths (n,).

        Node i holds identities[offsets[i]:offsets[i + 1]]; its path is a number in base v, as in `prefixes`.
        """
        paths, sizes = self._keys(self.codes[:, :depth][self._order]).unique_consecutive(return_counts=True)
        return self._order, offsets_of(sizes), paths

    @property
    def free(self) -> int:
        """Codes that no identity has, v^l - m."""
        return int(self.vocab_size**self.length - len(self))

    def extend(self, vectors: CodeVectors | Tensor, *, seed: int = 0) -> IdentityCodes:
        """These codes, unchanged, and after them one for each of ``vectors`` (n, d) of identities that came later.

        Each goes down the tree to the child of nearest centroid that has a free leaf, and where no such child exists
        starts the one whose direction its residual is nearest to, or a random one where the codes have no directions.
        Where more come than a child has room for, the nearest take it. Centroids of nodes there were stay.

        Where these codes and CodeVectors both say whose they are, the extended codes do too.

        Raises ValueError if the codes have no centroids (of depth 1 at least), the vectors are not (n, d) or without a
        direction, fewer than n codes are free, or a newcomer has a code already.
        """
        table, newcomers = (vectors.table, vectors.identities) if isinstance(vectors, CodeVectors) else (vectors, None)
        everybody = None
        if self.identities is not None and newcomers is not None:
            everybody = self.identities.followed_by(newcomers)
        if not self.centroids and self.length > 1:
            raise InputError(
                "these codes have no centroids to find the newcomers' place by; make them with gif.tokenize and its "
                "default centroid_levels"
            )
        if len(vectors) > self.free:
            raise InputError(
                f"{len(vectors)} newcomers, but only {self.free} of {self.vocab_size}^{self.length} codes are free: "
                "the tree is full; make new codes with a larger length or vocab_size (gif.tokenize with slack)"
            )
        tokens, centroids = place_newcomers(
            self._keys(self.codes[self._order]), table, self.vocab_size, self.length, self.centroids,
            self.directions, seed,
        )  # fmt: skip
        codes = torch.cat([self.codes, tokens.to(self.codes.device)])
        return IdentityCodes(
            codes, self.vocab_size, centroids=centroids, directions=self.directions, identities=everybody
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of m, l, v and the codes: what a checkpoint records to know its codes again."""
        digest = hashlib.sha256(f"{len(self)},{self.length},{self.vocab_size};".encode())
        digest.update(self.codes.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def length(self) -> int:
        """l, the tokens of a code."""
        return self.codes.shape[1]

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __repr__(self) -> str:
        return f"IdentityCodes({len(self)} identities, {self.length} tokens of {self.vocab_size})"

    def _index(self, labels: Tensor, *, low: int, hint: str = "") -> Tensor:
        """The labels (B,) as int64 on the codes' device, each in [low, m)."""
        hint = f"these codes were made for other identities{hint}"
        index = labels.to(self.codes.device) if isinstance(labels, Tensor) else labels
        return checks.integer("labels", index, ("B",), low=low, high=len(self), hint=hint)

    @cached_property
    def _rank(self) -> Tensor:
        """The place of each identity in the order of the codes, (m,)."""
        rank = torch.empty_like(self._order)
        rank[self._order] = torch.arange(len(self), dtype=rank.dtype, device=rank.device)
        return rank

    def _keys(self, codes: Tensor) -> Tensor:
        """Codes (n, l) as numbers in base v, (n,) int64."""
        keys = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        for tokens in codes.unbind(1):
            keys.mul_(self.vocab_size).add_(tokens)
        return keys

    def _check_distinct(self, keys: Tensor, identities: Tensor) -> None:
        same = (keys[1:] == keys[:-1]).nonzero()
        if len(same):
            first, second = identities[same[0, 0] :][:2].tolist()
            raise InputError(
                f"identities {first} and {second} share the code {self.codes[first].tolist()} ({len(same)} are not "
                "distinct), wanted one for each; make them with gif.tokenize"
            )

    def _check_centroids(self, keys: Tensor) -> None:
        for level, rows in enumerate(self.centroids):
            prefixes = keys // self.vocab_size ** (self.length - 1 - level)
            nodes = 1 + int((prefixes[1:] != prefixes[:-1]).sum())
            if level >= self.length or rows.ndim != 2 or len(rows) != nodes or not rows.is_floating_point():
                raise InputError(
                    f"centroids of level {level} must be ({nodes}, d) floating point, got {tuple(rows.shape)} "
                    f"{rows.dtype}; give the centroids that came with these codes, or none"
                )

    def _check_directions(self) -> None:
        if self.directions is not None and self.directions.shape[:-1] != (self.length, self.vocab_size):
            raise InputError(
                f"directions must be ({self.length}, {self.vocab_size}, d), got {tuple(self.directions.shape)}; give "
                "those that came with these codes, or none"
            )


def code_length(m: int, vocab_size: int, slack: float = 0.0) -> int:
    """The smallest l >= 1 with v^l >= m (1 + slack), exactly; ``slack`` counts as the decimal number it prints as.

    Raises ValueError unless m >= 1, vocab_size is in [2, 256] and slack >= 0.
    """
    check_vocab_size(vocab_size)
    if m < 1 or not 0 <= slack < float("inf"):
        raise InputError(f"wanted at least one identity and a finite slack >= 0, got m = {m}, slack = {slack}")
    wanted = m * (1 + Fraction(repr(float(slack))))
    length = 1
    while vocab_size**length < wanted:
        length += 1
    return length


def check_code_space(vocab_size: int, length: int) -> None:
    """Raise ValueError unless a code of ``length`` tokens fits int64 as a number in base ``vocab_size``."""
    if vocab_size**length > _LARGEST_KEY:
        raise InputError(
            f"codes of {length} tokens of {vocab_size} pass 2^63; take fewer tokens or a smaller vocabulary"
        )


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError unless a token can take ``vocab_size`` values."""
    if not isinstance(vocab_size, int) or not 2 <= vocab_size <= LARGEST_VOCAB:
        raise InputError(f"vocab_size must be an integer in [2, {LARGEST_VOCAB}], got {vocab_size}")


def _index_dtype(m: int) -> torch.dtype:
    return torch.int32 if m <= torch.iinfo(torch.int32).max else torch.int64


def _centroids(level: int) -> str:
    return f"centroids.{level}"
