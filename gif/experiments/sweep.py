"""Settings tried one at a time around each head's own, on a validation split of identities.

What is chosen here is written into `glyph_bench` by hand, for the kind of data that it was chosen on; the held-out
identities, which `gif accuracy` judges on, take no part. Every head gets the same number of trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gif.documents import markdown_table, replace_block, require_block
from gif.errors import InputError
from gif.experiments.comparison import MEASURES, compare, settings_of, show
from gif.experiments.glyph_bench import BATCH_SIZE, Contender, contenders_on
from gif.experiments.runs import Budget, Length, Machine
from gif.files import write_text
from gif.losses import RECIPES
from gif.progress import say
from gif_kernels import AngularMargin

CHOSEN_BY = ("0.001", "0.0001")  # the mean of both, which is less noisy than either
SOFTMAX_KNOBS = {"lr": (0.05, 0.1, 0.2, 0.4), "scale": (8, 12, 16, 24, 32), "margin": (0.1, 0.2, 0.3)}
PEER_KNOBS = {"lr": (0.05, 0.1, 0.2), "scale": (8, 12, 16, 24), "margin": (0.1, 0.2, 0.3)}
KNOBS: dict[str, dict[str, tuple[float, ...]]] = {
    "GIF": {
        "lr": (0.05, 0.1, 0.2),
        "contrast_scale": (8, 24),
        "contrast_margin": (0.1, 0.2, 0.3),
        "vector_lr": (8, 24, 72),
        "siblings": (2, 8),
    },
    "full softmax": SOFTMAX_KNOBS,
    "full softmax from code vectors": SOFTMAX_KNOBS,
    "Partial FC 0.1": SOFTMAX_KNOBS,
    "Partial FC 10,000": SOFTMAX_KNOBS,
    "Partial FC 10,000 from code vectors": SOFTMAX_KNOBS,
    "Dynamic Class Queue": {**PEER_KNOBS, "momentum": (0.9, 0.99, 0.999)},
    "Faster Face Classification": {**PEER_KNOBS, "momentum": (0.9, 0.99, 0.999)},
    "Prototype Memory": {**PEER_KNOBS, "group_size": (2, 4, 8)},
    "Virtual FC": {**PEER_KNOBS, "group_size": (2, 4, 8)},
}
"""Values of each setting; margins are CosFace's m3. The head's own value is among them, or beside them."""
SETTINGS = tuple(dict.fromkeys(setting for knobs in KNOBS.values() for setting in knobs))


def sweep(
    output: Path = Path("runs/sweep"),
    *,
    data: str = "glyphs",
    identities: int | None = None,
    heads: Sequence[str] = tuple(KNOBS),
    settings: Sequence[str] = SETTINGS,
    seeds: int = 2,
    epochs: int = 4,
    seconds: int | None = None,
    batch_size: int = BATCH_SIZE,
    split: int = 1,
    jobs: int = 1,
    compile: bool = False,
    docs: Path | None = None,
) -> None:
    """Try each head's settings one at a time on validation identities, and say which was best.

    A fifth of the training identities is set apart to judge on; the held-out ones are never seen. An interrupted run
    continues when the same command is given again.

    Args:
        output: folder for sweep.md and the runs.
        data: the data set.
        identities: how many of the data set's identities there are, at random; all where not given.
        heads: which heads.
        settings: which settings, all of them by default; a head's that it does not have are passed over.
        seeds: runs of each setting.
        epochs: passes over the training images in each run.
        seconds: processor time of each run instead: a head's trials take as many steps as it takes in that time.
        batch_size: images a step.
        split: seed of the split into training and held-out identities, the same as of `gif accuracy`.
        jobs: runs that go on at once, each in a process of its own with its share of the processors.
        compile: torch.compile the backbone: minutes at first, and less time a step.
        docs: a document whose block "sweep DATA", or "sweep DATA IDENTITIES", gets the table.
    """
    unknown = [head for head in heads if head not in KNOBS]
    if unknown or not heads:
        raise InputError(f"wanted heads among {list(KNOBS)}, got {list(heads)}")
    if (strange := set(settings) - set(SETTINGS)) or not settings:
        raise InputError(f"wanted settings among {list(SETTINGS)}, got {sorted(strange)}")
    budget = Budget(
        data=data,
        identities=identities,
        split=split,
        validation=True,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
    )
    block = f"sweep {budget.subject}"
    if docs is not None:
        require_block(docs, block)
    bases = contenders_on(data)
    trials = {head: dict(variations(head, bases[head], settings)) for head in heads}
    everything = {name: contender for head in KNOBS for name, contender in variations(head, bases[head])}
    chosen = {name: contender for found in trials.values() for name, contender in found.items()}
    paced_by = {name: head for head, found in trials.items() for name in found}
    length = Length("epochs", epochs) if seconds is None else Length("seconds", seconds)
    claim = settings_of("sweep", budget, everything) | ({} if seconds is None else {"seconds": seconds})
    found = compare(output, chosen, budget, claim, Machine(jobs, compile), length, paced_by)

    def score(name: str) -> float:
        return float(np.mean([found.values(name, measure) for measure in CHOSEN_BY]))

    best = {max(names, key=score) for names in trials.values()}
    columns = ("head", *MEASURES.values(), "best")
    rows = [(*row, "best" if row[0] in best else "") for row in found.rows()]
    title = f"validation identities of {budget.subject}, mean ± deviation of {seeds} seeds, {length}"
    show(columns, rows, title)
    table = markdown_table(columns, rows)
    write_text(output / "sweep.md", table)
    if docs is not None:
        replace_block(docs, block, table)
    say(f"wrote {output / 'sweep.md'}; best by TAR: {', '.join(sorted(best))}")


def variations(head: str, base: Contender, settings: Sequence[str] = SETTINGS) -> Iterator[tuple[str, Contender]]:
    """A head as it is, ``base``, and with each of ``settings`` at each other value: names and contenders."""
    yield head, base
    for knob, values in KNOBS[head].items():
        for value in values if knob in settings else ():
            setting: Any = AngularMargin(m2=0.0, m3=value) if knob.endswith("margin") else value
            if setting != _setting(base, knob):
                yield f"{head}, {knob}={value:g}", _turned(base, knob, setting)


def _setting(contender: Contender, knob: str) -> Any:
    if knob == "lr":
        return contender.lr
    head = contender.head
    if head.kind == "gif":
        return head.overrides.get(knob, getattr(RECIPES[head.recipe], knob))
    return getattr(head, knob)


def _turned(base: Contender, knob: str, setting: Any) -> Contender:
    if knob == "lr":
        return replace(base, lr=setting)
    head = base.head
    change = {"overrides": {**head.overrides, knob: setting}} if head.kind == "gif" else {knob: setting}
    return replace(base, head=replace(head, **change))
