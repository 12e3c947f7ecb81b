"""The `gif` command: each stage of the method, and all of them at once."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch

from gif.backbones import BackboneConfig, save_backbone
from gif.codes import IdentityCodes, judge_codes, tokenize
from gif.codes.commands import export_codes, extend_codes, inspect_codes
from gif.data import HELD_OUT, ImageDecoder, left_out, load_data
from gif.data.convert import convert
from gif.data.decoding import MAX_PIXELS
from gif.data.identities import Identities, require_same_names
from gif.data.images import SPLIT_BY
from gif.data.inspection import inspect
from gif.data.report import glyph_report
from gif.distributed import process_group, rank, wait_for_all, world_size
from gif.doctor import doctor
from gif.encoders import Precision, make_encoder
from gif.errors import InputError, Interrupted
from gif.evaluation.command import evaluate
from gif.experiments.accuracy import accuracy
from gif.experiments.quickstart import quickstart
from gif.experiments.sweep import sweep
from gif.export import export_command
from gif.faults import BUG_CODE, MENDABLE_CODE, bug, mendable, printable
from gif.files import check_file, save_tensors, write_text
from gif.losses import GIFLoss, HeadConfig
from gif.ownership import check_output, existing, hold
from gif.packages import needs
from gif.planning import plan
from gif.progress import say
from gif.resume import WHO, claim_folder, own_file
from gif.training import (
    AUGMENTATIONS,
    AugmentationName,
    Checkpoints,
    TrainingConfig,
    ValidationConfig,
    check_training,
    plot_losses,
    plot_validations,
    train,
)
from gif.vectors import CodeVectors, SpreadReport, Start, initial_code_vectors, spread_code_vectors, spread_file
from gif.vectors.plots import plot_gaps, plot_nearest_cosines

DEBUG = "--debug"
DESCRIPTION = (
    "Train recognition models with millions of identities: identity codes instead of a softmax. "
    f"{DEBUG}, anywhere in a command, shows where an error comes from."
)
ALIASES = {"--closed_form": "--start"}  # which torchrun takes for a short form of its own --start-method
HEAD_FORMAT = "gif.head/1"


def vectors_command(
    output: Path,
    *,
    data: str = "glyphs",
    held_out: int | float = HELD_OUT,
    encoder: Literal["pixels", "clip", "dino"] = "pixels",
    model: str | None = None,
    weights: str | None = None,
    width: int = 128,
    image_size: int = 112,
    max_pixels: int = MAX_PIXELS,
    batch_size: int = 256,
    workers: int = 0,
    precision: Precision = "fp32",
    device: str = "cpu",
) -> None:
    """Make code vectors: each identity's mean image feature under a frozen encoder.

    A run that was interrupted continues when the same command is given again, on as many processes. Several processes
    share the identities: torchrun --nproc-per-node 8 -m gif.cli vectors ...

    Args:
        output: where to write the code vectors (.safetensors).
        data: the data set, a name or a path (docs/data.md); its training identities are encoded.
        held_out: share of the identities that training never sees, or how many; 0 uses all. The same for every command.
        encoder: "pixels" needs no weights; "clip" and "dino" are pretrained and load from a hub or from --weights.
        model: the network's name in open_clip or timm; by default ViT-B-32 (clip), vit_base_patch16_224.dino (dino).
        weights: file with the encoder's weights, instead of the hub; OpenAI's need --model ViT-B-32-quickgelu.
        width: of the vectors, for "pixels"; the backbone's embedding_size must equal it. clip and dino have their own.
        image_size: pixels that images on disk are read in, before the encoder resizes them to its own.
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
        batch_size: images encoded at once.
        workers: processes that read images, for each process that encodes.
        precision: of a network; "bf16" is for GPUs.
        device: where to encode, "cpu" or "cuda".
    """
    partial = output.with_suffix(".partial")
    check_output(output, [partial])
    with process_group(device) as own, hold(output, existing(own_file(partial))):
        images = load_data(data, held_out=held_out, decoder=ImageDecoder(image_size, max_pixels=max_pixels)).train
        network = make_encoder(encoder, width=width, model=model, weights=weights, device=own, precision=precision)
        table = initial_code_vectors(
            images,
            network,
            batch_size=batch_size,
            num_workers=workers,
            checkpoint=partial,
            keep_checkpoint=True,
            device=own,
        )
        if rank() == 0:
            table.save(output)
            say(f"wrote {table} to {output}")
        wait_for_all()
        own_file(partial).unlink(missing_ok=True)


def spread_command(
    vectors: Path,
    output: Path,
    *,
    epochs: int = 3,
    batch: int = 2048,
    lr: float = 0.1,
    start: Start = "none",
    neighbor_epochs: int = 0,
    target_gap: float | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    in_file: bool = False,
) -> None:
    """Spread code vectors evenly over the sphere, and say how even they became and what it cost.

    A run that was interrupted continues where it was when the same command is given again. Several processes share the
    work: torchrun --nproc-per-node 8 -m gif.cli spread ...

    Args:
        vectors: the code vectors to start from, as `gif vectors` writes them.
        output: where to write the spread ones, and beside it the report (.json), a histogram (.png), the gap over
            epochs (-gap.png).
        epochs: passes over all vectors; 3 do nearly all there is to do.
        batch: vectors that push each other apart in one step.
        lr: learning rate, per vector.
        start: a closed form first; "center" subtracts the mean, "whiten" also evens out the covariance. After torchrun
            write --closed_form, for torchrun takes --start for an option of its own.
        neighbor_epochs: passes in subsets of neighbours afterwards, which part near-duplicates.
        target_gap: stop early, once the mean optimality gap of an epoch is below this.
        minutes: stop after so much time.
        seed: of the random subsets.
        device: where to compute.
        in_file: leave the vectors in a file, which may be larger than memory, and step them there; several processes
            always do.
    """
    options: dict[str, Any] = {
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "start": start,
        "neighbor_epochs": neighbor_epochs,
        "target_gap": target_gap,
        "minutes": minutes,
        "seed": seed,
    }
    partial, picture = output.with_suffix(".partial"), output.with_suffix(".png")
    report_file, gaps = output.with_suffix(".json"), output.with_name(f"{output.stem}-gap.png")
    check_output(output, [partial, report_file, picture, gaps], [vectors])

    def write_report(report: SpreadReport) -> None:
        write_text(report_file, json.dumps(report.to_dict(), indent=2))
        plot_nearest_cosines(report.before, report.after, picture)
        plot_gaps(report, gaps)

    with process_group(device) as own:
        if in_file or world_size() > 1:
            report = spread_file(vectors, output, device=own, write_report=write_report, **options)
        else:
            with hold(output, existing(partial)):
                given = CodeVectors.load(vectors)
                table = CodeVectors(given.table.to(own), normalized=True, identities=given.identities)
                report = spread_code_vectors(table, checkpoint=partial, keep_checkpoint=True, **options)
                table.save(output)
                write_report(report)
                partial.unlink()
        if rank() == 0:
            say(f"{report}\nwrote {output}")


def tokenize_command(
    vectors: Path,
    output: Path,
    *,
    vocab_size: int = 20,
    length: int | None = None,
    slack: float = 0.0,
    capacity_factor: float = 1.5,
    alignment: Literal["residual", "none"] = "residual",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
) -> None:
    """Cut identity codes from code vectors: similar identities share a prefix, and no two share a code.

    The vectors stay on disk. A run that was interrupted continues after its last whole level when the same command is
    given again.

    Args:
        vectors: the (spread) code vectors.
        output: where to write the codes (.safetensors).
        vocab_size: v, the values a token can take, 5 to 20 in the paper.
        length: l, the tokens of a code; the shortest that fits where it is not given.
        slack: room for identities that arrive later, as a share of those there are.
        capacity_factor: how much larger than the mean a branch of the code tree may be; 1 makes them equal.
        alignment: "residual" numbers branches so that a token means the same direction everywhere; "none" at random.
        seed: of the clustering.
        device: where to cut; "auto" takes a GPU if there is one with room for the vectors. "cpu" reads them from disk,
            a block at a time; "cuda" holds them all. Codes are those of the CPU but for ties.
    """
    partial = output.with_suffix(".partial")
    check_output(output, [partial], [vectors])
    with hold(output, existing(partial)):
        check_file(vectors)  # every row will be read many times
        table = CodeVectors.load(vectors, mmap=True)
        codes = tokenize(
            table,
            vocab_size=vocab_size,
            length=length,
            slack=slack,
            capacity_factor=capacity_factor,
            alignment=alignment,
            seed=seed,
            checkpoint=partial,
            keep_checkpoint=True,
            device=device,
        )
        codes.save(output)
        partial.unlink()
        if len(codes) > 1:
            say(str(judge_codes(codes, table)))
        say(f"wrote {codes} to {output}")


def train_command(
    output: Path,
    *,
    data: str = "glyphs",
    held_out: int | float = HELD_OUT,
    codes: Path | None = None,
    vectors: Path | None = None,
    head: HeadConfig = HeadConfig(),  # noqa: B008 (frozen)
    backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 (frozen)
    training: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    validation: ValidationConfig = ValidationConfig(),  # noqa: B008 (frozen)
    augmentation: AugmentationName = "affine",
    max_pixels: int = MAX_PIXELS,
    tensorboard: bool = False,
    resume: Literal["auto", "never"] = "auto",
) -> None:
    """Train a backbone, with identity codes or with a softmax; under torchrun, in several processes.

    A run that was interrupted continues at its last checkpoint when the same command is given again, on as many
    processes as there are then. A config from the repository's configs folder holds a recipe; any option after it wins.

    Args:
        output: folder for the backbone, the head, the identities that were trained on, the code vectors if it moved
            them, the losses and their plot, the checkpoints and TensorBoard's files; of a run that is validated, the
            best backbone and the scores too.
        data: the data set, a name or a path (docs/data.md); its training identities are used. Images on disk are read
            in the backbone's size and colours.
        held_out: share of the identities that training never sees, or how many; 0 uses all. The same for every command.
        codes: identity codes, as `gif tokenize` writes them (head kind gif).
        vectors: the code vectors they were cut from (head kind gif with a regression weight).
        head: which loss.
        backbone: which network.
        training: optimizer and schedule.
        validation: what the backbone is judged by while it trains, and how often. The best one is kept.
        augmentation: "affine" for glyphs, "mirror" for aligned faces, or "none".
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
        tensorboard: log to output/tensorboard.
        resume: "auto" continues the run that output holds, if it does; "never" refuses it.
    """
    if resume == "never" and output.exists():
        raise InputError(f"{output} exists; give another --output, or --resume auto to continue the run in it")
    kept = Checkpoints(output / "checkpoints").newest
    with process_group(training.device) as own, hold(output, kept):
        code_table = None if codes is None else IdentityCodes.load(codes, mmap=True)
        decoder = ImageDecoder(backbone.image_size, backbone.channels, max_pixels=max_pixels)
        split = load_data(data, held_out=held_out, decoder=decoder)
        images = split.train
        who = images.identities
        if (before := output / WHO).exists():
            require_same_names(f"the run in {output}", Identities.load(before), "the data set", who)
        validate = validation.open(split.held_out, decoder, workers=training.workers, device=own)
        torch.manual_seed(training.seed)
        network = backbone.build()
        table = None if vectors is None else CodeVectors.load(vectors, mmap=True)
        loss_fn = head.build(images.num_identities, backbone.embedding_size, code_table, table, identities=who)
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
            claim_folder(output, settings)
            who.save(output / WHO)
        wait_for_all()
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
        if rank() > 0:
            return
        save_backbone(output / "backbone.safetensors", network, backbone, trained_on=who)
        save_tensors(output / "head.safetensors", loss_fn.state_dict(), format=HEAD_FORMAT, **who.metadata())
        if isinstance(loss_fn, GIFLoss) and loss_fn.vectors is not None and loss_fn.recipe.moves_vectors:
            loss_fn.vectors.save(output / "vectors.safetensors")
        save_tensors(output / "losses.safetensors", {"losses": log.losses}, format="gif.losses/1")
        plot_losses({head.kind: log.losses}, output / "losses.png")
        say(f"wrote the trained backbone to {output / 'backbone.safetensors'}")
        if log.validations:
            best = Checkpoints(output / "checkpoints").load_best(network)
            save_backbone(output / "best.safetensors", network, backbone, trained_on=who)
            write_text(output / "validations.json", json.dumps(log.validations, indent=2))
            plot_validations(log.validations, output / "validations.png")
            say(f"wrote the best one, after {best:,} steps, to {output / 'best.safetensors'}")


COMMANDS: dict[str, Any] = {
    "quickstart": quickstart,
    "data": {
        "_help": "Say what is in a data set, convert it, render glyphs.",
        "inspect": inspect,
        "convert": convert,
        "glyphs": glyph_report,
    },
    "vectors": vectors_command,
    "spread": spread_command,
    "plan": plan,
    "tokenize": tokenize_command,
    "codes": {
        "_help": "Look into identity codes, export them, and give codes to identities that come later.",
        "inspect": inspect_codes,
        "export": export_codes,
        "extend": extend_codes,
    },
    "train": train_command,
    "evaluate": evaluate,
    "export": export_command,
    "accuracy": accuracy,
    "sweep": sweep,
    "doctor": doctor,
}


def _run(arguments: Sequence[str]) -> None:
    """The command line, by jsonargparse, which it alone needs."""
    with needs("jsonargparse[signatures]", "the command line"):
        from jsonargparse import ArgumentParser, auto_cli

    class Parser(ArgumentParser):
        """Names what is missing as it is given on the command line: --output, not train.output."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            begin, required, keys = message.partition("arguments are required: ")
            if required:
                message = begin + required + ", ".join(map(_option, keys.split(", ")))
            super().error(message, ex)

        def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return super().parse_path(cfg_path, *arguments, **options)
            except UnicodeDecodeError as error:
                raise InputError(f"{cfg_path} is no UTF-8 text ({error}); write the config as UTF-8") from error

    auto_cli(
        COMMANDS,
        args=_arguments(arguments),
        as_positional=False,
        prog="gif",
        description=DESCRIPTION,
        parser_class=Parser,
    )


def _option(key: str) -> str:
    """--option of a key such as train.output or data.convert.input."""
    level: Any = COMMANDS
    names = key.split(".")
    while len(names) > 1 and isinstance(level, dict) and names[0] in level:
        level = level[names.pop(0)]
    return f"--{'.'.join(names)}"


def _arguments(given: Sequence[str]) -> list[str]:
    """The command line with options by their first names, and without --debug, which may stand anywhere."""
    arguments = []
    for argument in given:
        name, sign, value = argument.partition("=")
        arguments.append(f"{ALIASES.get(name, name)}{sign}{value}")
    return [argument for argument in arguments if argument != DEBUG]


def main() -> None:
    """Run the `gif` command.

    What a user can mend is one line, and exits with 1; a wrong command line with 2; an interrupt with 130, SIGTERM,
    which is one too, with 143: what long work keeps is kept. Anything else is a bug, said to be one, and exits with 70.
    --debug shows the traceback in each case.
    """
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # a bus error, of a mapped file that was shortened, says where it was read
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    given = sys.argv[1:]
    try:
        _run(given)
    except KeyboardInterrupt as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            say(str(stop) or "interrupted; this command keeps nothing, and begins anew")
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    except Exception as error:
        if DEBUG in given:
            traceback.print_exc()
        line = mendable(error)
        say(printable(bug(error) if line is None else f"error: {line}"))
        sys.exit(BUG_CODE if line is None else MENDABLE_CODE)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Interrupted("", number)


if __name__ == "__main__":
    main()
