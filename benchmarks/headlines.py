"""The numbers that a reader looks for first, each beside what is wanted of it: the last lines of `make bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.heads import BACKBONE_ALONE, GIF, QUICK
from benchmarks.results import Measurement


@dataclass(frozen=True)
class Headline:
    """A ratio of two providers' times at one point.

    Args:
        name: what a line begins with.
        kernel, shape, mode, dtype: of the point; an empty mode is any.
        provider: whose time it is, over that of the first of ``against`` that was measured.
        wanted: the most it may be, or the least where ``least``.
        least: whether more is better.
    """

    name: str
    kernel: str
    shape: str
    mode: str
    wanted: float
    against: tuple[str, ...]
    dtype: str = "float32"
    provider: str = "ours"
    least: bool = False

    def line(self, found: Sequence[Measurement]) -> str:
        """Value, what is wanted, and whether it is met; of the machine measured last."""
        value = self._value(found)
        if value is None:
            return f"{self.name}: not measured in this run"
        met = value >= self.wanted if self.least else value <= self.wanted
        relation = ">=" if self.least else "<="
        return f"{self.name}: {value:.2f}, wanted {relation} {self.wanted:g}: {'met' if met else 'NOT MET'}"

    def _value(self, found: Sequence[Measurement]) -> float | None:
        here = {
            m.provider: m.ratio
            for m in found
            if (m.kernel, m.shape, m.dtype, m.machine) == (self.kernel, self.shape, self.dtype, found[-1].machine)
            and self.mode in ("", m.mode)
        }
        other = next((here[name] for name in self.against if name in here), None)
        if other is None or self.provider not in here:
            return None
        return other / here[self.provider] if self.least else here[self.provider] / other


_TOKENS, _BOTH, _OWN = "B1024-d512-l5-v20", "forward+backward", ("own products", "products")
HEADLINES = (
    Headline("codes of 10K, time over faiss", "tokenize", "m10000-d128", "", 1.0, ("faiss",)),
    Headline("codes of 100K, time over faiss", "tokenize", "m100000-d512", "", 1.0, ("faiss",)),
    Headline("codes of 1M, time over faiss", "tokenize", "m1000000-d512", "", 1.0, ("faiss",)),
    Headline("token loss over its products", "token_margin", _TOKENS, _BOTH, 1.3, _OWN),
    Headline("the same with projections", "token_margin", f"{_TOKENS}-projected", _BOTH, 1.3, _OWN),
    Headline("the same in bfloat16", "token_margin", _TOKENS, _BOTH, 1.5, _OWN, "bfloat16"),
    Headline(
        "token loss, B 128, eager's time over ours",
        "token_margin",
        "B128-d512-l5-v20",
        "forward",
        1.2,
        ("batched eager",),
        least=True,
    ),
    Headline("live contrast over its products", "live_contrast", "B256-K4096-d512", "", 1.3, ("products",)),
    *(
        Headline(
            f"whole step, {m:,}, over its backbone",
            "whole_step",
            f"m{m}",
            "small 32x32 B256",
            1.1,
            (BACKBONE_ALONE,),
            provider=GIF.name,
        )
        for m in QUICK
    ),
)


def headlines(found: Sequence[Measurement]) -> list[str]:
    """A line each."""
    return [headline.line(found) for headline in HEADLINES]
