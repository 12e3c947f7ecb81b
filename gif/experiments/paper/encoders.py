"""`gif experiments encoders`: code vectors from different frozen encoders (the supplement's section 9, Table 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from gif.backbones import BackboneConfig
from gif.codes import TokenizeConfig, tokenize
from gif.data import HELD_OUT, IdentityDataset, IdentitySplit, ImageDecoder, load_data, split_identities
from gif.encoders import Encoder, make_encoder
from gif.errors import InputError
from gif.evaluation import judge
from gif.evaluation.benchmarks import IJB_FAR, HeldOutIdentities, IjbFolders, PairFiles
from gif.evaluation.embedding import Embedder
from gif.experiments.comparison import MEASURES, mean_and_spread
from gif.experiments.glyph_bench import (
    BACKBONE,
    BATCH_SIZE,
    CONTENDERS,
    SPREAD_EPOCHS,
    VOCAB_SIZE,
    GlyphBench,
    bench_settings,
    folder_name,
)
from gif.experiments.paper.report import Findings, Table, chosen, counted, draw_scores, experiment, once, place, publish
from gif.experiments.paper.self_distillation import distilled_encoder
from gif.plotting import COLORS, figure, save_figure
from gif.training import TrainingConfig
from gif.vectors import CodeVectors, SpreadConfig, initial_code_vectors, spread_code_vectors

NAME = "encoders"
EncoderName = Literal["pixels", "distilled", "random", "clip", "dino"]
OFFLINE: tuple[EncoderName, ...] = ("pixels", "distilled", "random")
HEADS = tuple(name for name, contender in CONTENDERS.items() if contender.head.kind == "gif")
TRAINED = ("GIF, published", "GIF")
SPLIT = 1  # seed of the splits, of random vectors, of spreading and of codes
APART = 0.3  # share of the identities to train on with whose images the encoder without labels is trained
ENCODED = 256  # images at a time
JUDGED_BY = "0.001"
TABLE_4 = {
    "lfw": "LFW",
    "cplfw": "CPLFW",
    "calfw": "CALFW",
    "cfp_fp": "CFP-FP",
    "agedb_30": "Age-DB",
    "IJB-B": "IJB-B",
    "IJB-C": "IJB-C",
}
"""Columns of the supplement's Table 4, by the names of the files that the field passes on."""


@dataclass(frozen=True)
class Size:
    """Runs of each, identities before the splits (all where None), and passes over the images of each training."""

    seeds: int
    identities: int | None
    epochs: int
    encoder_epochs: int


FULL = Size(seeds=3, identities=2000, epochs=2, encoder_epochs=10)
QUICK = Size(seeds=1, identities=400, epochs=1, encoder_epochs=2)


@dataclass(frozen=True)
class Weights:
    """Which networks "clip" and "dino" are, as for `gif vectors`.

    Args:
        clip_model: of open_clip.
        clip: file with its weights, or a tag of its hub.
        dino_model: of timm.
        dino: file with its weights, instead of the hub.
    """

    clip_model: str | None = None
    clip: str | None = None
    dino_model: str | None = None
    dino: str | None = None


@dataclass(frozen=True)
class How:
    """How the runs are computed; the learning rate is the recipe's.

    Args:
        batch_size: images a step.
        micro_batch_size: images that are held at once; all of a step where not given.
        device: where to train, "cpu" or "cuda".
        precision: "fp32", or autocast to "bf16" or "fp16".
        channels_last: memory format of backbone and images; faster for convolutions on a GPU.
        compile: torch.compile the backbone.
        workers: processes that read images.
    """

    batch_size: int = BATCH_SIZE
    micro_batch_size: int | None = None
    device: str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    workers: int = 0

    def training(self, epochs: int, seed: int) -> TrainingConfig:
        """A run of so many epochs with that seed. Raises ValueError for a number out of its range."""
        return TrainingConfig(epochs=epochs, seed=seed, **vars(self))


def encoders(
    output: Path | None = None,
    *,
    quick: bool = False,
    encoders: Sequence[EncoderName] = OFFLINE,
    weights: Weights = Weights(),
    heads: Sequence[str] = TRAINED,
    data: str = "glyphs",
    identities: int | None = None,
    held_out: int | float = HELD_OUT,
    seeds: int | None = None,
    epochs: int | None = None,
    encoder_epochs: int | None = None,
    backbone: BackboneConfig = BACKBONE,
    training: How = How(),
    vocab_size: int = VOCAB_SIZE,
    pairs: list[Path] | Path | None = None,
    ijb: list[Path] | Path | None = None,
    docs: Path | None = None,
) -> None:
    """Train from the code vectors of different encoders, each spread or not, and judge all alike.

    The claim under test: all that an encoder has to give is a meaningful order of similarity. Without a download these
    are pixels, a small encoder trained without labels, by self-distillation, on identities that take no other part, and
    random vectors, which have no order. With CLIP, DINO, faces and the evaluation sets it is the paper's Table 4:

        gif experiments encoders --encoders '["clip", "dino"]' --data ms1mv2 --backbone.name iresnet100
        --backbone.channels 3 --backbone.image_size 112 --training.device cuda --epochs 20 --pairs BINS --ijb
        '["IJBB", "IJBC"]'

    The backbone's embeddings are as wide as the encoder's vectors. A run that was interrupted continues.

    Args:
        output: folder for encoders.json, encoders.md, the picture and the runs; runs/experiments/encoders, or
            encoders-quick.
        quick: a minute: one seed, few identities, one epoch.
        encoders: which; "clip" and "dino" load from a hub or from --weights.
        weights: which networks "clip" and "dino" are.
        heads: which recipes are trained: "GIF, published" is the paper's, with fixed code vectors.
        data: the data set, a name or a path.
        identities: how many of it, at random, before some are held out; 2,000 glyphs, or 400 where quick, else all.
        held_out: share of the identities that judge, or how many: all pairs of their images are compared.
        seeds: runs of each; 3, or 1.
        epochs: passes over the training images; 2, or 1.
        encoder_epochs: those of the encoder without labels over its own; 10, or 2.
        backbone: what is trained; its embedding_size is the width of "pixels", "distilled" and "random".
        training: batch size, device and precision of the runs.
        vocab_size: values of a token.
        pairs: verification .bin files, or a folder of them: lfw, cplfw, calfw, cfp_fp, agedb_30.
        ijb: the folder of IJB-B or IJB-C, or both, for a backbone of aligned faces.
        docs: a document whose block "experiments encoders" gets the results; pictures go into its folder pictures.
    """
    size = QUICK if quick else FULL
    if data != "glyphs":
        size = replace(size, identities=None)
    size = chosen(size, seeds=seeds, identities=identities, epochs=epochs, encoder_epochs=encoder_epochs)
    _check(size, encoders, heads)
    decoder = ImageDecoder(backbone.image_size, backbone.channels)
    benchmarks: list[PairFiles | IjbFolders] = []
    if pairs:
        benchmarks.append(PairFiles(pairs, decoder))
    if ijb:
        benchmarks.append(IjbFolders(ijb, decoder))
    folder = place(NAME, output, quick)
    settings = {
        "data": data,
        "held_out": held_out,
        **{name: value for name, value in asdict(size).items() if name != "seeds"},
        "backbone of the runs": asdict(backbone),
        "training": training.training(size.epochs, 0).settings(),
        "tokens": vocab_size,
        "weights": asdict(weights),
        **bench_settings({name: CONTENDERS[name] for name in HEADS}),
    }
    with experiment(NAME, folder, settings, docs):
        split = load_data(data, identities=size.identities, held_out=held_out, seed=SPLIT, decoder=decoder)
        lab = Laboratory.open(folder, split, size, backbone, training)
        made, runs = {}, []
        for name in dict.fromkeys(encoders):
            for spread in (False, True):
                bench, report = lab.code(name, weights, spread=spread, vocab_size=vocab_size)
                made[_named(name, spread)] = report
                for head in dict.fromkeys(heads):
                    for seed in range(size.seeds):
                        run = lab.run(bench, _named(name, spread), head, seed, benchmarks)
                        runs.append({"vectors": _named(name, spread), "head": head, "seed": seed, **run})
        publish(NAME, _findings(size, data, heads, made, runs), folder, docs)


def _check(size: Size, encoders: Sequence[str], heads: Sequence[str]) -> None:
    if min(size.seeds, size.epochs, size.encoder_epochs) < 1:
        raise InputError(
            f"wanted at least one seed and epoch, got {size.seeds} seeds, {size.epochs}, {size.encoder_epochs} epochs"
        )
    for what, given, known in (("encoders", encoders, get_args(EncoderName)), ("heads", heads, HEADS)):
        if not given or (unknown := [name for name in given if name not in known]):
            raise InputError(f"wanted {what} among {list(known)}, got {unknown if given else 'none'}")


def _named(encoder: str, spread: bool) -> str:
    return f"{encoder}, spread" if spread else encoder


@dataclass(frozen=True)
class Laboratory:
    """What every run shares: images to train on, others to judge by, others still for the encoder without labels."""

    folder: Path
    data: IdentitySplit
    apart: IdentityDataset
    size: Size
    backbone: BackboneConfig
    how: How

    @classmethod
    def open(
        cls,
        folder: Path,
        split: IdentitySplit,
        size: Size,
        backbone: BackboneConfig,
        how: How,
    ) -> Laboratory:
        """Set a part of the identities to train on apart."""
        train, apart = split_identities(split.train, APART, SPLIT)
        return cls(folder, IdentitySplit(train, split.held_out), apart, size, backbone, how)

    def code(
        self, name: EncoderName, weights: Weights, *, spread: bool, vocab_size: int
    ) -> tuple[GlyphBench, dict[str, Any]]:
        """Code vectors of an encoder and their codes, and what is to be said of them; what is there is read."""
        place_of = self.folder / "vectors" / name
        initial, final = place_of / "initial.safetensors", place_of / "spread.safetensors"
        alone = place_of / "alone.json"
        if not initial.exists() or not alone.exists():
            encoder = self._encoder(name, weights)
            vectors = self._random() if encoder is None else initial_code_vectors(self.data.train, encoder)
            vectors.save(initial)
            once(alone, lambda: {} if encoder is None else self._judged(encoder))
        report = {"the encoder alone": once(alone, dict)}
        vectors = CodeVectors.load(initial)
        if spread:
            gaps = place_of / "spread.json"
            if not final.exists() or not gaps.exists():
                done = spread_code_vectors(vectors, SpreadConfig(epochs=SPREAD_EPOCHS, seed=SPLIT))
                vectors.save(final)
                once(gaps, done.to_dict)
            vectors, report["spreading"] = CodeVectors.load(final), once(gaps, dict)
        codes = tokenize(vectors, TokenizeConfig(vocab_size=vocab_size, seed=SPLIT))
        config = replace(self.backbone, embedding_size=vectors.width)
        return GlyphBench(self.data, vectors, None, codes, config), report

    def _encoder(self, name: EncoderName, weights: Weights) -> Encoder | None:
        """The encoder of that name; None for random vectors, which have none."""
        if name == "random":
            return None
        if name == "distilled":
            training = self.how.training(self.size.encoder_epochs, SPLIT)
            training = replace(training, batch_size=min(training.batch_size, len(self.apart)))
            return distilled_encoder(self.apart, self.backbone, self.folder / "encoder", training)
        if name == "pixels":
            return make_encoder("pixels", width=self.backbone.embedding_size)
        given = {"clip": (weights.clip_model, weights.clip), "dino": (weights.dino_model, weights.dino)}
        model, file = given[name]
        return make_encoder(name, width=self.backbone.embedding_size, model=model, weights=file, device=self.how.device)

    def _random(self) -> CodeVectors:
        generator = torch.Generator().manual_seed(SPLIT)
        shape = self.data.train.num_identities, self.backbone.embedding_size
        return CodeVectors(torch.randn(shape, generator=generator), identities=self.data.train.identities)

    def _judged(self, encoder: Encoder) -> dict[str, Any]:
        """How well the encoder itself knows the identities that judge."""
        held_out = self.data.held_out
        every = torch.arange(len(held_out)).split(ENCODED)
        features, labels = zip(
            *((encoder(images).cpu(), labels) for images, labels in (held_out.batch(some.tolist()) for some in every)),
            strict=True,
        )
        return judge(torch.cat(features), torch.cat(labels)).to_dict()

    def run(
        self, bench: GlyphBench, name: str, head: str, seed: int, benchmarks: Sequence[PairFiles | IjbFolders]
    ) -> dict[str, Any]:
        """Train a head from these code vectors and judge it; what is there is read, and judged by what is new."""
        folder = self.folder / folder_name(name) / folder_name(head) / f"seed-{seed}"
        training = self.how.training(self.size.epochs, seed)
        backbones: list[nn.Module] = []

        def backbone() -> nn.Module:
            if not backbones:  # a run that is done trains no more: it loads its last checkpoint
                backbones.append(bench.fit(f"{head} from {name}", CONTENDERS[head], training, folder)[0])
            return backbones[0]

        def held_out() -> dict[str, Any]:
            part = HeldOutIdentities(self.data.held_out)
            return part.judge(backbone(), Embedder(device=training.device)).numbers

        found = {"held_out": once(folder / "held-out.json", held_out), "benchmarks": {}}
        for benchmark in benchmarks:
            kind = "pairs" if isinstance(benchmark, PairFiles) else "ijb"
            there = benchmark.pairs if isinstance(benchmark, PairFiles) else benchmark.benchmarks
            kept = folder / f"{kind}-{'-'.join(map(folder_name, there))}.json"

            def scores(of: PairFiles | IjbFolders = benchmark) -> dict[str, float]:
                judged = of.judge(backbone(), Embedder(device=training.device)).scores
                return {what.removesuffix(f" TAR@{IJB_FAR:g}"): score for what, score in judged.items()}

            found["benchmarks"] |= once(kept, scores)
        return found


def _scores(runs: Sequence[Mapping[str, Any]], vectors: str, head: str, measure: str) -> list[float]:
    own = [run for run in runs if (run["vectors"], run["head"]) == (vectors, head)]
    found = [{**run["held_out"]["tar"], **run["held_out"], **run["benchmarks"]}.get(measure) for run in own]
    return [math.nan if value is None else float(value) for value in found]


def _findings(
    size: Size,
    data: str,
    heads: Sequence[str],
    made: Mapping[str, Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
) -> Findings:
    judged = list(runs[0]["benchmarks"])
    columns = {name: title for name, title in TABLE_4.items() if name in judged}
    columns |= {name: name for name in judged if name not in TABLE_4}
    tables = [
        Table(
            f"{head}: held-out identities",
            ("code vectors", *MEASURES.values()),
            [(name, *(mean_and_spread(_scores(runs, name, head, measure)) for measure in MEASURES)) for name in made],
        )
        for head in heads
    ]
    if columns:
        rows = [
            (f"{head} ({name})", data, *(_percent(_scores(runs, name, head, measure)) for measure in columns))
            for head in heads
            for name in made
        ]
        title = "Table 4: verification accuracy, and TAR@FAR=1e-4 of IJB, in per cent"
        tables.insert(0, Table(title, ("Method", "Train Set", *columns.values()), rows))
    tables.append(_of_encoders(made))
    count = "all" if size.identities is None else f"{size.identities:,}"
    return Findings(
        {"size": asdict(size), "vectors": made, "runs": list(runs)},
        f"{data}, {count} identities. Those held out judge; {APART:.0%} of the others train the encoder without "
        f"labels, {counted(size.encoder_epochs, 'epoch')}, and nothing else; the rest train for "
        f"{counted(size.epochs, 'epoch')}; mean ± deviation of {counted(size.seeds, 'seed')}.",
        [sentence for head in heads for sentence in _verdict(head, made, runs)],
        tables,
        {"accuracy": ("Accuracy by where code vectors come from", lambda path: _draw(heads, made, runs, path))},
    )


def _percent(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values):.2f}"


def _of_encoders(made: Mapping[str, Mapping[str, Any]]) -> Table:
    """What the encoders know by themselves, and what spreading leaves of their order."""
    rows: list[tuple[str, ...]] = []
    for name, report in made.items():
        alone, spread = report["the encoder alone"], report.get("spreading")
        gaps = "" if spread is None else f"{spread['before']['gap']:.3f}, {spread['after']['gap']:.4f}"
        rows.append((name, f"{alone['rank1']:.3f}" if alone else "none", gaps))
    return Table(
        "The encoders themselves: rank-1 of their features on the identities that judge, and the optimality gap of the "
        "code vectors before and after spreading",
        ("code vectors", "rank-1", "gap"),
        rows,
    )


def _verdict(head: str, made: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Whether order helps, and whether it matters whose: differences seed by seed, with their spread."""
    spread = [name for name in made if name.endswith(", spread")]
    ordered = [name for name in spread if not name.startswith("random")]
    for name in ordered:
        if "random, spread" in spread:
            yield f"{head}: {_difference(name, 'random, spread', head, runs)}"
    for one, other in pairwise(ordered):
        yield f"{head}: {_difference(one, other, head, runs)}"
    for name in spread:
        yield f"{head}: {_difference(name, name.removesuffix(', spread'), head, runs)}"


def _difference(one: str, other: str, head: str, runs: Sequence[Mapping[str, Any]]) -> str:
    ahead = np.array(_scores(runs, one, head, JUDGED_BY)) - np.array(_scores(runs, other, head, JUDGED_BY))
    mean, deviation = float(ahead.mean()), float(ahead.std())
    if len(ahead) == 1:
        return f"{one} {mean:+.3f} against {other} by TAR@{JUDGED_BY}, one seed."
    told = "cannot be told from" if abs(mean) <= deviation else "is ahead of" if mean > 0 else "is behind"
    return f"{one} {told} {other} by TAR@{JUDGED_BY}: {mean:+.3f} ± {deviation:.3f}."


def _draw(heads: Sequence[str], made: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    drawing, panels = figure(5.2 * len(heads), 4.4, columns=len(heads))
    for axes, head in zip(np.atleast_1d(panels), heads, strict=True):
        for number, name in enumerate(made):
            scores = _scores(runs, name, head, JUDGED_BY)
            style = {"color": COLORS[number // 2 % len(COLORS)], "fillstyle": "full" if number % 2 else "none"}
            draw_scores(axes, number, scores, **style)
        axes.set_xticks(range(len(made)), list(made), rotation=25, ha="right")
        axes.set_title(head)
    np.atleast_1d(panels)[0].set_ylabel(f"TAR@{JUDGED_BY}, held-out identities")
    save_figure(drawing, path)
