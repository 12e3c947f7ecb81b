"""`gif experiments lambda`: how tokens weigh (the supplement's section 7, Fig. 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gif.codes import TokenizeConfig, advise, tokenize
from gif.codes.advise import CodeShape
from gif.errors import InputError
from gif.evaluation import embed, judge
from gif.experiments.comparison import MEASURES, mean_and_spread
from gif.experiments.glyph_bench import BATCH_SIZE, CONTENDERS, Contender, GlyphBench, bench_settings, folder_name
from gif.experiments.paper.adaptive_tokens import AdaptiveTokens, DifficultTokens, LearnedTokens
from gif.experiments.paper.report import Findings, Table, chosen, counted, draw_scores, experiment, once, place, publish
from gif.losses import GIFLoss, HeadConfig, TokenWeights
from gif.plotting import figure, line_style, save_figure
from gif.training import TrainingConfig

NAME = "lambda"
SPLIT = 1  # seed of the split, of code vectors and of codes
PATTERNS: tuple[TokenWeights, ...] = get_args(TokenWeights)
JUDGED_BY = "0.001"  # TAR at this FAR: L_C alone is too weak for a smaller one to tell much
_PUBLISHED = CONTENDERS["GIF, published"]


def _alone(kind: type[HeadConfig], weights: TokenWeights = "uniform") -> Contender:
    """The published recipe's L_C, and nothing else."""
    published = _PUBLISHED.head
    overrides = {**published.overrides, "regression_weight": 0.0}
    head = kind(kind="gif", recipe=published.recipe, overrides=overrides, token_weights=weights)
    return replace(_PUBLISHED, head=head)


CODES_ALONE: dict[str, Contender] = {
    **{pattern: _alone(HeadConfig, pattern) for pattern in PATTERNS},
    "learned": _alone(LearnedTokens),
    "by difficulty": _alone(DifficultTokens),
}
"""The supplement's four patterns, and two that follow the tokens' losses."""


@dataclass(frozen=True)
class Size:
    """How much is done: runs of each, identities before the split, lengths of codes, passes over the images."""

    seeds: int
    identities: int
    lengths: tuple[int, ...]
    epochs: int


FULL = Size(seeds=3, identities=2000, lengths=(3, 5), epochs=2)
QUICK = Size(seeds=1, identities=400, lengths=(2, 3), epochs=1)


def token_lambda(
    output: Path | None = None,
    *,
    quick: bool = False,
    seeds: int | None = None,
    lengths: Sequence[int] | str | None = None,
    data: str = "glyphs",
    identities: int | None = None,
    epochs: int | None = None,
    docs: Path | None = None,
) -> None:
    """Train with the tokens' loss L_C alone under each pattern of token weights, and say whether uniform wins.

    Increasing, decreasing, Gaussian and uniform weights, as in the supplement, and two that follow the tokens' losses:
    learned by uncertainty, and in proportion to the difficulty. Each with codes of several lengths, over seeds, judged
    on identities never seen. A run that was interrupted continues when the same command is given again.

    Args:
        output: folder for lambda.json, lambda.md, the pictures and the runs; runs/experiments/lambda, or lambda-quick.
        quick: a minute: one seed, few identities, one epoch.
        seeds: runs of each; 3, or 1 where quick.
        lengths: l of the codes, such as 3,5; for each the smallest vocabulary of 5 to 20 that has enough codes.
        data: the data set.
        identities: how many of it, at random, before a fifth is held out; 2,000, or 400.
        epochs: passes over the training images; 2, or 1.
        docs: a document whose block "experiments lambda" gets the results; pictures go into its folder pictures.
    """
    size = chosen(
        QUICK if quick else FULL, seeds=seeds, lengths=_lengths(lengths), identities=identities, epochs=epochs
    )
    if min(size.seeds, size.epochs) < 1:
        raise InputError(f"wanted at least one seed and epoch, got {size.seeds} and {size.epochs}")
    folder = place(NAME, output, quick)
    settings = {"data": data, "identities": size.identities, "epochs": size.epochs}
    with experiment(NAME, folder, {**settings, **bench_settings(CODES_ALONE)}, docs):
        bench = GlyphBench.prepare(SPLIT, data=data, identities=size.identities, folder=folder / "data")
        shapes = _shapes(size.lengths, bench.data.train.num_identities)
        runs = [
            {"weights": name, "length": shape.length, "vocab_size": shape.vocab_size, "seed": seed, **result}
            for shape in shapes
            for name, seed, result in _runs(bench, shape, size, folder)
        ]
        publish(NAME, _findings(size, data, shapes, runs), folder, docs)


def _lengths(given: Sequence[int] | str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        return tuple(sorted({int(length) for length in (given.split(",") if isinstance(given, str) else given)}))
    except ValueError as error:
        raise InputError(f"wanted lengths such as 3,5, got {given!r}") from error


def _shapes(lengths: Sequence[int], m: int) -> list[CodeShape]:
    there = {shape.length: shape for shape in advise(m)}
    if not lengths or (missing := [length for length in lengths if length not in there]):
        raise InputError(
            f"codes of {m:,} identities with 5 to 20 values a token have the lengths {', '.join(map(str, there))}; "
            f"got {', '.join(map(str, missing if lengths else [])) or 'none'}"
        )
    return [there[length] for length in lengths]


def _runs(bench: GlyphBench, shape: CodeShape, size: Size, folder: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """Name, seed and result of each run with codes of this shape; those that are there are read."""
    config = TokenizeConfig(vocab_size=shape.vocab_size, length=shape.length, seed=SPLIT)
    coded = replace(bench, codes=tokenize(bench.vectors, config))
    found = []
    for seed in range(size.seeds):
        for name, contender in CODES_ALONE.items():
            into = folder / f"length-{shape.length}" / folder_name(name) / f"seed-{seed}"
            training = TrainingConfig(epochs=size.epochs, batch_size=BATCH_SIZE, seed=seed)

            def run(
                of: str = name, what: Contender = contender, how: TrainingConfig = training, where: Path = into
            ) -> dict[str, Any]:
                return _run(coded, of, what, how, where)

            found.append((name, seed, once(into / "result.json", run)))
    return found


def _run(bench: GlyphBench, name: str, contender: Contender, training: TrainingConfig, folder: Path) -> dict[str, Any]:
    backbone, head, log = bench.fit(f"{name} token weights", contender, training, folder)
    held_out = bench.data.held_out
    assert isinstance(head, GIFLoss | AdaptiveTokens)
    return {
        **judge(embed(backbone, held_out), held_out.labels).to_dict(),
        "lambda": head.token_weights.tolist(),
        "loss": float(log.losses[-10:].mean()),
    }


def _scores(runs: Sequence[Mapping[str, Any]], name: str, length: int, measure: str) -> list[float]:
    own = [run for run in runs if (run["weights"], run["length"]) == (name, length)]
    found = [{**run["tar"], **run}.get(measure) for run in own]
    return [math.nan if value is None else float(value) for value in found]


def _findings(size: Size, data: str, shapes: Sequence[CodeShape], runs: Sequence[Mapping[str, Any]]) -> Findings:
    tables = [
        Table(
            f"Codes of {shape.length} tokens of {shape.vocab_size}: held-out identities",
            ("lambda", *MEASURES.values()),
            [
                (name, *(mean_and_spread(_scores(runs, name, shape.length, measure)) for measure in MEASURES))
                for name in CODES_ALONE
            ],
        )
        for shape in shapes
    ]
    conditions = (
        f"L_C alone on {data}, {size.identities:,} identities of which a fifth is held out, "
        f"{counted(size.epochs, 'epoch')}, mean ± deviation of {counted(size.seeds, 'seed')}."
    )
    return Findings(
        {"size": asdict(size), "runs": list(runs)},
        conditions,
        [sentence for shape in shapes for sentence in _verdict(shape, runs)],
        tables,
        {
            "weights": ("Fig. 6a: lambda by the token's place", lambda path: _draw_weights(shapes[-1], runs, path)),
            "accuracy": ("Fig. 6b: accuracy by the pattern", lambda path: _draw_accuracy(shapes, runs, path)),
        },
    )


def _verdict(shape: CodeShape, runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Whether uniform weights win, among the supplement's patterns and against those that follow the losses."""
    scores = {name: np.array(_scores(runs, name, shape.length, JUDGED_BY)) for name in CODES_ALONE}
    uniform = scores.pop("uniform")
    given = {name: scores.pop(name) for name in PATTERNS if name in scores}
    for among, others in (("the supplement's patterns", given), ("those that follow the losses", scores)):
        name, best = max(others.items(), key=lambda item: float(item[1].mean()))
        yield f"l = {shape.length}, {among}: {_compared(uniform - best, name)}"


def _compared(ahead: NDArray[np.float64], name: str) -> str:
    """Uniform weights against the best other: won or lost by more than the spread of the difference over the seeds."""
    mean, spread = float(ahead.mean()), float(ahead.std())
    if len(ahead) == 1:
        return f"uniform {mean:+.3f} against {name}, the best, by TAR@{JUDGED_BY}, one seed."
    told = "cannot be told from" if abs(mean) <= spread else "wins, ahead of" if mean > 0 else "does not win, behind"
    return f"uniform {told} {name}, the best other, by TAR@{JUDGED_BY}: {mean:+.3f} ± {spread:.3f}."


def _draw_weights(shape: CodeShape, runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """lambda against the token's index: as given, and as training ended for those that follow the losses."""
    drawing, axes = figure(6.4, 4.2)
    places = np.arange(1, shape.length + 1)
    for number, name in enumerate(CODES_ALONE):
        own = [run["lambda"] for run in runs if (run["weights"], run["length"]) == (name, shape.length)]
        axes.plot(places, np.mean(own, 0), marker="o", label=name, **line_style(number))
    axes.set(xlabel="token j", ylabel="lambda_j", ylim=(0, None))
    axes.set_xticks(places)
    axes.legend(frameon=False, fontsize="small")
    save_figure(drawing, path)


def _draw_accuracy(shapes: Sequence[CodeShape], runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    drawing, panels = figure(4.6 * len(shapes), 4.0, columns=len(shapes))
    for axes, shape in zip(np.atleast_1d(panels), shapes, strict=True):
        for number, name in enumerate(CODES_ALONE):
            scores = _scores(runs, name, shape.length, JUDGED_BY)
            draw_scores(axes, number, scores, color=line_style(number)["color"])
        axes.set_xticks(range(len(CODES_ALONE)), list(CODES_ALONE), rotation=25, ha="right")
        axes.set_title(f"l = {shape.length}, v = {shape.vocab_size}")
    np.atleast_1d(panels)[0].set_ylabel(f"TAR@{JUDGED_BY}, held-out identities")
    save_figure(drawing, path)
