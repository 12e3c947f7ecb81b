"""`python -m benchmarks.campaign`: damage, kills, rivals and planted code, by a seed, for the minutes that are given.

    python -m benchmarks.campaign --seed 1 --minutes 10 --output runs/campaign
    python -m benchmarks.campaign --repeat 1/mutations/checkpoint/17        # one case again, and what came of it

Every kind of case is numbered from 0, and a case follows from the seed, its kind and its number alone. Records are
appended to campaign.jsonl: given again with the same output and seed, the campaign goes on behind the last. The exit
code is 1 if anything was silent, executed, a traceback or lost, and each such case is listed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch

from benchmarks.campaign import commands, damaged, planted
from benchmarks.campaign.isolation import Isolated, attempt
from benchmarks.campaign.records import FILE, VIOLATIONS, Kind, Record, Records, table
from gif.progress import PLAIN_INTERVAL, console, print_table, say

SHARES = {damaged.PART: 0.5, planted.PART: 0.15, commands.KILLS: 0.25, commands.RIVALS: 0.1}
"""Parts, with their shares of the time; what one leaves goes to those after it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        parts = [options.repeat.split("/")[1]] if options.repeat else options.parts
        kinds = _prepare(Path(folder), parts)
        by_name = {f"{kind.part}/{kind.name}": kind for kind in kinds}
        if options.repeat:
            found = attempt(by_name, options.repeat)
            say(f"{found.outcome}: {found.note}")
            return int(found.outcome in VIOLATIONS)
        options.output.mkdir(parents=True, exist_ok=True)
        records = Records(options.output / FILE)
        with Isolated(by_name) as isolated:
            deadline = time.monotonic() + 60 * options.minutes
            for place, part in enumerate(parts):
                shares = [SHARES[name] for name in parts[place:]]
                until = time.monotonic() + (deadline - time.monotonic()) * shares[0] / sum(shares)
                _run(part, [kind for kind in kinds if kind.part == part], isolated, records, options, until)
    return _report(records)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="decides every case (0)")
    parser.add_argument("--minutes", type=float, default=10, help="for all parts together, after inputs are made (10)")
    parser.add_argument("--cases", type=int, help="at most so many of each kind")
    parser.add_argument(
        "--parts", nargs="+", choices=SHARES, default=list(SHARES), metavar="PART", help=", ".join(SHARES)
    )
    parser.add_argument("--output", type=Path, default=Path("runs/campaign"), help=f"folder for {FILE}")
    parser.add_argument("--repeat", metavar="CASE", help="only this case, as a violation is listed")
    return parser.parse_args(arguments)


def _prepare(folder: Path, parts: Sequence[str]) -> list[Kind]:
    """The inputs of the parts, made in ``folder``, and their kinds."""
    say(f"making inputs for {', '.join(parts)}")
    kinds: list[Kind] = []
    if damaged.PART in parts or planted.PART in parts:
        damaged.write_all(folder / "formats")
        if planted.PART in parts:
            planted.write_all(folder / "formats")
        kinds += [
            *damaged.kinds(folder / "formats"),
            *(planted.kinds(folder / "formats") if planted.PART in parts else []),
        ]
    if commands.KILLS in parts or commands.RIVALS in parts:
        commands.write_inputs(folder / "commands")
        kinds += commands.kinds(folder / "commands")
    return kinds


def _run(
    part: str,
    kinds: Sequence[Kind],
    isolated: Isolated,
    records: Records,
    options: argparse.Namespace,
    until: float,
) -> None:
    """Cases of one part, a kind after another, until the time is over or there are no more."""
    begin = said = time.monotonic()
    tried = records.tried()
    cases = (case for case in _cases(kinds, options) if case not in tried)
    for done, case in enumerate(cases, 1):
        if (now := time.monotonic()) > until and done > len(kinds):
            break
        found = isolated.attempt(case)
        records.add(Record(case, found.outcome, found.note))
        if found.outcome in VIOLATIONS:
            say(f"{found.outcome}: {case}: {found.note}")
        if now - said >= PLAIN_INTERVAL:
            said = now
            say(f"{part}: {done:,} cases, {done / (now - begin):.1f}/s, {max(until - now, 0):.0f} s left")


def _cases(kinds: Sequence[Kind], options: argparse.Namespace) -> Iterator[str]:
    """seed/part/kind/number, each kind in turn; endless unless every kind has so many cases."""
    for number in count():
        of = [kind for kind in kinds if number < min(kind.cases or number + 1, options.cases or number + 1)]
        if not of:
            return
        yield from (f"{options.seed}/{kind.part}/{kind.name}/{number}" for kind in of)


def _report(records: Records) -> int:
    console.width = max(console.width, 160)
    print_table(table(records.all))
    for record in records.violations:
        say(f"{record.outcome}: {record.note}\n    python -m benchmarks.campaign --repeat {record.case!r}")
    return int(bool(records.violations))


if __name__ == "__main__":
    sys.exit(main())
