"""Results of runs, a small file a head: in the repository they let many machines and days add to one comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gif.errors import InputError
from gif.experiments.glyph_bench import contender_settings, folder_name
from gif.experiments.runs import HEAD_BYTES, PROCESSOR, PROCESSOR_SECONDS, RESULT, Run
from gif.files import read_json, write_text
from gif.progress import say
from gif.resume import differences

KEPT = ("rank1", "tar", "pair_accuracy", "steps", HEAD_BYTES, PROCESSOR_SECONDS, PROCESSOR)
"""Of a result; of a set that judges its measures."""


@contextmanager
def recorded(folder: Path | None, shared: Mapping[str, Any], runs: Sequence[Run]) -> Iterator[None]:
    """Within the block, those of ``runs`` that ``folder`` has records of are done; after it, it has all that are.

    Where ``folder`` is None nothing is known and nothing kept. ``shared``: as of `Records`.

    Raises ValueError where a record is no JSON.
    """
    if folder is None:
        yield
        return
    records = Records(folder, shared)
    records.restore(runs)
    try:
        yield
    finally:
        records.keep(runs)


class Records:
    """What runs scored, in ``folder``: head.json holds a head's settings, and what its runs scored, by length and seed.

    A head whose settings are others today has no records: they are replaced when it has run again.

    Args:
        folder: of the records of one comparison.
        shared: the settings that all its runs have in common, fit for JSON.
    """

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self._folder = folder
        self._shared = dict(shared)
        self._known: dict[str, dict[str, dict[str, Any]]] = {}  # by head and run

    def restore(self, runs: Iterable[Run]) -> None:
        """Write the result of each run that is recorded, and has none, into its folder: it is not trained again.

        Raises ValueError where a record is no JSON.
        """
        restored = 0
        for head in _by_head(runs):
            known = self._of(head[0])
            for run in head:
                if not run.done and (found := known.get(_key(run))) is not None:
                    write_text(run.folder / RESULT, json.dumps(found, indent=2))
                    restored += 1
        if restored:
            say(f"{restored} run{'s' * (restored > 1)} known from {self._folder}")

    def keep(self, runs: Iterable[Run]) -> None:
        """Record every run that is done."""
        for head in _by_head(run for run in runs if run.done):
            known = self._of(head[0])
            found = {_key(run): _record(read_json(run.folder / RESULT)) for run in head if _key(run) not in known}
            if found:
                text = {
                    "settings": self._settings(head[0]),
                    "runs": dict(sorted({**known, **found}.items(), key=_order)),
                }
                write_text(self._path(head[0]), _one_run_a_line(text))
                known.update(found)

    def _of(self, run: Run) -> dict[str, dict[str, Any]]:
        """What is known of a head whose settings are those of ``run``, by run; read once."""
        if run.name not in self._known:
            self._known[run.name] = self._read(run)
        return self._known[run.name]

    def _read(self, run: Run) -> dict[str, dict[str, Any]]:
        path = self._path(run)
        if not path.exists():
            return {}
        there = read_json(path)
        if not isinstance(there, dict) or not {"settings", "runs"} <= there.keys():
            raise InputError(f"{path} is no record of runs; remove it, or name another folder")
        if other := differences(json.dumps(there["settings"]), json.dumps(self._settings(run))):
            say(f"{path} is of other settings ({other}) and is not used")
            return {}
        runs: dict[str, dict[str, Any]] = there["runs"]
        return runs

    def _path(self, run: Run) -> Path:
        return self._folder / f"{folder_name(run.name)}.json"

    def _settings(self, run: Run) -> dict[str, Any]:
        return {**self._shared, **contender_settings(run.contender)}


def recorded_results(folder: Path | None, heads: Sequence[str]) -> list[dict[str, list[dict[str, Any]]]]:
    """By length, the longest first, the results by head that ``folder`` has of ``heads``; none where it is None."""
    if folder is None:
        return []
    found: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for name in heads:
        path = folder / f"{folder_name(name)}.json"
        for key, result in read_json(path)["runs"].items() if path.exists() else ():
            found.setdefault(_order((key, None))[:2], {}).setdefault(name, []).append(result)
    return [found[length] for length in sorted(found, reverse=True)]


def _by_head(runs: Iterable[Run]) -> list[list[Run]]:
    heads: dict[str, list[Run]] = {}
    for run in runs:
        heads.setdefault(run.name, []).append(run)
    return list(heads.values())


def _key(run: Run) -> str:
    return f"{run.length.folder}/seed-{run.seed}"


def _order(entry: tuple[str, Any]) -> tuple[str, int, int]:
    """By unit, length, seed, as numbers."""
    length, seed = entry[0].split("/")
    unit, count = length.rsplit("-", 1)
    return unit, int(count), int(seed.removeprefix("seed-"))


def _record(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's result tables and curves read."""
    kept = {name: result[name] for name in KEPT if name in result}
    if sets := {name: {key: of[key] for key in KEPT if key in of} for name, of in result["sets"].items()}:
        kept["sets"] = sets
    return kept


def _one_run_a_line(record: Mapping[str, Any]) -> str:
    """JSON that a difference of two versions shows run by run."""
    runs = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record["runs"].items())
    return f'{{"settings": {json.dumps(record["settings"])},\n "runs": {{\n{runs}\n}}}}\n'
