"""What training moves beside parameters, as part of a module's state dict: for libraries that save that alone."""

from __future__ import annotations

from torch import Tensor, nn

from gif.errors import InputError
from gif.head import own_rows
from gif.losses import GIFLoss


class TablesInState(nn.Module):
    """A module with a `GIFLoss` as its ``loss``, whose ``state_dict()`` holds the code vectors that training moves."""

    loss: GIFLoss

    def get_extra_state(self) -> dict[str, Tensor]:
        """The code vectors of this process, where training moves them: part of ``state_dict()``."""
        self.loss.settle()
        return {name: own_rows(table) for name, table in self.loss.tables().items()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore them in place. Raises ValueError unless they fit the recipe and the table."""
        self.loss.settle()
        tables = {name: own_rows(table) for name, table in self.loss.tables().items()}
        shapes, given = ({name: tuple(table.shape) for name, table in each.items()} for each in (tables, state))
        if shapes != given:
            raise InputError(f"this state has the tables {given}, wanted {shapes}; take the recipe it was trained with")
        for name, table in tables.items():
            table.copy_(state[name])
