"""`python -m benchmarks.compare old.json new.json`: what became slower, by ratio to a reference product.

Machines may differ: each measurement is compared as a multiple of a product that was timed in the same rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli
from rich.table import Table

from benchmarks.results import Measurement, read_results
from gif.progress import console, say


def compare(saved: Path, new: Path, *, tolerance: float = 1.25) -> None:
    """Print each measurement's change; exit with 1 where one is slower beyond doubt.

    Args:
        saved: results of before, of `--benchmark-json`.
        new: results of now.
        tolerance: slower by more than this factor counts, where the 20 % to 80 % quantiles do not overlap either.
    """
    before, after = (_by_name(read_results([path])) for path in (saved, new))
    common = [name for name in after if name in before]
    if not common:
        raise ValueError(f"{saved} and {new} have no measurement in common; run the same benchmarks")
    table = Table("measurement", "before", "now", "change", title="time as a multiple of the reference product's")
    slower = []
    for name in common:
        old, now = before[name], after[name]
        change = now.ratio / old.ratio
        worse = change > tolerance and now.ratio_20 > old.ratio_80
        if worse:
            slower.append(name)
        table.add_row(" ".join(name), f"{old.ratio:.3g}", f"{now.ratio:.3g}", f"{change:.2f} x{' slower' * worse}")
    console.print(table)
    say(f"{len(slower)} of {len(common)} are slower by more than {tolerance:g} x")
    if slower:
        sys.exit(1)


def _by_name(found: list[Measurement]) -> dict[tuple[str, ...], Measurement]:
    return {(m.kernel, m.provider, *m.point): m for m in found}


if __name__ == "__main__":
    try:
        auto_cli(compare)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
