"""What the benchmarks record, and pytest-benchmark's files read again: one record a measurement."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gif.planning import Rates

COLUMNS = ("kernel", "provider", "mode", "shape", "dtype", "machine")
"""Fields that together name a measurement."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured, and what is known of it before and beside the timing.

    Args:
        kernel: the op or the question, which has a table of its own.
        provider: whose implementation.
        mode: what is done, such as "forward".
        shape, dtype: of the inputs.
        headline: whether it is among the points that a reader looks for; the others are one click away.
        identities: m, or how many vectors there are, where that is what varies.
        flops: of the products, by formula.
        bytes: the least that must move, by formula.
        kept_bytes: what stays between calls.
        needed_bytes: of memory, by formula.
        rates: this machine's, measured right before.
        distinct: share of the identities with a code of their own.
        cosine: mean cosine to the centroids, a number a token.
        loss_error, gradient_error: relative errors against float64.
    """

    kernel: str
    provider: str
    mode: str
    shape: str
    dtype: str = "float32"
    headline: bool = True
    identities: int | None = None
    flops: float | None = None
    bytes: float | None = None
    kept_bytes: int | None = None
    needed_bytes: float | None = None
    rates: Rates | None = None
    distinct: float | None = None
    cosine: list[float] | None = None
    loss_error: float | None = None
    gradient_error: float | None = None

    @property
    def point(self) -> tuple[str, ...]:
        """What was measured, whoever did it: shape, mode, dtype."""
        return self.shape, self.mode, self.dtype


@dataclass(frozen=True, kw_only=True)
class Measurement(Subject):
    """One provider at one point.

    Args:
        machine: where.
        seconds: the median time of a round.
        ratio: the median ratio of a round to the reference product of the same round.
        ratio_20, ratio_80: its quantiles.
        peak_bytes: memory beyond what was there before.
        process_bytes: what the system counts, resident memory or NVML's; None where it was not looked at.
        ceiling_ratio: the median ratio to the fastest product of the dtype.
        copy_ratio: the median ratio to the reference copy.
        reference_flops, reference_bytes: of the reference product, and of the copy.
    """

    machine: str
    seconds: float
    ratio: float
    ratio_20: float
    ratio_80: float
    peak_bytes: int
    process_bytes: int | None = None
    ceiling_ratio: float | None = None
    copy_ratio: float | None = None
    reference_flops: float | None = None
    reference_bytes: float | None = None

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Measurement:
        """One entry of pytest-benchmark's file; KeyError or TypeError for one that the harness did not make."""
        known = {field.name for field in fields(cls)}
        facts = {name: value for name, value in entry["extra_info"].items() if name in known}
        if facts.get("rates") is not None:
            facts["rates"] = Rates(**facts["rates"])
        return cls(seconds=entry["stats"]["median"], **facts)

    def to_facts(self) -> dict[str, Any]:
        """What is left in pytest-benchmark's file beside its own times."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "seconds"}

    @property
    def held_bytes(self) -> int:
        """What stays and what a call takes beside it."""
        return (self.kept_bytes or 0) + self.peak_bytes

    @property
    def rate(self) -> float | None:
        """FLOPs a second as a share of the fastest product's, where a formula gave the FLOPs."""
        if self.flops is None or self.ceiling_ratio is None or self.reference_flops is None:
            return None
        return self.flops / self.ceiling_ratio / self.reference_flops

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second as a share of the reference copy's, where a formula gave the bytes."""
        if self.bytes is None or self.copy_ratio is None or self.reference_bytes is None:
            return None
        return self.bytes / self.copy_ratio / self.reference_bytes

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
