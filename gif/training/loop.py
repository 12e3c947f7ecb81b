"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gif.data.augment import RandomAffine, normalize_pixels
from gif.data.images import IdentityImages
from gif.losses import GIFLoss
from gif.progress import progress
from gif.training.checkpoint import Checkpoints

REPORT_EVERY = 10  # steps between looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: SGD with momentum, warm-up, then a cosine down to zero.

    Args:
        epochs: passes over the data set.
        batch_size: images a step; the last, smaller batch of an epoch is dropped.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of SGD, on backbone and head alike.
        warmup: share of the steps in which the rate rises linearly from 0.
        clip: largest gradient norm of the backbone.
        seed: of initial values, order of images and augmentation.
        device: where to train, "cpu" or "cuda".
    """

    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    clip: float = 5.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.lr <= 0 or not 0 <= self.warmup < 1:
            raise ValueError(f"wanted epochs >= 1, batch_size >= 2, lr > 0 and warmup in [0, 1), got {self}")


@dataclass(frozen=True)
class TrainingLog:
    """The loss of every step, (steps,) float32, and images a second, NaN where a run had nothing left to do."""

    losses: Tensor
    images_per_second: float


def train(
    backbone: nn.Module,
    head: nn.Module,
    dataset: IdentityImages,
    config: TrainingConfig,
    *,
    augment: Callable[[Tensor], Tensor] = RandomAffine(),  # noqa: B008 (frozen)
    checkpoints: str | Path | None = None,
    description: str = "training",
) -> TrainingLog:
    """Train ``backbone`` and ``head``, where head(backbone(images), labels) is the loss, in place.

    Code vectors that a `GIFLoss` moves are trained in place too.

    With ``checkpoints``, a folder, the state is kept after each epoch, and a run that was killed continues there: the
    same arguments give the same result as a run that was not.

    Raises ValueError for a data set smaller than a batch, FloatingPointError when the loss is no longer finite.
    """
    if len(dataset) < config.batch_size:
        raise ValueError(f"the data set has {len(dataset)} images, fewer than a batch of {config.batch_size}")
    model = nn.ModuleDict({"backbone": backbone, "head": head}).to(config.device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    steps_an_epoch = len(dataset) // config.batch_size
    total = config.epochs * steps_an_epoch
    keeper = None if checkpoints is None else Checkpoints(Path(checkpoints))
    losses = torch.full((total,), math.nan, device=config.device)
    tables = {"losses": losses, **(head.tables() if isinstance(head, GIFLoss) else {})}
    done = keeper.load(model, optimizer, tables) if keeper else 0
    step = done * steps_an_epoch
    start = time.monotonic()

    note = ""
    with progress(description, total * config.batch_size, "images") as advance:
        advance(step * config.batch_size)
        for epoch in range(done, config.epochs):
            torch.manual_seed(config.seed * 1_000_003 + epoch)  # an epoch's randomness is its own: a run can resume
            loader = DataLoader(
                dataset, config.batch_size, shuffle=True, drop_last=True, collate_fn=IdentityImages.collate
            )
            for images, labels in loader:
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * _rate(step / total, config.warmup)
                images = augment(normalize_pixels(images.to(config.device)))
                loss = head(backbone(images), labels.to(config.device))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(backbone.parameters(), config.clip)
                optimizer.step()
                losses[step] = loss.detach()
                step += 1
                if step % REPORT_EVERY == 0:
                    _check_finite(losses[:step])
                    note = f"loss {float(losses[step - REPORT_EVERY : step].mean()):.3f}"
                advance(len(images), note)
            _check_finite(losses[:step])
            if keeper:
                keeper.save(model, optimizer, tables, epoch + 1)
    trained = (config.epochs - done) * steps_an_epoch * config.batch_size
    return TrainingLog(losses.cpu(), trained / (time.monotonic() - start) if trained else math.nan)


def _rate(progress: float, warmup: float) -> float:
    """Factor of the peak rate when ``progress`` in [0, 1] of the steps are done."""
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def _check_finite(losses: Tensor) -> None:
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(
            f"the loss is {float(losses[-1])} after {len(losses)} steps; lower lr, lengthen warmup or lower the scale"
        )


@torch.inference_mode()
def embed(backbone: nn.Module, data: IdentityImages, *, batch_size: int = 512, device: str = "cpu") -> Tensor:
    """Embeddings (n, d) float32 of a data set's images, on the CPU, not normalised; the backbone in eval mode."""
    backbone = backbone.to(device)
    was_training = backbone.training
    backbone.eval()
    batches = []
    with progress("embedding", len(data), "images") as advance:
        for batch in data.image_batches(batch_size):
            batches.append(backbone(normalize_pixels(batch.to(device))).float().cpu())
            advance(len(batch))
    backbone.train(was_training)
    return torch.cat(batches)
