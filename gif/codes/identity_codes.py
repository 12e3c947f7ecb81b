"""The identity codes c^y: each identity's tokens, fixed before training, no two identities alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gif.codes.code_table import CodeTable, largest_bucket, number_of
from gif.codes.extend import place_newcomers
from gif.codes.segments import offsets_of
from gif.data.identities import Identities, check_count
from gif.errors import DamagedFileError, InputError
from gif.files import load_tensors, map_tensor, read_metadata, save_tensors
from gif.vectors.store import CodeVectors
from gif_kernels import checks

FORMAT = "gif.identity_codes/1"
LARGEST_VOCAB = 256  # a token is one byte
_LARGEST_KEY = torch.iinfo(torch.int64).max
_FINGERPRINT = "fingerprint"
_ROWS_A_BLOCK = 1 << 22


class IdentityCodes:
    """Codes of m identities: l tokens each, every token in [0, v), all codes distinct (METHOD: c^y).

    Args:
        codes: (m, l) integers, or the table of them that was read from a file.
        vocab_size: v, in [2, 256]; v^l must fit int64.
        centroids: unit vectors of the tree's nodes where `tokenize` made the codes: tensor j is (nodes, d), a row for
            each prefix of j + 1 tokens in use, in increasing order of the prefixes. May stop at any level.
        directions: (l, v, d) what each token means under every prefix, where `tokenize` aligned them: the direction of
            a child from its parent.
        identities: whose they are, where that is known; kept in files.

    It holds a `CodeTable`, 8 bytes an identity where v^l <= 2^32, or none where that lies in a memory map.

    Raises TypeError if the codes are not an integer tensor, ValueError if a token is out of range, two identities share
    a code, or the centroids, directions or identities do not belong to the codes.
    """

    def __init__(
        self,
        codes: Tensor | CodeTable,
        vocab_size: int,
        *,
        centroids: Sequence[Tensor] | None = None,
        directions: Tensor | None = None,
        identities: Identities | None = None,
    ) -> None:
        check_vocab_size(vocab_size)
        self.vocab_size = vocab_size
        self.centroids = tuple(centroids or ())
        self.directions = directions
        self.identities = identities
        if isinstance(codes, CodeTable):
            self.table = codes
            check_count("codes", identities, len(codes))
        else:
            for rows in codes.split(_ROWS_A_BLOCK) if isinstance(codes, Tensor) and codes.ndim else (codes,):
                hint = "give the vocab_size the codes were made with"
                checks.integer("codes", rows, ("m", "l"), low=0, high=vocab_size, hint=hint)
            check_code_space(vocab_size, codes.shape[1])
            check_count("codes", identities, len(codes))
            self.table = CodeTable.of(codes, vocab_size)
            self._check_distinct_and_centroids()
        self._check_directions()

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False) -> IdentityCodes:
        """Read codes from ``path``.

        ``mmap`` leaves them on disk and reads what is asked for; a file of an earlier version, which has no order of
        the codes in it, is read whole. Of a mapped file the centroids are left out.

        Raises FileNotFoundError, or ValueError if the file is truncated, damaged or of another kind.
        """
        if mmap and (mapped := cls._map(path)) is not None:
            return mapped
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

    @classmethod
    def _map(cls, path: str | Path) -> IdentityCodes | None:
        """The codes with their tables left in the file; None where it has no order of them."""
        metadata = read_metadata(path, format=FORMAT)
        if _FINGERPRINT not in metadata:
            return None
        v = int(metadata["vocab_size"])
        codes, order, starts = (map_tensor(path, name, format=FORMAT) for name in ("codes", "order", "starts"))
        fits = codes.ndim == 2 and codes.dtype == torch.uint8 and order.shape == codes.shape[:1]
        if not fits or starts.ndim != 1 or len(starts) < 2 or [int(starts[0]), int(starts[-1])] != [0, len(order)]:
            raise DamagedFileError(f"{path} is damaged: its tables do not belong together; make it again")
        table = CodeTable(codes, order, starts, v, codes.shape[1], largest_bucket(starts))
        found = cls(table, v, identities=Identities.map(path, metadata, format=FORMAT))
        found.fingerprint = metadata[_FINGERPRINT]
        return found

    def save(self, path: str | Path) -> None:
        """Write codes, their order, centroids and directions if there are any, and whose they are, atomically."""
        tensors = {"codes": self.codes, "order": self.table.order, "starts": self.table.starts}
        tensors |= {_centroids(level): rows for level, rows in enumerate(self.centroids)}
        if self.directions is not None:
            tensors["directions"] = self.directions
        metadata = {"vocab_size": str(self.vocab_size), _FINGERPRINT: self.fingerprint}
        if self.identities is not None:
            tensors |= self.identities.tensors()
            metadata |= self.identities.metadata()
        save_tensors(path, tensors, format=FORMAT, **metadata)

    def lookup(self, labels: Tensor) -> Tensor:
        """Codes of identities ``labels`` (B,) as (B, l) int64, on the labels' device; label -1 gives a row of -1.

        Raises TypeError for labels that are not integers, ValueError for another shape or a label outside [-1, m).
        """
        index = self._index(labels, low=-1, hint=" (-1 marks a row to ignore)")
        rows = self.table.tokens(index.clamp_min(0))
        return rows.masked_fill((index < 0)[:, None], -1).to(labels.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Identities (n,) int64 that own ``codes`` (n, l), on the codes' device; -1 where no identity does.

        Raises TypeError for codes that are not integers, ValueError for another shape.
        """
        every = torch.iinfo(torch.int64)
        hint = "give rows of tokens"
        tokens = checks.integer("codes", codes, ("n", self.length), low=every.min, high=every.max, hint=hint)
        tokens = tokens.to(self.table.numbers.device)
        wanted = number_of(tokens, self.vocab_size)
        identities = self.table.at(self.table.smaller(wanted).clamp_max(len(self) - 1))
        valid = ((tokens >= 0) & (tokens < self.vocab_size)).all(1)
        return torch.where(valid & (self.table.number(identities) == wanted), identities, -1).to(codes.device)

    def prefixes(self, tokens: int) -> Tensor:
        """The first ``tokens`` tokens of each code as a number in base v, (m,) int64: its node at that depth."""
        return number_of(self.codes[:, :tokens], self.vocab_size)

    def siblings(self, labels: Tensor, count: int) -> Tensor:
        """Neighbours in the order of the codes, which share the longest prefixes: (B, count) int64 for labels (B,).

        The next, the one before, the second next and so on, around the ends; with few identities some may repeat.
        """
        index = self._index(labels, low=0)
        turn = torch.arange(count, device=index.device)
        steps = (turn // 2 + 1) * (1 - turn % 2 * 2)
        place = (self.table.smaller(self.table.number(index))[:, None] + steps) % len(self)
        return self.table.at(place).to(labels.device)

    def nodes(self, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tree's nodes of ``depth`` tokens: identities by code (m,), offsets (n + 1,), paths (n,).

        Node i holds identities[offsets[i]:offsets[i + 1]]; its path is a number in base v, as in `prefixes`.
        """
        below = self.vocab_size ** (self.length - depth)
        paths, sizes = (self._ordered() // below).unique_consecutive(return_counts=True)
        return self.table.order, offsets_of(sizes), paths

    @property
    def codes(self) -> Tensor:
        """All codes, (m, l) uint8: of a table in memory a new tensor, of one in a memory map what lies there."""
        return self.table.codes()

    def to(self, device: torch.device | str) -> IdentityCodes:
        """These codes with their table on ``device``, where lookups then wait for nothing; these if it is there."""
        table = self.table.to(device)
        if table is self.table:
            return self
        moved = IdentityCodes(
            table,
            self.vocab_size,
            centroids=self.centroids,
            directions=self.directions,
            identities=self.identities,
        )
        moved.fingerprint = self.fingerprint
        return moved

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
            self._ordered(), table, self.vocab_size, self.length, self.centroids,
            self.directions, seed,
        )  # fmt: skip
        codes = torch.cat([self.codes, tokens.to(self.table.numbers.device)])
        return IdentityCodes(
            codes, self.vocab_size, centroids=centroids, directions=self.directions, identities=everybody
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of m, l, v and the codes: what a checkpoint records to know its codes again.

        Of codes in a memory map it is what their file says, which was found when they were written.
        """
        digest = hashlib.sha256(f"{len(self)},{self.length},{self.vocab_size};".encode())
        digest.update(self.codes.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def length(self) -> int:
        """l, the tokens of a code."""
        return self.table.length

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"IdentityCodes({len(self)} identities, {self.length} tokens of {self.vocab_size})"

    def _index(self, labels: Tensor, *, low: int, hint: str = "") -> Tensor:
        """The labels (B,) as int64 on the codes' device, each in [low, m)."""
        hint = f"these codes were made for other identities{hint}"
        index = labels.to(self.table.numbers.device) if isinstance(labels, Tensor) else labels
        return checks.integer("labels", index, ("B",), low=low, high=len(self), hint=hint)

    def _ordered(self) -> Tensor:
        """The numbers of all codes, increasing, (m,) int64."""
        return self.table.number(self.table.order.long())

    def _check_distinct_and_centroids(self) -> None:
        numbers = self._ordered()
        same = (numbers[1:] == numbers[:-1]).nonzero()
        if len(same):
            first, second = self.table.order[same[0, 0] :][:2].tolist()
            raise InputError(
                f"identities {first} and {second} share the code {self.codes[first].tolist()} ({len(same)} are not "
                "distinct), wanted one for each; make them with gif.tokenize"
            )
        for level, rows in enumerate(self.centroids):
            prefixes = numbers // self.vocab_size ** (self.length - 1 - level)
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


def _centroids(level: int) -> str:
    return f"centroids.{level}"
