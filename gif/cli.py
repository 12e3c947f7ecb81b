"""The `gif` command: each stage of the method, and all of them at once."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from gif.backbones import BackboneConfig, load_backbone, save_backbone
from gif.codes import IdentityCodes, judge_codes, tokenize
from gif.data import DataName, load_data
from gif.data.report import glyph_report
from gif.doctor import doctor
from gif.encoders import make_encoder
from gif.evaluation import judge, plot_roc
from gif.experiments.accuracy import accuracy
from gif.experiments.quickstart import quickstart
from gif.experiments.sweep import sweep
from gif.files import save_tensors, write_text
from gif.losses import GIFLoss, HeadConfig
from gif.progress import console, say
from gif.resume import claim_folder
from gif.training import TrainingConfig, embed, plot_losses, train
from gif.vectors import CodeVectors, initial_code_vectors, spread_code_vectors
from gif.vectors.plots import plot_nearest_cosines

DESCRIPTION = "Train recognition models with millions of identities: identity codes instead of a softmax."
HEAD_FORMAT = "gif.head/1"


def vectors_command(
    output: Path,
    *,
    data: DataName = "glyphs",
    encoder: Literal["pixels", "clip", "dino"] = "pixels",
    model: str | None = None,
    weights: str | None = None,
    width: int = 128,
    batch_size: int = 256,
    device: str = "cpu",
) -> None:
    """Make code vectors: each identity's mean image feature under a frozen encoder.

    Args:
        output: where to write the code vectors (.safetensors).
        data: the data set; its training identities are encoded.
        encoder: "pixels" needs no weights; "clip" and "dino" are pretrained and load from a hub or from --weights.
        model: the network's name in open_clip or timm; by default ViT-B-32 (clip), vit_base_patch16_224.dino (dino).
        weights: file with the encoder's weights, instead of the hub; OpenAI's need --model ViT-B-32-quickgelu.
        width: of the vectors, for "pixels"; the backbone's embedding_size must equal it. clip and dino have their own.
        batch_size: images encoded at once.
        device: where to encode, "cpu" or "cuda".
    """
    network = make_encoder(encoder, width=width, model=model, weights=weights, device=device)
    vectors = initial_code_vectors(
        load_data(data).train, network, batch_size=batch_size, checkpoint=output.with_suffix(".partial")
    )
    vectors.save(output)
    say(f"wrote {vectors} to {output}")


def spread_command(
    vectors: Path,
    output: Path,
    *,
    epochs: int = 3,
    batch: int = 2048,
    lr: float = 0.1,
    target_gap: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Spread code vectors evenly over the sphere, and say how even they became and what it cost.

    A run that was interrupted continues where it was when the same command is given again.

    Args:
        vectors: the code vectors to start from, as `gif vectors` writes them.
        output: where to write the spread ones; a histogram is drawn beside it (.png).
        epochs: passes over all vectors; 3 do nearly all there is to do.
        batch: vectors that push each other apart in one step.
        lr: learning rate, per vector.
        target_gap: stop early, once the mean optimality gap of an epoch is below this.
        seed: of the random subsets.
        device: where to compute, "cpu" or "cuda".
    """
    table = CodeVectors(CodeVectors.load(vectors).table.to(device), normalized=True)
    report = spread_code_vectors(
        table,
        epochs=epochs,
        batch=batch,
        lr=lr,
        target_gap=target_gap,
        seed=seed,
        checkpoint=output.with_suffix(".partial"),
    )
    table.save(output)
    plot_nearest_cosines(report.before, report.after, output.with_suffix(".png"))
    say(f"before: {report.before}\nafter:  {report.after}\nwrote {table} to {output}")


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
) -> None:
    """Cut identity codes from code vectors: similar identities share a prefix, and no two share a code.

    Args:
        vectors: the (spread) code vectors.
        output: where to write the codes (.safetensors).
        vocab_size: v, the values a token can take, 5 to 20 in the paper.
        length: l, the tokens of a code; the shortest that fits where it is not given.
        slack: room for identities that arrive later, as a share of those there are.
        capacity_factor: how much larger than the mean a branch of the code tree may be; 1 makes them equal.
        alignment: "residual" numbers branches so that a token means the same direction everywhere; "none" at random.
        seed: of the clustering.
    """
    table = CodeVectors.load(vectors)
    codes = tokenize(
        table,
        vocab_size=vocab_size,
        length=length,
        slack=slack,
        capacity_factor=capacity_factor,
        alignment=alignment,
        seed=seed,
    )
    codes.save(output)
    if len(codes) > 1:
        say(str(judge_codes(codes, table)))
    say(f"wrote {codes} to {output}")


def train_command(
    output: Path,
    *,
    data: DataName = "glyphs",
    codes: Path | None = None,
    vectors: Path | None = None,
    head: HeadConfig = HeadConfig(),  # noqa: B008 (frozen)
    backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 (frozen)
    training: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
) -> None:
    """Train a backbone, with identity codes or with a softmax.

    A run that was interrupted continues after its last whole epoch when the same command is given again.

    Args:
        output: folder for the backbone, the head, the code vectors if it moved them, the losses and their plot, and the
            checkpoints.
        data: the data set; its training identities are used.
        codes: identity codes, as `gif tokenize` writes them (head kind gif).
        vectors: the code vectors they were cut from (head kind gif with a regression weight).
        head: which loss.
        backbone: which network.
        training: optimizer and schedule.
    """
    code_table = None if codes is None else IdentityCodes.load(codes)
    images = load_data(data).train
    torch.manual_seed(training.seed)
    network = backbone.build()
    loss_fn = head.build(
        images.num_identities,
        backbone.embedding_size,
        code_table,
        None if vectors is None else CodeVectors.load(vectors, mmap=True),
    )
    claim_folder(
        output,
        {
            "command": "train",
            "data": data,
            "codes": code_table and code_table.fingerprint,
            "vectors": vectors and str(vectors.resolve()),
            "head": asdict(head),
            "backbone": asdict(backbone),
            "training": asdict(training),
        },
    )
    log = train(network, loss_fn, images, training, checkpoints=output / "checkpoints")
    save_backbone(output / "backbone.safetensors", network, backbone)
    save_tensors(output / "head.safetensors", loss_fn.state_dict(), format=HEAD_FORMAT)
    if isinstance(loss_fn, GIFLoss) and loss_fn.vectors is not None and loss_fn.recipe.moves_vectors:
        loss_fn.vectors.save(output / "vectors.safetensors")
    save_tensors(output / "losses.safetensors", {"losses": log.losses}, format="gif.losses/1")
    plot_losses({head.kind: log.losses}, output / "losses.png")
    say(f"wrote the trained backbone to {output / 'backbone.safetensors'}")


def evaluate_command(
    model: Path, *, data: DataName = "glyphs", output: Path | None = None, device: str = "cpu"
) -> None:
    """Judge a trained backbone on identities that training never saw.

    Args:
        model: backbone.safetensors, as `gif train` writes it.
        data: the data set; its held-out identities are used.
        output: folder for roc.png and evaluation.json; beside the model where it is not given.
        device: where to compute, "cpu" or "cuda".
    """
    network, _ = load_backbone(model)
    images = load_data(data).held_out
    judgement = judge(embed(network, images, device=device), images.labels)
    folder = output or model.parent
    plot_roc({model.parent.name: judgement}, folder / "roc.png")
    write_text(folder / "evaluation.json", json.dumps(judgement.to_dict(), indent=2))
    console.print(judgement.table())
    say(f"drew {folder / 'roc.png'}")


COMMANDS: dict[str, Any] = {
    "quickstart": quickstart,
    "data": {"_help": "Render data sets, and say what is in them.", "glyphs": glyph_report},
    "vectors": vectors_command,
    "spread": spread_command,
    "tokenize": tokenize_command,
    "train": train_command,
    "evaluate": evaluate_command,
    "accuracy": accuracy,
    "sweep": sweep,
    "doctor": doctor,
}


def main() -> None:
    """Run the `gif` command. Errors a user can mend are one line, and exit with 1; an interrupt exits with 130."""
    try:
        auto_cli(COMMANDS, as_positional=False, prog="gif", description=DESCRIPTION)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; the same command continues where this one stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
