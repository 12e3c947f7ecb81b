"""Vision transformers, as timm has them."""

from __future__ import annotations

from torch import nn

from gif.errors import InputError
from gif.packages import needs


def vision_transformer(model: str, embedding_size: int, channels: int, image_size: int) -> nn.Module:
    """timm's ``model`` with fresh weights, whose last layer gives the embedding.

    Input (B, channels, image_size, image_size) float, output (B, embedding_size), not normalised.

    Raises ValueError if timm has no such model, or it cannot be built for this image size.
    """
    with needs("timm", "vision transformers"):
        import timm  # here, since it takes seconds that most commands need not wait

    if not timm.is_model(model):
        near = ", ".join(timm.list_models(f"{model.split('_patch')[0]}*")[:5]) or "timm.list_models('vit*')"
        raise InputError(f"timm has no model {model!r}; there are {near}")
    try:
        network: nn.Module = timm.create_model(
            model, pretrained=False, num_classes=embedding_size, img_size=image_size, in_chans=channels
        )
    except TypeError as error:
        raise InputError(f"{model} cannot be built for an image size ({error}); name a vision transformer") from error
    return network
