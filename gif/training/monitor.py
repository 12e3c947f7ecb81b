"""What a run shows of itself: the progress line, and what its loggers write."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from gif.distributed import rank
from gif.progress import progress, say
from gif.training.checkpoint import mean_score
from gif.training.loggers import Logger, all_open

Report = Callable[[int, Mapping[str, float]], None]


@contextmanager
def monitor(
    description: str, steps: int, done: int, batch_size: int, device: torch.device, loggers: Sequence[Logger]
) -> Iterator[tuple[Callable[[], None], Report, Report]]:
    """Yield ``advance()``, to be called after each step, ``report(step, measures)``, ``report_scores(step, scores)``.

    The progress line shows images a second, the time left, the loss, the head's health, memory and the last validation,
    which also gets a line of its own; the loggers get all measures and scores. The first process reports; the others
    are silent.
    """
    if rank() > 0:
        yield lambda: None, lambda step, measures: None, lambda step, scores: None
        return
    note = validation = ""
    with (
        progress(description, steps * batch_size, "images", done=done * batch_size) as bar,
        all_open(loggers, done) as write,
    ):
        last_time, last_step = time.monotonic(), done

        def report(step: int, measures: Mapping[str, float]) -> None:
            nonlocal note, last_time, last_step
            now = time.monotonic()
            memory = memory_gb(device)
            speed = (step - last_step) * batch_size / max(now - last_time, 1e-9)
            last_time, last_step = now, step
            write(step, {**measures, "images a second": speed, "memory (GB)": memory})
            parts = (f"loss {measures['loss']:.3f}", summary(measures), f"{memory:.1f} GB")
            note = ", ".join(part for part in parts if part)

        def report_scores(step: int, scores: Mapping[str, float]) -> None:
            nonlocal validation, last_time, last_step
            last_time, last_step = time.monotonic(), step  # validating is no part of the speed
            shown = {**scores, "mean": mean_score(scores)} if len(scores) > 1 else dict(scores)
            write(step, {f"validation/{name}": score for name, score in shown.items()})
            words = ", ".join(f"{name} {score:.4f}" for name, score in shown.items())
            validation = f", validation {mean_score(scores):.4f}"
            say(f"{description}: validation after {step:,} steps: {words}")

        yield lambda: bar(batch_size, note + validation), report, report_scores


def memory_gb(device: torch.device) -> float:
    """Memory of this process in GB (10^9 bytes): on CUDA the most that tensors took, otherwise what it holds now.

    NaN where that takes psutil, and it is not installed.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import psutil
    except ModuleNotFoundError:
        return math.nan
    return psutil.Process().memory_info().rss / 1e9


def summary(measures: Mapping[str, float]) -> str:
    """Put the measures into one short line, for the progress bar."""
    parts = []
    tokens = [value for name, value in measures.items() if name.startswith("token accuracy")]
    if tokens:
        parts.append(f"tokens {'/'.join(f'{value:.0%}'[:-1] for value in tokens)} %")
        parts.append(f"codes {measures['code accuracy']:.0%}")
    if "cosine to own" in measures:
        parts.append(f"own {measures['cosine to own']:.2f}, impostor {measures['cosine to impostor']:.2f}")
    if stayed := measures.get("code vectors stayed"):
        parts.append(f"{stayed:,.0f} code vectors stayed")
    return ", ".join(parts)
