"""Heads against each other on glyphs, over seeds, at equal budgets: what each part of the loss is worth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from gif.evaluation import Roc, plot_roc
from gif.experiments.glyph_bench import BATCH_SIZE, HEADS, GlyphBench, bench_settings, folder_name
from gif.files import load_tensors, save_tensors, write_text
from gif.progress import console, say
from gif.resume import claim_folder
from gif.training import TrainingConfig

ROC_FORMAT = "gif.roc/1"
MEASURES = {"rank1": "rank-1", "0.001": "TAR@0.001", "0.0001": "TAR@0.0001", "pair_accuracy": "pairs"}


def accuracy(
    output: Path = Path("runs/accuracy"),
    *,
    heads: Sequence[str] = tuple(HEADS),
    seeds: int = 3,
    epochs: int = 4,
    split: int = 1,
) -> None:
    """Train every head with every seed, judge each on held-out identities, and write a table with mean and spread.

    All runs have the same identities, backbone, images and steps; a seed decides initial values, order of images and
    augmentation. An interrupted run continues when the same command is given again.

    Args:
        output: folder for accuracy.md, roc.png and the runs.
        heads: which heads; all of them by default.
        seeds: runs of each head.
        epochs: passes over the training images in each run.
        split: seed of the split into training and held-out identities. Scales and margins were chosen on split 0.
    """
    unknown = [head for head in heads if head not in HEADS]
    if unknown or not heads or seeds < 1:
        raise ValueError(
            f"wanted at least one seed and heads among {list(HEADS)}, got seeds={seeds}, heads={list(heads)}"
        )
    chosen = {name: HEADS[name] for name in heads}
    claim_folder(output, {"command": "accuracy", "epochs": epochs, "split": split, **bench_settings(HEADS)})
    runs = {(name, seed): output / folder_name(name) / f"seed-{seed}" for name in chosen for seed in range(seeds)}
    missing = [run for run, folder in runs.items() if not (folder / "result.json").exists()]
    if missing:
        bench = GlyphBench.prepare(split)
        for number, (name, seed) in enumerate(missing, 1):
            say(f"run {number} of {len(missing)}: {name}, seed {seed}")
            training = TrainingConfig(epochs=epochs, batch_size=BATCH_SIZE, seed=seed)
            result = bench.run(name, chosen[name], training, runs[name, seed])
            roc = result.judgement.roc
            curve = {"fpr": roc.fpr, "tpr": roc.tpr, "thresholds": roc.thresholds}
            save_tensors(runs[name, seed] / "roc.safetensors", _tensors(curve), format=ROC_FORMAT)
            write_text(runs[name, seed] / "result.json", json.dumps(result.judgement.to_dict(), indent=2))

    scores = {name: [_measures(runs[name, seed]) for seed in range(seeds)] for name in chosen}
    plot_roc({name: _curve(runs[name, 0]) for name in chosen}, output / "roc.png")
    rows = [
        (name, *(_spread([score[measure] for score in found]) for measure in MEASURES))
        for name, found in scores.items()
    ]
    columns = ("head", *MEASURES.values())
    table = Table(*columns, title=f"held-out glyphs, mean ± deviation of {seeds} seeds, {epochs} epochs")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    write_text(output / "accuracy.md", "\n".join(lines) + "\n")
    say(f"wrote {output / 'accuracy.md'} and {output / 'roc.png'}")


def _measures(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    scores = {**found["tar"], "rank1": found["rank1"], "pair_accuracy": found["pair_accuracy"]}
    return {name: math.nan if score is None else score for name, score in scores.items()}


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(values, dtype=np.float64)) for name, values in arrays.items()}


def _curve(folder: Path) -> Roc:
    tensors, _ = load_tensors(folder / "roc.safetensors", format=ROC_FORMAT)
    return Roc(**{name: values.numpy() for name, values in tensors.items()})


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"
