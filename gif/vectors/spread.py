"""Spread code vectors over the sphere: SGD on the Gaussian potential of random subsets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gif.progress import progress
from gif.resume import UnfinishedWork
from gif.vectors.quality import VectorQuality, judge_vectors, sample_rows, uniform_optimum
from gif.vectors.store import CodeVectors
from gif_kernels import uniformity_step_

CHECKPOINT_FORMAT = "gif.spread_checkpoint/1"


@dataclass(frozen=True)
class SpreadReport:
    """What spreading did: quality before and after (of a sample), and the mean gap of each epoch's subsets."""

    before: VectorQuality
    after: VectorQuality
    gaps: list[float]


def spread_code_vectors(
    vectors: CodeVectors,
    *,
    epochs: int = 3,
    batch: int = 2048,
    lr: float = 0.1,
    t: float = 2.0,
    target_gap: float | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> SpreadReport:
    """Minimise the Gaussian potential of ``vectors``, in place.

    Each epoch goes once through random subsets of about ``batch`` vectors without replacement, one `uniformity_step_`
    a subset. Three epochs do nearly all there is to do; more epochs trade the encoder's order of similarity for ever
    smaller gains, so the report shows both.

    Args:
        vectors: (m, d), m >= 2.
        epochs: passes over the table, >= 1.
        batch: vectors in a subset, >= 2.
        lr: rate per vector, > 0 (see `uniformity_step_`).
        t: of the potential.
        target_gap: stop after the first epoch whose subsets' mean gap to the uniform optimum is below this.
        seed: of the subsets and of the rounding.
        checkpoint: file kept once a minute and on interruption; a later call with the same arguments continues from it
            to the same result, and removes it when done.

    Raises ValueError for bad values or for a checkpoint of another run.
    """
    if len(vectors) < 2 or epochs < 1 or batch < 2:
        raise ValueError(
            f"wanted at least 2 vectors, 1 epoch and a batch of 2, got {len(vectors)} vectors, epochs={epochs}, "
            f"batch={batch}"
        )
    table, optimum = vectors.table, uniform_optimum(vectors.width, t)
    sample = sample_rows(len(vectors)).to(table.device)
    start: Tensor = table[sample]
    losses: list[float] = []
    settings = f"{vectors} batch={batch} lr={lr} t={t} seed={seed} start={_digest(start)}"
    work = UnfinishedWork(checkpoint, CHECKPOINT_FORMAT, settings)
    if (saved := work.load()) is not None:
        table.copy_(saved["vectors"])
        losses = saved["losses"].tolist()

    def state() -> dict[str, Tensor]:
        return {"vectors": table, "losses": torch.tensor(losses, dtype=torch.float64)}

    steps_an_epoch = max(len(vectors) // batch, 1)
    total = epochs * steps_an_epoch
    gaps: list[float] = [
        sum(losses[i : i + steps_an_epoch]) / steps_an_epoch - optimum
        for i in range(0, len(losses) - steps_an_epoch + 1, steps_an_epoch)
    ]
    with progress("spreading code vectors", total * batch, "vectors") as advance:
        advance(len(losses) * batch)
        begun = len(losses)
        try:
            for step, index in _subsets(len(vectors), steps_an_epoch, total, seed, first=len(losses)):
                if step % steps_an_epoch == 0 and _reached(gaps, target_gap):
                    break
                begun = step + 1
                rounding = seed * 1_000_003 + step
                losses.append(float(uniformity_step_(table, index.to(table.device), lr=lr, t=t, seed=rounding)))
                if len(losses) % steps_an_epoch == 0:
                    gaps.append(sum(losses[-steps_an_epoch:]) / steps_an_epoch - optimum)
                if work.due:
                    work.save(state())
                advance(batch, note=f"gap {losses[-1] - optimum:.4f}")
        except BaseException:
            if begun == len(losses):  # not in the middle of a step: the table is what the losses say
                work.save(state())
            raise
    work.remove()
    return SpreadReport(judge_vectors(start, t=t), judge_vectors(table[sample], start, t=t), gaps)


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def _reached(gaps: list[float], target: float | None) -> bool:
    return bool(gaps) and target is not None and gaps[-1] < target


def _subsets(m: int, steps_an_epoch: int, total: int, seed: int, *, first: int) -> Iterator[tuple[int, Tensor]]:
    """Subsets of [0, m) for steps ``first`` to ``total``: a function of seed and step alone, so a run can resume."""
    for epoch in range(first // steps_an_epoch, -(-total // steps_an_epoch)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        subsets = torch.randperm(m, generator=generator).tensor_split(steps_an_epoch)
        for i, subset in enumerate(subsets):
            step = epoch * steps_an_epoch + i
            if step >= first:
                yield step, subset
