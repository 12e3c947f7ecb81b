"""`python -m benchmarks.placement`: what it takes to leave code vectors in a file, and to divide them among processes.

Steps of the live head with its rows asked for one step ahead, as training does, in memory, in a file that the system
has in its cache, and in one of which it has nothing, after a backbone of so many seconds: their times, and the share in
which they wait for rows. Then the memory of each of several processes that divide a table, beyond what it has where the
table is in a file. Then steps at several numbers of identities, with the table in each place: time and memory over
those at the fewest, which know nothing of the number.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch.multiprocessing import spawn

from benchmarks.harness import DEVICE
from benchmarks.heads import BATCH, VOCAB, WIDTH, identity_codes, label_batches
from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.progress import say
from gif.vectors.placement import Placement, place_code_vectors
from gif.vectors.staging import Staged

CPU = torch.device("cpu")
WARM = 5
FILLED = 1 << 16  # rows
MADV_DONTNEED = 4  # of Linux: of a shared mapping the pages are let go, not what is in them


def placement(
    *,
    identities: int = 1_000_000,
    divided: int = 400_000,
    divided_width: int = 128,
    rounds: int = 20,
    backbones: tuple[float, ...] = (0.0, 0.05, 0.5),
    negatives: tuple[int, ...] = (0, 4096),
    scaled: tuple[int, ...] = (10_000, 1_000_000, 64_000_000),
    scaled_width: int = 128,
) -> None:
    """Measure and print all three.

    Args:
        identities: of the table whose steps are timed.
        divided: identities of the table that processes divide.
        divided_width: and its width.
        rounds: steps that are timed, after five that are not.
        backbones: seconds that the network takes; the processor is free in them.
        negatives: of the recipe.
        scaled: identities of the tables, in bfloat16, whose steps are compared.
        scaled_width: and their width: 64 million of 128 take 16.4 GB.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, identities, WIDTH)
        for count in negatives:
            for seconds in backbones:
                memory, _ = _steps(folder, "host", count, seconds, rounds)
                file, waits = _steps(folder, "file", count, seconds, rounds)
                disk, disk_waits = _steps(folder, "file", count, seconds, rounds, cold=True)
                say(
                    f"{count} negatives, a backbone of {seconds:g} s: in a file {file / memory:.2f} x the time, waits "
                    f"{waits:.1%}; none of it in memory {disk / memory:.1f} x, waits {disk_waits:.1%}, {disk:.2f} s"
                )
        _write(folder, divided, divided_width)
        for processes in (1, 2, 3):
            spawn(_divided, (processes, folder, divided * divided_width * 4), nprocs=processes)
        for where in ("device", "host", "file") if DEVICE == "cuda" else ("host", "file"):
            for count in negatives:
                _scale(folder, where, count, scaled, scaled_width, rounds)


def _write(folder: Path, m: int, width: int) -> None:
    IdentityCodes(identity_codes(m, "cpu"), VOCAB).save(folder / "codes.safetensors")
    CodeVectors(torch.randn(m, width)).save(folder / "vectors.safetensors")


def _head(folder: Path, where: Placement, negatives: int, working: str) -> GIFLoss:
    source = CodeVectors.load(folder / "vectors.safetensors", mmap=True)
    vectors, _ = place_code_vectors(source, CPU, where, folder / working, moves=True, goes_on=False)
    codes = IdentityCodes.load(folder / "codes.safetensors", mmap=True)
    return GIFLoss(codes, vectors, vectors.width, negatives=negatives)


def _steps(
    folder: Path, where: Placement, negatives: int, backbone: float, rounds: int, *, cold: bool = False
) -> tuple[float, float]:
    """Seconds of a step beyond its backbone, and the share of a whole step in which it waits for its rows.

    ``cold``: before each step the system forgets the file.
    """
    head = _head(folder, where, negatives, "working.safetensors")
    assert head.vectors is not None  # it has just got them
    labels = [torch.randint(len(head.codes), (BATCH,)) for _ in range(WARM + rounds + 1)]
    waited, wait = [0.0], Staged.wait

    def timed(self: Staged) -> torch.Tensor:
        begin = time.perf_counter()
        rows = wait(self)
        waited[0] += time.perf_counter() - begin
        return rows

    Staged.wait = timed  # type: ignore[method-assign]
    try:
        ready, seconds = head.prepare(labels[0], CPU), []
        for number in range(WARM + rounds):
            if number == WARM:
                waited[0] = 0.0
            if cold:
                _forget(head.vectors.table, folder / "working.safetensors")
            begin = time.perf_counter()
            following = head.prepare(labels[number + 1], CPU, ahead=1)
            time.sleep(backbone)
            head(torch.randn(BATCH, WIDTH).requires_grad_(), ready).backward()
            head.zero_grad()
            ready = following
            seconds.append(time.perf_counter() - begin)
        head.settle()
    finally:
        Staged.wait = wait  # type: ignore[method-assign]
    return statistics.median(seconds[WARM:]) - backbone, waited[0] / sum(seconds[WARM:])


def _scale(
    folder: Path, where: Placement, negatives: int, identities: tuple[int, ...], width: int, rounds: int
) -> None:
    """Steps with tables of several sizes that take turns: print medians of their ratios to the smallest, and memory."""
    steps, beside = [], []
    for m in identities:
        before = _own_bytes()
        step, table_bytes = _step_of(folder / f"{m}.table", m, where, negatives, width)
        for _ in range(WARM):
            step()
        steps.append(step)
        beside.append(_own_bytes() - before - table_bytes)
    ratios: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        seconds = [step() for step in steps]
        for of_step, taken in zip(ratios, seconds, strict=True):
            of_step.append(taken / seconds[0])
    for m, of_step, more in zip(identities, ratios, beside, strict=True):
        say(
            f"table on {where}, {negatives} negatives, {m:,} x {width}: {statistics.median(of_step):.2f} x the time at "
            f"{identities[0]:,}, {more / 1e6:.0f} MB beside the table"
        )


def _step_of(path: Path, m: int, where: Placement, negatives: int, width: int) -> tuple[Callable[[], float], int]:
    """A training step of the live head that says its seconds, and what of its table is this process's own memory.

    The table, in bfloat16, holds some random rows again and again.
    """
    device = torch.device(DEVICE)
    if where == "file":
        table = torch.from_file(str(path), shared=True, size=m * width, dtype=torch.bfloat16).view(m, width)
    else:
        table = torch.empty(m, width, dtype=torch.bfloat16, device=device if where == "device" else CPU)
    some = torch.randn(min(m, FILLED), width).to(table)
    for begin in range(0, m, FILLED):
        part = table[begin : begin + FILLED]
        part.copy_(some[: len(part)])
    codes = IdentityCodes(identity_codes(m, table.device), VOCAB)
    head = GIFLoss(codes, CodeVectors(table, normalized=True), width, negatives=negatives).to(device)
    labels = cycle(label_batches(m, BATCH))

    def step() -> float:
        embeddings = torch.randn(BATCH, width, device=device).requires_grad_()
        begin = time.perf_counter()
        head(embeddings, head.prepare(next(labels), device)).backward()
        head.zero_grad()
        head.settle()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return step, 0 if where == "file" else table.nbytes


def _forget(table: torch.Tensor, path: Path) -> None:
    """Have the system write what changed of a mapped file, and drop all that it has of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = os.sysconf("SC_PAGE_SIZE")
    begin = table.data_ptr() // page * page
    with path.open("rb+") as file:
        os.fdatasync(file.fileno())
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(table.nbytes), MADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _divided(rank: int, processes: int, folder: Path, table_bytes: int) -> None:
    """One of several processes: memory of its own with its part on the host, less that with the table in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{processes}", rank=rank, world_size=processes)
    taken = []
    for where in ("file", "file", "host"):  # the first brings what is imported and allocated once
        before = _own_bytes()
        head = _head(folder, where, 1024, f"working-{processes}.safetensors")
        for _ in range(3):
            embeddings = torch.randn(64, head.embedding_size).requires_grad_()
            head(embeddings, head.prepare(torch.randint(len(head.codes), (64,)), CPU)).backward()
        head.settle()
        taken.append(_own_bytes() - before)
        del head
    shares: list[float] = [0.0] * processes
    dist.all_gather_object(shares, (taken[2] - taken[1]) / table_bytes)
    if rank == 0:
        say(f"{processes} processes: {', '.join(f'{share:.2f}' for share in shares)} of the table each")
    dist.destroy_process_group()


def _own_bytes() -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


if __name__ == "__main__":
    auto_cli(placement, as_positional=False)
