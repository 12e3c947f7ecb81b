"""Initial code vectors: the mean feature of each identity, whatever happens on the way."""

import pytest
import torch
from torch.utils.data import Dataset

from gif import resume
from gif.data.images import IdentityImages
from gif.encoders import PixelEncoder
from gif.files import load_tensors
from gif.vectors import initial as initial_module
from gif.vectors import initial_code_vectors


def random_images(n, m, channels=1, size=12):
    labels = torch.cat([torch.arange(m), torch.randint(m, (n - m,))])[torch.randperm(n)]
    return IdentityImages(torch.randint(256, (n, channels, size, size), dtype=torch.uint8), labels, range(m))


class OneByOne(Dataset):
    """A dataset without batches, labels or a number of identities: a Python int a label."""

    def __init__(self, images):
        self.pairs = images

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image, label = self.pairs[index]
        return image, int(label)


class Projection:
    """An encoder with a fixed random matrix, that can fail at a batch."""

    name = "projection"
    embedding_size = 5

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.matrix = torch.randn(144, 5, generator=torch.Generator().manual_seed(0))
        self.fail_at, self.error, self.batches = fail_at, error, 0

    def __call__(self, images):
        if self.batches == self.fail_at:
            raise self.error
        self.batches += 1
        return images.float().mean(1).flatten(1) / 255 @ self.matrix

    def finish(self, means):
        return means


def by_hand(data, encoder):
    features = encoder(data.images).double()
    means = torch.stack([features[data.labels == y].mean(0) for y in range(data.num_identities)])
    vectors = encoder.finish(means.float()).double()
    return (vectors / vectors.norm(dim=1, keepdim=True)).float()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_is_the_mean_by_hand(channels, batch_size):
    data = random_images(101, 13, channels)
    vectors = initial_code_vectors(data, Projection(), batch_size=batch_size)
    assert len(vectors) == 13 and vectors.width == 5 and vectors.table.dtype == torch.float32
    # float32 products of 144 terms, summed in another order for another batch: a few eps of 1.2e-7
    torch.testing.assert_close(vectors.table, by_hand(data, Projection()), rtol=0, atol=2e-6)


def test_pixels_and_a_plain_dataset():
    data = random_images(60, 9, channels=3)
    whole = initial_code_vectors(data, PixelEncoder(8))
    torch.testing.assert_close(whole.table, by_hand(data, PixelEncoder(8)), rtol=0, atol=1e-4)  # eigenvectors
    plain = initial_code_vectors(OneByOne(data), PixelEncoder(8), num_identities=9, num_workers=1)
    assert torch.equal(plain.table, whole.table)


def test_order_of_the_images_does_not_matter():
    data = random_images(200, 4)
    order = torch.randperm(200)
    shuffled = IdentityImages(data.images[order], data.labels[order], data.names)
    first, second = (initial_code_vectors(d, Projection(), batch_size=1) for d in (data, shuffled))
    assert (first.table - second.table).abs().max() <= torch.finfo(torch.float32).eps  # the final rounding


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_continues_to_the_same_vectors(tmp_path, error):
    data = random_images(90, 11)
    path = tmp_path / "vectors.partial"
    whole = initial_code_vectors(data, Projection(), batch_size=8)
    with pytest.raises(error):
        initial_code_vectors(data, Projection(fail_at=4, error=error), batch_size=8, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint of another run"):
        initial_code_vectors(data, Projection(), batch_size=9, checkpoint=path)
    encoder = Projection()
    resumed = initial_code_vectors(data, encoder, batch_size=8, checkpoint=path)
    assert encoder.batches == 12 - 4
    assert torch.equal(resumed.table, whole.table)
    assert not path.exists()


def test_a_killed_run_leaves_the_last_timed_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    monkeypatch.setattr(resume, "LARGEST_SHARE", float("inf"))
    path, seen = tmp_path / "vectors.partial", []

    class Watcher(Projection):
        def __call__(self, images):
            tensors, _ = load_tensors(path, format=initial_module.CHECKPOINT_FORMAT) if path.exists() else ({}, {})
            seen.append(int(tensors.get("images", 0)))
            return super().__call__(images)

    initial_code_vectors(random_images(30, 5), Watcher(), batch_size=8, checkpoint=path)
    assert seen == [0, 8, 16, 24]


def test_half_added_sums_are_not_saved(tmp_path, monkeypatch):
    """An interruption between the sums and the counts leaves the checkpoint before it."""
    path = tmp_path / "vectors.partial"
    monkeypatch.setattr(initial_module.torch, "ones_like", lambda labels: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        initial_code_vectors(random_images(30, 5), Projection(), batch_size=8, checkpoint=path)
    assert not path.exists()


def test_missing_identities():
    data = random_images(40, 10)
    data.labels[data.labels == 3] = 4
    data.labels[data.labels == 7] = 4
    encoder = Projection()
    with pytest.raises(ValueError, match=r"2 of 10 identities have no image \(first: 3, 7\)"):
        initial_code_vectors(data, encoder)
    assert encoder.batches == 0  # known before the work
    with pytest.raises(ValueError, match=r"2 of 10 identities have no image \(first: 3, 7\)"):
        initial_code_vectors(OneByOne(data), encoder, num_identities=10)
    with pytest.raises(ValueError, match="1 of 1 identities have no image"):
        initial_code_vectors(OneByOne([]), encoder, num_identities=1)


def test_features_that_are_not_finite():
    class Broken(Projection):
        def __call__(self, images):
            features = super().__call__(images)
            if self.batches == 3:
                features[2, 1] = float("nan")
            return features

    with pytest.raises(ValueError, match="features of images 16 to 23 hold NaN or infinity, first in image 18"):
        initial_code_vectors(random_images(40, 10), Broken(), batch_size=8)


def test_errors():
    data = random_images(40, 10)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\), got \[0, 9\]"):
        initial_code_vectors(data, Projection(), num_identities=9)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\)"):
        initial_code_vectors(OneByOne(data), Projection(), num_identities=9)
    with pytest.raises(ValueError, match="num_identities=None"):
        initial_code_vectors(OneByOne(data), Projection())
    with pytest.raises(ValueError, match="batch_size=0"):
        initial_code_vectors(data, Projection(), batch_size=0)

    class Flat(Projection):
        def __call__(self, images):
            return super().__call__(images).flatten()

    with pytest.raises(ValueError, match=r"the encoder must give \(40, e\) features, got \(200,\)"):
        initial_code_vectors(data, Flat())
