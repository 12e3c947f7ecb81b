"""Checkpoints of a training run: whole or absent, one a finished epoch."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints epoch-00001, epoch-00002, ... in ``folder``; only the newest is kept.

    Each is written beside its place and renamed into it, so a killed run leaves the one before.
    """

    folder: Path

    def save(self, model: nn.Module, optimizer: Optimizer, tables: dict[str, Tensor], epoch: int) -> None:
        """Write the state after ``epoch`` epochs; ``tables`` are tensors beside the model and the optimizer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"epoch-{epoch:05d}"
        temporary = place.with_name(f".{place.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "tables": tables}
        with _single_process():
            dcp.save(state, checkpoint_id=temporary, no_dist=True)
        temporary.rename(place)
        for old in self._places():
            if old != place:
                shutil.rmtree(old)

    def load(self, model: nn.Module, optimizer: Optimizer, tables: dict[str, Tensor]) -> int:
        """Restore the newest state in place; return the epochs done, 0 if there is none."""
        places = self._places()
        if not places:
            return 0
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "tables": tables}
        with _single_process():
            dcp.load(state, checkpoint_id=places[-1], no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return int(places[-1].name.removeprefix("epoch-"))

    def _places(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("epoch-*") if re.fullmatch(r"epoch-\d{5}", path.name))


@contextmanager
def _single_process() -> Iterator[None]:
    """Without the warning that there is no process group: there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
