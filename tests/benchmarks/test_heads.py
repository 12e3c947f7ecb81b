"""The heads that are measured: their formulas against what they hold, and a step that reaches a backbone."""

import pytest
import torch

from benchmarks.heads import BACKBONE_ALONE, BATCH, PROVIDERS, WIDTH, needed_bytes, step_work
from benchmarks.memory import kept_bytes, peak_bytes
from benchmarks.test_whole_step import SMALL, Setting, whole_step
from gif.backbones import BackboneConfig

M = 20_000


@pytest.fixture
def labels():
    torch.manual_seed(0)
    return [torch.randint(M, (BATCH,)) for _ in range(2)]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_memory_by_formula(provider, labels, tmp_path):
    """Within a fifth: small buffers and the allocator's rounding are left out of the formulas."""
    embeddings = torch.randn(BATCH, WIDTH).requires_grad_()
    steps = []
    kept = kept_bytes(lambda: steps.append(PROVIDERS[provider](M, labels, tmp_path)), "cpu")
    peak = peak_bytes(lambda: steps[0](embeddings, labels[0]), "cpu")
    assert 0.8 < needed_bytes(provider, M) / (kept + peak) < 1.2
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("provider", PROVIDERS)
def test_only_gif_is_flat(provider):
    small, large = (step_work(provider, m)["flops"] for m in (100_000, 64_000_000))
    assert (large <= 1.5 * small) is provider.startswith("GIF")  # codes of 4 and 6 tokens


def test_work_by_hand():
    assert step_work("full softmax", M) == {"flops": 6 * BATCH * M * WIDTH, "bytes": 16 * M * WIDTH}
    assert step_work("Partial FC 0.1", M)["flops"] == pytest.approx(0.6 * BATCH * M * WIDTH)
    tokens, candidates = 4 * (20 + WIDTH), 3 * BATCH
    assert step_work("GIF", M)["flops"] == 6 * BATCH * WIDTH * (tokens + candidates)


@pytest.mark.parametrize("provider", [BACKBONE_ALONE, *PROVIDERS])
def test_a_whole_step_moves_the_backbone(provider, tmp_path):
    setting = Setting(BackboneConfig("small", embedding_size=WIDTH, width=4), batch=8, slow=False)
    labels = [torch.randint(1000, (setting.batch,))]
    head = None if provider == BACKBONE_ALONE else PROVIDERS[provider](1000, labels, tmp_path)
    backbone = setting.backbone.build()
    step = whole_step(backbone, head)
    before = [parameter.detach().clone() for parameter in backbone.parameters()]
    step(setting.images(), labels[0])
    assert all((old != new).any() for old, new in zip(before, backbone.parameters(), strict=True))
    assert str(SMALL) == "small 32x32 B256"
