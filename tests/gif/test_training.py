"""The training loop, its checkpoints, the backbone it trains."""

import math

import pytest
import torch

from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.backbones import BackboneConfig, load_backbone, save_backbone
from gif.data import IdentityImages
from gif.data.augment import RandomAffine, normalize_pixels
from gif.losses import MarginSoftmax
from gif.training import TrainingConfig, embed, plot_losses, train
from gif.training import loop as loop_module
from gif.training.loop import _rate

BACKBONE = BackboneConfig(embedding_size=16, image_size=16, width=4)


@pytest.fixture
def dataset():
    """Eight identities, each a fixed pattern under noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat(20)
    patterns = torch.randint(0, 200, (8, 1, 16, 16), generator=generator)
    noise = torch.randint(0, 55, (160, 1, 16, 16), generator=generator)
    return IdentityImages((patterns[labels] + noise).to(torch.uint8), labels, list("abcdefgh"))


def fresh():
    torch.manual_seed(0)
    return BACKBONE.build(), MarginSoftmax(8, 16, scale=16.0)


def unchanged(images):
    return images


def test_learns(dataset):
    backbone, head = fresh()
    log = train(backbone, head, dataset, TrainingConfig(epochs=6, batch_size=32), augment=unchanged)
    assert log.losses.shape == (30,) and log.images_per_second > 0
    assert log.losses[-5:].mean() < 0.5 * log.losses[:5].mean()
    embeddings = torch.nn.functional.normalize(embed(backbone, dataset), dim=1)
    similarity = embeddings @ embeddings.T
    same = dataset.labels[:, None] == dataset.labels
    assert similarity[same].mean() > similarity[~same].mean() + 0.5


def test_a_killed_run_continues_to_the_same_weights(dataset, tmp_path, monkeypatch):
    config = TrainingConfig(epochs=3, batch_size=32)
    whole, head = fresh()
    log = train(whole, head, dataset, config)

    backbone, head = fresh()
    steps = []

    def interrupted(images):
        steps.append(1)
        if len(steps) == 13:  # in the third epoch
            raise KeyboardInterrupt
        return RandomAffine()(images)

    with pytest.raises(KeyboardInterrupt):
        train(backbone, head, dataset, config, augment=interrupted, checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00002"]
    torch.manual_seed(123)
    resumed, head = BACKBONE.build(), MarginSoftmax(8, 16, scale=16.0)
    again = train(resumed, head, dataset, config, checkpoints=tmp_path)
    assert torch.equal(again.losses, log.losses)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name

    def never(images):
        raise AssertionError("a finished run must not train again")

    finished = train(*fresh(), dataset, config, augment=never, checkpoints=tmp_path)
    assert torch.equal(finished.losses, log.losses)


def test_moved_code_vectors_are_part_of_the_state(dataset, tmp_path):
    config = TrainingConfig(epochs=3, batch_size=32)
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(2)] * 3), 2)
    start = CodeVectors(torch.randn(8, 16, generator=torch.Generator().manual_seed(5))).table

    def fresh_gif():
        torch.manual_seed(0)
        vectors = CodeVectors(start.clone(), normalized=True)
        return BACKBONE.build(), GIFLoss(codes, vectors, 16)

    whole, whole_head = fresh_gif()
    log = train(whole, whole_head, dataset, config)
    assert not torch.equal(whole_head.vectors.table, start)
    steps = []

    def interrupted(images):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return RandomAffine()(images)

    with pytest.raises(KeyboardInterrupt):
        train(*fresh_gif(), dataset, config, augment=interrupted, checkpoints=tmp_path)
    resumed, resumed_head = fresh_gif()
    again = train(resumed, resumed_head, dataset, config, checkpoints=tmp_path)
    assert torch.equal(again.losses, log.losses)
    assert torch.equal(resumed_head.vectors.table, whole_head.vectors.table)


def test_a_kill_while_writing_leaves_the_checkpoint_before(dataset, tmp_path, monkeypatch):
    config = TrainingConfig(epochs=2, batch_size=32)
    save, calls = loop_module.Checkpoints.save, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 2:
            (self.folder / ".epoch-00002.tmp").mkdir()
            (self.folder / ".epoch-00002.tmp" / "__0_0.distcp").write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, *args)

    monkeypatch.setattr(loop_module.Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*fresh(), dataset, config, checkpoints=tmp_path)
    monkeypatch.setattr(loop_module.Checkpoints, "save", save)
    log = train(*fresh(), dataset, config, checkpoints=tmp_path)
    assert torch.equal(log.losses, train(*fresh(), dataset, config).losses)


def test_rate():
    assert _rate(0, 0.1) == 0
    assert _rate(0.05, 0.1) == pytest.approx(0.5)
    assert _rate(0.1, 0.1) == 1
    assert _rate(0.55, 0.1) == pytest.approx(0.5)
    assert _rate(1, 0.1) == pytest.approx(0)
    assert _rate(0, 0) == 1


def test_errors(dataset):
    with pytest.raises(ValueError, match="160 images, fewer than a batch of 161"):
        train(*fresh(), dataset, TrainingConfig(batch_size=161))
    with pytest.raises(ValueError, match="epochs=0"):
        TrainingConfig(epochs=0)

    class Diverging(torch.nn.Module):
        def forward(self, embeddings, labels):
            return embeddings.sum() * math.inf

    with pytest.raises(FloatingPointError, match="lower lr"):
        train(fresh()[0], Diverging(), dataset, TrainingConfig(epochs=9, batch_size=16), augment=unchanged)


def test_backbone_file(tmp_path):
    backbone = BACKBONE.build().eval()
    save_backbone(tmp_path / "b.safetensors", backbone, BACKBONE)
    loaded, config = load_backbone(tmp_path / "b.safetensors")
    assert config == BACKBONE and not loaded.training
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(loaded(images), backbone(images))
    with pytest.raises(ValueError, match="multiple of 16, got 20"):
        BackboneConfig(image_size=20).build()
    other = BackboneConfig(embedding_size=8, image_size=16, width=4)
    save_backbone(tmp_path / "c.safetensors", backbone, other)
    with pytest.raises(ValueError, match="does not fit the backbone it names"):
        load_backbone(tmp_path / "c.safetensors")


class TestAugmentation:
    def test_pixels(self):
        images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
        assert normalize_pixels(images).flatten().tolist() == [-1, 1]

    def test_no_change_at_zero(self):
        images = torch.rand(3, 1, 16, 16) * 2 - 1
        still = RandomAffine(degrees=0, scale=1, shift=0)(images)
        torch.testing.assert_close(still, images, rtol=0, atol=1e-5)

    def test_shift_moves_the_centre_of_mass_and_fills_with_black(self):
        images = torch.full((200, 1, 17, 17), -1.0)
        images[:, :, 8, 8] = 1.0
        moved = RandomAffine(degrees=0, scale=1, shift=0.25)(images) + 1
        columns = (moved.sum(2) * torch.arange(17)).sum((1, 2)) / moved.sum((1, 2, 3))
        assert moved.min() >= -1e-6
        assert columns.std() == pytest.approx(0.25 * 17 / 3**0.5, rel=0.2)
        assert columns.mean() == pytest.approx(8, abs=0.6)

    def test_rotation_keeps_the_radius(self):
        images = torch.full((100, 1, 33, 33), -1.0)
        images[:, :, 16, 28] = 1.0  # 12 pixels right of the centre
        turned = RandomAffine(degrees=90, scale=1, shift=0)(images) + 1
        rows = (turned.sum(3) * torch.arange(33)).sum((1, 2)) / turned.sum((1, 2, 3)) - 16
        columns = (turned.sum(2) * torch.arange(33)).sum((1, 2)) / turned.sum((1, 2, 3)) - 16
        torch.testing.assert_close((rows**2 + columns**2).sqrt(), torch.full((100,), 12.0), rtol=0, atol=0.3)
        assert rows.std() > 4


def test_images_check_their_labels():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\), got \[0, 1\]"):
        IdentityImages(images, torch.tensor([0, 1]), ["a"])
    with pytest.raises(ValueError, match="uint8"):
        IdentityImages(images.float(), torch.tensor([0, 0]), ["a"])
    with pytest.raises(ValueError, match="one an image"):
        IdentityImages(images, torch.tensor([0]), ["a"])


def test_picture(tmp_path):
    plot_losses({"a": torch.rand(100) + 1, "short": torch.rand(3) + 1}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
