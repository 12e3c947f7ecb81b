"""What training moves beside parameters, as part of a module's state dict: for libraries that save that alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gif.errors import InputError
from gif.head import own_rows
from gif.losses import GIFLoss

PREFIX = "moved_"


class TablesInState(nn.Module):
    """A module with a `GIFLoss` as its ``loss``, whose ``state_dict()`` holds the code vectors that training moves.

    They are ordinary tensors in it, "moved_vectors" (m, d), which every format keeps. They are no buffers: the module
    may go to another device or dtype, and the table stays what and where it is.
    """

    loss: GIFLoss

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{PREFIX}{name}": table for name, table in self._moved().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Restore them in place. Raises ValueError unless they fit the recipe and the table."""
        tables = self._moved()
        begin = f"{prefix}{PREFIX}"
        found = {key.removeprefix(begin): state_dict.pop(key) for key in list(state_dict) if key.startswith(begin)}
        shapes, given = ({name: tuple(table.shape) for name, table in each.items()} for each in (tables, found))
        if shapes != given:
            raise InputError(f"this state has the tables {given}, wanted {shapes}; take the recipe it was trained with")
        for name, table in tables.items():
            table.copy_(found[name])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _moved(self) -> dict[str, Tensor]:
        """What this process has of each table, once all steps are in it."""
        self.loss.settle()
        return {name: own_rows(table) for name, table in self.loss.tables().items()}
