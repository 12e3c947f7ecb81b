"""`python -m benchmarks.report runs/bench/results.json`: tables, plots and a CSV of what was measured.

With `--docs docs/benchmarks.md` the tables go into the document's blocks, one a kernel, and the plots beside it.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from benchmarks.results import FACTS, Measurement, read_results
from benchmarks.test_head_scaling import PROVIDERS, needed_bytes
from gif.documents import markdown_table, replace_block, require_block
from gif.files import write_text
from gif.plotting import COLORS, figure, save_figure
from gif.progress import say

METRICS = ("seconds", "ratio", "ratio_20", "ratio_80", "peak_bytes", "rate")


def report(results: Sequence[Path], *, output: Path = Path("runs/bench"), docs: Path | None = None) -> None:
    """Write results.csv, a table a kernel and plots.

    Args:
        results: files of `--benchmark-json`; of a point measured twice the later counts.
        output: folder for them.
        docs: a document whose blocks "bench KERNEL" get the tables; the plots go into its folder pictures.
    """
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
        pictures = {f"bench-{kernel}.png": plot_rates}
        if kernel == "head":
            text += "\n" + missing_heads(measured)
            pictures = {"bench-head.png": plot_heads}
        drawn = []
        for name, draw in pictures.items():
            if draw(measured, output / name):
                drawn.append(name)
        write_text(output / f"{kernel}.md", text)
        if docs is not None:
            text += "".join(f"\n![](pictures/{name})\n" for name in drawn)
            replace_block(docs, f"bench {kernel}", text)
            for name in drawn:
                pictures[name](measured, docs.parent / "pictures" / name)
    say(f"wrote {', '.join(f'{kernel}.md' for kernel in kernels)} and results.csv into {output}")


def as_csv(found: Sequence[Measurement]) -> str:
    """A line a metric of a measurement: kernel, provider, mode, shape, dtype, machine, metric, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*FACTS, "metric", "value"))
    for m in found:
        for metric in METRICS:
            value = getattr(m, metric)
            if value is not None:
                writer.writerow((*(m.facts[fact] for fact in FACTS), metric, value))
    return text.getvalue()


def as_markdown(found: Sequence[Measurement]) -> str:
    """Tables of a kernel, one a machine: a row a point, a column a provider; time, memory, ratio to the first."""
    parts = []
    for machine in dict.fromkeys(m.machine for m in found):
        here = {(m.point, m.provider): m for m in found if m.machine == machine}
        providers = list(dict.fromkeys(provider for _, provider in here))
        rows = []
        for point in dict.fromkeys(point for point, _ in here):
            ours = here.get((point, providers[0]))
            rows.append((" ".join(point), *(_cell(here.get((point, name)), ours) for name in providers)))
        note = (
            f"{machine}; median time, peak memory beyond the inputs, and time over that of {providers[0]} (each by its "
            "ratio to a product timed in the same round)."
        )
        parts.append(f"{note}\n\n{markdown_table(('', *providers), rows)}")
    return "\n".join(parts)


def _cell(m: Measurement | None, ours: Measurement | None) -> str:
    if m is None:
        return ""
    text = f"{_time(m.seconds)}, {_bytes(m.facts.get('kept_bytes', 0) + m.peak_bytes)}"
    if ours is not None and m is not ours:
        text += f", {m.ratio / ours.ratio:.3g} x"
    return text + (f" ({100 * m.rate:.0f} % of a product's rate)" if m.rate is not None else "")


def missing_heads(found: Sequence[Measurement]) -> str:
    """Which heads did not fit, with the memory they would need."""
    measured = {(m.provider, m.facts["identities"]) for m in found}
    rows = [
        (f"{m:,}", name, _bytes(needed_bytes(name, m)))
        for m in sorted({m for _, m in measured})
        for name in PROVIDERS
        if (name, m) not in measured
    ]
    if not rows:
        return ""
    table = markdown_table(("identities", "head", "needs"), rows)
    return f"Not measured, since this machine has too little memory:\n\n{table}"


def plot_heads(found: Sequence[Measurement], path: Path) -> bool:
    """Time and memory of each head against the number of identities; hollow where only the formula is known."""
    drawing, (time, memory) = figure(11.0, 4.4, columns=2)
    everything = sorted({m.facts["identities"] for m in found})
    for number, name in enumerate(PROVIDERS):
        mine = sorted((m for m in found if m.provider == name), key=lambda m: m.facts["identities"])
        color = COLORS[number % len(COLORS)]
        sizes = [m.facts["identities"] for m in mine]
        time.loglog(sizes, [m.seconds * 1e3 for m in mine], "o-", color=color, label=name)
        held = [(m.facts["kept_bytes"] + m.peak_bytes) / 2**20 for m in mine]
        memory.loglog(sizes, held, "o-", color=color, label=name)
        unmeasured = [m for m in everything if m not in sizes]
        memory.loglog(
            unmeasured, [needed_bytes(name, m) / 2**20 for m in unmeasured], "o", color=color, fillstyle="none"
        )
    time.set(xlabel="identities", ylabel="ms", title="One step of the head")
    memory.set(xlabel="identities", ylabel="MiB", title="Memory of the head (hollow: by formula, did not fit)")
    time.legend(fontsize="small")
    save_figure(drawing, path)
    return True


def plot_rates(found: Sequence[Measurement], path: Path) -> bool:
    """Each provider's FLOPs a second as a share of a product's, a bar a point; False where no formula gave FLOPs."""
    known = [m for m in found if m.rate is not None]
    if not known:
        return False
    points = list(dict.fromkeys(m.point for m in known))
    providers = list(dict.fromkeys(m.provider for m in known))
    drawing, axes = figure(11.0, 1.6 + 0.28 * len(known))
    height = 0.8 / len(providers)
    for number, name in enumerate(providers):
        mine = {m.point: m.rate for m in known if m.provider == name}
        places = [place + number * height for place, point in enumerate(points) if point in mine]
        values = [100 * mine[point] for point in points if point in mine]
        axes.barh(places, values, height, color=COLORS[number % len(COLORS)], label=name)
    axes.set_yticks(
        [place + 0.4 - height / 2 for place in range(len(points))], [" ".join(p) for p in points], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("% of the rate of a square product timed in the same round")
    axes.legend(fontsize="small")
    save_figure(drawing, path)
    return True


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"


def main() -> None:
    """The command line."""
    parser = ArgumentParser(description="Write results.csv, a table a kernel and plots.")
    parser.add_argument("results", nargs="+", type=Path, help="files of --benchmark-json")
    parser.add_function_arguments(report, skip={"results"})
    arguments = parser.parse_args()
    try:
        report(arguments.results, output=arguments.output, docs=arguments.docs)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
