"""`gif experiments cost`: memory and speed of optimising code vectors (the supplement's section 8, Fig. 7)."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gif.devices import check_device
from gif.errors import InputError
from gif.experiments.paper.report import Findings, Table, chosen, counted, experiment, once, place, publish
from gif.experiments.paper.spreaders import IN_FILE, LR, OURS, SPREADERS, Shape, Spreader, Spreading
from gif.planning import Rates
from gif.planning.curves import CARD_BYTES, Curve, draw_card, draw_curves, draw_legend
from gif.planning.memory import free_bytes, peak_bytes
from gif.plotting import figure, save_figure
from gif.progress import progress, say
from gif_kernels import uniformity_step_

NAME = "cost"
LARGEST = 64_000_000  # identities, of the supplement's figure
ROOM = 0.5  # of the memory that is free, which a measurement may take
ROUNDS, SLOW_ROUNDS, WARM = 11, 3, 2
ALLOWED = 2.0**-7  # error of a coordinate, in bfloat16: its rounding
GIB = 2.0**30


@dataclass(frozen=True)
class Size:
    """Numbers of identities that are measured as far as they fit, and planned; width and batch of a step."""

    identities: tuple[int, ...]
    width: int
    batch: int


FULL = Size((1_000_000, 4_000_000, 16_000_000, LARGEST), width=512, batch=2048)
QUICK = Size((100_000, 1_000_000, LARGEST), width=64, batch=512)


def cost(
    output: Path | None = None,
    *,
    quick: bool = False,
    width: int | None = None,
    batch: int | None = None,
    memory_gib: float | None = None,
    device: str = "cpu",
    docs: Path | None = None,
) -> None:
    """Measure memory and speed of optimising code vectors, as far as this machine goes, and plan them to 64 million.

    A step among random rows of a bfloat16 table: this library's, in memory and in a file, beside what one would write
    with autograd. Each is held to the specification before it is timed. On a CPU it is processor time that counts, of
    each thread, so that other work there does not. An interrupted run continues when the same command is given again.

    Args:
        output: folder for cost.json, cost.md and the picture; runs/experiments/cost, or cost-quick.
        quick: a minute: small steps in tables of 100 thousand and a million, and what is planned beyond.
        width: of a vector; 512, or 64 where quick.
        batch: rows of a step; 2,048, or 512.
        memory_gib: GiB that a measurement may take: no larger table is measured; half of what is free, if not given.
        device: where to compute, "cpu" or "cuda".
        docs: a document whose block "experiments cost" gets the results; the picture goes into its folder pictures.
    """
    size = chosen(QUICK if quick else FULL, width=width, batch=batch)
    check_device(device)
    if size.width < 1 or not 2 <= size.batch <= min(size.identities):
        raise InputError(
            f"wanted width >= 1 and a batch of 2 to {min(size.identities):,} rows, got {size.width} and {size.batch}"
        )
    if memory_gib is not None and not memory_gib > 0:
        raise InputError(f"memory_gib must be > 0, got {memory_gib}")
    shape = Shape(size.width, size.batch, device)
    folder = place(NAME, output, quick)
    with experiment(NAME, folder, {**asdict(size), "device": device, "machine": _machine(device)}, docs):
        room = ROOM * free_bytes(device) if memory_gib is None else memory_gib * GIB
        points = list(itertools.product(SPREADERS.values(), size.identities))
        found: dict[str, dict[int, Any]] = {name: {} for name in SPREADERS}
        rates = _rates(once(folder / "rates.json", lambda: _known(shape.rates())))
        with progress("measuring steps", len(points), "tables") as advance:
            for spreader, m in points:
                path = folder / "points" / f"{spreader.name.replace(', ', '-').replace(' ', '-')}-{m}.json"
                needed = spreader.memory(m, shape)
                if path.exists() or needed <= room:

                    def measure(of: Spreader = spreader, rows: int = m) -> dict[str, Any]:
                        return _measure(of, rows, shape)

                    found[spreader.name][m] = once(path, measure)
                else:
                    say(f"{spreader.name}, {m:,} rows: needs {needed / GIB:.3g} GiB, {room / GIB:.3g} may be taken")
                advance(1)
        publish(NAME, _findings(size, shape, found, rates), folder, docs)


def _machine(device: str) -> str:
    """What computes: the card, or the CPU with its threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.9 has none
    return f"{processor.get('cpu_name') or 'a CPU'}, {counted(torch.get_num_threads(), 'thread')}"


def _measure(spreader: Spreader, m: int, shape: Shape) -> dict[str, Any]:
    """Seconds of a step among m rows, and its memory."""
    with tempfile.TemporaryDirectory(prefix=".gif-cost-") as folder:
        spreading = spreader.build(m, shape, Path(folder))
        generator = torch.Generator().manual_seed(0)
        subsets = []
        for _ in range(2):  # which take turns; two in a million are in both at most
            index = torch.randint(m, (4 * shape.batch,), generator=generator).unique()
            subsets.append(index[torch.randperm(len(index), generator=generator)[: shape.batch]].to(shape.device))
        for index in subsets:
            values = F.normalize(torch.randn(len(index), shape.width, generator=generator).add(0.5), dim=1)
            spreading.table[index.to(spreading.table.device)] = values.to(spreading.table)
        _check(spreader, spreading, subsets[0])
        seeds = itertools.count(1)

        def step() -> None:
            seed = next(seeds)
            spreading.step(subsets[seed % 2].to(spreading.table.device), seed)

        peak = peak_bytes(step, shape.device)
        seconds = _seconds(step, shape, SLOW_ROUNDS if spreader.slow else ROUNDS)
    return {"seconds": seconds, "held_bytes": spreading.held + peak}


def _check(spreader: Spreader, spreading: Spreading, index: Tensor) -> None:
    """Hold a step to the specification, on its rows alone; AssertionError where it is off by more than rounding."""
    index = index.to(spreading.table.device)
    expected = spreading.table[index].double()
    every = torch.arange(len(expected), device=expected.device)
    uniformity_step_(expected, every, lr=LR, impl="reference")
    spreading.step(index, 0)
    error = float((spreading.table[index].double() - expected).abs().max())
    if error > ALLOWED:
        raise AssertionError(f"{spreader.name}: a coordinate is off by {error:.1e}, more than bfloat16's rounding")


def _seconds(step: Callable[[], None], shape: Shape, rounds: int) -> float:
    """Median time of a step, by the clock of ``shape``."""
    times = []
    for number in range(WARM + rounds):
        begin = shape.clock()
        step()
        if torch.device(shape.device).type == "cuda":
            torch.cuda.synchronize(shape.device)
        if number >= WARM:
            times.append(shape.clock() - begin)
    return statistics.median(times)


def _known(rates: Rates | None) -> dict[str, float | None] | None:
    """Rates, fit for JSON: None for those that are infinite."""
    if rates is None:
        return None
    return {name: rate if math.isfinite(rate) else None for name, rate in asdict(rates).items()}


def _rates(known: Mapping[str, float | None] | None) -> Rates | None:
    """What `_known` wrote."""
    if known is None:
        return None
    return Rates(**{name: math.inf if rate is None else rate for name, rate in known.items()})


def _curves(
    size: Size, shape: Shape, found: Mapping[str, Mapping[int, Any]], rates: Rates | None
) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Memory, and steps a second, of each spreader: measured and by formula."""
    memories, speeds = {}, {}
    for name, spreader in SPREADERS.items():
        mine = found[name]
        planned = {m: spreader.memory(m, shape) for m in size.identities}
        steps = {} if rates is None else {m: 1 / spreader.seconds(m, shape, rates) for m in size.identities}
        memories[name] = Curve({m: point["held_bytes"] for m, point in mine.items()}, planned)
        speeds[name] = Curve({m: 1 / point["seconds"] for m, point in mine.items()}, steps)
    return memories, speeds


def _findings(size: Size, shape: Shape, found: Mapping[str, Mapping[int, Any]], rates: Rates | None) -> Findings:
    memories, speeds = _curves(size, shape, found, rates)
    machine = _machine(shape.device)
    rows = [
        (
            f"{m:,}",
            *(f"{_cell(memories[name], m, GIB)} GiB, {_cell(speeds[name], m, 1)}/s" for name in SPREADERS),
        )
        for m in size.identities
    ]
    table = Table(
        f"Memory, and steps a second, of {shape.batch:,} rows of width {shape.width} in bfloat16; planned in brackets",
        ("identities", *SPREADERS),
        rows,
    )
    return Findings(
        {"size": asdict(size), "machine": machine, "rates": _known(rates), "points": found},
        f"{machine}; seconds of processor time a thread on a CPU. Planned by `gif.planning`'s formulas from rates "
        "that are measured first.",
        _verdict(size, memories, speeds),
        [table],
        {
            "fig7": (
                "Fig. 7: memory (a) and speed (b) of optimising code vectors",
                lambda path: _draw(memories, speeds, path),
            )
        },
    )


def _cell(curve: Curve, m: int, unit: float) -> str:
    if m in curve.measured:
        return f"{curve.measured[m] / unit:.3g}"
    return f"({curve.formula[m] / unit:.3g})" if m in curve.formula else "(not known)"


def _verdict(size: Size, memories: Mapping[str, Curve], speeds: Mapping[str, Curve]) -> Sequence[str]:
    largest = max(size.identities)
    needed = memories[OURS.name].formula[largest]
    told = [
        f"{largest:,} identities need {needed / GIB:.3g} GiB in memory, "
        f"{'within' if needed <= CARD_BYTES else 'more than'} the {CARD_BYTES / GIB:.1f} of an 80 GB GPU, and "
        f"{_cell(memories[IN_FILE.name], largest, GIB)} GiB with the table in a file."
    ]
    for name in (OURS.name, IN_FILE.name):
        taken = speeds[name].measured
        if len(taken) > 1:
            first, last = min(taken), max(taken)
            told.append(
                f"{name}: a step among {last:,} rows takes {taken[first] / taken[last]:.2f} times what one among "
                f"{first:,} takes, measured."
            )
    return told


def _draw(memories: Mapping[str, Curve], speeds: Mapping[str, Curve], path: Path) -> None:
    drawing, (memory, speed) = figure(11.0, 4.6, columns=2)
    draw_curves(memory, memories, "B", "(a) Memory of optimising code vectors")
    draw_curves(speed, speeds, "", "(b) Steps a second")
    draw_card(memory)
    draw_legend(drawing, memories, formula=True)
    save_figure(drawing, path)
