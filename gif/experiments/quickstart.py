"""The whole method on real images in a few minutes: codes, training, judgement, report."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gif.codes.picture import plot_code_tree
from gif.documents import markdown_table
from gif.evaluation import plot_roc
from gif.experiments.glyph_bench import BATCH_SIZE, CONTENDERS, GlyphBench, HeadResult, bench_settings, folder_name
from gif.files import write_text
from gif.ownership import existing, hold
from gif.progress import new_table, print_table, say
from gif.resume import RECORD, claim_folder
from gif.training import TrainingConfig, plot_losses
from gif.vectors import SpreadReport
from gif.vectors.plots import plot_nearest_cosines

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = ("GIF", "GIF, published", "full softmax")


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
    with hold(output, existing(output / RECORD)):
        _quickstart(output, epochs, seed)


def _quickstart(output: Path, epochs: int, seed: int) -> None:
    begin = time.monotonic()
    training = TrainingConfig(epochs=epochs, batch_size=BATCH_SIZE, seed=seed)
    heads = {name: CONTENDERS[name] for name in SHOWN}
    claim_folder(output, {"command": "quickstart", **asdict(training), **bench_settings(heads)})
    report = output / "report.md"
    if report.exists():
        say(f"this run is finished, its report is {report}; remove {output} to repeat it, or give another --output")
        return
    bench = GlyphBench.prepare(seed)
    claim_folder(output / "data", bench.data.train.summary())
    bench.vectors.save(output / "vectors.safetensors")
    bench.codes.save(output / "codes.safetensors")
    results = {name: bench.run(name, head, training, output / folder_name(name)) for name, head in heads.items()}
    assert bench.spread is not None  # they were spread here
    plot_nearest_cosines(bench.spread.before, bench.spread.after, output / "nearest-cosines.png")
    plot_code_tree(bench.codes, bench.data.train, output / "code-tree.png")
    plot_losses({name: result.log.losses for name, result in results.items()}, output / "losses.png")
    plot_roc({name: result.judgement for name, result in results.items()}, output / "roc.png")
    print_table(_table(results))
    write_text(report, _report(bench, bench.spread, results, training))
    say(f"done in {time.monotonic() - begin:.0f} s; the report is {report}")


def _rows(results: dict[str, HeadResult]) -> list[tuple[str, ...]]:
    """A row a head: what it cost and how well its backbone knows identities it never saw."""
    return [
        (
            name,
            f"{result.judgement.rank1:.3f}",
            *(result.judgement.tar_in_words(far, 3) for far in result.judgement.tar),
            f"{result.judgement.pair_accuracy:.3f}",
            f"{result.parameters:,}",
            "" if math.isnan(result.log.images_per_second) else f"{result.log.images_per_second:,.0f}",
        )
        for name, result in results.items()
    ]


def _columns(results: dict[str, HeadResult]) -> tuple[str, ...]:
    fars = next(iter(results.values())).judgement.tar
    return ("head", "rank-1", *(f"TAR@{far:g}" for far in fars), "pairs", "parameters", "images/s")


def _table(results: dict[str, HeadResult]) -> Table:
    table = new_table(*_columns(results), title="held-out identities, never seen in training")
    for row in _rows(results):
        table.add_row(*row)
    return table


def _report(bench: GlyphBench, spread: SpreadReport, results: dict[str, HeadResult], training: TrainingConfig) -> str:
    data, codes = bench.data, bench.codes
    judgement = next(iter(results.values())).judgement
    return f"""# Quickstart: identity codes beside a full softmax, on glyphs

Identity = character, image = the character in one font.
{data.train.num_identities:,} identities ({len(data.train):,} images) were trained on;
{data.held_out.num_identities:,} others ({len(data.held_out):,} images) judge the backbone.
All heads had the same backbone, images, order, augmentation and {training.epochs} epochs.

{markdown_table(_columns(results), _rows(results))}
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
