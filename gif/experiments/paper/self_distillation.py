"""An encoder trained without labels, by self-distillation: offline it stands for a pretrained one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gif.backbones import BackboneConfig, load_backbone, save_backbone
from gif.data import IdentityDataset
from gif.data.images import normalize_pixels
from gif.errors import InputError
from gif.head import Head
from gif.losses.peers.momentum_encoder import MomentumEncoder
from gif.training import TrainingConfig, train
from gif.training.augmentation import RandomAffine

PROTOTYPES, HIDDEN = 512, 256
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
TEACHER_MOMENTUM = 0.99  # of runs of hundreds of steps; DINO's own begins at 0.996
CENTER_MOMENTUM = 0.9
VIEWS = RandomAffine(degrees=20.0, scale=1.3, shift=0.12)  # of which the student sees one and the teacher another
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.04}


class SelfDistillation(nn.Module, Head):
    """Cross entropy of a student's prototypes against those of a teacher that follows it (Caron et al., ICCV 2021).

    As in DINO the teacher is a momentum copy of backbone and projection, its outputs are centred by a running mean and
    sharpened, and it sees another view of the same images. Unlike DINO there is one view of one size for each of the
    two. No label is read.

    Args:
        backbone: what is trained, as it is now.
        embedding_size: of its embeddings.
        prototypes: numbers that are compared.
    """

    def __init__(self, backbone: nn.Module, embedding_size: int, prototypes: int = PROTOTYPES) -> None:
        super().__init__()
        self.projection = _Projection(embedding_size, prototypes)
        self.teacher = MomentumEncoder(nn.Sequential(backbone, self.projection), TEACHER_MOMENTUM)
        self.register_buffer("center", torch.zeros(prototypes))
        self.center: Tensor
        self._targets = torch.empty(0, prototypes)

    def before_step(self, backbone: nn.Module, views: Callable[[], Tensor], labels: Tensor) -> None:
        """Let the teacher follow, and take its targets for a view of the batch."""
        self.teacher.follow(nn.Sequential(backbone, self.projection))
        outputs = self.teacher.network(views()).float()
        self._targets = ((outputs - self.center) / TEACHER_TEMPERATURE).softmax(1)
        self.center.lerp_(outputs.mean(0), 1 - CENTER_MOMENTUM)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of the next embeddings (B, d) of the batch that `before_step` has seen; ``labels`` are not read."""
        count = len(embeddings)
        if len(self._targets) < count:
            raise InputError("before each step call head.before_step(backbone, views, labels)")
        targets, self._targets = self._targets[:count], self._targets[count:]
        outputs = self.projection(embeddings.float()) / STUDENT_TEMPERATURE
        return -(targets * outputs.log_softmax(1)).sum(1).mean()


class _Projection(nn.Module):
    """Two layers, then cosines to the prototypes."""

    def __init__(self, inputs: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, inputs))
        self.prototypes = nn.Parameter(torch.randn(prototypes, inputs))

    def forward(self, embeddings: Tensor) -> Tensor:
        return normalize(self.layers(embeddings), dim=1) @ normalize(self.prototypes, dim=1).T


class DistilledEncoder:
    """A frozen backbone as an `Encoder`: features are its embeddings.

    Args:
        backbone: as `save_backbone` kept it.
        config: of the backbone.
        name: in logs and checkpoints.
    """

    fit = None

    def __init__(self, backbone: nn.Module, config: BackboneConfig, name: str = "distilled") -> None:
        self.name = name
        self.embedding_size = config.embedding_size
        self._backbone = backbone.eval()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (n, d) float32 of ``images`` (n, c, h, w) uint8, as the backbone takes them."""
        features: Tensor = self._backbone(normalize_pixels(images))
        return features.float()


def distilled_encoder(
    images: IdentityDataset, config: BackboneConfig, folder: Path, training: TrainingConfig
) -> DistilledEncoder:
    """An encoder trained on ``images`` without their labels, kept in ``folder`` / encoder.safetensors; continues there.

    ``training`` says for how long, with which seed and where; the optimizer is AdamW, as DINO's.

    Raises ValueError where there are fewer images than a batch has.
    """
    kept = folder / "encoder.safetensors"
    if not kept.exists():
        torch.manual_seed(training.seed)
        backbone = config.build()
        head = SelfDistillation(backbone, config.embedding_size)
        train(
            backbone,
            head,
            images,
            replace(training, **ADAMW),
            augment=VIEWS,
            checkpoints=folder / "checkpoints",
            description="training an encoder without labels",
        )
        save_backbone(kept, backbone, config, trained_on=images.identities)
    backbone, known = load_backbone(kept)
    if known != config:
        raise InputError(f"{kept} holds the backbone {asdict(known)}, wanted {asdict(config)}; give another --output")
    return DistilledEncoder(backbone, config)
