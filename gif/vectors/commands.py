"""`gif vectors` and `gif spread`: code vectors from images, and evenly over the sphere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from gif.data import HELD_OUT, ImageDecoder, load_data
from gif.data.decoding import MAX_PIXELS
from gif.distributed import process_group, rank, wait_for_all, world_size
from gif.encoders import Precision, make_encoder
from gif.encoders.basis import Basis, EncoderOptions, basis_path
from gif.files import write_text
from gif.options import options_of
from gif.ownership import check_output, existing, hold
from gif.progress import say
from gif.resume import own_file
from gif.vectors.config import SpreadConfig
from gif.vectors.in_file import spread_file
from gif.vectors.initial import fitted_code_vectors
from gif.vectors.plots import plot_gaps, plot_nearest_cosines
from gif.vectors.spread import SpreadReport, spread_code_vectors
from gif.vectors.store import CodeVectors


def vectors_command(
    output: Path,
    *,
    data: str = "glyphs",
    identities: float | None = None,
    held_out: int | float = HELD_OUT,
    encoder: Literal["pixels", "clip", "dino"] = "pixels",
    model: str | None = None,
    weights: str | None = None,
    width: int = 128,
    image_size: int = 112,
    max_pixels: int = MAX_PIXELS,
    batch_size: int = 256,
    workers: int = 0,
    precision: Precision = "fp32",
    device: str = "auto",
) -> None:
    """Make code vectors: each identity's mean image feature under a frozen encoder.

    The vectors are held, and the sums of a few thousand identities. A run that was interrupted continues when the same
    command is given again, on as many processes. Several processes share the identities: torchrun --nproc-per-node 8 -m
    gif.cli vectors ...

    Args:
        output: where to write the code vectors (.safetensors), and beside them which encoder made them
            (.encoder.safetensors), by which `gif codes grow` makes those of later identities.
        data: the data set, a name or a path (docs/data.md); its training identities are encoded.
        identities: how many of the data set's there are, at random, such as 1e6; all where it is not given, a million
            of glyph-words. The same for every command.
        held_out: share of the identities that training never sees, or how many; 0 uses all. The same for every command.
        encoder: "pixels" needs no weights; "clip" and "dino" are pretrained and load from a hub or from --weights.
        model: the network's name in open_clip or timm; by default ViT-B-32 (clip), vit_base_patch16_224.dino (dino).
        weights: file with the encoder's weights, instead of the hub; OpenAI's need --model ViT-B-32-quickgelu.
        width: of the vectors, for "pixels"; the backbone's embedding_size must equal it. clip and dino have their own.
        image_size: pixels that images on disk are read in, before the encoder resizes them to its own.
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
        batch_size: images encoded at once.
        workers: processes that read images, for each process that encodes.
        precision: of a network; "bf16" is for GPUs.
        device: where to encode, "cpu", "cuda", or "auto": a GPU if there is one.
    """
    partial = output.with_suffix(".partial")
    check_output(output, [partial, basis_path(output)])
    with process_group(device) as own, hold(output, existing(own_file(partial))):
        decoder = ImageDecoder(image_size, max_pixels=max_pixels)
        images = load_data(data, identities=identities, held_out=held_out, decoder=decoder).train
        network = make_encoder(encoder, width=width, model=model, weights=weights, device=own, precision=precision)
        table, known = fitted_code_vectors(
            images,
            network,
            batch_size=batch_size,
            num_workers=workers,
            checkpoint=partial,
            keep_checkpoint=True,
            device=own,
        )
        if rank() == 0:
            options = EncoderOptions(encoder, width, model, weights, precision, image_size)
            Basis(options, known).save(output)
            table.save(output)
            say(f"wrote {table} to {output}, and how they were made beside it")
        wait_for_all()
        own_file(partial).unlink(missing_ok=True)


@options_of(SpreadConfig, without=("t", "neighbors"))
def spread_command(
    vectors: Path,
    output: Path,
    *,
    config: SpreadConfig,
    device: str = "auto",
    in_file: bool = False,
) -> None:
    """Spread code vectors evenly over the sphere, and say how even they became and what it cost.

    A run that was interrupted continues where it was when the same command is given again. Several processes share the
    work: torchrun --nproc-per-node 8 -m gif.cli spread ...

    Args:
        vectors: the code vectors to start from, as `gif vectors` writes them.
        output: where to write the spread ones, and beside it the report (.json), a histogram (.png), the gap over
            epochs (-gap.png).
        device: where to compute, "cpu", "cuda", or "auto": a GPU if there is one.
        in_file: leave the vectors in a file, which may be larger than memory, and step them there; several processes
            always do.
    """
    partial, (report_file, picture, gaps) = output.with_suffix(".partial"), spread_reports(output)
    check_output(output, [partial, report_file, picture, gaps], [vectors])

    def write_report(report: SpreadReport) -> None:
        write_text(report_file, json.dumps(report.to_dict(), indent=2))
        plot_nearest_cosines(report.before, report.after, picture)
        plot_gaps(report, gaps)

    with process_group(device) as own:
        if in_file or world_size() > 1:
            report = spread_file(vectors, output, config, device=own, write_report=write_report)
        else:
            with hold(output, existing(partial)):
                given = CodeVectors.load(vectors)
                table = CodeVectors(given.table.to(own), normalized=True, identities=given.identities)
                report = spread_code_vectors(table, config, checkpoint=partial, keep_checkpoint=True)
                table.save(output)
                write_report(report)
                partial.unlink()
        if rank() == 0:
            say(f"{report}\nwrote {output}")


def spread_reports(output: Path) -> tuple[Path, Path, Path]:
    """What `gif spread` writes beside its output: the report, the histogram, the gap over epochs."""
    return output.with_suffix(".json"), output.with_suffix(".png"), output.with_name(f"{output.stem}-gap.png")
