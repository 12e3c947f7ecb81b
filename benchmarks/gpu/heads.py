"""Training heads from 10 thousand to 64 million identities, alone and with a backbone, in bfloat16 autocast.

GIF's code table and code vectors lie on the device, in bfloat16; "GIF, in a file" has them on the host, the vectors in
a file. Steps are timed by events as the host launches them: what it waits for counts.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu.records import at_most
from benchmarks.gpu.stage import Run
from benchmarks.heads import (
    FULL,
    FULL_SOFTMAX,
    FUSED,
    GIF,
    PARTIAL_FC,
    POOL,
    WIDTH,
    Head,
    Step,
    gif_head,
    gif_on_device,
    label_batches,
    trained,
)
from benchmarks.test_whole_step import whole_step
from gif.backbones import BackboneConfig
from gif.planning.heads import HeadCost

BF16 = torch.bfloat16


@functools.lru_cache(maxsize=1)
def _in_a_file(m: int, batch: int) -> Step:
    """Kept, since the order of its codes takes long to find on a host."""
    with tempfile.TemporaryDirectory() as folder:  # the map outlives the name
        return GIF.build(m, label_batches(m, batch), Path(folder))


def _cost_on_device(m: int, batch: int) -> HeadCost:
    """Count the code vectors too, and the code table and its order twice, since the codes are sorted there."""
    cost = GIF.cost(m, batch)
    return replace(cost, tables=2 * cost.tables + m * WIDTH * BF16.itemsize)


ON_DEVICE = Head("GIF", gif_on_device, _cost_on_device)


def _in_a_graph(m: int, labels: list[Tensor], folder: Path) -> Step:
    """Forward and backward pass in CUDA graphs, which the host replays; the optimizer's step as it is."""
    head = gif_head(m, labels, torch.empty(m, WIDTH, dtype=BF16, device=labels[0].device))
    given = torch.randn(len(labels[0]), WIDTH, device=labels[0].device, dtype=BF16).requires_grad_()
    graphed: nn.Module = head
    if given.is_cuda:
        with torch.autocast(given.device.type, BF16, cache_enabled=False):
            graphed = torch.cuda.make_graphed_callables(head, (given, labels[0]))  # type: ignore[assignment]
    return trained(graphed)


IN_A_GRAPH = Head("GIF, in a CUDA graph", _in_a_graph, _cost_on_device)
IN_A_FILE = Head("GIF, in a file", lambda m, labels, folder: _in_a_file(m, len(labels[0])), GIF.cost)
OTHERS = (PARTIAL_FC, FULL_SOFTMAX)
TINY = (50,)
BATCH = 256
FLAT = at_most(1.6)
"""GIF's step at 64 million identities over that at 10 thousand."""
NETWORKS = ("iresnet50", "iresnet100")
ACTIVATIONS = {"iresnet50": 20 << 30, "iresnet100": 34 << 30, "small": 1 << 20}
"""Bytes of a training step of 256 images of 112 x 112, about."""
WHOLE = (
    *((1_000_000, head) for head in (ON_DEVICE, IN_A_GRAPH, *OTHERS)),
    *((64_000_000, head) for head in (IN_A_FILE, *OTHERS)),
)
"""What stands beside a network. The code vectors of 64 million identities have no room there on one card."""
STEPS = 10


def run(run: Run) -> None:
    """GIF at all sizes, then the others, then whole steps, then other cross entropies that hold no logits."""
    taken: dict[int, float] = {}
    sizes = run.pick(FULL, TINY)
    for m in run.points(sizes):
        _alone(run, ON_DEVICE, m, taken)
    for m in run.points((min(sizes), max(sizes))):
        _alone(run, IN_A_GRAPH, m, {})
    if len(taken) > 1 and max(taken) == max(sizes):
        ratio = taken[max(taken)] / taken[min(taken)]
        what = f"{ON_DEVICE.name}: step at {max(taken):,} identities over that at {min(taken):,}"
        run.record(what, ratio, "x", goal=FLAT)
    for head, m in run.points(itertools.product(OTHERS, sizes)):
        _alone(run, head, m, {})
    tiny = tuple(itertools.product(TINY, (ON_DEVICE, IN_A_FILE, *OTHERS)))
    for network in run.points(run.pick(NETWORKS, ("small",)), takes=run.pick(5.0, 0.0)):
        alone = _whole(run, network, None, 0, None)
        for m, head in run.points(run.pick(WHOLE, tiny)):
            _whole(run, network, head, m, alone)
    for head in FUSED:  # last, since some of them try many configurations first
        if head.missing:
            run.record(head.name, status="missing", note=head.missing)
            continue
        for m in run.points(sizes, takes=run.pick(5.0, 0.0)):
            _alone(run, head, m, {})


def _alone(run: Run, head: Head, m: int, taken: dict[int, float]) -> None:
    what = f"{head.name}, {m:,} identities"
    batch = run.pick(BATCH, 4)
    if not run.fits(what, head.cost(m, batch).bytes):
        return
    with run.attempt(what, ours=head in (ON_DEVICE, IN_A_GRAPH)), tempfile.TemporaryDirectory() as folder:
        labels = label_batches(m, batch)
        step = head.build(m, labels, Path(folder))
        run.device.reset_peak()
        embeddings = torch.randn(batch, WIDTH, device=run.device.name).requires_grad_()
        call = _in_turn(run, partial(_head_step, step, embeddings), labels)
        seconds = run.device.eager_seconds(call, STEPS)
        taken[m] = seconds
        run.record(what, seconds * 1e3, "ms", status="note")
        run.record(f"{what}: kernels and copies", run.device.launches(call), "", status="note", detail=True)
        run.record(
            f"{what}: most allocated by torch", run.device.peak_bytes() / 2**30, "GiB", status="note", detail=True
        )


def _head_step(step: Step, embeddings: Tensor, labels: Tensor) -> None:
    """What the backbone gives in autocast is bfloat16."""
    step(embeddings.to(BF16), labels)
    embeddings.grad = None


def _in_turn(run: Run, step: Callable[[Tensor], None], labels: list[Tensor]) -> Callable[[], None]:
    turns = itertools.count()

    def call() -> None:
        with torch.autocast(run.device.name, BF16):
            step(labels[next(turns) % POOL])

    return call


def _whole(run: Run, network: str, head: Head | None, m: int, alone: float | None) -> float | None:
    """Seconds of a step of the network, with a head or without; None where it does not fit."""
    what = f"{network} and {head.name}, {m:,} identities" if head else f"{network} alone"
    batch = run.pick(BATCH, 4)
    needed = ACTIVATIONS[network] + (head.cost(m, batch).bytes if head else 0)
    if not run.fits(what, needed):
        return None
    config = run.pick(
        BackboneConfig(network, WIDTH, channels=3, image_size=112),  # type: ignore[arg-type]
        BackboneConfig("small", WIDTH, width=4),
    )
    with run.attempt(what), tempfile.TemporaryDirectory() as folder:
        labels = label_batches(max(m, 1), batch)
        head_step = head.build(m, labels, Path(folder)) if head else None
        run.device.reset_peak()
        with torch.device(run.device.name):
            backbone = config.build()
        backbone.to(memory_format=torch.channels_last)
        images = torch.randn(batch, config.channels, config.image_size, config.image_size, device=run.device.name)
        step = whole_step(backbone, head_step)
        images = images.contiguous(memory_format=torch.channels_last)
        seconds = run.device.eager_seconds(_in_turn(run, partial(step, images), labels), STEPS)
        run.record(what, batch / seconds, "images/s", status="note")
        if alone is not None:
            run.record(f"{what}: the head's share", 100 * (1 - alone / seconds), "%", status="note")
        run.record(
            f"{what}: most allocated by torch", run.device.peak_bytes() / 2**30, "GiB", status="note", detail=True
        )
        return seconds
    return None
