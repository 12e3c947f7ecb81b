"""Labels on their way to a loss that reads tables for them."""

from __future__ import annotations

import torch
from torch import Tensor

from gif.codes import IdentityCodes
from gif.devices import to_device
from gif.vectors.rows import Rows


class PreparedLabels:
    """Labels of a batch, and what a `GIFLoss` reads of its tables for them; `GIFLoss.prepare` makes it.

    What is on the host, or in a file, is asked for at once; the rest when it is used.

    Args:
        codes: of all identities.
        labels: (B,) int64, wherever they are.
        device: where the loss is.
        candidates: (C,) identities that the batch is contrasted with, on ``device``; None where no term reads vectors.
        rows: their code vectors; None where the loss reads a whole table.
        begin: where the batch's own identities begin among the candidates.

    Attributes:
        labels: (B,) int64 on ``device``.
    """

    def __init__(
        self,
        codes: IdentityCodes,
        labels: Tensor,
        device: torch.device,
        candidates: Tensor | None = None,
        rows: Rows | None = None,
        begin: int = 0,
    ) -> None:
        self.labels = to_device(labels, device)
        self._codes, self._given, self._device = codes, labels, device
        self._candidates, self._rows, self._begin = candidates, rows, begin
        self._tokens: Tensor | None = None  # not functools.cached_property, whose lock torch.compile cannot trace
        self._vectors: Tensor | None = None
        if labels.device != device:
            self.tokens  # noqa: B018 (what is on the host is asked for at once)

    @property
    def tokens(self) -> Tensor:
        """The tokens (B, l) of the labels' codes."""
        if self._tokens is None:
            self._tokens = to_device(self._codes.lookup(self._given), self._device)
        return self._tokens

    @property
    def candidates(self) -> Tensor:
        """The identities (C,) that the batch is contrasted with."""
        assert self._candidates is not None  # a term asks for them
        return self._candidates

    @property
    def has_rows(self) -> bool:
        """Whether code vectors were asked for: else the loss reads the whole table."""
        return self._rows is not None

    @property
    def rows(self) -> Rows:
        """The code vectors of the candidates, to be moved."""
        assert self._rows is not None  # a term asks for them
        return self._rows

    @property
    def vectors(self) -> Tensor:
        """The code vectors (C, d) of the candidates; float32 at least, for steps are smaller than bfloat16 tells."""
        if self._vectors is None:
            values = self.rows.values
            self._vectors = values.to(torch.promote_types(values.dtype, torch.float32))
        return self._vectors

    @property
    def own_vectors(self) -> Tensor:
        """The code vectors (B, d) of the labels: a copy, so that who keeps them does not keep all candidates'."""
        return self.vectors[self._begin : self._begin + len(self.labels)].clone()

    def release(self) -> None:
        """Let go of ``vectors``, which a repeated forward pass reads again."""
        self._vectors = None
