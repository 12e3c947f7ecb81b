"""Where the host waits for the device, by file and line, and whether the head can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import gif
from benchmarks.gpu.records import Goal, at_least, at_most
from benchmarks.gpu.stage import Run
from benchmarks.heads import VOCAB, identity_codes
from gif.backbones import BackboneConfig
from gif.codes.tree import Cutting, root
from gif.losses.recipes import RecipeName
from gif_kernels import uniformity_step_, vector_step_

NONE = at_most(0)
WORKS = at_least(1)
SHARE = 1.5
"""The capacity of a child, as a multiple of an equal share of its node's rows: `tokenize`'s default."""
ITERATIONS = 8
RECIPE_NAMES: tuple[RecipeName, ...] = ("live", "paper")


def run(run: Run) -> None:
    """The waits of a training step, of spreading and of tokenising; then the head in a graph."""
    m, width, batch = run.pick((100_000, 512, 256), (60, 16, 6))
    for recipe in RECIPE_NAMES:
        for place in dict.fromkeys((run.device.name, "cpu")):
            with run.attempt(f"training step, {recipe}"):
                goal = NONE if place == run.device.name else None
                what = f"training step, {recipe}, tables on the {'device' if goal else 'host'}"
                _waits(run, what, _training_step(run, recipe, m, width, batch, place), goal)
    table = torch.randn(m, width, device=run.device.name).to(torch.bfloat16)
    with run.attempt("step of spreading"):
        index = torch.randperm(m, device=run.device.name)[: min(m, 2048)]
        _waits(run, "step of spreading", lambda: uniformity_step_(table, index, lr=0.1), NONE)
    with run.attempt("step of code vectors"):
        named = torch.randint(m, (3 * batch,), device=run.device.name)
        step = partial(vector_step_, table, named, torch.randn(3 * batch, width, device=run.device.name), lr=0.1)
        _waits(run, "step of code vectors", step, NONE)
    with run.attempt("epoch of spreading"):
        rows = gif.CodeVectors(torch.randn(run.pick(8192, 20), width, device=run.device.name) + 0.3)
        batch_rows = run.pick(2048, 10)
        _waits(
            run, f"epoch of spreading, {len(rows) // batch_rows} steps and its judgement",
            lambda: gif.spread_code_vectors(rows, gif.SpreadConfig(epochs=1, batch=batch_rows)),
        )  # fmt: skip
    with run.attempt("a level of tokenising"):
        below = run.pick(3, 1)
        level = root(torch.randn(m, width, device=run.device.name), VOCAB, below + 1, 0)
        cutting = Cutting(VOCAB**below, SHARE, ITERATIONS)
        _waits(run, "a level of tokenising", lambda: level.tokens(cutting, "residual", lambda n: None))
    for recipe in reversed(RECIPE_NAMES):
        _capture(run, recipe, m, width, batch)


def _waits(run: Run, what: str, call: Callable[[], object], goal: Goal | None = None) -> None:
    found = run.device.waits(call)
    run.record(f"{what}: waits", sum(found.values()), "", goal=goal)
    for place, count in found.most_common():
        run.record(f"{what}: {place}", count, "waits", status="note")


def _head(run: Run, recipe: RecipeName, m: int, width: int, place: str) -> gif.GIFLoss:
    table = torch.randn(m, width, device=place).to(torch.bfloat16)
    codes = gif.IdentityCodes(identity_codes(m, place), VOCAB)
    return gif.GIFLoss(codes, gif.CodeVectors(table), width, recipe=recipe).to(run.device.name)


def _training_step(run: Run, recipe: RecipeName, m: int, width: int, batch: int, place: str) -> Callable[[], None]:
    """Backbone, head, optimizer."""
    config = run.pick(
        BackboneConfig("iresnet18", width, channels=3, image_size=112), BackboneConfig("small", width, width=4)
    )
    backbone, head = config.build().to(run.device.name), _head(run, recipe, m, width, place)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.1, momentum=0.9, fused=True)
    images = torch.randn(batch, config.channels, config.image_size, config.image_size, device=run.device.name)
    labels = torch.randint(m, (batch,), device=run.device.name)

    def step() -> None:
        with torch.autocast(run.device.name, torch.bfloat16):
            embeddings = backbone(images)
        head(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _capture(run: Run, recipe: RecipeName, m: int, width: int, batch: int) -> None:
    """The head in a graph of ours and in PyTorch's own; a replay of the live one moves code vectors."""
    embeddings = torch.randn(batch, width, device=run.device.name, requires_grad=True)
    labels = torch.randint(m, (batch,), device=run.device.name)

    def ours() -> None:
        head = _head(run, recipe, m, width, run.device.name)
        parameters = [embeddings, *head.parameters()]
        run.device.captured(lambda: torch.autograd.grad(head(embeddings, labels), parameters, allow_unused=True))

    def of_pytorch() -> None:
        head = _head(run, recipe, m, width, run.device.name)
        assert head.vectors is not None  # given above
        if run.device.name == "cuda":
            torch.cuda.make_graphed_callables(head, (embeddings, labels))
        before = head.vectors.table.clone()
        head(embeddings, labels).backward()
        moved = int((head.vectors.table != before).any(1).sum())
        if (moved > 0) != head.recipe.moves_vectors:
            raise RuntimeError(f"{moved} code vectors moved in a replay")

    for what, capture in (("in a graph", ours), ("in make_graphed_callables", of_pytorch)):
        try:
            capture()
        except Exception as error:
            note = str(error).strip().splitlines()[0][:300]
            run.record(f"the head {what}, {recipe}: works", 0, "", goal=WORKS, note=note)
        else:
            run.record(f"the head {what}, {recipe}: works", 1, "", goal=WORKS)
