"""The report of a run: report.html, which holds its pictures, and report.md beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gif.backbones import BackboneConfig, load_backbone
from gif.codes import IdentityCodes, judge_codes
from gif.codes.picture import plot_code_tree
from gif.data import IdentityDataset, IdentitySplit
from gif.evaluation import Embedder, Judgement, judge, plot_det, plot_roc
from gif.evaluation.embedding import ReadableImages
from gif.evaluation.thresholds import FIRM
from gif.files import load_tensors, read_json, write_text
from gif.planning.heads import gif_cost, softmax_cost
from gif.report import Document
from gif.report.pairs import PairScores, all_pairs
from gif.report.pictures import plot_head_cost, plot_pairs, plot_scores
from gif.run.stages import RECORD, StageRecord
from gif.training import plot_losses
from gif.vectors.store import CodeVectors

HARDEST = 12  # pairs of either kind
CHOICES = "choices.json"
LARGER = (100_000, 1_000_000, 10_000_000)  # identities that the head's cost is told of too
NAMED_IDENTITIES = 3


@dataclass(frozen=True)
class Trained:
    """A head that was trained: its name, its folder, images a step, and how long it took (s), None if not in one go."""

    head: str
    folder: Path
    batch_size: int
    seconds: float | None

    def numbers(self) -> dict[str, str]:
        """What evaluation.json says of the held-out identities, in words; empty where nothing was judged."""
        path = self.folder / "evaluation.json"
        if not path.exists():
            return {}
        found = read_json(path)["held_out"]
        found = found if "rank1" in found else next(iter(found.values()))  # of several sets the first
        rates = {f"TAR@{float(far):g}": share for far, share in found["tar"].items()}
        measures = {"rank-1": found["rank1"], **rates, "pairs": found["pair_accuracy"]}
        return {name: "?" if value is None else f"{value:.3f}" for name, value in measures.items()}

    def speed(self) -> str:
        """Images a second in training, in words."""
        return f"{len(self.losses()) * self.batch_size / self.seconds:,.0f}" if self.seconds else ""

    def losses(self) -> torch.Tensor:
        """The loss of every step, (steps,)."""
        return load_tensors(self.folder / "losses.safetensors", format="gif.losses/1")[0]["losses"]

    def parameters(self) -> int:
        """How many numbers the head trains, its buffers not among them."""
        state, _ = load_tensors(self.folder / "head.safetensors", format="gif.head/1")
        return sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())


@dataclass(frozen=True)
class _Judged:
    """The held-out images that could be read, their pairs, and the judgement of one head."""

    images: NDArray[np.int64]
    scores: PairScores
    judgement: Judgement


def data_files(folder: Path) -> tuple[Path, Path, Path]:
    """What the ``folder`` of a run has of its data: what is known of it, and two pictures."""
    place = folder / "data"
    return place / "data.json", place / "identities.png", place / "long-tail.png"


def write_report(
    folder: Path, data: str, split: IdentitySplit, trained: Sequence[Trained], judging: Mapping[str, Any]
) -> None:
    """Write report.html and report.md into the ``folder`` of a run whose other stages are done, and their pictures.

    Args:
        folder: of the run.
        data: what the data set is called.
        split: its identities, as the backbone reads their images.
        trained: the heads; the first is GIF.
        judging: the settings of `gif evaluate`, of which processes that read images and the device are taken.
    """
    pictures = folder / "pictures"
    document = Document(f"Identity codes for {Path(data).name}")
    codes = IdentityCodes.load(folder / "codes.safetensors")
    backbone = load_backbone(trained[0].folder / "backbone.safetensors")[1]
    judged = {}
    if len(split.held_out):
        judged = {each.head: _judged(each, split.held_out, judging) for each in trained}
    _summary(document, split, trained, judged)
    _data(document, folder, split)
    _vectors(document, folder)
    _codes(document, codes, folder, split.train, pictures)
    _training(document, trained, backbone, pictures)
    if judged:
        _judgement(document, trained, judged, split.held_out, pictures)
    _cost(document, codes, trained, backbone.embedding_size, trained[0].batch_size, pictures)
    _settings(document, folder)
    write_text(folder / "report.md", document.markdown(folder))
    write_text(folder / "report.html", document.html())


def _judged(each: Trained, held_out: IdentityDataset, settings: Mapping[str, Any]) -> _Judged:
    backbone, _ = load_backbone(each.folder / "backbone.safetensors")
    embedder = Embedder(flip=False, workers=settings.get("workers", 0), device=settings.get("device", "cpu"))
    numbers, embeddings = embedder.all_shares(backbone, ReadableImages(held_out), f"embedding with {each.head}")
    labels = held_out.labels[numbers]
    return _Judged(numbers.numpy(), all_pairs(embeddings, labels, HARDEST), judge(embeddings, labels))


def _summary(
    document: Document, split: IdentitySplit, trained: Sequence[Trained], judged: Mapping[str, _Judged]
) -> None:
    train, held = split.train, split.held_out
    told = f"{train.num_identities:,} identities ({len(train):,} images) were trained on"
    if not judged:
        document.paragraph(f"{told}; nobody was held out, so nothing is judged: see the choices at the end.")
        return
    found = judged[trained[0].head].judgement
    document.paragraph(
        f"{told}; {held.num_identities:,} others ({len(held):,} images), never seen in training, judge the backbone: "
        f"{found.genuine:,} genuine pairs (two images of one identity) and {found.impostor:,} impostor pairs."
    )
    columns = list(dict.fromkeys(name for each in trained for name in each.numbers()))
    rows = [[each.head, *(each.numbers().get(name, "") for name in columns), each.speed()] for each in trained]
    document.table(["head", *columns, "images/s"], rows)
    document.paragraph(
        "Rank-1: the nearest other image shows the same identity. TAR@f: the share of genuine pairs that are accepted "
        "at the threshold at which the share f of impostor pairs is; ? where there are too few pairs to know. Pairs: "
        "accuracy on as many genuine as impostor pairs, in ten folds. Images/s: in training, with all around it; "
        "empty where it was interrupted.",
        note=True,
    )


def _data(document: Document, folder: Path, split: IdentitySplit) -> None:
    known, sheet, tail = data_files(folder)
    facts = read_json(known)
    document.heading("Data")
    document.paragraph(f"`{facts['data']}`: {facts['identities']:,} identities, {facts['images']:,} images.")
    rows = []
    for name, part in (("trained on", split.train), ("held out", split.held_out)):
        if len(part):
            quartiles = np.quantile(part.image_counts().numpy(), np.linspace(0, 1, 5))
            spread = [f"{value:g}" for value in quartiles]
            rows.append([name, f"{part.num_identities:,}", f"{len(part):,}", *spread])
    columns = ["part", "identities", "images", "fewest", "first quartile", "median", "third quartile", "most"]
    document.table(columns, rows)
    document.paragraph("The last five columns: images of an identity.", note=True)
    document.picture(
        sheet,
        "images of some identities",
        "A row is an identity; from the one with most images to the one with fewest.",
    )
    document.picture(tail, "how many images identities have")
    if facts["left out"]:
        document.paragraph("Left out, and why:")
        for line in facts["left out"]:
            document.paragraph(line)
    else:
        document.paragraph("Nothing was left out: every image can be read, and nothing else lies there.")


def _vectors(document: Document, folder: Path) -> None:
    report = read_json(folder / "spread.json")
    before, after = report["before"], report["after"]
    document.heading("Code vectors")
    document.paragraph(
        "An identity's code vector is its mean image feature under a frozen encoder. Spreading them evenly over the "
        "sphere makes room between them, and should keep who is near whom."
    )
    kept = after.get("order_kept")
    rows = [
        ["optimality gap", _number(before["gap"]), _number(after["gap"]), "0 or less: as even as can be"],
        [
            "largest cosine of two",
            _number(report["largest_cosine"]["before"]),
            _number(report["largest_cosine"]["after"]),
            f"as many uniform points would have {report['largest_cosine']['uniform']:.3f}",
        ],
        ["length of the mean", _number(before["mean_norm"]), _number(after["mean_norm"]), "0 where they are centred"],
        ["order kept", "", _number(kept), "of triplets; 0.5 is chance, 1 all of it"],
    ]
    document.table(["measure", "before", "after", "read it as"], rows)
    document.picture(
        folder / "spread.png",
        "cosines to the nearest code vector",
        "Cosine of each code vector to the nearest other, before and after.",
    )
    document.picture(folder / "spread-gap.png", "optimality gap over epochs")


def _codes(document: Document, codes: IdentityCodes, folder: Path, train: IdentityDataset, pictures: Path) -> None:
    document.heading("Identity codes")
    document.paragraph(
        f"Each identity has {codes.length} tokens of {codes.vocab_size} values, no two the same: "
        f"{codes.vocab_size**codes.length:,} codes, of which {codes.free:,} are free. Whoever is alike should share "
        "the first tokens."
    )
    plot_code_tree(codes, train, pictures / "code-tree.png")
    document.picture(
        pictures / "code-tree.png",
        "identities by their codes",
        "A row is one prefix, and one image of each of some identities that have it.",
    )
    if len(codes) > 1:
        quality = judge_codes(codes, CodeVectors.load(folder / "spread.safetensors", mmap=True))
        rows = [[name, *(_number(value) for value in values), meaning] for name, values, meaning in quality.measures()]
        document.table(["measure", *(f"token {place + 1}" for place in range(codes.length)), "read it as"], rows)
        document.paragraph(
            f"Nearest neighbours share {quality.neighbor_prefix:.2f} first tokens on average, random pairs "
            f"{quality.random_prefix:.2f}."
        )


def _training(document: Document, trained: Sequence[Trained], backbone: BackboneConfig, pictures: Path) -> None:
    main = trained[0]
    document.heading("Training")
    document.paragraph(
        f"{len(main.losses()):,} steps of {main.batch_size} images, {backbone.name} network, images of "
        f"{backbone.channels} x {backbone.image_size} x {backbone.image_size}."
    )
    plot_losses({each.head: each.losses() for each in trained}, pictures / "losses.png")
    caption = "Losses of different heads are different quantities: compare their shape, not their height."
    document.picture(pictures / "losses.png", "loss of every step", caption if len(trained) > 1 else "")


def _judgement(
    document: Document,
    trained: Sequence[Trained],
    judged: Mapping[str, _Judged],
    held_out: IdentityDataset,
    pictures: Path,
) -> None:
    main = judged[trained[0].head]
    judgement = main.judgement
    document.heading("Judgement")
    curves = {head: each.judgement for head, each in judged.items()}
    plot_roc(curves, pictures / "roc.png")
    plot_det(curves, pictures / "det.png")
    document.picture(
        pictures / "roc.png",
        "true-accept rate against false-accept rate",
        f"A curve begins at the smallest rate that {judgement.impostor:,} impostor pairs can show.",
    )
    document.picture(pictures / "det.png", "false-reject rate against false-accept rate")
    found = judgement.thresholds
    known = {far: at for far, at in found.at.items() if at is not None}
    few = {far: "" if at.is_firm else " ?" for far, at in known.items()}
    rows = [
        [f"{far:g}", f"{at.threshold:.3f}", f"{at.tar:.3f}", f"{at.false_accepts:,}{few[far]}"]
        for far, at in known.items()
    ]
    rows.append([f"{found.eer:.3g} (equal error)", f"{found.eer_threshold:.3f}", f"{1 - found.eer:.3f}", ""])
    document.paragraph(
        f"Accept two images as one identity where their cosine is at least the threshold ({trained[0].head}); at "
        f"{found.eer_threshold:.3f} as many genuine pairs are refused as impostor pairs accepted, {found.eer:.1%}."
    )
    document.table(["false-accept rate", "threshold", "true-accept rate", "false accepts"], rows)
    if any(few.values()):
        document.paragraph(f"? Fewer than {FIRM} false accepts: a matter of a few pairs.", note=True)
    plot_scores(main.scores, {far: at.threshold for far, at in known.items()}, pictures / "scores.png")
    document.picture(pictures / "scores.png", "distribution of cosines, with thresholds")
    for kind, pairs, title, caption in (
        (
            "genuine",
            main.scores.hardest_genuine,
            "One identity, lowest cosines",
            "Look here for wrong labels and broken images.",
        ),
        (
            "impostor",
            main.scores.hardest_impostor,
            "Two identities, highest cosines",
            "Look here for one person in two folders.",
        ),
    ):
        path = pictures / f"hardest-{kind}.png"
        shown = [type(pair)(int(main.images[pair.first]), int(main.images[pair.second]), pair.cosine) for pair in pairs]
        plot_pairs(held_out, shown, title, path)
        document.picture(path, title.lower(), caption)


def _cost(
    document: Document, codes: IdentityCodes, trained: Sequence[Trained], width: int, batch: int, pictures: Path
) -> None:
    m, v = len(codes), codes.vocab_size
    document.heading("What the head costs")
    rows = []
    for count in (m, *(larger for larger in LARGER if larger > m)):
        ours = gif_cost(count, width=width, batch=batch, vocab_size=v)
        costs = (ours, softmax_cost(count, width=width, batch=batch))
        memory, work = [f"{1e-6 * cost.bytes:,.1f}" for cost in costs], [f"{1e-9 * cost.flops:,.2f}" for cost in costs]
        rows.append([f"{count:,}", *memory, *work])
    document.table(["identities", "GIF, MB", "softmax, MB", "GIF, GFLOP", "softmax, GFLOP"], rows)
    document.paragraph(
        f"A step of the head alone, by formula: width {width}, batches of {batch}, float32. A softmax has a centre for "
        "each identity, and all take part in each step; the code's head knows the length of the codes alone. Of a few "
        "thousand identities and fewer it costs more than a softmax.",
        note=True,
    )
    plot_head_cost(m, width, batch, pictures / "head-cost.png")
    document.picture(
        pictures / "head-cost.png", "memory and work of the head against the number of identities", "Points: this run."
    )
    if len(trained) > 1:
        document.table(["head", "numbers that it keeps"], [[each.head, f"{each.parameters():,}"] for each in trained])


def _settings(document: Document, folder: Path) -> None:
    document.heading("Settings, and why")
    if (folder / CHOICES).exists():
        chosen = json.loads((folder / CHOICES).read_text(encoding="utf-8"))
        rows = [[each["what"], str(each["value"]), each["why"]] for each in chosen]
        document.table(["setting", "chosen", "because"], rows)
    document.paragraph("`config.yaml` has them all; each stage takes it: `gif train --config config.yaml --output X`.")
    timings = StageRecord(folder).read()
    rows = [[name, f"{timing.seconds:,.1f} s"] for name, timing in timings.items() if timing.seconds is not None]
    document.table(["stage", "took"], rows)
    document.paragraph(f"Of a stage that was interrupted, its last part (`{RECORD}`).", note=True)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"
