"""What a training loop may ask of a head beside its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gif.devices import to_device

HEAD_FORMAT = "gif.head/1"
"""Of files that hold what a head has learnt."""
Placement = Literal["auto", "device", "host", "file"]
"""Where tables lie that a head reads and moves rows of."""


class TablePart(NamedTuple):
    """Rows [begin, begin + k) of a table of ``total`` rows, which several processes divide among them: (k, ...)."""

    rows: Tensor
    begin: int
    total: int


def own_rows(table: Tensor | TablePart) -> Tensor:
    """What this process has of a table."""
    return table.rows if isinstance(table, TablePart) else table


class Head:
    """Answers to what `gif.training.train` asks of a head; each says what is true of a module that is no `Head`.

    A head is a module whose call ``head(embeddings, labels)`` is the loss. That is enough to be trained: its parameters
    are optimized, and its ``state_dict()`` is kept in checkpoints. A head that does more is a `Head` too, and overrides
    what differs:

        class MyHead(nn.Module, Head): ...

    Attributes:
        under_autocast: whether the loss may be called under autocast where the training's precision is bf16 or fp16. It
            may where it keeps in float32 whatever would lose by it. Otherwise it gets float32.
        group_size: how many images of an identity stand side by side in an epoch's order, where it has that many: for
            heads that make a class weight from some images of a batch and classify others by it. Each image still
            comes once in an epoch.
        grouped_share: share of these groups that stay together; the images of the others come one by one.
    """

    under_autocast: bool = False
    group_size: int = 1
    grouped_share: float = 1.0

    def prepare(self, labels: Tensor, device: torch.device, ahead: int = 0) -> Any:
        """What the loss takes in place of ``labels`` (B,), which are on the CPU; it will be called on ``device``.

        The loop asks for it while the step before runs, so what only the labels decide can be fetched meanwhile.
        ``ahead``: how many calls of the loss come before, from now on. Of several processes each prepares the same
        calls, in the same order.
        """
        return to_device(labels, device)

    def settle(self) -> None:
        """Return when `tables` hold all that steps have moved: called before they are saved."""

    def tables(self) -> dict[str, Tensor | TablePart]:
        """What the head changes in place beside its parameters, by name: tensors (m, ...), the same ones each time.

        Of a table that the processes divide among them, each gives its `TablePart`; of others each has the whole.
        A checkpoint keeps them and restores them in place. It writes a table whole, and afterwards the rows that moved,
        so a table may be too large to be copied each time. Names are those of folders among the checkpoints.
        """
        return {}

    def mark_moves(self, moved: Mapping[str, Tensor]) -> None:
        """From now on set ``moved[name][row]``, of (m,) bool on the table's device, for each row here that moves.

        Called before training where checkpoints are kept and there are tables. Each checkpoint clears the marks. A row
        that moves and is not marked is lost when the run continues.
        """
        raise NotImplementedError(f"{type(self).__name__} has tables, so it must override mark_moves")

    def begin_step(self, rate: float, share: float, done: float) -> None:
        """Called first in each step, for a head of which something follows the schedule.

        ``rate`` is the optimizer's learning rate of this step, ``share`` what that is of its peak, in [0, 1], and
        ``done`` what share of the steps comes before this one, in [0, 1).
        """

    def before_step(self, backbone: nn.Module, views: Callable[[], Tensor], labels: Tensor) -> None:
        """Called before each step, without gradients: for a head whose own encoder follows ``backbone``.

        ``views()`` are the normalised images (B, c, h, w) of this process's share of the batch, augmented once more,
        and ``labels`` (B,) their identities. The forward passes of the step then get the same rows in the same order,
        in one or more parts. It does nothing here, and images that nobody asks for are not made.
        """

    def share_of_a_step(self, share: float) -> AbstractContextManager[None]:
        """Around a forward and a backward pass that are this share, in (0, 1], of one step of the optimizer.

        Gradients of several such passes accumulate, and the loop weighs each loss by its share. What the head moves by
        itself is to move by this share of its step.
        """
        return nullcontext()

    def check_processes(self, processes: int) -> None:
        """Raise InputError, before work starts, where so many processes cannot train this head together."""

    def health(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Named measures () of how well a batch of embeddings (B, d) with identities ``labels`` (B,) meets its targets.

        A label of -1 is ignored. They are shown beside the loss, averaged over the processes.
        """
        return {}

    def place_tables(self, device: torch.device, placement: Placement, folder: Path, *, goes_on: bool) -> str:
        """Bring what the head reads of its tables to where `gif train` wants them, before the first step on ``device``.

        ``placement`` is "auto", "device", "host" or "file"; ``folder`` is the run's, for a file to work in, which a run
        that ``goes_on`` finds there. Every process calls it. Returns what to say of it, or nothing.
        """
        return ""

    def save_tables(self, folder: Path) -> None:
        """Write the tables, as training left them, to files in ``folder``: for the results of `gif train`.

        Every process calls it.
        """


def as_head(module: nn.Module) -> Head:
    """The module itself where it is a `Head`, and otherwise one that gives the answers of a plain module."""
    return module if isinstance(module, Head) else Head()
