"""`gif plan`."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from gif.codes import advise
from gif.errors import InputError
from gif.files import write_text
from gif.planning.measured import LARGEST, SMALLEST, StepMeasurement, measure_steps, plot_spreading
from gif.planning.rates import CARDS, Rates, measure_rates
from gif.planning.stages import (
    encode_cost,
    head_costs,
    pixels_cost,
    spread_cost,
    spread_memory,
    spread_step_seconds,
    tokenize_cost,
)
from gif.progress import new_table, print_table, say
from gif.vectors.placement import DEVICE_SHARE, HOST_SHARE


def plan(
    *,
    identities: float = 64e6,
    width: int = 512,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    device: Literal["cpu", "a100", "h100", "h200", "mi300x"] = "h100",
    images: float = 20,
    read: float | None = None,
    encoder: Literal["network", "pixels"] = "network",
    encoder_gflops: float = 8.8,
    batch: int = 2048,
    epochs: int = 3,
    training_batch: int = 1024,
    slack: float = 0.1,
    in_file: bool = False,
    measure: bool = False,
    output: Path | None = None,
) -> None:
    """Say what each stage will take, before it is run: memory, time, and the shape of the codes.

    Args:
        identities: m.
        width: d, of the embeddings and the code vectors.
        dtype: of the code vectors.
        device: a card, planned with 0.6 of its data sheet's peaks; or this machine's CPU, which a calibration of a few
            seconds measures.
        images: of an identity, on average.
        read: images a second that the data give before an encoder sees them, as a progress line says; without it they
            lie in memory, decoded.
        encoder: a frozen network, or the pixels of `gif vectors`, with --device cpu.
        encoder_gflops: of the network, an image; ViT-B/32 takes 8.8.
        batch: code vectors in a step of spreading.
        epochs: of spreading.
        training_batch: images in a step of training.
        slack: room in the codes for identities that arrive later, as a share of those there are.
        in_file: the code vectors stay in a file while they are spread.
        measure: time steps of spreading on this CPU, on sparse float32 files of 1M to 64M rows (up to the identities),
            and hold the plan against them; about a minute, and some hundred MB of disk.
        output: where to draw memory and speed against the number of identities (.png); the numbers go beside it, as
            .json.
    """
    m, itemsize = int(identities), getattr(torch, dtype).itemsize
    if read is not None and not read > 0:
        raise InputError(f"wanted more than 0 images read a second, got read={read}; leave it out for images in memory")
    if m < 2 or min(width, images, batch, epochs, training_batch) < 1:
        raise InputError(
            "wanted at least 2 identities, and width, images, batch, epochs and training_batch >= 1, got "
            f"{m}, {width}, {images}, {batch}, {epochs}, {training_batch}"
        )
    if measure and (device != "cpu" or dtype != "float32"):
        raise InputError(
            f"measure times float32 tables on this CPU, and the plan is for {dtype} on {device}; give --device cpu "
            "--dtype float32"
        )
    if encoder == "pixels" and device != "cpu":
        raise InputError(f"pixels are encoded by a CPU, of which a plan for {device} knows nothing; give --device cpu")
    folder = None if output is None else output.parent
    shape = advise(m, slack)[0]
    rates = measure_rates(width, batch, folder, shape.vocab_size) if device == "cpu" else CARDS[device]
    commands = [
        pixels_cost(m, width, rates, images=images, read=read or math.inf)
        if encoder == "pixels"
        else encode_cost(m, width, rates, images=images, encoder_flops=1e9 * encoder_gflops, read=read or math.inf),
        spread_cost(m, width, itemsize, rates, batch=batch, epochs=epochs, in_file=in_file),
        tokenize_cost(
            m, width, itemsize, rates, vocab_size=shape.vocab_size, length=shape.length, mapped=device == "cpu"
        ),
    ]
    stages = [
        *(stage.in_a_process(rates) for stage in commands),
        *head_costs(m, width, rates, batch=training_batch, vocab_size=shape.vocab_size),
    ]
    title = f"{m:,} identities x {width}, {dtype}, {device}"
    table = new_table("stage", "GiB", "host GiB", "time", "of", title=title)
    for stage in stages:
        color = "[red]" if stage.memory > rates.capacity else ""
        memory, host = (f"{size / 2**30:,.2f}" for size in (stage.memory, stage.host))
        table.add_row(stage.name, f"{color}{memory}", host, _time(stage.seconds), stage.note)
    print_table(table)
    if rates.resident:
        say(
            f"of each command, encode, spread and tokenize: {rates.start:.1f} s to start and "
            f"{rates.resident / 2**30:.2f} GiB of Python and its libraries are counted"
        )
    over = [stage.name for stage in stages if stage.memory > rates.capacity]
    if over:
        say(f"more than the {rates.capacity / 1e9:.0f} GB of one {device}: {'; '.join(over)}")
    say(f"code vectors in training: {where_code_vectors_go(m * width * itemsize, rates.capacity, device)}")
    say(
        f"codes: v = {shape.vocab_size}, l = {shape.length}, {shape.codes:,} of them, {shape.slack:.0%} more than "
        f"identities (wanted {slack:.0%})"
    )
    measured = measure_steps(width, batch, min(m, LARGEST), folder) if measure else []
    for point in measured:
        say(
            f"{point.m:,} x {width} float32 in a file: a step of {point.batch} takes {1e3 * point.seconds:.1f} ms, "
            f"planned {1e3 * point.planned:.1f} ms ({point.planned / point.seconds:.2f} x)"
        )
    if output is not None:
        _write(output, m, width, itemsize, batch, rates, in_file, measured)


def where_code_vectors_go(table_bytes: int, capacity: float, device: str) -> str:
    """Where ``--placement auto`` puts a table of so many bytes, and how many processes it takes on devices."""
    size = f"{table_bytes / 2**30:,.1f} GiB"
    room = (HOST_SHARE if device == "cpu" else DEVICE_SHARE) * capacity
    if table_bytes <= room:
        return f"{size}, in memory" if device == "cpu" else f"{size}, on the device"
    processes = math.ceil(table_bytes / room)
    if device == "cpu":
        return f"{size}, in a file"
    return f"{size}, on the host or, where that has no room, in a file; on the devices of {processes} processes or more"


def _write(
    output: Path,
    m: int,
    width: int,
    itemsize: int,
    batch: int,
    rates: Rates,
    in_file: bool,
    measured: list[StepMeasurement],
) -> None:
    sizes = [int(size) for size in np.geomspace(SMALLEST, max(m, LARGEST), 40)]
    step = spread_step_seconds(width, itemsize, batch, rates, in_file=in_file)
    if measured:
        step = statistics.median(point.planned for point in measured)
    planned = [(size, spread_memory(size, width, itemsize, batch), step) for size in sizes]
    plot_spreading(planned, measured, rates.capacity, output.with_suffix(".png"))
    numbers = {"rates": asdict(rates), "step_seconds": step, "measured": [asdict(point) for point in measured]}
    write_text(output.with_suffix(".json"), json.dumps(numbers, indent=2))
    say(f"drew {output.with_suffix('.png')}")


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{1e3 * seconds:.3g} ms"
