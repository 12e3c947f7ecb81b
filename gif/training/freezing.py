"""Parts of a backbone that stay as they are while the rest is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gif.errors import InputError


def freeze(backbone: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Freeze parts of a backbone, by the names of its modules or parameters; "*" is all of it.

    Their weights get no gradient. Returns the modules, which are to be kept in eval mode, so that the running
    statistics of their norms stay too.

    Raises ValueError for a name of nothing, and says what there is.
    """
    modules, parameters = dict(backbone.named_modules()), dict(backbone.named_parameters())
    modules["*"] = backbone
    frozen = []
    for name in names:
        if name in modules and name:
            modules[name].requires_grad_(False)
            frozen.append(modules[name])
        elif name in parameters:
            parameters[name].requires_grad_(False)
        else:
            parts = ", ".join(
                f"{part} ({sum(weights.numel() for weights in module.parameters()) / 1e6:.1f} million weights)"
                for part, module in backbone.named_children()
            )
            raise InputError(f'the backbone has no part {name!r} to freeze; it has {parts}, and theirs; "*" is all')
    return frozen
