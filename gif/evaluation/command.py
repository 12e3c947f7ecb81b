"""`gif evaluate`: one trained backbone, any of the field's benchmarks, one folder of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gif.backbones import load_backbone
from gif.data import HELD_OUT, IdentityDataset, ImageDecoder, broken_report, load_data
from gif.distributed import process_group, rank
from gif.errors import InputError
from gif.evaluation.benchmarks import Benchmark, HeldOutIdentities, IjbFolders, Outcome, PairFiles
from gif.evaluation.curves import plot_det, plot_identification, plot_roc
from gif.evaluation.embedding import Embedder
from gif.files import write_text
from gif.ownership import check_folder
from gif.progress import console, say


def evaluate(
    model: Path,
    *,
    data: str | None = None,
    held_out: int | float = HELD_OUT,
    pairs: list[Path] | Path | None = None,
    ijb: list[Path] | Path | None = None,
    output: Path | None = None,
    flip: bool = True,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "cpu",
) -> None:
    """Judge a trained backbone: on pairs (LFW, CFP-FP, AgeDB, ...), on IJB, on identities that training never saw.

    Everything that is given is judged, after a look at all of it. Several processes share the images:
    torchrun --nproc-per-node 8 -m gif.cli evaluate ...

    Args:
        model: backbone.safetensors, as `gif train` writes it, or insightface's model.pt.
        data: a data set, a name or a path (docs/data.md); all pairs of images of its held-out identities are judged.
        held_out: share of the data's identities that training never saw, or how many, as `gif train` was told; 1 judges
            all of them.
        pairs: verification .bin files, '["lfw.bin", "cfp_fp.bin"]', or a folder of them.
        ijb: the folder of IJB-B or IJB-C, with loose_crop and meta, or '["IJBB", "IJBC"]'; 1:1 and 1:N are judged.
        output: folder for evaluation.json, roc.png, det.png and identification.png; beside the model where it is not
            given.
        flip: for pairs and IJB, add the embedding of the mirrored image, as their protocols do.
        batch_size: images embedded at once.
        workers: processes that read images, for each process that embeds.
        device: where to compute, "cpu" or "cuda".
    """
    if data is None and not pairs and not ijb:
        raise InputError("nothing to judge by; give --pairs lfw.bin, --ijb IJBC, --data DATA, or several of them")
    network, config = load_backbone(model)
    decoder = ImageDecoder(config.image_size, config.channels)
    with process_group(device) as own:
        embedder = Embedder(flip, batch_size, workers, own)
        benchmarks: list[Benchmark] = []
        images: IdentityDataset | None = None
        if data is not None:
            images = load_data(data, held_out=held_out, decoder=decoder).held_out
            benchmarks.append(HeldOutIdentities(images))
        if pairs:
            benchmarks.append(PairFiles(pairs, decoder))
        if ijb:
            benchmarks.append(IjbFolders(ijb, decoder))
        check_folder(output or model.parent)
        outcomes = [benchmark.judge(network, embedder) for benchmark in benchmarks]
        if images is not None and (report := broken_report(images)):
            say(report)
        if rank() == 0:
            settings = {"model": str(model), "data": data, "held_out": held_out, "flip": flip}
            write_outcomes(outcomes, output or model.parent, settings)


def write_outcomes(outcomes: Sequence[Outcome], folder: Path, settings: Mapping[str, Any]) -> None:
    """Print the tables; write evaluation.json, roc.png, det.png and, where probes were searched, identification.png."""
    curves = {name: curve for outcome in outcomes for name, curve in outcome.curves.items()}
    searches = {name: found for outcome in outcomes for name, found in outcome.identification.items()}
    results = {"settings": dict(settings), **{outcome.kind: outcome.numbers for outcome in outcomes}}
    for outcome in outcomes:
        for table in outcome.tables:
            console.print(table)
    write_text(folder / "evaluation.json", json.dumps(results, indent=2, allow_nan=False))
    plot_roc(curves, folder / "roc.png")
    plot_det(curves, folder / "det.png")
    drawn = [folder / "roc.png", folder / "det.png"]
    if any(found.curve is not None for found in searches.values()):
        plot_identification(searches, folder / "identification.png")
        drawn.append(folder / "identification.png")
    say(f"wrote {folder / 'evaluation.json'}, drew {', '.join(map(str, drawn))}")
