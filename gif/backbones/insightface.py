"""Which of insightface's networks a state dict is of: told from the names and shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gif.backbones.config import BackboneConfig
from gif.backbones.insightface_mobile import VARIANTS
from gif.backbones.insightface_vit import PATCH, TRANSFORMERS
from gif.backbones.iresnet import BLOCKS, WIDTHS
from gif.backbones.shapes import STRIDE
from gif.errors import InputError

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DataParallel and DistributedDataParallel, torch.compile, FSDP and checkpointing put into parameters' names."""
_USUAL_SIZE = 112

State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Networks of one kind.

    Args:
        first, last: names of two tensors that each of them has.
        config: which one a state dict is of. Raises ValueError, or IndexError and KeyError, where it is none of them.
    """

    first: str
    last: str
    config: Callable[[State], BackboneConfig]


def plain_names(state: Mapping[str, Tensor]) -> State:
    """A state dict whose names have no wrapper in them, at the beginning or within."""
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): x for name, x in state.items()}


def find_network(path: Path, stored: object) -> tuple[State, BackboneConfig]:
    """The state dict of a network of insightface's in what a file holds, and which network it is.

    That is what is stored itself, or the first of its values that has one; its names may have a prefix.

    Raises ValueError where there is none, or it is of a network that is not known.
    """
    for family in FAMILIES:
        state = _state_in(stored, family)
        if state is not None:
            try:
                return state, family.config(state)
            except (IndexError, KeyError, ValueError) as error:
                raise InputError(f"{path} does not fit a network of insightface's ({error}); give another") from error
    raise InputError(
        f"{path} is no state dict of an IResNet, MobileFaceNet or vision transformer of insightface's, and holds none; "
        "give one that its arcface_torch wrote"
    )


def _state_in(stored: object, family: Family) -> State | None:
    if not isinstance(stored, Mapping):
        return None
    tensors = plain_names({name: x for name, x in stored.items() if isinstance(name, str) and isinstance(x, Tensor)})
    outer = [name.removesuffix(family.last) for name in tensors if f".{name}".endswith(f".{family.last}")]
    for prefix in sorted(outer, key=len):  # of an attribute that the network was, as "backbone." or "model."
        if f"{prefix}{family.first}" in tensors:
            return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    found = (_state_in(value, family) for value in stored.values())
    return next((state for state in found if state is not None), None)


def _iresnet(state: State) -> BackboneConfig:
    blocks = tuple(_count(state, f"layer{stage}") for stage in (1, 2, 3, 4))
    name = next((name for name, known in BLOCKS.items() if known == blocks), None)
    if name is None:
        raise ValueError(f"{blocks} blocks a stage, and the known networks have {BLOCKS}")
    last, first = state["fc.weight"].shape, state["conv1.weight"].shape
    if len(last) != 2 or len(first) != 4:
        raise ValueError(f"fc.weight is {tuple(last)}, conv1.weight {tuple(first)}")
    return BackboneConfig(name, last[0], first[1], STRIDE * math.isqrt(last[1] // WIDTHS[-1]))


def _mobile(state: State) -> BackboneConfig:
    counts = [_count(state, f"layers.{place}.layers") for place in (3, 5, 7)]
    name = next((name for name, (blocks, _) in VARIANTS.items() if [*blocks[1:]] == counts), None)
    if name is None:
        raise ValueError(f"{counts} blocks a stage, and the known networks are {VARIANTS}")
    size = STRIDE * state["features.layers.0.layers.0.weight"].shape[2]
    return BackboneConfig(name, len(state["features.layers.2.weight"]), _channels(state, "layers.0.layers.0"), size)


def _transformer(state: State) -> BackboneConfig:
    _, patches, width = state["pos_embed"].shape
    shape = (width, _count(state, "blocks"))
    name = next((name for name, kind in TRANSFORMERS.items() if (kind.width, kind.depth) == shape), None)
    if name is None:
        raise ValueError(f"width and depth are {shape}, and the known networks are {TRANSFORMERS}")
    side = math.isqrt(patches)
    size = _USUAL_SIZE if side == _USUAL_SIZE // PATCH else side * PATCH
    return BackboneConfig(name, len(state["feature.2.weight"]), _channels(state, "patch_embed.proj"), size)


def _count(state: State, prefix: str) -> int:
    """How many numbered modules there are below a name."""
    depth = prefix.count(".") + 1
    return len({name.split(".")[depth] for name in state if name.startswith(f"{prefix}.")})


def _channels(state: State, layer: str) -> int:
    return int(state[f"{layer}.weight"].shape[1])


FAMILIES = (
    Family("conv1.weight", "fc.weight", _iresnet),
    Family("layers.0.layers.0.weight", "features.layers.2.weight", _mobile),
    Family("patch_embed.proj.weight", "feature.2.weight", _transformer),
)
