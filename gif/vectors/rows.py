"""The code vectors that one step works on, wherever their table is."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from torch import Tensor

from gif.devices import to_device
from gif.vectors.staging import Stage, Staged
from gif_kernels import vector_step_


class Rows(Protocol):
    """Rows (C, d) of a table, of identities that may be named more than once."""

    @property
    def values(self) -> Tensor:
        """The rows (C, d) in the table's dtype, where the step is; the same bits whenever they are asked for again."""

    def move_(self, gradient: Tensor, lr: float, seed: int | Tensor) -> Tensor:
        """`CodeVectors.move_` of these rows by their ``gradient`` (C, d): how many stayed, () int64."""

    def mark(self, moved: Tensor) -> None:
        """Set ``moved`` (m,) bool, which is where the table is, for these rows."""


class MovingTable(Protocol):
    """What rows in place ask of whoever has them, as `gif.vectors.store.CodeVectors` does."""

    table: Tensor

    def lookup(self, labels: Tensor) -> Tensor:
        """Rows of identities (C,), as (C, d)."""

    def move_(self, labels: Tensor, gradient: Tensor, lr: float, *, seed: int | Tensor = 0) -> Tensor:
        """One step for the rows of ``labels`` (C,), in place; how many stayed, () int64."""


class RowsInPlace:
    """Rows of a table that is where the step is: they are read and moved in it.

    Attributes:
        table: (m, d), all of them.
        identities: (C,) int64, which.
    """

    def __init__(self, vectors: MovingTable, identities: Tensor) -> None:
        self._vectors = vectors
        self.table, self.identities = vectors.table, identities

    @property
    def values(self) -> Tensor:
        """The rows as they are now: the table itself moves, after the step has read them."""
        return self._vectors.lookup(self.identities)

    def move_(self, gradient: Tensor, lr: float, seed: int | Tensor) -> Tensor:
        """Move them in the table."""
        return self._vectors.move_(self.identities, gradient, lr, seed=seed)

    def mark(self, moved: Tensor) -> None:
        """Set ``moved`` (m,) bool for these rows."""
        moved.index_fill_(0, self.identities.to(moved.device), True)  # `[...] = True` copies from the host


class StagedRows:
    """Rows of a table on the host or in a file, brought to the step and given back by a `Stage`.

    Args:
        staged: the distinct rows.
        place: (C,) which of them each of the C is, where the step is.
        names: (n,) what the distinct rows are called in the rounding, where the step is.
    """

    def __init__(self, staged: Staged, place: Tensor, names: Tensor) -> None:
        self._staged, self._place, self._names = staged, place, names

    @classmethod
    def ask(cls, stage: Stage, rows: Tensor) -> StagedRows:
        """Ask for ``rows`` (C,) of the stage's table, on the CPU."""
        distinct, place = rows.unique(return_inverse=True)
        names = to_device(distinct, stage.device)
        return cls(stage.stage(distinct), to_device(place, stage.device), names)

    @cached_property
    def values(self) -> Tensor:
        """The rows as the steps before left them."""
        return self._staged.values()[self._place]

    def move_(self, gradient: Tensor, lr: float, seed: int | Tensor) -> Tensor:
        """Move a copy of them, and give it back."""
        moved = self._staged.values().clone()
        stayed = vector_step_(moved, self._place, gradient, lr=lr, seed=seed, row_ids=self._names)
        self._staged.give_back(moved)
        return stayed

    def mark(self, moved: Tensor) -> None:
        """Set ``moved`` (m,) bool for these rows."""
        moved.index_fill_(0, self._staged.rows, True)
