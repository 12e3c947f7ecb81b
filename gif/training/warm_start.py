"""Training that begins where another ended: from a model, or from a finished run with its head."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gif.backbones import BackboneConfig, load_backbone, model_file
from gif.encoders.base import loading
from gif.errors import InputError, MissingFileError
from gif.files import load_tensors
from gif.head import HEAD_FORMAT
from gif.packages import needs
from gif.progress import say_once
from gif.weights import check_pytorch

TIMM = "timm"
"""What stands for timm's own weights of the network, from its hub."""
BACKBONE, HEAD = "backbone.safetensors", "head.safetensors"
_OF_THIS_RUN = ("_extra_state", "draws")  # of a head: whose codes it is for, and how often it has drawn


def backbone_of(init: str, config: BackboneConfig) -> BackboneConfig:
    """What is to be trained: ``config``, or where that is the default, the backbone that `begin_from`'s ``init`` is.

    Raises what `begin_from` does.
    """
    if _is_timm(init, config):
        return config
    if init == TIMM:
        raise InputError("timm has weights for --backbone.name vit; name one with --backbone.model")
    _, known = load_backbone(_backbone_file(init))
    if config == BackboneConfig() and known != config:
        say_once(f"the backbone is that of {init}: {_options(known)}")
        return known
    if (config.name, config.model, config.width) != (known.name, known.model, known.width):
        raise InputError(f"{init} is another backbone than the one to be trained; give {_options(known)}")
    return config


def begin_from(init: str, config: BackboneConfig) -> nn.Module:
    """A backbone that begins with the weights of another.

    Args:
        init: a file that `gif.backbones.load_backbone` takes: of `gif train`, or insightface's; the folder of a run;
            for a backbone "vit" a file of timm's, or "timm" for those of its hub.
        config: what is to be trained (`backbone_of`).

    Weights that have another shape begin afresh, and are named: those that the embedding's width, the channels or the
    size of the images decide. Raises FileNotFoundError, ValueError where the file is damaged, or is of another network.
    """
    network = config.build()
    if _is_timm(init, config):
        _fill(network, _timm_weights(init, config, network), f"timm's {config.model}")
    else:
        given, _ = load_backbone(_backbone_file(init))
        _fill(network, dict(given.state_dict()), init)
    return network


def begin_head_from(init: str, head: nn.Module) -> None:
    """Give a head what that of a run has learnt, where ``init`` is the folder of one; else nothing.

    Weights of another shape begin afresh, such as a softmax's of other identities. Tokens and projections of `GIFLoss`
    know no identities, and fit codes that were extended.
    """
    path = Path(init) / HEAD
    if not Path(init).is_dir() or not path.exists():
        return
    tensors, _ = load_tensors(path, format=HEAD_FORMAT)
    own = head.state_dict()
    taken = [name for name, value in tensors.items() if name in own and _fits(name, value, own[name])]
    if not taken:
        say_once(f"the head of {init} is another one; this one begins afresh")
        return
    head.load_state_dict({**own, **{name: tensors[name] for name in taken}})
    fresh = [name for name in own if name not in taken and name not in _OF_THIS_RUN]
    say_once(f"the head begins with that of {init}" + (f", but for {', '.join(fresh)}" if fresh else ""))


def _fits(name: str, value: Tensor, own: object) -> bool:
    return name not in _OF_THIS_RUN and isinstance(own, Tensor) and own.shape == value.shape


def _backbone_file(init: str) -> Path:
    path = Path(init)
    if (path / BACKBONE).exists():
        return path / BACKBONE  # and not the best one: it goes on from the last
    return model_file(path)


def _fill(network: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Copy all weights that fit. Raises ValueError where names differ, or hardly any weight fits."""
    own = network.state_dict()
    if missing := sorted(own.keys() ^ weights.keys()):
        raise InputError(
            f"{what} is of another network: {len(missing)} weights are in one of them alone, such as {missing[0]}; "
            "give the backbone that it is of"
        )
    fresh = [name for name, value in own.items() if value.shape != weights[name].shape]
    if 2 * sum(own[name].numel() for name in fresh) > sum(value.numel() for value in own.values()) and len(fresh) > 2:
        raise InputError(f"{what} is of a network of other sizes: {', '.join(fresh[:3])}, ... do not fit")
    network.load_state_dict({**weights, **{name: own[name] for name in fresh}})
    if fresh:
        say_once(f"weights that begin afresh, for their shapes are others than in {what}: {', '.join(fresh)}")


def _is_timm(init: str, config: BackboneConfig) -> bool:
    """Whether the weights are timm's: no file of `gif train`'s, or insightface's, for a network of timm's."""
    if config.name != "vit" or Path(init).is_dir():
        return False
    if init == TIMM:
        return True
    try:
        load_backbone(init)
    except MissingFileError:
        raise
    except InputError:
        return True
    return False


@torch.no_grad()
def _timm_weights(init: str, config: BackboneConfig, network: nn.Module) -> dict[str, Tensor]:
    """timm's weights of a network, brought to its image size and channels; of the last layer its own."""
    with needs("timm", "vision transformers"):
        import timm
    file = None if init == TIMM else Path(init)
    if file is not None:
        check_pytorch(file)
    options: dict[str, Any] = {"num_classes": 0, "in_chans": config.channels, "img_size": config.image_size}
    with loading(f"timm's {config.model}", file):
        if file is None:
            found = timm.create_model(config.model, pretrained=True, **options)
        else:
            # a state of PyTorch's, even where timm's own file is in the format of the network's authors
            overlay = {"file": str(file), "custom_load": False}
            found = timm.create_model(config.model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    own = network.state_dict()
    weights = dict(found.state_dict())
    if unknown := sorted(weights.keys() - own.keys()):
        raise InputError(f"{init} has weights that {config.model} has not, such as {unknown[0]}; name its network")
    last = [name for name in own if name not in weights]
    say_once(f"the last layer begins afresh: {', '.join(last)}")
    return {**own, **weights}


def _options(config: BackboneConfig) -> str:
    """A configuration as the command line gives it."""
    defaults = BackboneConfig()
    given = asdict(config)
    told = [entry.name for entry in fields(config) if given[entry.name] != getattr(defaults, entry.name)]
    return " ".join(f"--backbone.{name} {given[name]}" for name in told) or "the default backbone"
