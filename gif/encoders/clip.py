"""CLIP image encoders, through open_clip."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from gif.encoders.base import NetworkEncoder, Precision, Preprocessing, loading
from gif.errors import InputError, MissingFileError
from gif.packages import needs
from gif.weights import check_pytorch

DEFAULT_MODEL = "ViT-B-32"
DEFAULT_WEIGHTS = "openai"


class CLIPEncoder(NetworkEncoder):
    """The image tower of a CLIP model; features are its projected embedding, not normalised.

    Args:
        model: an architecture of `open_clip.list_models()`.
        pretrained: a tag of that architecture, fetched from its hub, or the path of a weight file (.safetensors,
            .pt). A file does not say which activation or preprocessing it was trained with: those of ``model`` are
            used, so OpenAI's own weights want a "-quickgelu" model when they come from a file.
        device: where the network runs.
        precision: "fp32", or "bf16" for autocast.

    Raises ValueError for an unknown model or a file that does not fit it, FileNotFoundError if ``pretrained`` is
    neither a tag nor a file, and RuntimeError if the hub cannot be reached.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        pretrained: str | Path = DEFAULT_WEIGHTS,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        with needs("open_clip_torch", "the encoder clip"):
            import open_clip  # here, since it takes seconds that most commands need not wait

        if model not in open_clip.list_models():
            raise InputError(f"no CLIP model {model}; open_clip.list_models() names them")
        tag = open_clip.get_pretrained_cfg(model, str(pretrained))
        file = None if tag else Path(pretrained)
        if file is not None and not file.is_file():
            raise MissingFileError(
                f"no weight file {file}, and {model} has no tag of that name; give the path of its weights, or one of "
                f"the tags {', '.join(open_clip.list_pretrained_tags_by_model(model)) or '(it has none)'}"
            )
        with loading(f"CLIP {model}", file):
            if file is not None:
                check_pytorch(file)
            clip = open_clip.create_model_from_pretrained(
                model,
                str(pretrained),
                # open_clip only warns where a tag was trained with another activation than the architecture's
                force_quick_gelu=tag.get("quick_gelu", False),
                return_transform=False,
                weights_only=True,
            )
        clip = clip.eval().to(device)
        super().__init__(
            f"clip {model} {file.name if file else pretrained}",
            partial(clip.encode_image, normalize=False),
            _preprocessing(open_clip.get_model_preprocess_cfg(clip)),
            device,
            precision,
        )


def _preprocessing(config: dict) -> Preprocessing:
    if config["resize_mode"] not in ("shortest", "squash"):
        raise InputError(f"resize mode {config['resize_mode']!r} is not supported; give a model without padding")
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing(
        resize=(height, width),
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        squash=config["resize_mode"] == "squash",
    )
