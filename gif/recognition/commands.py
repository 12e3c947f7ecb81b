"""`gif embed`, `gif verify`, `gif search`: what a trained model is for."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gif.data import IdentityDataset, ImageDecoder
from gif.data.decoding import MAX_PIXELS
from gif.data.listing import Tally
from gif.distributed import gather_rows, process_group, rank, wait_for_all, world_size
from gif.errors import InputError
from gif.evaluation.embedding import Embedder, ReadableImages
from gif.files import write_text
from gif.ownership import check_output, existing, hold
from gif.progress import new_table, print_table, say
from gif.recognition.aligning import load_align
from gif.recognition.embeddings import SUFFIXES, Embeddings, check_suffix
from gif.recognition.model import Model, load_model
from gif.recognition.search import Backend, search
from gif.recognition.sources import image_names, open_images
from gif.resume import UnfinishedWork, own_file

CHECKPOINT_FORMAT = "gif.embedding_checkpoint/1"


def embed_command(
    images: list[str],
    *,
    model: Path,
    output: Path,
    flip: bool | None = None,
    align: str | None = None,
    batch_size: int = 256,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
) -> None:
    """Embed images: a unit vector and a name each, in one file. Images that cannot be used are left out, and named.

    A run that was interrupted continues when the same command is given again. Several processes share the images:
    torchrun --nproc-per-node 8 -m gif.cli embed ...

    Args:
        images: image files and folders of them, at whatever depth; or one data set, as --data takes it.
        model: what `gif train` or `gif export` wrote, or insightface's model.pt.
        output: where to write the embeddings: .npz (arrays "names" and "embeddings"), or .parquet (columns "name" and
            "embedding"), which needs pyarrow.
        flip: add the mirrored image's embedding; where not given, as the model's thresholds were found.
        align: a function that brings what an image shows into its place, file.py:function or module:function
            (docs/inference.md).
        batch_size: images embedded at once.
        workers: processes that read images, for each process that embeds.
        max_pixels: an image whose file declares more is left out, before it is decoded.
        device: where to compute, "cpu", "cuda", or "auto": a GPU if there is one.
    """
    check_suffix(output)
    partial = output.with_suffix(".partial")
    check_output(output, [partial], [model])
    with process_group(device) as own, hold(output, existing(own_file(partial))):
        loaded = _load(model, flip, align, max_pixels, str(own))
        found = open_images(images, loaded.decoder)
        _check_size(found, loaded)
        embeddings, left = _embed_all(loaded, found, Embedder(loaded.flip, batch_size, workers, own), partial)
        if rank() == 0:
            embeddings.save(output)
            if left.number:
                say(f"{left.number:,} of {len(found):,} images cannot be used and were left out: {left.names}")
            say(f"wrote {len(embeddings):,} embeddings of width {embeddings.vectors.shape[1]} to {output}")
        wait_for_all()
        own_file(partial).unlink(missing_ok=True)


def verify_command(
    first: Path,
    second: Path,
    *,
    model: Path,
    far: float | None = None,
    threshold: float | None = None,
    by: str | None = None,
    flip: bool | None = None,
    align: str | None = None,
    max_pixels: int = MAX_PIXELS,
    output: Path | None = None,
    device: str = "auto",
) -> None:
    """Say whether two images show the same identity: their cosine, against a threshold of the model's.

    Args:
        first: an image.
        second: another.
        model: what `gif train` or `gif export` wrote, or insightface's model.pt. Its thresholds are those that `gif
            evaluate` has stored beside it.
        far: the false-accept rate whose threshold decides: 0.01, 0.001, 0.0001, 1e-5 or 1e-6. Where not given 0.001,
            or where too few pairs were judged for that, 0.01 or the equal error rate.
        threshold: the cosine that decides, instead.
        by: which judgement's thresholds: a name in MODEL.thresholds.json; of the most impostor pairs where not given.
        flip: add the mirrored image's embedding; where not given, as the thresholds were found.
        align: a function that brings what an image shows into its place, file.py:function or module:function
            (docs/inference.md).
        max_pixels: an image whose file declares more is refused.
        output: where to write the verdict as JSON too.
        device: where to compute, "cpu", "cuda", or "auto": a GPU if there is one.
    """
    if output is not None:
        check_output(output, inputs=[first, second, model])
    loaded = _load(model, flip, align, max_pixels, device)
    verdict = loaded.verify(first, second, far=far, threshold=threshold, by=by)
    say(f"cosine {verdict.cosine:.4f}")
    if verdict.same is None:
        say(f"no decision: {verdict.basis}; or give --threshold")
    else:
        words = "the same identity" if verdict.same else "two identities"
        say(f"{words}, by a threshold of {verdict.threshold:.4f} ({verdict.basis})")
    if output is not None:
        write_text(output, json.dumps({"first": str(first), "second": str(second), **asdict(verdict)}, indent=2))


def search_command(
    *,
    gallery: str,
    query: list[str] | str,
    model: Path,
    top: int = 5,
    far: float | None = None,
    threshold: float | None = None,
    by: str | None = None,
    backend: Backend = "auto",
    flip: bool | None = None,
    align: str | None = None,
    batch_size: int = 256,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    output: Path | None = None,
    device: str = "auto",
) -> None:
    """Find the images of a gallery that are nearest to others, and which of them are near enough.

    The threshold is that of two images. Among n impostors in a gallery each may be taken for the query: at FAR f about
    n f of them are.

    Args:
        gallery: embeddings, as `gif embed` writes them; or images, a folder or a data set, which are embedded now.
        query: an image, '["a.jpg", "b.jpg"]', or a folder of images.
        model: what `gif train` or `gif export` wrote, or insightface's model.pt: the one that embedded the gallery.
        top: how many to show of each query.
        far: the false-accept rate whose threshold says which are near enough, as for `gif verify`.
        threshold: the cosine that says it, instead.
        by: which judgement's thresholds: a name in MODEL.thresholds.json; of the most impostor pairs where not given.
        backend: "faiss", its exact index; "exact", which needs no package; "auto" is faiss where it is installed. The
            answers are the same.
        flip: add the mirrored image's embedding; where not given, as the gallery has it.
        align: a function that brings what an image shows into its place, file.py:function or module:function
            (docs/inference.md).
        batch_size: images embedded at once.
        workers: processes that read images.
        max_pixels: an image whose file declares more is left out, before it is decoded.
        output: where to write the answers as JSON too.
        device: where to embed, "cpu", "cuda", or "auto": a GPU if there is one.
    """
    if output is not None:
        check_output(output, inputs=[Path(gallery), model])
    loaded = _load(model, flip, align, max_pixels, device)
    embedder = Embedder(loaded.flip, batch_size, workers, loaded.device)
    queries = open_images([query] if isinstance(query, str) else query, loaded.decoder)
    if gallery.endswith(SUFFIXES):
        stored = _gallery_of(Embeddings.load(gallery), gallery, loaded, model, flip)
        loaded = replace(loaded, flip=stored.flip)
        embedder = replace(embedder, flip=stored.flip)
    else:
        stored = _embed_now(loaded, open_images([gallery], loaded.decoder), embedder)
    near, basis = loaded.threshold(far, threshold=threshold, by=by)
    asked = _embed_now(loaded, queries, embedder)
    answers = search(asked.vectors, stored.vectors, top, backend=backend)
    for name, matches in zip(asked.names, answers, strict=True):
        table = new_table("rank", "cosine", "image", *([] if near is None else ["same"]), title=name)
        for place, match in enumerate(matches, start=1):
            same = [] if near is None else ["yes" if match.cosine >= near else "no"]
            table.add_row(str(place), f"{match.cosine:.4f}", stored.names[match.row], *same)
        print_table(table)
    say(basis if near is None else f"same: a cosine of at least {near:.4f} ({basis})")
    if output is not None:
        found = {
            name: [{"image": stored.names[match.row], "cosine": match.cosine} for match in matches]
            for name, matches in zip(asked.names, answers, strict=True)
        }
        write_text(output, json.dumps({"threshold": near, "basis": basis, "answers": found}, indent=2))
        say(f"wrote {output}")


def _load(model: Path, flip: bool | None, align: str | None, max_pixels: int, device: str) -> Model:
    hook = None if align is None else load_align(align)
    return load_model(model, device=device, flip=flip, align=hook, max_pixels=max_pixels)


def _gallery_of(stored: Embeddings, path: str, loaded: Model, model: Path, flip: bool | None) -> Embeddings:
    """A gallery's embeddings. Raises ValueError where they are another model's, or are flipped otherwise."""
    if stored.model != loaded.fingerprint:
        raise InputError(
            f"{path} was embedded by another model than {model} (vectors of width {stored.vectors.shape[1]}, this "
            f"model's have {loaded.config.embedding_size}); give the model it was made by, or embed it anew"
        )
    if flip is not None and flip != stored.flip:
        raise InputError(f"{path} was embedded with --flip {str(stored.flip).lower()}; leave --flip out, or embed anew")
    return stored


def _embed_now(loaded: Model, images: IdentityDataset, embedder: Embedder) -> Embeddings:
    _check_size(images, loaded)
    embeddings, left = _embed_all(loaded, images, embedder, None)
    if left.number:
        say(f"{left.number:,} of {len(images):,} images cannot be used and were left out: {left.names}")
    return embeddings


def _embed_all(
    loaded: Model, images: IdentityDataset, embedder: Embedder, partial: Path | None
) -> tuple[Embeddings, Tally]:
    """The embeddings of all images that can be read, and those that cannot.

    Of several processes each embeds its share, keeps it in ``partial`` once a minute, and all get all.
    """
    settings = {"model": loaded.fingerprint, "flip": loaded.flip, "images": images.summary()}
    work = UnfinishedWork(None if partial is None else own_file(partial), CHECKPOINT_FORMAT, settings)
    saved = work.load() or {}
    numbers = [saved["numbers"]] if saved else []
    vectors = [saved["vectors"]] if saved else []
    done = int(saved["done"]) if saved else 0

    def save() -> None:
        if numbers:
            work.save({"numbers": torch.cat(numbers), "vectors": torch.cat(vectors), "done": torch.tensor(done)})

    if done:
        say(f"continuing after {done:,} images")
    try:
        if done < len(range(rank(), len(images), world_size())):
            for some, rows in embedder.own_share(loaded.network, ReadableImages(images), "embedding", done=done):
                numbers.append(some)
                vectors.append(normalize(rows.float(), dim=1).cpu())
                done = (int(some[-1]) - rank()) // world_size() + 1
                if work.due:
                    save()
    except KeyboardInterrupt:
        save()
        raise
    order, rows = _gathered(torch.cat(numbers), torch.cat(vectors), embedder)
    if not rows.isfinite().all():
        raise InputError("the model's embeddings hold NaN or infinity; it has diverged in training: take another")
    names = image_names(images)
    readable = set(order.tolist())
    left = Tally.of(name for number, name in enumerate(names) if number not in readable)
    return Embeddings([names[number] for number in order.tolist()], rows, loaded.fingerprint, loaded.flip), left


def _gathered(numbers: Tensor, vectors: Tensor, embedder: Embedder) -> tuple[Tensor, Tensor]:
    """What all processes embedded, on the CPU, in the order of the images."""
    numbers, vectors = (gather_rows(rows.to(embedder.device)).cpu() for rows in (numbers, vectors))
    numbers, order = numbers.sort()
    return numbers, vectors[order]


def _check_size(images: IdentityDataset, loaded: Model) -> None:
    """Raise ValueError where images that are made in a size of their own are not what the model takes."""
    decoder: ImageDecoder = loaded.decoder
    wanted = (decoder.channels, decoder.size, decoder.size)
    if images.image_shape != wanted:
        raise InputError(
            f"the images are {' x '.join(map(str, images.image_shape))}, and the model takes "
            f"{' x '.join(map(str, wanted))} (channels, height, width); give images that fit it"
        )
