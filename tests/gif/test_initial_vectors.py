"""Initial code vectors: the mean feature of each identity, whatever happens on the way."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.utils.data import Dataset

from gif import resume
from gif.data import ImageDecoder, open_data
from gif.data.images import IdentityImages
from gif.encoders import PixelEncoder
from gif.files import load_tensors
from gif.progress import console
from gif.vectors import initial as initial_module
from gif.vectors import initial_code_vectors, mean_features


def random_images(n, m, channels=1, size=12):
    labels = torch.cat([torch.arange(m), torch.randint(m, (n - m,))])[torch.randperm(n)]
    return IdentityImages(
        torch.randint(256, (n, channels, size, size), dtype=torch.uint8), labels, list(map(str, range(m)))
    )


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
    fit: Callable | None = None

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.matrix = torch.randn(144, 5, generator=torch.Generator().manual_seed(0))
        self.fail_at, self.error, self.batches = fail_at, error, 0

    def __call__(self, images):
        if self.batches == self.fail_at:
            raise self.error
        self.batches += 1
        return images.float().mean(1).flatten(1) / 255 @ self.matrix


def by_hand(data, encoder):
    features = encoder(data.images).double()
    means = torch.stack([features[data.labels == y].mean(0) for y in range(data.num_identities)])
    vectors = (means if encoder.fit is None else encoder.fit(means.float())(means.float())).double()
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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_left_out(tmp_path, png, num_workers):
    kept = []
    for y in range(3):
        (tmp_path / str(y)).mkdir()
        for i in range(4):
            image = torch.randint(256, (3, 12, 12), dtype=torch.uint8)
            broken = (y, i) in ((1, 0), (1, 1), (2, 3))  # images 4, 5 and 11: a whole batch of 2, and half a batch
            (tmp_path / str(y) / f"{i}.png").write_bytes(b"" if broken else png(image))
            kept += [] if broken else [(image, y)]
    data = open_data(str(tmp_path), decoder=ImageDecoder(12))
    with console.capture() as capture:
        vectors = initial_code_vectors(data, Projection(), batch_size=2, num_workers=num_workers)
    readable = IdentityImages(torch.stack([image for image, _ in kept]), torch.tensor([y for _, y in kept]), "abc")
    torch.testing.assert_close(vectors.table, by_hand(readable, Projection()), rtol=0, atol=2e-6)
    assert "3 of 12 images are broken and were left out" in capture.get()
    for i in (2, 3):
        (tmp_path / "1" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"identities without an image that can be read: 1 \(1\)"):
        initial_code_vectors(data, Projection(), batch_size=5)


def test_an_interrupted_run_with_broken_images_continues(tmp_path, png):
    for y in range(2):
        (tmp_path / str(y)).mkdir()
        for i in range(5):
            (tmp_path / str(y) / f"{i}.png").write_bytes(
                b"" if i == 1 else png(torch.randint(256, (3, 12, 12), dtype=torch.uint8))
            )
    data, path = open_data(str(tmp_path), decoder=ImageDecoder(12)), tmp_path / "vectors.partial"
    whole = initial_code_vectors(data, Projection(), batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        initial_code_vectors(data, Projection(fail_at=3), batch_size=2, checkpoint=path)
    resumed = initial_code_vectors(data, Projection(), batch_size=2, checkpoint=path)
    assert torch.equal(resumed.table, whole.table)


class Pixels(PixelEncoder):
    """Whitened pixels of a width of 8, that can fail at a batch."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        super().__init__(8)
        self.fail_at, self.error, self.batches = fail_at, error, 0

    def __call__(self, images):
        if self.batches == self.fail_at:
            raise self.error
        self.batches += 1
        return super().__call__(images)


class Listed(Dataset):
    """A dataset with labels that is no `IdentityDataset`."""

    def __init__(self, images):
        self.pairs, self.labels = images, images.labels

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


@pytest.fixture
def small_parts(monkeypatch):
    """Sums of 7 identities at a time, and encoders that are fitted to 20."""
    monkeypatch.setattr(mean_features, "PART", 7)
    monkeypatch.setattr(initial_module, "FITTED", 20)


class TestParts:
    """Identities are read part by part, and encoders are fitted to some of many."""

    @pytest.mark.parametrize("encoder", [Projection, Pixels])
    @pytest.mark.parametrize("batch_size", [1, 8, 256])
    @pytest.mark.parametrize("m", [7, 15, 20])
    def test_make_no_difference_up_to_as_many_as_are_fitted_to(self, monkeypatch, encoder, batch_size, m):
        data = random_images(3 * m, m)
        whole = initial_code_vectors(data, encoder(), batch_size=1)
        monkeypatch.setattr(mean_features, "PART", 7)
        monkeypatch.setattr(initial_module, "FITTED", 20)
        parts = initial_code_vectors(data, encoder(), batch_size=batch_size)
        exact = batch_size == 1 or encoder is Pixels  # products depend on the rows beside them
        torch.testing.assert_close(parts.table, whole.table, rtol=0, atol=0 if exact else 2e-6)

    def test_are_those_of_the_means_by_hand_in_whatever_order_images_lie(self, small_parts):
        data = random_images(200, 33)
        found = initial_code_vectors(data, Pixels(), batch_size=8)
        means = torch.stack([Pixels()(data.images[data.labels == y]).double().mean(0).float() for y in range(33)])
        some = torch.arange(20) * 33 // 20
        assert len(some.unique()) == 20
        # float32 means of values up to 1, and the whitening divides by less than one
        wanted = torch.nn.functional.normalize(Pixels().fit(means[some])(means))
        torch.testing.assert_close(found.table, wanted, rtol=0, atol=1e-4)
        order = data.labels.argsort(stable=True)
        ordered = IdentityImages(data.images[order], data.labels[order], data.names)
        assert torch.equal(initial_code_vectors(ordered, Pixels(), batch_size=5).table, found.table)

    @pytest.mark.parametrize("plain", [OneByOne, Listed])
    def test_a_plain_dataset_is_one_part(self, small_parts, plain):
        data = random_images(90, 33)
        found = initial_code_vectors(plain(data), Pixels(), num_identities=33)
        assert torch.equal(found.table, initial_code_vectors(data, Pixels()).table)

    def test_are_near_the_whitening_of_all(self, small_parts, monkeypatch):
        """Coordinates of like variance may turn among each other; pairs keep their cosines."""
        monkeypatch.setattr(initial_module, "FITTED", 100)
        m, directions = 400, torch.randn(3, 144) * torch.tensor([30.0, 20, 10])[:, None]
        faces = 128 + (torch.randn(m, 3) @ directions).view(m, 1, 12, 12)
        labels = torch.arange(m).repeat_interleave(2)
        images = (faces[labels] + torch.randn(2 * m, 1, 12, 12)).clamp(0, 255).byte()
        data = IdentityImages(images, labels, list(map(str, range(m))))
        some = initial_code_vectors(data, PixelEncoder(3)).table
        means = torch.stack([PixelEncoder(3)(images[labels == y]).mean(0) for y in range(m)])
        every = torch.nn.functional.normalize(PixelEncoder(3).fit(means)(means))
        pairs = torch.stack([some @ some.T, every @ every.T]).flatten(1)
        assert torch.corrcoef(pairs)[0, 1] > 0.9  # of variances that 100 samples give within 14 %

    def test_a_run_killed_at_any_batch_continues_to_the_same_vectors(self, small_parts, tmp_path):
        data, path = random_images(70, 33), tmp_path / "vectors.partial"
        encoder = Pixels()
        whole = initial_code_vectors(data, encoder, batch_size=8)
        few = data.of_identities(torch.arange(20) * 33 // 20)
        assert encoder.batches > -(-len(data) // 8) + -(-len(few) // 8)  # parts end batches
        for fail_at in range(encoder.batches):
            with pytest.raises(KeyboardInterrupt):
                initial_code_vectors(data, Pixels(fail_at), batch_size=8, checkpoint=path)
            resumed = Pixels()
            found = initial_code_vectors(data, resumed, batch_size=8, checkpoint=path)
            assert torch.equal(found.table, whole.table) and resumed.batches == encoder.batches - fail_at
            assert not path.exists()

    def test_a_run_killed_while_it_fits_continues(self, small_parts, tmp_path, monkeypatch):
        data, path = random_images(70, 33), tmp_path / "vectors.partial"
        whole = initial_code_vectors(data, Pixels(), batch_size=8)

        class Interrupted(Pixels):
            def fit(self, means):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            initial_code_vectors(data, Interrupted(), batch_size=8, checkpoint=path)
        before, after = Pixels(), Pixels()
        initial_code_vectors(data, before, batch_size=8)
        found = initial_code_vectors(data, after, batch_size=8, checkpoint=path)
        assert torch.equal(found.table, whole.table)
        assert after.batches < before.batches  # the images to fit to are not read again

    def test_done_and_kept(self, small_parts, tmp_path):
        data, path = random_images(70, 33), tmp_path / "vectors.partial"
        whole = initial_code_vectors(data, Pixels(), batch_size=8, checkpoint=path, keep_checkpoint=True)
        encoder = Pixels()
        again = initial_code_vectors(data, encoder, batch_size=8, checkpoint=path, keep_checkpoint=True)
        assert torch.equal(again.table, whole.table) and encoder.batches == 0 and path.exists()

    def test_sums_of_a_part_alone_are_held(self, small_parts, monkeypatch):
        held, zeros = [], torch.zeros
        monkeypatch.setattr(
            mean_features.torch, "zeros", lambda *shape, **options: held.append(shape) or zeros(*shape, **options)
        )
        initial_code_vectors(random_images(70, 33), Projection(), batch_size=8)
        sums = [shape for shape in held if shape[1:] == (5,)]
        assert sums == [(7, 5)]

    def test_an_identity_whose_images_break_on_the_way(self, small_parts, tmp_path, png):
        for y in range(9):
            (tmp_path / str(y)).mkdir()
            for i in range(2):
                (tmp_path / str(y) / f"{i}.png").write_bytes(png(torch.randint(256, (3, 12, 12), dtype=torch.uint8)))
        data = open_data(str(tmp_path), decoder=ImageDecoder(12))

        class Breaks(Projection):
            def __call__(self, images):
                for i in range(2):
                    (tmp_path / "8" / f"{i}.png").write_bytes(b"")
                return super().__call__(images)

        with pytest.raises(ValueError, match=r"1 of 2 identities have no image \(first: 8\)"):
            initial_code_vectors(data, Breaks(), batch_size=4)


def shared_images():
    """Long-tailed: half of the images show identity 0."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.cat([torch.arange(11), torch.zeros(40).long(), torch.randint(11, (29,), generator=generator)])
    labels = labels[torch.randperm(80, generator=generator)]
    return IdentityImages(
        torch.randint(256, (80, 1, 12, 12), dtype=torch.uint8, generator=generator), labels, list(map(str, range(11)))
    )


def _process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    data, path = shared_images(), folder / "vectors.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial_module, "_GATHERED_ROWS", 2)
        encoder = Projection()
        vectors = initial_code_vectors(data, encoder, batch_size=8)
        pixels = initial_code_vectors(data, PixelEncoder(8), batch_size=8)
        with pytest.raises(KeyboardInterrupt):
            initial_code_vectors(data, Projection(fail_at=2), batch_size=8, checkpoint=path)
        own_file = folder / f"vectors.partial-{rank + 1}-of-2"
        assert own_file.exists()
        dist.barrier()
        resumed = initial_code_vectors(data, Projection(), batch_size=8, checkpoint=path)
        assert torch.equal(resumed.table, vectors.table) and not own_file.exists()
        with pytest.raises(ValueError, match="2 processes share the identities; give a dataset with `labels`"):
            initial_code_vectors(OneByOne(data), Projection(), num_identities=11)
        one = IdentityImages(data.images, torch.zeros(80, dtype=torch.int64), ["a"])
        with pytest.raises(ValueError, match="2 processes share 1 identities"):
            initial_code_vectors(one, Projection())
        patch.setattr(mean_features, "PART", 2)
        patch.setattr(initial_module, "FITTED", 10)
        fitted = initial_code_vectors(data, Pixels(), batch_size=8)
        with pytest.raises(KeyboardInterrupt):
            initial_code_vectors(data, Pixels(fail_at=1), batch_size=8, checkpoint=path)
        dist.barrier()
        half = initial_code_vectors(data, Pixels(), batch_size=8, checkpoint=path, keep_checkpoint=True)
        if rank == 0:  # what it has kept does not hold yet what the other has found
            own_file.unlink()
        dist.barrier()
        again = initial_code_vectors(data, Pixels(), batch_size=8, checkpoint=path)
        assert torch.equal(half.table, fitted.table) and torch.equal(again.table, fitted.table)
    torch.save((vectors.table, pixels.table, encoder.batches, fitted.table), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_make_the_vectors_of_one(tmp_path, monkeypatch):
    spawn(_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    data = shared_images()
    alone = initial_code_vectors(data, Projection(), batch_size=8).table
    torch.testing.assert_close(first[0], alone, rtol=0, atol=2e-6)  # as other batches do
    assert torch.equal(first[1], initial_code_vectors(data, PixelEncoder(8), batch_size=8).table)
    assert first[2] + second[2] <= 80 / 8 + 1  # each image is encoded once
    monkeypatch.setattr(mean_features, "PART", 2)
    monkeypatch.setattr(initial_module, "FITTED", 10)
    fitted = initial_code_vectors(data, Pixels(), batch_size=8)
    assert torch.equal(first[3], second[3]) and torch.equal(first[3], fitted.table)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1, 1], [100, 1, 1, 1], [1, 1, 1, 100], [5, 0, 0, 7, 1, 1, 1]])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_shares(monkeypatch, counts, processes):
    monkeypatch.setattr(mean_features, "world_size", lambda: processes)
    bounds = mean_features.shares(torch.tensor(counts))
    assert len(bounds) == processes + 1 and bounds[0] == 0 and bounds[-1] == len(counts)
    sizes = [sum(counts[begin:end]) for begin, end in zip(bounds, bounds[1:])]  # noqa: B905, RUF007
    assert all(begin < end for begin, end in zip(bounds, bounds[1:]))  # noqa: B905, RUF007
    assert max(sizes) <= sum(counts) / processes + max(counts) + processes
