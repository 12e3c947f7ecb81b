"""`gif train`: a backbone and its head from a data set, one folder of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gif.backbones import BackboneConfig, save_backbone
from gif.codes import IdentityCodes
from gif.data import HELD_OUT, EncodedImages, ImageDecoder, left_out, load_data
from gif.data.decoding import MAX_PIXELS
from gif.data.identities import Identities, require_same_names
from gif.data.images import SPLIT_BY, IdentityDataset, normalize_pixels
from gif.distributed import process_group, rank, wait_for_all
from gif.errors import InputError
from gif.files import save_tensors, write_text
from gif.head import HEAD_FORMAT, Placement, as_head
from gif.losses import HeadConfig
from gif.ownership import hold
from gif.progress import say, say_once
from gif.resume import WHO, claim_folder
from gif.training.augmentation import AUGMENTATIONS, AugmentationName
from gif.training.checkpoint import Checkpoints
from gif.training.config import TrainingConfig
from gif.training.curves import plot_losses, plot_validations
from gif.training.loop import check_training, train
from gif.training.statistics import recompute_statistics
from gif.training.validation import ValidationConfig
from gif.vectors.store import CodeVectors

MOST_KEPT = 1 << 30  # bytes of decoded images that the training process keeps, where it reads them itself
STATISTICS_IMAGES = 20_000  # that batch normalisation's statistics are taken anew of


def train_command(
    output: Path,
    *,
    data: str = "glyphs",
    identities: float | None = None,
    held_out: int | float = HELD_OUT,
    codes: Path | None = None,
    vectors: Path | None = None,
    head: HeadConfig = HeadConfig(),  # noqa: B008 (frozen)
    backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 (frozen)
    training: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    validation: ValidationConfig = ValidationConfig(),  # noqa: B008 (frozen)
    augmentation: AugmentationName = "affine",
    max_pixels: int = MAX_PIXELS,
    placement: Placement = "auto",
    statistics: Literal["running", "recomputed"] = "running",
    tensorboard: bool = False,
    resume: Literal["auto", "never"] = "auto",
) -> None:
    """Train a backbone, with identity codes or with a softmax; under torchrun, in several processes.

    A run that was interrupted continues at its last checkpoint when the same command is given again, on as many
    processes as there are then. A config from the repository's configs folder holds a recipe; any option after it wins.

    Args:
        output: folder for the backbone, the head, the identities that were trained on, the tables that the head moved,
            the losses and their plot, the checkpoints and TensorBoard's files; of a run that is validated, the
            best backbone and the scores too.
        data: the data set, a name or a path (docs/data.md); its training identities are used. Images on disk are read
            in the backbone's size and colours.
        identities: how many of the data set's there are, at random, such as 1e6; all where it is not given, a million
            of glyph-words. The same for every command.
        held_out: share of the identities that training never sees, or how many; 0 uses all. The same for every command.
        codes: identity codes, as `gif tokenize` writes them (head kind gif).
        vectors: the code vectors they were cut from (head kind gif with a regression weight).
        head: which loss.
        backbone: which network.
        training: optimizer and schedule.
        validation: what the backbone is judged by while it trains, and how often. The best one is kept.
        augmentation: "affine" for glyphs, "mirror" for aligned faces, "photo" for other photographs, or "none".
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
        placement: where the code vectors lie: in the memory of the "device", on the "host" or in a "file", whose rows
            are read and written while steps run; "auto" is the first of these that they fit. Several processes divide
            those that move.
        statistics: means and variances of batch normalisation in the backbone that is written: "running", as the steps
            left them, or "recomputed" with its weights, of up to 20,000 training images: where there were few steps.
        tensorboard: log to output/tensorboard.
        resume: "auto" continues the run that output holds, if it does; "never" refuses it.
    """
    if resume == "never" and output.exists():
        raise InputError(f"{output} exists; give another --output, or --resume auto to continue the run in it")
    kept = Checkpoints(output / "checkpoints").newest
    with process_group(training.device) as own, hold(output, kept):
        code_table = None if codes is None else IdentityCodes.load(codes, mmap=True)
        decoder = ImageDecoder(backbone.image_size, backbone.channels, max_pixels=max_pixels)
        split = load_data(data, identities=identities, held_out=held_out, decoder=decoder)
        images = split.train
        who = images.identities
        if isinstance(images, EncodedImages) and training.workers == 0:
            images.keep(MOST_KEPT)
        if (before := output / WHO).exists():
            require_same_names(f"the run in {output}", Identities.load(before), "the data set", who)
        validate = validation.open(split.held_out, decoder, workers=training.workers, device=own)
        torch.manual_seed(training.seed)
        network = backbone.build()
        table = None if vectors is None else CodeVectors.load(vectors, mmap=True)
        loss_fn = head.build(
            images.num_identities, backbone.embedding_size, code_table, table, identities=who, backbone=network
        )
        log_folder = output / "tensorboard" if tensorboard else None
        check_training(loss_fn, images, training, tensorboard=log_folder)
        if rank() == 0:
            settings = {
                "command": "train",
                "data": {"name": data, **images.summary()},
                "held_out": held_out,
                "held_out_by": SPLIT_BY,
                "codes": code_table and code_table.fingerprint,
                "vectors": table and table.fingerprint(),
                "head": asdict(head),
                "backbone": asdict(backbone),
                "training": training.settings(),
                "augmentation": augmentation,
            }
            if statistics != "running":  # which records of earlier versions do not name
                settings["statistics"] = statistics
            claim_folder(output, settings)
            who.save(output / WHO)
        wait_for_all()
        if place := as_head(loss_fn).place_tables(own, placement, output, goes_on=kept() is not None):
            say_once(place)
        log = train(
            network,
            loss_fn,
            images,
            training,
            augment=AUGMENTATIONS[augmentation],
            validate=validate,
            validate_every=validation.every,
            checkpoints=output / "checkpoints",
            tensorboard=log_folder,
        )
        if report := left_out(images):
            say(report)
        as_head(loss_fn).save_tables(output)
        if rank() > 0:
            return
        if statistics == "recomputed":
            recompute_statistics(network, _training_batches(images, training, augmentation, own))
        save_backbone(output / "backbone.safetensors", network, backbone, trained_on=who)
        save_tensors(output / "head.safetensors", loss_fn.state_dict(), format=HEAD_FORMAT, **who.metadata())
        save_tensors(output / "losses.safetensors", {"losses": log.losses}, format="gif.losses/1")
        plot_losses({head.kind: log.losses}, output / "losses.png")
        say(f"wrote the trained backbone to {output / 'backbone.safetensors'}")
        if log.validations:
            best = Checkpoints(output / "checkpoints").load_best(network)
            save_backbone(output / "best.safetensors", network, backbone, trained_on=who)
            write_text(output / "validations.json", json.dumps(log.validations, indent=2))
            plot_validations(log.validations, output / "validations.png")
            say(f"wrote the best one, after {best:,} steps, to {output / 'best.safetensors'}")


def _training_batches(
    images: IdentityDataset, training: TrainingConfig, augmentation: AugmentationName, device: torch.device
) -> Iterator[Tensor]:
    """Batches of training images, at random and augmented, as steps take them: the same for the same seed."""
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(len(images), generator=generator)[:STATISTICS_IMAGES]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(training.seed)
        for places in order.split(training.batch_size):
            batch = images.batch(places.tolist())[0]
            if len(batch) > 1:
                yield AUGMENTATIONS[augmentation](normalize_pixels(batch.to(device)))
