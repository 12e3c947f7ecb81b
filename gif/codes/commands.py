"""`gif tokenize` cuts identity codes; `gif codes` looks into them, hands them to others, and gives newcomers theirs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.distributed import is_torchelastic_launched

from gif.codes.config import TokenizeConfig
from gif.codes.identity_codes import IdentityCodes
from gif.codes.newcomers import find_move, joined, which_are_new
from gif.codes.picture import plot_occupancy
from gif.codes.quality import judge_codes, token_entropy
from gif.codes.tokenize import tokenize, working_device
from gif.data import HELD_OUT, ImageDecoder, load_data
from gif.data.decoding import MAX_PIXELS
from gif.data.identities import require_same, require_same_names
from gif.devices import resolve_device
from gif.distributed import first_decides, process_group, rank, wait_for_all
from gif.encoders.basis import Basis
from gif.errors import InputError
from gif.files import atomic_path, check_file
from gif.options import options_of
from gif.ownership import check_output, existing, hold
from gif.progress import new_table, print_table, say
from gif.vectors.initial import initial_code_vectors
from gif.vectors.store import CodeVectors

if TYPE_CHECKING:
    from rich.table import Table

EXPORT_FORMATS = (".npy", ".csv")


@options_of(TokenizeConfig, without=("iterations", "centroid_levels"))
def tokenize_command(
    vectors: Path,
    output: Path,
    *,
    config: TokenizeConfig,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Cut identity codes from code vectors: similar identities share a prefix, and no two share a code.

    The vectors stay on disk. A run that was interrupted continues after its last whole level when the same command is
    given again, on as many processes as you like. Several processes share the work:
    torchrun --nproc-per-node 8 -m gif.cli tokenize ...

    Args:
        vectors: the (spread) code vectors.
        output: where to write the codes (.safetensors).
        device: where to cut; "auto" takes a GPU if there is one with room for the vectors. "cpu" reads them from disk,
            a block at a time; "cuda" holds them all, but of several processes none does. Codes are those of the CPU but
            for ties.
    """
    partial = output.with_suffix(".partial")
    check_output(output, [partial], [vectors])
    table = CodeVectors.load(vectors, mmap=True)
    with process_group(_kind(device, table)) as own, hold(output, existing(partial)):
        first_decides(lambda: check_file(vectors))  # every row will be read many times
        codes = tokenize(table, config, checkpoint=partial, keep_checkpoint=True, device=own)
        if rank() == 0:
            codes.save(output)
            partial.unlink()
        wait_for_all()
        if rank() == 0:
            if len(codes) > 1:
                say(str(judge_codes(codes, table)))
            say(f"wrote {codes} to {output}")


def _kind(device: str, table: CodeVectors) -> str:
    """The device by which processes join: "auto" is one that has room for the vectors, which several do not copy."""
    if device != "auto":
        return device
    if is_torchelastic_launched():
        return "cuda" if torch.cuda.is_available() else "cpu"
    return working_device(table.table, device).type


def inspect_codes(codes: Path, *, vectors: Path | None = None, picture: Path | None = None) -> None:
    """Say how large a code table is, how full its tree and how evenly used its tokens are, and draw that.

    Args:
        codes: identity codes, as `gif tokenize` writes them.
        vectors: the code vectors they were cut from, to judge the codes by.
        picture: where to draw the tree's occupancy (.png); beside the codes where it is not given.
    """
    picture = picture or codes.with_suffix(".png")
    check_output(picture, inputs=[codes, vectors])
    table = IdentityCodes.load(codes)
    total = table.vocab_size**table.length
    say(f"{table}, {table.free:,} of {total:,} codes free ({table.free / len(table):.1%} of the identities there are)")
    print_table(_levels(table))
    if vectors is not None:
        cut_from = CodeVectors.load(vectors, mmap=True)
        require_same("the codes", table.identities, "the code vectors", cut_from.identities)
        say(str(judge_codes(table, cut_from)))
    plot_occupancy(table, picture)
    say(f"drew {picture}")


def export_codes(codes: Path, output: Path) -> None:
    """Write the codes for other programs: an identity a row, a token a column.

    Args:
        codes: identity codes, as `gif tokenize` writes them.
        output: a NumPy array of uint8 (.npy), or text with a header (.csv).
    """
    if output.suffix not in EXPORT_FORMATS:
        raise InputError(f"--output must end in {' or '.join(EXPORT_FORMATS)}, got {output}")
    check_output(output, inputs=[codes])
    table = IdentityCodes.load(codes)
    tokens = table.codes.cpu().numpy()
    with atomic_path(output) as temporary:
        if output.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, tokens)
        else:
            header = ",".join(f"token_{position + 1}" for position in range(table.length))
            np.savetxt(temporary, tokens, fmt="%d", delimiter=",", header=header, comments="")
    say(f"wrote {table} to {output}")


def extend_codes(codes: Path, vectors: Path, output: Path) -> None:
    """Give codes to identities that came later; those there are keep theirs.

    Each newcomer takes the free code nearest down the tree. Their rows follow the others', in order.

    Args:
        codes: identity codes with centroids, as `gif tokenize` writes them.
        vectors: code vectors of the newcomers alone.
        output: where to write all the codes (.safetensors).
    """
    check_output(output, inputs=[vectors])
    before = IdentityCodes.load(codes)
    newcomers = CodeVectors.load(vectors)
    after = before.extend(newcomers)
    after.save(output)
    say(f"wrote {after} to {output}: {len(after) - len(before):,} came, {after.free:,} codes are free")
    if after.identities is None and before.identities is not None:
        say(f"{vectors} does not say whose vectors they are, so the extended codes do not either")


def grow_codes(
    codes: Path,
    vectors: Path,
    made: Path,
    output: Path,
    *,
    data: str,
    identities: float | None = None,
    held_out: int | float = HELD_OUT,
    batch_size: int = 256,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
) -> None:
    """Give codes and code vectors to identities that came later, from their images; those there are keep theirs.

    Newcomers are encoded in the basis of the others, moved as spreading and training have moved those, and sent down
    the code tree. Training continues from the run: gif train --data DATA --init RUN --codes OUTPUT/codes.safetensors
    --vectors OUTPUT/vectors.safetensors --output RUN2.

    Args:
        codes: identity codes with centroids, as `gif tokenize` writes them.
        vectors: the code vectors as they are now: RUN/vectors.safetensors, or what `gif spread` wrote.
        made: the code vectors as `gif vectors` wrote them, with the encoder's file beside them.
        output: folder for codes.safetensors and vectors.safetensors, of everybody, in the data set's order.
        data: the data set of all, old and new.
        identities: how many of the data set's there are, as for `gif train`.
        held_out: share of the identities that training never sees, or how many, as for `gif train`.
        batch_size: images encoded at once.
        workers: processes that read images.
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
        device: where to encode, "cpu", "cuda", or "auto": a GPU if there is one.
    """
    files = {name: output / f"{name}.safetensors" for name in ("codes", "vectors")}
    for file in files.values():
        check_output(file, inputs=[codes, vectors, made])
    own = resolve_device(device)
    before, now, raw = IdentityCodes.load(codes), CodeVectors.load(vectors), CodeVectors.load(made, mmap=True)
    basis = Basis.load(made)
    if before.identities is None:
        raise InputError(f"{codes} does not say whose codes they are, so who is new is not known; make them again")
    for path, table in ((vectors, now), (made, raw)):
        require_same_names(str(codes), before.identities, str(path), table.identities)
    move = find_move(raw.table, now.table)
    with hold(output):
        decoder = ImageDecoder(basis.options.image_size, max_pixels=max_pixels)
        images = load_data(data, identities=identities, held_out=held_out, decoder=decoder).train
        new = torch.from_numpy(which_are_new(images.identities, before.identities)).nonzero().flatten()
        if len(new) > before.free:
            raise InputError(f"{len(new)} newcomers, but only {before.free} codes are free; make new codes with slack")
        encoder = basis.encoder(own)
        newcomers = initial_code_vectors(
            images.of_identities(new), encoder, batch_size=batch_size, num_workers=workers, device=own
        )
        placed = CodeVectors(move(newcomers.table), normalized=True, identities=newcomers.identities)
        extended, everybody = joined(before, now, placed, images.identities)
        everybody.save(files["vectors"])
        extended.save(files["codes"])
    say(
        f"{len(new):,} came, {extended.free:,} codes are free; where the others went is known to a cosine of "
        f"{move.cosine:.3f} on identities that it was not learnt from\nwrote {', '.join(map(str, files.values()))}"
    )


def _levels(codes: IdentityCodes) -> Table:
    """Nodes of each depth: how many, how large, how full; and how evenly its token is used."""
    drawn = new_table("tokens", "nodes", "identities a node", "largest", "fullest", "token entropy")
    for depth, entropy in enumerate(token_entropy(codes), start=1):
        sizes = codes.nodes(depth)[1].diff()
        largest, room = int(sizes.max()), codes.vocab_size ** (codes.length - depth)
        drawn.add_row(
            str(depth),
            f"{len(sizes):,}",
            f"{len(codes) / len(sizes):.1f}",
            f"{largest:,}",
            f"{largest / room:.1%}",
            f"{entropy:.4f}",
        )
    return drawn
