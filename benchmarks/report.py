"""`python -m benchmarks.report runs/bench/results.json`: tables, plots and a CSV of what was measured.

With `--docs docs/benchmarks.md` each kernel's block of the document gets a picture and a small table, and a CSV beside
the document every number. Of `benchmarks.gpu` give gpu.jsonl, and `--docs docs/gpu.md`.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from benchmarks.gpu.report import report_gpu
from benchmarks.headlines import headlines
from benchmarks.pictures import Picture, pictures
from benchmarks.results import COLUMNS, Measurement, read_results
from benchmarks.tables import as_markdown, by_point, missing_heads, small_table
from gif.documents import replace_block, require_block
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
LINE = ("machine", "shape", "mode", "dtype", "provider", "seconds", "of_first", "held_bytes", "roofline", "distinct")
PICTURES, NUMBERS = "pictures", "benchmarks"
"""Folders beside a document."""


def report(results: Sequence[Path], *, output: Path = Path("runs/bench"), docs: Path | None = None) -> None:
    """Write results.csv, a table a kernel and plots, and say how each headline stands.

    Args:
        results: files of `--benchmark-json`; of a point measured twice the later counts. Or one of `benchmarks.gpu`.
        output: folder for them.
        docs: a document whose blocks "bench KERNEL" get a picture and a small table; the plots, of the machine measured
            last, go into its folder pictures, and every number into its folder benchmarks. Of `benchmarks.gpu` the
            blocks are "gpu goals" and "gpu STAGE".
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
            for name, draw in drawn.items():
                draw(here, docs.parent / PICTURES / name)
            write_text(docs.parent / NUMBERS / f"{kernel}.csv", as_lines(measured))
            replace_block(docs, f"bench {kernel}", in_document(measured, drawn))
    say(f"wrote {', '.join(f'{kernel}.md' for kernel in kernels)} and results.csv into {output}")
    for line in headlines(found):
        say(line)


def in_document(found: Sequence[Measurement], drawn: dict[str, Picture]) -> str:
    """What a document shows of a kernel: the first picture, a small table, and where the rest is."""
    first, *others = drawn or [None]
    picture = "" if first is None else f"![]({PICTURES}/{first})\n\n"
    rest = f"[Every number]({NUMBERS}/{found[0].kernel}.csv) of every point."
    if others:
        rest += f" [Shares of the roofline]({PICTURES}/{others[0]})."
    return f"{picture}{small_table(found)}\n{rest}\n"


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


def as_lines(found: Sequence[Measurement]) -> str:
    """A line a measurement of one kernel, to be read beside a document, in three digits.

    ``of_first`` is the time over that of the first provider at the same point and machine, by ratios to the reference
    product; ``roofline`` the share of the roofline; empty is what was not looked at.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LINE)
    for machine in dict.fromkeys(m.machine for m in found):
        here = [m for m in found if m.machine == machine]
        for point in by_point(here).values():
            for m in point.values():
                first = point.get(here[0].provider)
                numbers = (m.seconds, first and m.ratio / first.ratio, m.held_bytes, m.roofline, m.distinct)
                digits = ("" if number is None else f"{number:.3g}" for number in numbers)
                writer.writerow((m.machine, m.shape, m.mode, m.dtype, m.provider, *digits))
    return text.getvalue()


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
