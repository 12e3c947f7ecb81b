"""`gif train`: a backbone and its head from a data set, one folder of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gif.backbones import BackboneConfig, fingerprint, save_backbone
from gif.codes import IdentityCodes
from gif.data import HELD_OUT, EncodedImages, ImageDecoder, left_out, load_data
from gif.data.decoding import MAX_PIXELS
from gif.data.identities import Identities, require_same_names
from gif.data.images import SPLIT_BY, IdentityDataset, normalize_pixels
from gif.distributed import process_group, rank, wait_for_all
from gif.errors import InputError
from gif.files import save_tensors, write_text
from gif.head import HEAD_FORMAT, Placement, as_head
from gif.losses import GIFLoss, HeadConfig
from gif.ownership import hold
from gif.progress import say, say_once
from gif.resume import WHO, claim_folder
from gif.training.augmentation import AUGMENTATIONS, AugmentationName
from gif.training.checkpoint import Checkpoints
from gif.training.config import TrainingConfig
from gif.training.curves import plot_losses, plot_validations
from gif.training.loggers import LoggerName, loggers_of
from gif.training.loop import check_training, train
from gif.training.statistics import recompute_statistics
from gif.training.validation import ValidationConfig
from gif.training.warm_start import backbone_of, begin_from, begin_head_from
from gif.vectors.store import CodeVectors

MOST_KEPT = 1 << 30  # bytes of decoded images that the training process keeps, where it reads them itself
STATISTICS_IMAGES = 8_192  # that batch normalisation's statistics are taken anew of
LENGTH = ("training.epochs", "training.steps", "training.patience")
"""Settings of a run that another may have that goes on with it for longer."""


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
    init: str | None = None,
    loggers: list[LoggerName] | LoggerName = [],  # noqa: B006 (read alone)
    resume: Literal["auto", "never", "longer"] = "auto",
) -> None:
    """Train a backbone, with identity codes or with a softmax; under torchrun, in several processes.

    A run that was interrupted continues at its last checkpoint when the same command is given again, on as many
    processes as there are then. A config from the repository's configs folder holds a recipe; any option after it wins.

    Args:
        output: folder for the backbone, the head, the identities that were trained on, the tables that the head moved,
            the losses and their plot, all measures (measures.jsonl), the checkpoints and the loggers' files; of a run
            that is validated, the best backbone and the scores too.
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
            left them, or "recomputed" with its weights, of up to 8,192 training images: where there were few steps.
        init: what the backbone begins with: a model of `gif train`, insightface's model.pt, for a backbone "vit" a file
            of timm's, or "timm" for those of its hub. The folder of a finished run gives its head too.
        loggers: where measures go beside that file: csv (as a table, measures.csv), tensorboard, wandb; one or several.
        resume: "auto" continues the run that output holds, if it does; "never" refuses it; "longer" continues a run
            that had fewer epochs or steps, finished or not, to as many as are given now.
    """
    if resume == "never" and output.exists():
        raise InputError(f"{output} exists; give another --output, or --resume auto to continue the run in it")
    checkpoints = Checkpoints(output / "checkpoints")
    kept = checkpoints.newest
    if resume == "longer" and kept() is None:
        raise InputError(f"{output} holds no run that could go on; train with --resume auto")
    with process_group(training.device) as own, hold(output, kept):
        if init is not None:
            backbone = backbone_of(init, backbone)
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
        network = backbone.build() if init is None else begin_from(init, backbone)
        table = None if vectors is None else CodeVectors.load(vectors, mmap=True)
        loss_fn = head.build(
            images.num_identities, backbone.embedding_size, code_table, table, identities=who, backbone=network
        )
        if init is not None:
            begin_head_from(init, loss_fn)
        settings = {
            "command": "train",
            "data": {"name": data, **images.summary()},
            "held_out": held_out,
            "held_out_by": SPLIT_BY,
            "codes": code_table and code_table.fingerprint,
            "vectors": table and table.fingerprint(),
            "head": asdict(head),
            **({"recipe": asdict(loss_fn.recipe)} if isinstance(loss_fn, GIFLoss) else {}),
            "backbone": asdict(backbone),
            "training": training.settings(),
            "augmentation": augmentation,
            **({} if init is None else {"init": fingerprint(network)}),
            # which records of earlier versions do not name
            **({} if statistics == "running" else {"statistics": statistics}),
        }
        if resume == "longer" and training.steps_of(len(images)) < (before_now := checkpoints.steps()):
            raise InputError(f"the run in {output} is of {before_now:,} steps; give as many or more to go on with it")
        told = loggers_of(output, loggers, settings)
        check_training(loss_fn, images, training, loggers=told)
        if rank() == 0:
            claim_folder(output, settings, may_differ=LENGTH if resume == "longer" else (), longer=LENGTH)
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
            checkpoints=checkpoints.folder,
            loggers=told,
            longer=True,  # of other runs the record says that they are others
        )
        network = log.average or network
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
            best = checkpoints.load_best(network)
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
