"""How to train: every number of a run in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from gif.errors import InputError

POLYNOMIAL_POWER = 2  # of insightface's schedule
_MACHINE = ("device", "micro_batch_size", "channels_last", "compile", "workers", "save_steps", "save_minutes", "keep")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: an optimizer, warm-up, then a schedule down to zero.

    Args:
        epochs: passes over the data set.
        steps: of the optimizer, in place of whole epochs; None: as many as the epochs have.
        batch_size: images a step, of all processes together; the last, smaller batch of an epoch is dropped.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of the optimizer, on backbone and head alike.
        warmup: share of the steps in which the rate rises linearly from 0.
        clip: largest gradient norm of the backbone; .inf does not clip.
        seed: of initial values, order of images and augmentation.
        device: where to train, "cpu", "cuda", or "auto": a GPU if there is one.
        optimizer: "sgd" with momentum, or "adamw".
        schedule: from the peak to zero, "cosine" or "polynomial" (of power 2).
        precision: "fp32", or autocast to "bf16" or "fp16": of the backbone, and of the operands of the products in
            `GIFLoss`, `MarginSoftmax` and `PartialFC`, whose norms, margins, logits and sums stay float32. Another head
            is float32.
        micro_batch_size: images that a process holds at once; where its share of a batch is larger, gradients
            accumulate to the mean over the batch.
        channels_last: memory format of backbone and images; faster for convolutions on a GPU.
        compile: torch.compile the backbone.
        workers: processes that read images, for each process that trains.
        save_steps: steps between two checkpoints, beside those in time.
        save_minutes: minutes between two checkpoints; longer where more than a tenth of the time would go into them.
        keep: newest checkpoints to keep, beside the best one where the run is validated.
        freeze: parts of the backbone that stay as they are, by the names of its modules or parameters, such as
            [conv1, bn1, layer1]; "*" is all of it.
        ema: decay of an average of the weights, such as 0.999, which is judged, kept as the best, and written as the
            backbone; None: the weights themselves are.
        patience: validations in a row without a better one after which training ends; None: it takes all steps.

    Raises ValueError for a number out of its range.
    """

    epochs: int = 5
    steps: int | None = None
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    clip: float = 5.0
    seed: int = 0
    device: str = "auto"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["cosine", "polynomial"] = "cosine"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch_size: int | None = None
    channels_last: bool = False
    compile: bool = False
    workers: int = 0
    save_steps: int | None = None
    save_minutes: float = 10.0
    keep: int = 1
    freeze: list[str] = field(default_factory=list)
    ema: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        least = {"epochs": 1, "steps": 1, "batch_size": 2, "workers": 0, "save_steps": 1, "keep": 1}
        least["patience"] = 1
        least["micro_batch_size"] = 3  # of 2, some would be single images, which batch normalisation cannot train on
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise InputError(f"wanted {name} >= {value}, got {name}={given}")
        for name in ("lr", "clip", "save_minutes"):
            if not getattr(self, name) > 0:
                raise InputError(f"wanted {name} > 0, got {name}={getattr(self, name)}")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"wanted {name} in [0, 1), got {name}={getattr(self, name)}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"wanted ema in (0, 1), such as 0.999, got ema={self.ema}")
        if self.weight_decay < 0:
            raise InputError(f"wanted weight_decay >= 0, got weight_decay={self.weight_decay}")
        for name, names in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("cosine", "polynomial")),
            ("precision", ("fp32", *AUTOCAST)),
        ):
            if getattr(self, name) not in names:
                raise InputError(f"wanted {name} of {', '.join(names)}, got {name}={getattr(self, name)!r}")

    def settings(self) -> dict[str, Any]:
        """The fields that decide the result: all but what says on which machine, and how, it is computed."""
        decides = {name: value for name, value in asdict(self).items() if name not in _MACHINE}
        if self.steps is None:
            del decides["steps"]  # as records of earlier versions have it
        else:
            del decides["epochs"]
        defaults: dict[str, Any] = {
            "freeze": [],
            "ema": None,
            "patience": None,
        }  # which records of earlier versions do not have
        return {name: value for name, value in decides.items() if name not in defaults or value != defaults[name]}

    def steps_of(self, images: int) -> int:
        """Steps of the whole run on so many images."""
        return self.steps or self.epochs * (images // self.batch_size)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer that this configuration names, of some parameters."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def rate(self, progress: float) -> float:
        """The learning rate when ``progress`` in [0, 1] of the steps are done."""
        if progress < self.warmup:
            return self.lr * (progress / self.warmup)
        left = (progress - self.warmup) / (1 - self.warmup)
        if self.schedule == "polynomial":
            return self.lr * (1 - left) ** POLYNOMIAL_POWER
        return self.lr * ((1 + math.cos(math.pi * left)) / 2)
