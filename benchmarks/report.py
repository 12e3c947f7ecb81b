"""`python -m benchmarks.report runs/bench/results.json`: tables, plots and a CSV of what was measured.

With `--docs docs/benchmarks.md` the tables go into the document's blocks, one a kernel, and the plots beside it. Of
`benchmarks.gpu` give gpu.jsonl, and `--docs docs/gpu.md`.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from benchmarks.gpu.report import report_gpu
from benchmarks.heads import BACKBONE_ALONE, BATCH, HEADS
from benchmarks.pictures import pictures
from benchmarks.results import COLUMNS, Measurement, read_results
from gif.documents import markdown_table, replace_block, require_block
from gif.files import write_text
from gif.progress import say

METRICS = (
    "seconds",
    "ratio",
    "ratio_20",
    "ratio_80",
    "peak_bytes",
    "kept_bytes",
    "process_bytes",
    "rate",
    "bandwidth",
    "roofline",
)


def report(results: Sequence[Path], *, output: Path = Path("runs/bench"), docs: Path | None = None) -> None:
    """Write results.csv, a table a kernel and plots.

    Args:
        results: files of `--benchmark-json`; of a point measured twice the later counts. Or one of `benchmarks.gpu`.
        output: folder for them.
        docs: a document whose blocks "bench KERNEL" get the tables; the plots, of the machine measured last, go into
            its folder pictures. Of `benchmarks.gpu` the blocks are "gpu goals" and "gpu STAGE".
    """
    if len(results) == 1 and results[0].suffix == ".jsonl":
        report_gpu(results[0], output=output, docs=docs)
        return
    latest = {(m.kernel, m.provider, m.point, m.machine): m for m in read_results(results)}
    found = list(latest.values())
    kernels = list(dict.fromkeys(m.kernel for m in found))
    if docs is not None:
        for kernel in kernels:
            require_block(docs, f"bench {kernel}")
    write_text(output / "results.csv", as_csv(found))
    for kernel in kernels:
        measured = [m for m in found if m.kernel == kernel]
        text = as_markdown(measured)
        if kernel == "head":
            text += "\n" + missing_heads(measured)
        here = [m for m in measured if m.machine == measured[-1].machine]
        drawn = pictures(here)
        for name, draw in drawn.items():
            draw(here, output / name)
        write_text(output / f"{kernel}.md", text)
        if docs is not None:
            text += "".join(f"\n![](pictures/{name})\n" for name in drawn)
            replace_block(docs, f"bench {kernel}", text)
            for name, draw in drawn.items():
                draw(here, docs.parent / "pictures" / name)
    say(f"wrote {', '.join(f'{kernel}.md' for kernel in kernels)} and results.csv into {output}")


def as_csv(found: Sequence[Measurement]) -> str:
    """A line a metric of a measurement: kernel, provider, mode, shape, dtype, machine, metric, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, "metric", "value"))
    for m in found:
        for metric in METRICS:
            value = getattr(m, metric)
            if value is not None:
                writer.writerow((*(getattr(m, column) for column in COLUMNS), metric, value))
    return text.getvalue()


def as_markdown(found: Sequence[Measurement]) -> str:
    """Tables of a kernel, one a machine: a row a point, a column a provider. What is no headline is folded away."""
    parts = []
    for machine in dict.fromkeys(m.machine for m in found):
        here = [m for m in found if m.machine == machine]
        first = here[0].provider
        third = "the head's share" if first == BACKBONE_ALONE else f"time over that of {first}"
        note = (
            f"{machine}; median time, memory beyond the inputs, and {third}, by ratios to a product timed in the same "
            "rounds."
        )
        if any(m.roofline is not None for m in here):
            note += " In brackets: FLOPs or bytes a second, by formula, as a share of that product's or of a copy's."
        headline, others = ([m for m in here if m.headline is wanted] for wanted in (True, False))
        parts.append(f"{note}\n\n{_table(headline)}")
        if others:
            count = len({m.point for m in others})
            parts.append(f"<details><summary>{count} more</summary>\n\n{_table(others)}\n</details>\n")
    return "\n".join(parts)


def _table(found: Sequence[Measurement]) -> str:
    here = {(m.point, m.provider): m for m in found}
    providers = list(dict.fromkeys(m.provider for m in found))
    rows = []
    for point in dict.fromkeys(m.point for m in found):
        first = here.get((point, providers[0]))
        rows.append((" ".join(point), *(_cell(here.get((point, name)), first) for name in providers)))
    return markdown_table(("", *providers), rows)


def _cell(m: Measurement | None, first: Measurement | None) -> str:
    if m is None:
        return ""
    text = f"{_time(m.seconds)}, {_bytes(m.held_bytes)}"
    if first is not None and m is not first:
        if first.provider == BACKBONE_ALONE:
            text += f", {100 * (1 - first.ratio / m.ratio):.0f} %"
        else:
            text += f", {m.ratio / first.ratio:.3g} x"
    if m.distinct is not None:
        text += f", {100 * m.distinct:.3g} % distinct"
    return text + (f" ({100 * m.roofline:.0f} %)" if m.roofline is not None else "")


def missing_heads(found: Sequence[Measurement]) -> str:
    """Which heads did not fit, with the memory they would need."""
    measured = {(m.provider, m.identities) for m in found}
    rows = [
        (f"{m:,}", head.name, _bytes(head.cost(m, BATCH).bytes))
        for m in sorted({m.identities for m in found if m.identities is not None})
        for head in HEADS.values()
        if (head.name, m) not in measured
    ]
    if not rows:
        return ""
    table = markdown_table(("identities", "head", "needs"), rows)
    return f"Not measured, since this machine has too little memory:\n\n{table}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 2**power:
            return f"{count / 2**power:.4g} {unit}" if count >= 1000 * 2**power else f"{count / 2**power:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"


def main() -> None:
    """The command line."""
    parser = ArgumentParser(description="Write results.csv, a table a kernel and plots.")
    parser.add_argument("results", nargs="+", type=Path, help="files of --benchmark-json, or one gpu.jsonl")
    parser.add_function_arguments(report, skip={"results"})
    arguments = parser.parse_args()
    try:
        report(arguments.results, output=arguments.output, docs=arguments.docs)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
