"""The heads that are measured: their formulas against what they hold, and a step that reaches a backbone."""

import pytest
import torch

from benchmarks.heads import (
    BACKBONE_ALONE,
    BATCH,
    FULL_SOFTMAX,
    GIF,
    HEADS,
    PARTIAL_FC,
    PARTIAL_FC_OF_SAMPLES,
    PUBLISHED,
    VOCAB,
    WIDTH,
    WITHOUT_NEGATIVES,
)
from benchmarks.memory import kept_bytes, peak_bytes
from benchmarks.test_whole_step import SMALL, Setting, whole_step
from gif.backbones import BackboneConfig

M = 20_000


@pytest.mark.parametrize("batch", [BATCH, 1024])
@pytest.mark.parametrize("head", HEADS.values(), ids=repr)
def test_memory_by_formula(head, batch, tmp_path):
    """Within 15 %: small buffers and the allocator's rounding are left out, and what Partial FC draws twice."""
    if head.missing:
        pytest.skip(head.missing)
    torch.manual_seed(0)
    labels = [torch.randint(M, (batch,)) for _ in range(2)]
    embeddings = torch.randn(batch, WIDTH).requires_grad_()
    steps = []

    def build():
        steps.append(head.build(M, labels, tmp_path))
        steps[0](embeddings, labels[0])

    kept = kept_bytes(build, "cpu") - embeddings.nbytes  # their gradient is the backbone's
    peak = peak_bytes(lambda: steps[0](embeddings, labels[1]), "cpu")
    assert 0.85 < head.cost(M, batch).bytes / (kept + peak) < 1.15
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("head", HEADS.values(), ids=repr)
def test_whose_work_is_flat_and_whose_memory(head):
    small, large = (head.cost(m, BATCH) for m in (100_000, 64_000_000))
    flat = head in (GIF, WITHOUT_NEGATIVES, PUBLISHED)  # codes of 4 and 6 tokens
    assert (large.flops <= 1.5 * small.flops) is (flat or head is PARTIAL_FC_OF_SAMPLES)
    assert (large.bytes - large.tables <= 1.5 * (small.bytes - small.tables)) is (flat or head is PARTIAL_FC_OF_SAMPLES)
    assert (large.bytes < 2 * 2**30) is flat


def test_work_by_hand():
    softmax = FULL_SOFTMAX.cost(M, BATCH)
    assert (softmax.flops, softmax.traffic) == (6 * BATCH * M * WIDTH, 16 * M * WIDTH)
    assert PARTIAL_FC.cost(M, BATCH).flops == pytest.approx(0.6 * BATCH * M * WIDTH)
    tokens, candidates = 4 * (VOCAB + WIDTH), 3 * BATCH
    assert WITHOUT_NEGATIVES.cost(M, BATCH).flops == 6 * BATCH * WIDTH * (tokens + candidates)
    assert GIF.cost(M, BATCH).flops == 6 * BATCH * WIDTH * (tokens + candidates + 4096)


@pytest.mark.parametrize("provider", [BACKBONE_ALONE, *HEADS])
def test_a_whole_step_moves_the_backbone(provider, tmp_path):
    setting = Setting(BackboneConfig("small", embedding_size=WIDTH, width=4), batch=8, slow=False)
    labels = [torch.randint(1000, (setting.batch,))]
    if provider != BACKBONE_ALONE and HEADS[provider].missing:
        pytest.skip(HEADS[provider].missing)
    head = None if provider == BACKBONE_ALONE else HEADS[provider].build(1000, labels, tmp_path)
    backbone = setting.backbone.build()
    step = whole_step(backbone, head)
    before = [parameter.detach().clone() for parameter in backbone.parameters()]
    step(setting.images(), labels[0])
    assert all((old != new).any() for old, new in zip(before, backbone.parameters(), strict=True))
    assert str(SMALL) == "small 32x32 B256"
