"""One whole training step, backbone and head, against the number of identities: what is the head's share?

`pytest benchmarks/test_whole_step.py` for a network of glyphs to 100 thousand identities; `--full` to 64 million, and
MobileFaceNet on 112 x 112 images. "backbone alone" is given a gradient of its embeddings instead of a head. Memory is
that of any step but the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, measure
from benchmarks.heads import BACKBONE_ALONE, FULL, HEADS, POOL, QUICK, WIDTH, Step, label_batches
from benchmarks.memory import kept_bytes, skip_unless_it_fits
from benchmarks.results import Subject
from gif.backbones import BackboneConfig

if TYPE_CHECKING:  # what a run on a GPU imports does without it
    from pytest_benchmark.fixture import BenchmarkFixture

ACTIVATION_BYTES = 40 << 20
"""What a MobileFaceNet holds for an image of 112 x 112 in training; the small network holds less."""


@dataclass(frozen=True)
class Setting:
    """A backbone and the images of a batch."""

    backbone: BackboneConfig
    batch: int
    slow: bool

    def __str__(self) -> str:
        return f"{self.backbone.name} {self.backbone.image_size}x{self.backbone.image_size} B{self.batch}"

    def images(self) -> Tensor:
        size = self.backbone.image_size
        return torch.randn(self.batch, self.backbone.channels, size, size, device=DEVICE)


SMALL = Setting(BackboneConfig("small", embedding_size=WIDTH), batch=256, slow=False)
MOBILE = Setting(BackboneConfig("mobilefacenet", embedding_size=WIDTH, channels=3, image_size=112), batch=64, slow=True)


def whole_step(backbone: nn.Module, head: Step | None) -> Step:
    """A step of both, given images and labels; without a head the loss is mean(z^2) / 2."""
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1, momentum=0.9, fused=True)

    def step(images: Tensor, labels: Tensor) -> None:
        embeddings = backbone(images)
        if head is None:
            embeddings.backward(embeddings.detach() / embeddings.numel())
        else:
            head(embeddings, labels)
        optimizer.step()
        optimizer.zero_grad()

    return step


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    metafunc.parametrize("m", FULL if full else QUICK)
    metafunc.parametrize("setting", [SMALL, MOBILE] if full else [SMALL], ids=lambda x: x.backbone.name)


@pytest.mark.parametrize("provider", [BACKBONE_ALONE, *HEADS])
def test_whole_step(benchmark: BenchmarkFixture, tmp_path: Path, m: int, setting: Setting, provider: str) -> None:
    head = HEADS.get(provider)
    if head and head.missing:
        pytest.skip(head.missing)
    needed = ACTIVATION_BYTES * setting.batch + (head.cost(m, setting.batch).bytes if head else 0)
    skip_unless_it_fits(f"{provider}, {m:,} identities, with a backbone", needed, DEVICE)
    labels = label_batches(m, setting.batch)
    images = setting.images()
    steps: list[Step] = []
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        steps[0](images, labels[turn % POOL])

    def build() -> None:
        head_step = head.build(m, labels, tmp_path) if head else None
        steps.append(whole_step(setting.backbone.build().to(DEVICE), head_step))
        call()

    kept = kept_bytes(build, DEVICE)
    slow = setting.slow or (head is not None and head.slow(m))
    subject = Subject(
        kernel="whole_step", provider=provider, mode=str(setting), shape=f"m{m}", identities=m, kept_bytes=kept
    )
    measure(benchmark, call, subject, rounds=5 if slow else 15, warmup_rounds=1 if slow else 3)
