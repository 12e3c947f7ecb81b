"""What pytest-benchmark wrote, one record a measurement."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS = ("kernel", "provider", "mode", "shape", "dtype", "machine")


@dataclass(frozen=True)
class Measurement:
    """One provider at one point.

    ``seconds`` is the median time; ``ratio`` the median ratio to the reference product of the same round, with its 20 %
    and 80 % quantiles; ``peak_bytes`` the memory beyond what was there before; ``facts`` all that was recorded.
    """

    seconds: float
    ratio: float
    ratio_20: float
    ratio_80: float
    peak_bytes: int
    facts: dict[str, Any]

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Measurement:
        """One entry of pytest-benchmark's file; KeyError for one that the harness did not make."""
        facts = entry["extra_info"]
        numbers = {name: facts[name] for name in ("ratio", "ratio_20", "ratio_80", "peak_bytes")}
        return cls(seconds=entry["stats"]["median"], facts=facts, **numbers)

    def __getattr__(self, name: str) -> Any:
        if name in FACTS:
            return self.facts[name]
        raise AttributeError(name)

    @property
    def point(self) -> tuple[str, ...]:
        """What was measured, whoever did it: shape, mode, dtype."""
        return self.shape, self.mode, self.dtype

    @property
    def headline(self) -> bool:
        """Whether it is among the points that a reader looks for; the others are one click away."""
        return bool(self.facts.get("headline", True))

    @property
    def kept_bytes(self) -> int | None:
        """What stays between calls, where it was looked at."""
        return self.facts.get("kept_bytes")

    @property
    def process_bytes(self) -> int | None:
        """What the system counts, resident memory or NVML's, where it was looked at."""
        return self.facts.get("process_bytes")

    @property
    def held_bytes(self) -> int:
        """What stays and what a call takes beside it."""
        return (self.kept_bytes or 0) + self.peak_bytes

    @property
    def rate(self) -> float | None:
        """FLOPs a second as a share of the reference product's, where a formula gave the FLOPs."""
        if "flops" not in self.facts:
            return None
        return float(self.facts["flops"] / self.ratio / self.facts["reference_flops"])

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second as a share of the reference copy's, where a formula gave the bytes."""
        if "bytes" not in self.facts:
            return None
        return float(self.facts["bytes"] / self.facts["copy_ratio"] / self.facts["reference_bytes"])

    @property
    def roofline(self) -> float | None:
        """The larger of `rate` and `bandwidth`: what the better used of processor and memory gives of what it could."""
        return max((share for share in (self.rate, self.bandwidth) if share is not None), default=None)


def read_results(paths: Iterable[str | Path]) -> list[Measurement]:
    """The measurements of some result files, in their order.

    Raises FileNotFoundError, or ValueError for a file that the benchmarks did not write.
    """
    found = []
    for path in paths:
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))["benchmarks"]
            found += [Measurement.from_entry(entry) for entry in entries]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no result of `make bench` ({error!r}); give files of --benchmark-json"
            ) from error
    if not found:
        raise ValueError("there is no measurement; give files of --benchmark-json")
    return found
