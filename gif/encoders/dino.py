"""DINO image encoders, and any other image model of timm."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from gif.encoders.base import NetworkEncoder, Precision, Preprocessing, loading
from gif.errors import InputError, MissingFileError
from gif.packages import needs
from gif.weights import check_pytorch

DEFAULT_MODEL = "vit_base_patch16_224.dino"


class DINOEncoder(NetworkEncoder):
    """A self-supervised network of timm without classifier; features are its pooled output, not normalised.

    Args:
        model: a model of timm with its tag, "architecture.tag".
        weights: the path of a weight file (.safetensors, .pth); None fetches the tag's weights from the hub.
        device: where the network runs.
        precision: "fp32", or "bf16" for autocast.

    Raises ValueError for an unknown model or a file that does not fit it, FileNotFoundError if there is no such
    file, and RuntimeError if the hub cannot be reached.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        weights: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        with needs("timm", "the encoder dino"):
            import timm  # here, since it takes seconds that most commands need not wait

        if not timm.is_model(model):
            raise InputError(f"no timm model {model}; timm.list_models(pretrained=True) names them")
        file = None if weights is None else Path(weights)
        if file is not None and not file.is_file():
            raise MissingFileError(
                f"no weight file {file}; give the path of the weights of {model}, or none to fetch them from the hub"
            )
        with loading(f"timm {model}", file):
            overlay = None if file is None else {"state_dict": _without_classifier(model, file), "num_classes": 0}
            network = timm.create_model(model, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
        network = network.eval().to(device)
        super().__init__(
            f"dino {model} {file.name if file else 'hub'}",
            network,
            _preprocessing(timm.data.resolve_model_data_config(network)),
            device,
            precision,
        )


def _without_classifier(model: str, file: Path) -> dict[str, torch.Tensor]:
    """The weights in ``file`` but for a classifier's, so that timm can ask for an exact fit of the rest."""
    import timm

    config = timm.get_pretrained_cfg(model)
    classifier = config.classifier if config else None
    check_pytorch(file)
    weights = timm.models.load_state_dict(str(file), weights_only=True)
    return {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] != classifier}


def _preprocessing(config: dict) -> Preprocessing:
    if config["crop_mode"] not in ("center", "squash"):
        raise InputError(f"crop mode {config['crop_mode']!r} is not supported; give a model without padding")
    height, width = config["input_size"][1:]
    return Preprocessing(
        resize=(math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])),
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        squash=config["crop_mode"] == "squash",
    )
