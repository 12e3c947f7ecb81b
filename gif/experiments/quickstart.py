"""The whole method on real images in a few minutes: codes, training, judgement, report."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from gif.backbones import BackboneConfig, save_backbone
from gif.codes import IdentityCodes, tokenize
from gif.codes.picture import plot_code_tree
from gif.data import GlyphSplit, glyphs
from gif.encoders import PixelEncoder
from gif.evaluation import Judgement, judge, plot_roc
from gif.files import write_text
from gif.losses import HeadConfig
from gif.progress import console, say
from gif.training import TrainingConfig, TrainingLog, embed, plot_losses, train
from gif.vectors import CodeVectors, SpreadReport, initial_code_vectors, spread_code_vectors
from gif.vectors.plots import plot_nearest_cosines
from gif_kernels import AngularMargin

VOCAB_SIZE = 12
BATCH_SIZE = 128
SPREAD_EPOCHS = 10  # an epoch is a single step here
BACKBONE = BackboneConfig(embedding_size=128, width=16)
HEADS = {
    "GIF": HeadConfig(kind="gif"),
    "GIF, published": HeadConfig(
        kind="gif", recipe="paper", overrides={"scale": 16.0, "margin": AngularMargin(m2=0.0, m3=0.1)}
    ),
    "full softmax": HeadConfig(kind="softmax", scale=16.0, margin=AngularMargin(m2=0.0, m3=0.2)),
}


@dataclass(frozen=True)
class _Result:
    log: TrainingLog
    judgement: Judgement
    parameters: int


def quickstart(output: Path = Path("runs/quickstart"), *, epochs: int = 4, seed: int = 0) -> None:
    """Do everything once, on glyphs: code vectors, spreading, codes, training beside the full softmax, judgement.

    The identities are the characters of the fonts that come with matplotlib, an image each in every font; a fifth of
    them is held out, never seen in training, and used to judge the heads. All get the same backbone, images and
    steps. Writes a report with pictures. An interrupted run continues when the same command is given again.

    Args:
        output: folder for the report and everything it is made of.
        epochs: passes over the training images, for each head.
        seed: of everything random.
    """
    begin = time.monotonic()
    training = TrainingConfig(epochs=epochs, batch_size=BATCH_SIZE, seed=seed)
    _prepare(output, repr((training, HEADS, BACKBONE, VOCAB_SIZE)))
    data = glyphs(seed=seed)
    say(
        f"glyphs: {data.train.num_identities:,} identities to train on ({len(data.train):,} images), "
        f"{data.held_out.num_identities:,} held out ({len(data.held_out):,} images)"
    )
    vectors, spread = _code_vectors(data, seed)
    say(f"code vectors before: {spread.before}\ncode vectors after:  {spread.after}")
    codes = tokenize(vectors, vocab_size=VOCAB_SIZE, seed=seed)
    say(f"identity codes: {codes}")
    vectors.save(output / "vectors.safetensors")
    codes.save(output / "codes.safetensors")

    results = {
        name: _train_and_judge(name, head, data, codes, vectors, training, output / _folder(name))
        for name, head in HEADS.items()
    }
    plot_nearest_cosines(spread.before, spread.after, output / "nearest-cosines.png")
    plot_code_tree(codes, data.train, output / "code-tree.png")
    plot_losses({name: result.log.losses for name, result in results.items()}, output / "losses.png")
    plot_roc({name: result.judgement for name, result in results.items()}, output / "roc.png")
    table = _table(results)
    console.print(table)
    write_text(output / "report.md", _report(data, codes, spread, results, training))
    say(f"done in {time.monotonic() - begin:.0f} s; the report is {output / 'report.md'}")


def _prepare(output: Path, settings: str) -> None:
    """Continue an unfinished run of the same settings; start anew otherwise."""
    record = output / "settings.txt"
    finished = (output / "report.md").exists()
    if output.exists() and any(output.iterdir()):
        if not record.exists():
            raise ValueError(f"{output} holds something that is no quickstart; give another --output")
        if finished or record.read_text(encoding="utf-8") != settings:
            shutil.rmtree(output)
        else:
            say(f"continuing the unfinished run in {output}")
    write_text(record, settings)


def _code_vectors(data: GlyphSplit, seed: int) -> tuple[CodeVectors, SpreadReport]:
    vectors = initial_code_vectors(data.train, PixelEncoder(BACKBONE.embedding_size))
    return vectors, spread_code_vectors(vectors, epochs=SPREAD_EPOCHS, seed=seed)


def _train_and_judge(
    name: str,
    head: HeadConfig,
    data: GlyphSplit,
    codes: IdentityCodes,
    vectors: CodeVectors,
    training: TrainingConfig,
    folder: Path,
) -> _Result:
    torch.manual_seed(training.seed)
    backbone = BACKBONE.build()
    own_vectors = CodeVectors(vectors.table.clone(), normalized=True)  # the head may move them
    loss_fn = head.build(data.train.num_identities, BACKBONE.embedding_size, codes, own_vectors)
    log = train(
        backbone, loss_fn, data.train, training, checkpoints=folder / "checkpoints", description=f"training with {name}"
    )
    save_backbone(folder / "backbone.safetensors", backbone, BACKBONE)
    judgement = judge(embed(backbone, data.held_out.images), data.held_out.labels)
    return _Result(log, judgement, sum(parameter.numel() for parameter in loss_fn.parameters()))


def _folder(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def _rows(results: dict[str, _Result]) -> list[tuple[str, ...]]:
    """A row a head: what it cost and how well its backbone knows identities it never saw."""
    return [
        (
            name,
            f"{result.judgement.rank1:.3f}",
            *(f"{tar:.3f}" for tar in result.judgement.tar.values()),
            f"{result.judgement.pair_accuracy:.3f}",
            f"{result.parameters:,}",
            f"{result.log.images_per_second:,.0f}",
        )
        for name, result in results.items()
    ]


def _columns(results: dict[str, _Result]) -> tuple[str, ...]:
    fars = next(iter(results.values())).judgement.tar
    return ("head", "rank-1", *(f"TAR@{far:g}" for far in fars), "pairs", "parameters", "images/s")


def _table(results: dict[str, _Result]) -> Table:
    table = Table(*_columns(results), title="held-out identities, never seen in training")
    for row in _rows(results):
        table.add_row(*row)
    return table


def _report(
    data: GlyphSplit, codes: IdentityCodes, spread: SpreadReport, results: dict[str, _Result], training: TrainingConfig
) -> str:
    columns = _columns(results)
    rows = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *_rows(results))]
    judgement = next(iter(results.values())).judgement
    return f"""# Quickstart: identity codes beside a full softmax, on glyphs

Identity = character, image = the character in one font.
{data.train.num_identities:,} identities ({len(data.train):,} images) were trained on;
{data.held_out.num_identities:,} others ({len(data.held_out):,} images) judge the backbone.
All heads had the same backbone, images, order, augmentation and {training.epochs} epochs.

{chr(10).join(rows)}

Rank-1: the nearest other image shows the same identity. TAR@f: true-accept rate at false-accept rate f, over all
pairs of held-out images ({judgement.genuine:,} genuine, {judgement.impostor:,} impostor). Pairs: accuracy in ten folds
of balanced pairs. Parameters: of the head.
A softmax head grows with the identities; the codes' head with their length.
Here: {codes.length} tokens of {codes.vocab_size}.

![ROC](roc.png)

![Losses](losses.png)

## Code vectors

Before spreading: {spread.before}.

After: {spread.after}.

![Nearest-neighbour cosines](nearest-cosines.png)

## Codes

Each identity has {codes.length} tokens of {codes.vocab_size} values.
A row below is one prefix, and characters below it.

![Code tree](code-tree.png)
"""
