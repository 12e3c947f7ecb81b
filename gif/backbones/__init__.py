"""Backbones: images to embeddings. A saved backbone names itself, so that it can be loaded by its path alone."""

from gif.backbones.config import BackboneConfig, BackboneName
from gif.backbones.files import (
    TrainedOn,
    fingerprint,
    image_fit,
    load_backbone,
    load_insightface,
    load_trained_on,
    model_file,
    save_backbone,
)
from gif.backbones.iresnet import IResNet
from gif.backbones.mobilefacenet import MobileFaceNet
from gif.backbones.small import SmallConvNet

__all__ = [
    "BackboneConfig",
    "BackboneName",
    "IResNet",
    "MobileFaceNet",
    "SmallConvNet",
    "TrainedOn",
    "fingerprint",
    "image_fit",
    "load_backbone",
    "load_insightface",
    "load_trained_on",
    "model_file",
    "save_backbone",
]
