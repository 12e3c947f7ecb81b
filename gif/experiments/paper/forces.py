"""`gif experiments forces`: what pulls and pushes a centre, and minority collapse (the supplement's section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gif.errors import InputError
from gif.evaluation import groups_by_images
from gif.evaluation.rarity import Group
from gif.experiments.comparison import mean_and_spread
from gif.experiments.glyph_bench import BATCH_SIZE, CONTENDERS, GlyphBench, bench_settings, folder_name
from gif.experiments.paper import layer_peeled
from gif.experiments.paper.force_probe import ForceProbe
from gif.experiments.paper.layer_peeled import Descent, LayerPeeled, minority_cosine, solve, threshold
from gif.experiments.paper.report import Findings, Table, chosen, counted, experiment, once, place, publish
from gif.plotting import COLORS, figure, line_style, plain_numbers, save_figure
from gif.progress import say
from gif.training import TrainingConfig, Validate

NAME = "forces"
TRAINED = ("full softmax", "Partial FC 0.1", "GIF")
COLLAPSED = 0.99  # cosine from which minority centres count as one
SHOWN_RATIOS = (1, 10, 20, 50, 100, 1000)
FINE = 40  # points of the theory's curve


@dataclass(frozen=True)
class Size:
    """How much is done.

    Args:
        seeds: of descents and runs.
        steps: of a descent on the layer-peeled model.
        identities: of the data set, in training and held out.
        epochs: of training.
        looks: at the forces, at equal distances, in training.
        bounds: E of models whose thresholds are told too.
        ratios: R of the descents.
        model: the layer-peeled one.
    """

    seeds: int
    steps: int
    identities: int
    epochs: int
    looks: int
    bounds: tuple[float, ...]
    ratios: tuple[float, ...] = (1, 2, 5, 10, 15, 20, 25, 30, 50, 100, 200, 500, 1000)
    model: LayerPeeled = field(default_factory=LayerPeeled)


FULL = Size(seeds=3, steps=1500, identities=2000, epochs=2, looks=4, bounds=(2.0, 3.0, 5.0))
QUICK = Size(seeds=1, steps=500, identities=400, epochs=1, looks=2, bounds=(3.0,), ratios=(1, 10, 30, 1000))


def forces(
    output: Path | None = None,
    *,
    quick: bool = False,
    seeds: int | None = None,
    steps: int | None = None,
    bound: float | None = None,
    data: str = "glyphs",
    identities: int | None = None,
    epochs: int | None = None,
    docs: Path | None = None,
) -> None:
    """Show what pulls and pushes centres: in the layer-peeled model of minority collapse, and in real training.

    In the layer-peeled model half of the classes have R times as many images as the others: the mean cosine between
    minority centres against R, of a full softmax, of Partial FC and of code vectors, beside the exact optimum and its
    threshold. In training on glyphs: the norms of pull and push by the number of images an identity has, over steps.
    A run that was interrupted continues when the same command is given again.

    Args:
        output: folder for forces.json, forces.md, the pictures and the runs; runs/experiments/forces, or forces-quick.
        quick: a minute: one seed, few steps, few identities.
        seeds: of each descent and each run; 3, or 1 where quick.
        steps: of each descent; 1,500, or 500.
        bound: E of the layer-peeled model, of the squared norms of features and of centres; 3.
        data: the data set to train on.
        identities: how many of it, at random, before a fifth is held out; 2,000, or 400.
        epochs: of training; 2, or 1.
        docs: a document whose block "experiments forces" gets the results; pictures go into its folder pictures.
    """
    size = chosen(QUICK if quick else FULL, seeds=seeds, steps=steps, identities=identities, epochs=epochs)
    if bound is not None:
        size = chosen(size, model=LayerPeeled(bound=bound))
    if min(size.seeds, size.steps, size.epochs) < 1:
        raise InputError(f"wanted at least one seed, step and epoch, got {size.seeds}, {size.steps} and {size.epochs}")
    folder = place(NAME, output, quick)
    trained = {name: CONTENDERS[name] for name in TRAINED}
    settings = {name: value for name, value in asdict(size).items() if name != "seeds"}
    with experiment(NAME, folder, {**settings, "data": data, **bench_settings(trained)}, docs):
        paths = _runs(size, folder)
        bench = None if all(path.exists() for path in paths.values()) else _bench(size, data, folder)
        peeled = _peeled(size, folder / "peeled")
        training = _trained(size, paths, bench)
        publish(NAME, _findings(size, data, peeled, training), folder, docs)


def _peeled(size: Size, folder: Path) -> dict[str, Any]:
    """The exact optimum, and the cosines (seeds, ratios) of each head's descent."""
    model = size.model

    def exact() -> dict[str, Any]:
        fine = np.geomspace(1, max(size.ratios), FINE).tolist()
        return {
            "threshold": _finite(threshold(model)),
            "ratios": fine,
            "cosines": [solve(model, ratio).cosine for ratio in fine],
            "thresholds": {f"{bound:g}": _finite(threshold(LayerPeeled(bound=bound))) for bound in size.bounds},
        }

    say("layer-peeled model: the exact optimum")
    found = {"exact": once(folder / "exact.json", exact), "heads": {}}
    for head in layer_peeled.HEADS:
        rows = []
        for seed in range(size.seeds):
            descent = Descent(model, size.ratios, seed, size.steps)
            path = folder / f"{folder_name(head)}-seed-{seed}.json"

            def cosines(own: Descent = descent, of: str = head) -> list[float]:
                return minority_cosine(own.centers(of), model).tolist()

            rows.append(once(path, cosines))
        found["heads"][head] = rows
    return found


def _runs(size: Size, folder: Path) -> dict[tuple[str, int], Path]:
    """Where what is found of each head with each seed is kept."""
    return {
        (name, seed): folder / folder_name(name) / f"seed-{seed}" / "forces.json"
        for name in TRAINED
        for seed in range(size.seeds)
    }


def _bench(size: Size, data: str, folder: Path) -> tuple[GlyphBench, list[Group]]:
    """What is trained on, and its identities by their number of images."""
    bench = GlyphBench.prepare(1, data=data, identities=size.identities, folder=folder / "data")
    groups = groups_by_images(bench.data.train.labels)
    if not groups:
        raise InputError(f"{data} has no 20 identities with about as many images; give more --identities")
    return bench, groups


def _run(
    bench: GlyphBench, groups: Sequence[Group], size: Size, name: str, seed: int, folder: Path
) -> dict[int, dict[str, float]]:
    """Train a head; measures of `ForceProbe` by the step that they are after."""
    training = TrainingConfig(epochs=size.epochs, batch_size=BATCH_SIZE, seed=seed)
    every = max(1, training.steps_of(len(bench.data.train)) // size.looks)

    def watch(head: nn.Module) -> Validate:
        return ForceProbe(head, bench.data.train, groups, BATCH_SIZE)

    return bench.fit(name, CONTENDERS[name], training, folder, watch=watch, watch_every=every)[2].validations


def _trained(
    size: Size, paths: Mapping[tuple[str, int], Path], bench: tuple[GlyphBench, list[Group]] | None
) -> dict[str, list[dict[str, dict[str, float]]]]:
    """By head, what each seed's run found; ``bench`` is for those that are missing."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in TRAINED}
    for (name, seed), path in paths.items():

        def run(of: str = name, with_seed: int = seed, into: Path = path.parent) -> dict[int, dict[str, float]]:
            assert bench is not None  # something is missing
            return _run(*bench, size, of, with_seed, into)

        found[name].append(once(path, run))
    return found


def _findings(
    size: Size, data: str, peeled: Mapping[str, Any], training: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Findings:
    exact, model = peeled["exact"], size.model
    ratios = [ratio for ratio in size.ratios if ratio in SHOWN_RATIOS]
    rows = [
        (name, *(mean_and_spread([row[size.ratios.index(ratio)] for row in found]) for ratio in ratios))
        for name, found in peeled["heads"].items()
    ]
    theory = [f"{solve(model, ratio).cosine:.3f}" for ratio in ratios]
    collapse = Table(
        f"Layer-peeled model, {model.majority} majority and {model.minority} minority classes, E = {model.bound:g}: "
        "mean cosine between minority centres at R times as many images of a majority class",
        ("centres", *(f"R = {ratio:,g}" for ratio in ratios)),
        [("optimum, by the convex program", *theory), *rows],
    )
    thresholds = Table(
        "R from which minority centres are one vector, by the convex program",
        ("E", *exact["thresholds"]),
        [("R_0", *map(_ratio, exact["thresholds"].values()))],
    )
    last = {name: [list(run.values())[-1] for run in runs] for name, runs in training.items()}
    groups = [key.removeprefix("pull ") for key in next(iter(last.values()))[0] if key.startswith("pull ")]
    in_training = Table(
        f"Training on {data}: norms of pull and push at the end, mean of a group's identities, and push over pull",
        ("head", *groups),
        [
            (f"{name}: {title}", *(mean_and_spread([measure(run, group) for run in runs]) for group in groups))
            for name, runs in last.items()
            for title, measure in MEASURES.items()
        ],
    )
    conditions = (
        f"Layer-peeled model: {size.steps:,} steps of Adam, {counted(size.seeds, 'seed')}, float64. Training: {data}, "
        f"{size.identities:,} identities of which a fifth is held out, {counted(size.epochs, 'epoch')}, "
        f"{counted(size.seeds, 'seed')}."
    )
    return Findings(
        {"layer-peeled": peeled, "training": training, "size": asdict(size)},
        conditions,
        [*_of_collapse(size, peeled), *_of_training(last, groups)],
        [collapse, thresholds, in_training],
        {
            "collapse": (
                "Mean cosine between minority centres against the ratio of images",
                lambda path: _draw_collapse(size, peeled, path),
            ),
            "steps": (
                "Norms of pull and push over steps, by the number of images of an identity",
                lambda path: _draw_steps(training, groups, path),
            ),
            "push-over-pull": (
                "Push over pull, and how alike the pushes are, by the number of images of an identity",
                lambda path: _draw_shares(last, groups, path),
            ),
        },
    )


MEASURES = {
    "pull": lambda run, group: run[f"pull {group}"],
    "push": lambda run, group: run[f"push {group}"],
    "push / pull": lambda run, group: run[f"push {group}"] / run[f"pull {group}"],
    "cosine between pushes": lambda run, group: run[f"push cosine {group}"],
}


def _finite(ratio: float) -> float | None:
    """What JSON can hold."""
    return ratio if math.isfinite(ratio) else None


def _ratio(ratio: float | None) -> str:
    return f"more than {layer_peeled.LARGEST_RATIO:,.0f}" if ratio is None else f"{ratio:,.1f}"


def _of_collapse(size: Size, peeled: Mapping[str, Any]) -> list[str]:
    told = [f"The optimum's minority centres are one vector from R = {_ratio(peeled['exact']['threshold'])} on."]
    for name, found in peeled["heads"].items():
        means = np.mean(found, 0)
        reached = [ratio for ratio, mean in zip(size.ratios, means, strict=True) if mean > COLLAPSED]
        told.append(
            f"{name}: {means[0]:.3f} at R = {size.ratios[0]:g}, {means[-1]:.3f} at R = {size.ratios[-1]:,g}; "
            + (f"above {COLLAPSED} from R = {reached[0]:,g} on." if reached else f"nowhere above {COLLAPSED}.")
        )
    return told


def _of_training(last: Mapping[str, Sequence[Mapping[str, float]]], groups: Sequence[str]) -> list[str]:
    told = []
    for name, runs in last.items():
        rare, frequent = (
            float(np.mean([MEASURES["push / pull"](run, group) for run in runs])) for group in (groups[0], groups[-1])
        )
        told.append(
            f"{name}: at the end push over pull is {rare:.2f} for identities with {groups[0]} and {frequent:.2f} for "
            f"those with {groups[-1]}."
        )
    return told


def _draw_collapse(size: Size, peeled: Mapping[str, Any], path: Path) -> None:
    drawing, axes = figure(7.6, 4.6)
    exact = peeled["exact"]
    axes.plot(exact["ratios"], exact["cosines"], color=COLORS[6], linewidth=1, label="optimum, by the convex program")
    if exact["threshold"] is not None and exact["threshold"] < max(size.ratios):
        axes.axvline(exact["threshold"], color=COLORS[6], linestyle=":", linewidth=1)
        place_of = (exact["threshold"], 0.02)
        text = f" R_0 = {exact['threshold']:.1f}"
        axes.annotate(text, place_of, xycoords=("data", "axes fraction"), fontsize=8)
    for number, (name, found) in enumerate(peeled["heads"].items()):
        style = line_style(number)
        means, spreads = np.mean(found, 0), np.std(found, 0)
        axes.errorbar(size.ratios, means, spreads, marker="o", markersize=4, capsize=2, label=name, **style)
    axes.set(xscale="log", xlabel="R: images of a majority class for one of a minority class")
    axes.set_ylabel("mean cosine between minority centres")
    axes.legend(frameon=False, fontsize="small")
    save_figure(drawing, path)


def _draw_steps(training: Mapping[str, Sequence[Mapping[str, Any]]], groups: Sequence[str], path: Path) -> None:
    """A panel a head, pull and push a line each group; means over the seeds."""
    drawing, panels = figure(4.2 * len(training), 4.4, columns=len(training))
    for axes, (name, runs) in zip(np.atleast_1d(panels), training.items(), strict=True):
        steps = [int(step) for step in runs[0]]
        for number, group in enumerate(groups):
            for force, dash in (("pull", "-"), ("push", "--")):
                values = np.mean([[look[f"{force} {group}"] for look in run.values()] for run in runs], 0)
                style = {"color": line_style(number)["color"], "linestyle": dash}
                axes.plot(steps, values, marker="o", markersize=3, label=f"{force}, {group}", **style)
        axes.set(yscale="log", xlabel="step", title=name)
        plain_numbers(axes)
    first = np.atleast_1d(panels)[0]
    first.set_ylabel("norm of the force of one pass, mean of a group")
    drawing.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    save_figure(drawing, path)


def _draw_shares(last: Mapping[str, Sequence[Mapping[str, float]]], groups: Sequence[str], path: Path) -> None:
    drawing, panels = figure(9.6, 4.0, columns=2)
    for axes, title in zip(panels, ("push / pull", "cosine between pushes"), strict=True):
        for number, (name, runs) in enumerate(last.items()):
            values = np.array([[MEASURES[title](run, group) for group in groups] for run in runs])
            style = line_style(number)
            axes.errorbar(groups, values.mean(0), values.std(0), marker="o", capsize=2, label=name, **style)
        axes.set(title=title, xlabel="images an identity has")
    panels[0].legend(frameon=False)
    save_figure(drawing, path)
