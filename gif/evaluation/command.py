"""`gif evaluate`: one trained backbone, any of the field's benchmarks, one folder of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from gif.backbones import TrainedOn, fingerprint, image_fit, load_backbone, load_trained_on, model_file
from gif.data import HELD_OUT, IdentityDataset, ImageDecoder, left_out, load_data
from gif.data.decoding import MAX_PIXELS
from gif.data.identities import quote_some
from gif.distributed import process_group, rank
from gif.errors import InputError, OutputError
from gif.evaluation.benchmarks import Benchmark, HeldOutIdentities, HeldOutSets, IjbFolders, Outcome, PairFiles
from gif.evaluation.calibration import Calibrated, Calibration, add_calibration
from gif.evaluation.curves import plot_det, plot_identification, plot_roc
from gif.evaluation.embedding import Embedder
from gif.files import write_text
from gif.ownership import check_folder
from gif.progress import print_table, say, say_once

Overlap = Literal["refuse", "drop", "keep"]


def evaluate(
    model: Path,
    *,
    data: str | None = None,
    identities: float | None = None,
    held_out: int | float = HELD_OUT,
    overlap: Overlap = "refuse",
    pairs: list[Path] | Path | None = None,
    ijb: list[Path] | Path | None = None,
    output: Path | None = None,
    flip: bool = True,
    batch_size: int = 256,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
) -> None:
    """Judge a trained backbone: on pairs (LFW, CFP-FP, AgeDB, ...), on IJB, on identities that training never saw.

    Everything that is given is judged, after a look at all of it. Several processes share the images:
    torchrun --nproc-per-node 8 -m gif.cli evaluate ...

    Args:
        model: backbone.safetensors of `gif train`, a folder of it or of `gif hub`, or insightface's model.pt.
        data: a data set, a name or a path (docs/data.md); all pairs of images of its held-out identities are judged.
            Of glyph-words four sets, which are the same whatever the number of identities.
        identities: how many of the data set's there are, as `gif train` was told.
        held_out: share of the data's identities that training never saw, or how many, as `gif train` was told; 1 judges
            all of them.
        overlap: what becomes of identities to be judged that the backbone was trained on, by their names: "refuse"
            stops, "drop" leaves them out, "keep" judges them too and says so.
        pairs: verification .bin files, '["lfw.bin", "cfp_fp.bin"]', or a folder of them.
        ijb: the folder of IJB-B or IJB-C, with loose_crop and meta, or '["IJBB", "IJBC"]'; 1:1 and 1:N are judged.
        output: folder for evaluation.json, roc.png, det.png and identification.png; beside the model where it is not
            given.
        flip: for pairs and IJB, add the embedding of the mirrored image, as their protocols do.
        batch_size: images embedded at once.
        workers: processes that read images, for each process that embeds.
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
        device: where to compute, "cpu", "cuda", or "auto": a GPU if there is one.
    """
    if data is None and not pairs and not ijb:
        raise InputError("nothing to judge by; give --pairs lfw.bin, --ijb IJBC, --data DATA, or several of them")
    model = model_file(model)
    network, config = load_backbone(model)
    trained_on = load_trained_on(model)
    decoder = ImageDecoder(config.image_size, config.channels, fit=image_fit(model), max_pixels=max_pixels)
    with process_group(device) as own:
        embedder = Embedder(flip, batch_size, workers, own)
        benchmarks: list[Benchmark] = []
        images: IdentityDataset | None = None
        judged = known = 0
        if data is not None:
            split = load_data(data, identities=identities, held_out=held_out, decoder=decoder)
            sets = split.sets or {"": split.held_out}
            unseen = {name: _unseen(part, model, trained_on, overlap) for name, part in sets.items()}
            sets, known = {name: part for name, (part, _) in unseen.items()}, sum(count for _, count in unseen.values())
            judged = sum(part.num_identities for part in sets.values())
            images = next(iter(sets.values()))
            benchmarks.append(HeldOutSets(sets) if split.sets else HeldOutIdentities(images))
        if pairs:
            benchmarks.append(PairFiles(pairs, decoder))
        if ijb:
            benchmarks.append(IjbFolders(ijb, decoder))
        check_folder(output or model.parent)
        mark = fingerprint(network)
        outcomes = [benchmark.judge(network, embedder) for benchmark in benchmarks]
        if images is not None and (report := left_out(images)):
            say(report)
        if rank() == 0:
            settings = {"model": str(model), "data": data, "held_out": held_out, "flip": flip}
            if images is not None:
                settings |= {"identities": judged, "of them trained on": known if trained_on else None}
            write_outcomes(outcomes, output or model.parent, settings)
            _store_thresholds(model, mark, outcomes, str(data))


def _unseen(
    images: IdentityDataset, model: Path, trained_on: TrainedOn | None, overlap: Overlap
) -> tuple[IdentityDataset, int]:
    """What is to be judged of ``images``, and how many of its identities the backbone was trained on.

    Raises ValueError for such identities where ``overlap`` is "refuse". Where all of them are called by numbers, and
    another data set was trained on, they may be others: that is said, and they are judged.
    """
    if trained_on is None:
        say_once(
            f"{model} does not say whom it was trained on: whether any of those judged were among them is not known"
        )
        return images, 0
    seen = torch.isin(images.names.digests(), trained_on.digests)
    count = int(seen.sum())
    if count == 0:
        return images, 0
    told = (
        f"{count:,} of the {images.num_identities:,} identities to be judged are called as ones that {model} was "
        f"trained on ({quote_some(images.names, seen.numpy())})"
    )
    if overlap == "drop":
        say_once(f"{told}: they are left out")
        return images.of_identities((~seen).nonzero().flatten()), 0
    numbers = all(name.isdecimal() for name in images.names.where(seen))
    elsewhere = numbers and trained_on.data != images.origin
    if overlap == "refuse" and not elsewhere:
        raise InputError(
            f"{told}, and the judgement would not be one of identities never seen; give the data and the held_out of "
            "training, or --overlap drop to leave them out, or --overlap keep where they are others or it is meant so"
        )
    say_once(f"{told}: unless they are others, this is no judgement of identities never seen")
    return images, count


def _store_thresholds(model: Path, mark: str, outcomes: Sequence[Outcome], data: str) -> None:
    """Keep the thresholds beside the model. Where nothing can be written there, that is said: the rest is done."""
    sets = {
        name: Calibrated(thresholds, outcome.flip, data if outcome.kind == "held_out" else "its pairs")
        for outcome in outcomes
        for name, thresholds in outcome.thresholds.items()
    }
    if not sets:
        return
    try:
        say(f"stored the thresholds for gif verify in {add_calibration(model, Calibration(mark, sets))}")
    except OutputError as error:
        say(f"the thresholds are not stored for gif verify: {error}")


def write_outcomes(outcomes: Sequence[Outcome], folder: Path, settings: Mapping[str, Any]) -> None:
    """Print the tables; write evaluation.json, roc.png, det.png and, where probes were searched, identification.png."""
    curves = {name: curve for outcome in outcomes for name, curve in outcome.curves.items()}
    searches = {name: found for outcome in outcomes for name, found in outcome.identification.items()}
    notes = [note for outcome in outcomes for note in outcome.notes]
    how = {**settings, "notes": notes} if notes else dict(settings)
    results = {"settings": how, **{outcome.kind: outcome.numbers for outcome in outcomes}}
    for outcome in outcomes:
        for table in outcome.tables:
            print_table(table)
    for note in notes:
        say(f"warning: {note}")
    write_text(folder / "evaluation.json", json.dumps(results, indent=2, allow_nan=False))
    plot_roc(curves, folder / "roc.png")
    plot_det(curves, folder / "det.png")
    drawn = [folder / "roc.png", folder / "det.png"]
    if any(found.curve is not None for found in searches.values()):
        plot_identification(searches, folder / "identification.png")
        drawn.append(folder / "identification.png")
    say(f"wrote {folder / 'evaluation.json'}, drew {', '.join(map(str, drawn))}")
