"""The peers: their losses, what they keep and for how long, and that a run goes on as if it had not been stopped."""

import math
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import spawn

from gif.backbones import BackboneConfig
from gif.data import IdentityImages
from gif.evaluation import embed
from gif.losses import DynamicClassPool, DynamicClassQueue, HeadConfig, PrototypeMemory, VirtualFC
from gif.losses.peers.pool import Places
from gif.losses.peers.virtual_fc import columns_of
from gif.training import TrainingConfig, train
from gif.training.order import EpochOrder, Groups
from gif_kernels import AngularMargin
from gif_kernels.runs import occurrences

M, WIDTH = 12, 6
BACKBONE = BackboneConfig(embedding_size=16, image_size=16, width=4)
COSFACE = AngularMargin(m2=0.0, m3=0.2)
KINDS = {
    "class_queue": HeadConfig(kind="class_queue", pool_size=40, momentum=0.9, scale=12.0, margin=COSFACE),
    "class_pool": HeadConfig(kind="class_pool", pool_size=10, momentum=0.9, scale=12.0, margin=COSFACE),
    "prototype_memory": HeadConfig(kind="prototype_memory", pool_size=10, scale=12.0, margin=COSFACE),
    "virtual_fc": HeadConfig(kind="virtual_fc", pool_size=10, group_size=4, scale=12.0, margin=COSFACE),
}


def unit(rows):
    return F.normalize(rows, dim=1)


def softmax_loss(embedding, target, others, margin, scale):
    """Of one embedding (d,), the weight of its class (d,) and those of other classes (k, d): by the formula."""
    embedding, target, others = embedding.double(), target.double(), others.double().reshape(-1, len(embedding))
    cosine = F.cosine_similarity(embedding, target, dim=0)
    own = scale * (cosine - margin)
    rest = scale * F.cosine_similarity(embedding[None], others, dim=1)
    return torch.logsumexp(torch.cat([own[None], rest]), 0) - own


class Table(torch.nn.Module):
    """An encoder whose images are numbers of rows of a table."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.nn.Parameter(rows)

    def forward(self, numbers):
        return self.rows[numbers]


def step(head, backbone, numbers, labels):
    """Embeddings and loss of one step on some rows of a `Table`."""
    labels = torch.tensor(labels)
    head.before_step(backbone, lambda: torch.tensor(numbers), labels)
    embeddings = backbone(torch.tensor(numbers))
    return embeddings, head(embeddings, labels)


class TestOrder:
    LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 3, 0, 1, 4])

    def test_occurrences(self):
        assert occurrences(self.LABELS).tolist() == [0, 0, 0, 1, 1, 2, 0, 3, 2, 0]
        assert occurrences(self.LABELS[:0]).tolist() == []

    def order(self, size, share=1.0, seed=0):
        groups = Groups(self.LABELS, size, share) if size else None
        order = EpochOrder(10, 10, seed=seed, begin=0, rank=0, processes=1, groups=groups)
        return next(iter(order))

    def test_groups_stand_where_their_first_image_stood(self):
        for seed in range(20):
            plain, grouped = self.order(0, seed=seed), self.order(2, seed=seed)
            assert sorted(grouped) == list(range(10))
            expected, left = [], list(plain)
            while left:
                image = left.pop(0)
                mates = [other for other in left if self.LABELS[other] == self.LABELS[image]][:1]
                left = [other for other in left if other not in mates]
                expected += [image, *mates]
            assert grouped == expected

    def test_a_share_of_the_groups_stays_together(self):
        assert self.order(2, 0.0) == self.order(0)
        labels = torch.arange(2000).repeat(2)
        order = torch.randperm(4000)
        arranged = labels[Groups(labels, 2, 0.25).arrange(order, torch.Generator().manual_seed(0))]
        pairs = int((arranged[1:] == arranged[:-1]).sum())
        assert abs(pairs - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75) + 5


class TestPlaces:
    def test_who_was_not_seen_for_longest_leaves(self):
        """Against a dictionary in the order of use; who is in the batch is touched before anybody leaves."""
        generator = torch.Generator().manual_seed(0)
        places = Places.empty(5)
        expected: OrderedDict[int, None] = OrderedDict()
        where: dict[int, int] = {}
        for _ in range(200):
            batch = torch.randint(12, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator)
            places, found, new = places.take(batch)
            assert new.tolist() == [identity not in expected for identity in batch.tolist()]
            for identity in batch.tolist():
                if identity in expected:
                    expected.move_to_end(identity)
            absent = [identity for identity in batch.tolist() if identity not in expected]
            for identity in dict.fromkeys(batch.tolist()):
                if identity in absent:
                    if len(expected) == 5:
                        stays = set(batch.tolist())
                        del expected[next(one for one in expected if one not in stays)]
                    expected[identity] = None
            for identity in batch.tolist():  # as new as its last row
                expected.move_to_end(identity)
            assert {int(identity) for identity in places.identities if identity >= 0} == set(expected)
            assert (places.identities[found] == batch).all() and (places.find(batch) == found).all()
            for identity, place in zip(batch.tolist(), found.tolist(), strict=True):
                assert where.get(identity, place) == place or bool(new[batch == identity].all())
            where = {int(identity): place for place, identity in enumerate(places.identities)}

    def test_more_identities_than_places(self):
        with pytest.raises(ValueError, match="a batch has 3 identities and the pool 2 places; give a pool_size"):
            Places.empty(2).take(torch.tensor([1, 2, 3]))

    def test_nobody_is_found_in_an_empty_pool(self):
        assert Places.empty(3).find(torch.tensor([0, 2, -1])).tolist() == [-1, -1, -1]


class TestClassQueue:
    def head(self, backbone, **options):
        return DynamicClassQueue(M, backbone, WIDTH, queue_size=5, momentum=0.75, margin=COSFACE, scale=8.0, **options)

    def test_queue_and_loss_step_by_step(self):
        torch.manual_seed(0)
        backbone = Table(torch.randn(8, WIDTH))
        head = self.head(backbone)
        first = backbone.rows.detach().clone()
        with torch.no_grad():
            backbone.rows.add_(torch.randn(8, WIDTH))
        weights = unit(0.75 * first + 0.25 * backbone.rows.detach())  # what the encoder has followed to
        _, loss = step(head, backbone, [0, 1, 2, 3], [3, 3, 7, 2])
        assert head.identities.tolist() == [3, 3, 7, 2, -1] and int(head.next_slot) == 4
        torch.testing.assert_close(head.weights[:4], weights[:4])
        z = backbone.rows.detach()
        expected = [  # of the pair each is classified by the other; of a single image its own weight is the only one
            softmax_loss(z[0], weights[1], weights[[2, 3]], 0.2, 8.0),
            softmax_loss(z[1], weights[0], weights[[2, 3]], 0.2, 8.0),
            softmax_loss(z[2], weights[2], weights[[1, 3]], 0.2, 8.0),
            softmax_loss(z[3], weights[3], weights[[1, 2]], 0.2, 8.0),
        ]
        torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)

        older = head.weights.clone()
        newer = unit(0.75 * (0.75 * first + 0.25 * z) + 0.25 * z)
        _, loss = step(head, backbone, [4, 5], [2, 9])
        assert head.identities.tolist() == [9, 3, 7, 2, 2]  # the oldest left, in turn
        # Class 3 counts once; class 2's older weight counts neither as its own nor as a negative.
        expected = [
            softmax_loss(z[4], newer[4], torch.stack([newer[5], older[1], older[2]]), 0.2, 8.0),
            softmax_loss(z[5], newer[5], torch.stack([newer[4], older[1], older[2]]), 0.2, 8.0),
        ]
        torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)

    def test_ignored_rows_and_parts_of_a_batch(self):
        torch.manual_seed(0)
        backbone = Table(torch.randn(6, WIDTH))
        whole, parts = self.head(backbone), self.head(backbone)
        numbers, labels = torch.arange(5), torch.tensor([1, 1, -1, 4, 4])
        for head in (whole, parts):
            head.before_step(backbone, lambda: numbers, labels)
        z = backbone(numbers)
        sums = parts(z[:1], labels[:1]) + parts(z[1:], labels[1:]) * 3
        torch.testing.assert_close(sums / 4, whole(z, labels))
        assert whole.identities.tolist() == [1, 1, 4, 4, -1]
        with pytest.raises(ValueError, match="not the rows of the step that has begun; before each step call"):
            whole(z, labels)
        whole.before_step(backbone, lambda: numbers, torch.full((5,), -1))
        lost = whole(z, torch.full((5,), -1))
        lost.backward()
        assert float(lost.detach()) == 0

    def test_errors(self):
        backbone = Table(torch.randn(9, WIDTH))
        with pytest.raises(ValueError, match="a batch has 6 images and the queue 5 places; give a queue_size"):
            step(self.head(backbone), backbone, [0] * 6, [1] * 6)
        with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 2"):
            DynamicClassQueue(M, backbone, WIDTH, momentum=2)
        with pytest.raises(ValueError, match="this head is for other classes"):
            step(self.head(backbone), backbone, [0], [M])


class TestClassPool:
    def test_pool_and_loss_step_by_step(self):
        torch.manual_seed(0)
        backbone = Table(torch.randn(8, WIDTH))
        head = DynamicClassPool(M, backbone, WIDTH, pool_size=3, momentum=1.0, margin=COSFACE, scale=8.0)
        w = unit(backbone.rows.detach())
        z = backbone.rows.detach()

        _, loss = step(head, backbone, [0, 1, 2], [5, 5, 8])  # first half: 0 and 2; second: 1
        assert head.identities.tolist() == [5, 8, -1]  # what the first half brought
        torch.testing.assert_close(head.features[0, :2], w[[0, 2]])
        # 0 is classified by 1 alone and 1 by 0 and 2, the same by both features; 2 is not in the pool of {1}.
        inside = softmax_loss(z[0], w[1], w[:0], 0.2, 8.0) + softmax_loss(z[1], w[0], w[[2]], 0.2, 8.0)
        outside = (w[2].double() @ w[1].double()).clamp(min=0)
        torch.testing.assert_close(loss.double(), inside / 2 + outside, rtol=1e-5, atol=1e-5)

        _, loss = step(head, backbone, [3, 4, 5, 6], [8, 8, 1, 2])
        # First half: 3 (the second feature of 8), 5 and 6; they take the empty place and that of 5, seen least lately.
        assert head.identities.tolist() == [2, 8, 1] and head.turn.tolist() == [1, 0, 1]
        torch.testing.assert_close(head.features[:, 1], w[[2, 3]])
        torch.testing.assert_close(head.features[0, [0, 2]], w[[6, 5]])
        # Images 3, 5, 6 meet the pool of 5: w0, 8: (w2, w4); image 4 the pool that is kept.
        inside = (
            softmax_loss(z[3], w[2], w[[0]], 0.2, 8.0)
            + softmax_loss(z[3], w[4], w[[0]], 0.2, 8.0)
            + softmax_loss(z[4], w[2], w[[5, 6]], 0.2, 8.0)
            + softmax_loss(z[4], w[3], w[[5, 6]], 0.2, 8.0)
        ) / 2
        outside = [
            torch.stack([w[i].double() @ w[0].double(), w[i].double() @ w[j].double()]).clamp(min=0).mean()
            for i in (5, 6)
            for j in (2, 4)
        ]
        expected = inside / 2 + torch.stack(outside).sum() / 2 / 2
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)

    def test_features_are_written_in_turns(self):
        backbone = Table(torch.randn(8, WIDTH))
        head = DynamicClassPool(M, backbone, WIDTH, pool_size=3, momentum=1.0)
        w = unit(backbone.rows.detach())
        head.receive(w[:5], torch.tensor([4, 4, 4, 9, 4]), torch.zeros(5, dtype=torch.bool))
        assert head.identities.tolist() == [4, 9, -1] and head.turn.tolist() == [0, 1, 0]
        torch.testing.assert_close(head.features[:, 0], w[[2, 4]])
        torch.testing.assert_close(head.features[0, 1], w[3])

    def test_all_rows_ignored(self):
        backbone = Table(torch.randn(8, WIDTH))
        _, loss = step(DynamicClassPool(M, backbone, WIDTH, pool_size=3), backbone, [0, 1], [-1, -1])
        loss.backward()
        assert float(loss.detach()) == 0


class TestPrototypeMemory:
    def test_memory_and_loss_step_by_step(self):
        torch.manual_seed(0)
        head = PrototypeMemory(M, WIDTH, memory_size=3, refresh=0.25, margin=COSFACE, scale=8.0)
        z = torch.randn(8, WIDTH)
        loss = head(z[:4], torch.tensor([6, 6, 2, -1]))
        p6, p2 = unit(unit(z[:2]).mean(0, keepdim=True))[0], unit(z[2:3])[0]
        assert head.identities.tolist() == [2, 6, -1]
        torch.testing.assert_close(head.prototypes[:2], torch.stack([p2, p6]))
        expected = [
            softmax_loss(z[0], p6, p2, 0.2, 8.0),
            softmax_loss(z[1], p6, p2, 0.2, 8.0),
            softmax_loss(z[2], p2, p6, 0.2, 8.0),
        ]
        torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)

        head(z[4:6], torch.tensor([2, 9]))
        p2 = F.normalize(0.75 * p2 + 0.25 * unit(z[4:5])[0], dim=0)
        assert head.identities.tolist() == [2, 6, 9]
        torch.testing.assert_close(head.prototypes[0], p2)
        head(z[6:8], torch.tensor([1, 1]))
        assert head.identities.tolist() == [2, 1, 9]  # 6 was refreshed least lately

    def test_only_training_changes_the_memory(self):
        head = PrototypeMemory(M, WIDTH, memory_size=3).eval()
        z = torch.randn(2, WIDTH, requires_grad=True)
        assert float(head(z, torch.tensor([0, 1])).detach()) == 0 and (head.identities == -1).all()
        head.train()(z, torch.tensor([0, 0]))
        before = head.prototypes.clone()
        assert float(head.eval()(z, torch.tensor([-1, 1])).detach()) == 0  # 1 is not in it
        assert torch.equal(before, head.prototypes)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"refresh must lie in \(0, 1\], got 0"):
            PrototypeMemory(M, WIDTH, refresh=0)
        with pytest.raises(ValueError, match="a batch has 3 identities and the pool 2 places"):
            PrototypeMemory(M, WIDTH, memory_size=2)(torch.randn(3, WIDTH), torch.arange(3))


class TestVirtualFC:
    @pytest.mark.parametrize(
        ("labels", "columns", "anchors"),
        [
            ([7, 2, 7, 12], {2: 2, 7: 0, 12: 1}, {7}),  # 7, 2 and 12 have column 2, and 7 comes first
            ([3, 13, 4, 8, 3], {3: 3, 4: 4, 8: 1, 13: 0}, {3, 4}),
            ([0], {0: 0}, {0}),
        ],
    )
    def test_hashing(self, labels, columns, anchors):
        if labels[0] == 7:
            columns = {2: 0, 7: 2, 12: 1}
        found, own = columns_of(torch.tensor(labels), 5)
        assert dict(zip(sorted(columns), found.tolist(), strict=True)) == columns
        assert {name for name, is_own in zip(sorted(columns), own.tolist(), strict=True) if is_own} == anchors

    def test_no_two_identities_share_a_column_in_a_batch(self):
        for seed in range(50):
            labels = torch.randint(1000, (10,), generator=torch.Generator().manual_seed(seed))
            found, own = columns_of(labels, 10)
            assert len(found.unique()) == len(labels.unique())
            assert (found[own] == labels.unique()[own] % 10).all() and own.any()

    def test_loss_and_columns(self):
        torch.manual_seed(0)
        head = VirtualFC(M, WIDTH, columns=4, margin=COSFACE, scale=8.0)
        before = head.weight.detach().clone()
        z, labels = torch.randn(5, WIDTH, requires_grad=True), torch.tensor([9, 9, 1, 2, -1])
        loss = head(z, labels)  # 9 and 1 have column 1; 9 is first, and 1 is lent column 0
        after = head.weight.detach()
        torch.testing.assert_close(after[1], (z[0] + z[1]).detach())
        torch.testing.assert_close(after[2], z[3].detach())
        assert torch.equal(after[[0, 3]], before[[0, 3]])
        columns = torch.stack([z[2].detach(), after[1], after[2], after[3]])
        expected = [
            softmax_loss(z[i].detach(), columns[c], columns[[k for k in range(4) if k != c]], 0.2, 8.0)
            for i, c in ((0, 1), (1, 1), (2, 0), (3, 2))
        ]
        torch.testing.assert_close(loss.detach().double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)
        loss.backward()
        assert (head.weight.grad[0] == 0).all() and (head.weight.grad[1:] != 0).any(1).all()
        assert (z.grad[:4] != 0).any(1).all() and (z.grad[4] == 0).all()

    def test_a_hundredth_of_the_identities_by_default(self):
        assert VirtualFC(250, WIDTH).weight.shape == (3, WIDTH)

    def test_more_identities_than_columns(self):
        with pytest.raises(ValueError, match="a batch has 3 identities and the layer 2 columns; give more columns"):
            VirtualFC(M, WIDTH, columns=2)(torch.randn(3, WIDTH), torch.arange(3))


def noisy(images):
    """So many images of each of eight identities: a pattern of its own under noise that is stronger."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat(images)
    patterns = torch.randint(0, 100, (8, 1, 16, 16), generator=generator)
    noise = torch.randint(0, 156, (8 * images, 1, 16, 16), generator=generator)
    return IdentityImages((patterns[labels] + noise).to(torch.uint8), labels, list("abcdefgh"))


def rows(data, begin, end):
    return IdentityImages(data.images[begin:end], data.labels[begin:end], data.names)


@pytest.fixture(scope="module")
def dataset():
    return noisy(20)


def build(kind, backbone=None):
    torch.manual_seed(0)
    backbone = backbone or BACKBONE.build()
    return backbone, KINDS[kind].build(8, 16, None, None, backbone=backbone)


def unchanged(images):
    return images


def rank1(backbone):
    """Share of images that no training saw whose nearest other image shows the same identity."""
    unseen = rows(noisy(30), 160, 240)
    embeddings = F.normalize(embed(backbone, unseen), dim=1)
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)
    return float((unseen.labels[nearest] == unseen.labels).float().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind):
    backbone, head = build(kind)
    before, part = rank1(backbone), rows(noisy(30), 0, 160)
    log = train(backbone, head, part, TrainingConfig(epochs=12, batch_size=16, lr=0.03), augment=unchanged)
    first, *_, last = log.losses.chunk(6)
    assert last.mean() < 0.4 * first.mean()
    assert before < 0.6 and rank1(backbone) > 0.7  # chance is an eighth


def interrupted_in(step):
    """Augmentation at random that ends the run in ``step``, however often a step asks for it."""
    seen = [0]

    def augment(images):
        seen[0] += 1
        if seen[0] == step:
            raise KeyboardInterrupt
        return images + 0.1 * torch.randn_like(images)

    return augment


@pytest.mark.parametrize("micro", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(kind, micro, dataset, tmp_path):
    part = dataset
    config = TrainingConfig(epochs=2, batch_size=16, save_steps=3, micro_batch_size=micro)
    backbone, head = build(kind)
    whole = train(backbone, head, part, config, augment=interrupted_in(-1))
    asked = 1 if micro is None else 3
    asked += kind.startswith("class")
    for stop in (8 * asked, 3 * asked):
        pieces = build(kind)
        with suppress(KeyboardInterrupt):
            train(pieces[0], pieces[1], part, config, augment=interrupted_in(stop), checkpoints=tmp_path)
    pieces = build(kind)
    log = train(pieces[0], pieces[1], part, config, augment=interrupted_in(-1), checkpoints=tmp_path)
    assert torch.equal(log.losses, whole.losses)
    for one, other in zip(pieces, (backbone, head), strict=True):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def flat():
    """A backbone without batch normalisation, whose statistics would be each process's own."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 16))


def trained(kind, part):
    torch.manual_seed(0)
    backbone, head = build(kind, flat())
    log = train(backbone, head, part, TrainingConfig(epochs=1, batch_size=16, lr=0.01), augment=unchanged)
    return log.losses, head.state_dict()


def together(rank, folder, part):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.save({kind: trained(kind, part) for kind in KINDS}, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_what_is_kept(dataset, tmp_path):
    part = dataset
    spawn(together, (tmp_path, part), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    for kind in KINDS:
        losses, state = trained(kind, part)
        assert first[kind][1].keys() == state.keys()
        assert all(torch.equal(value, second[kind][1][name]) for name, value in first[kind][1].items())
        for name in ("identities", "used", "turn", "next_slot"):
            if name in state:
                assert torch.equal(first[kind][1][name], state[name]), (kind, name)
        if kind != "class_pool":  # whose mean over images outside of the pool is each process's own
            torch.testing.assert_close(first[kind][0], losses, rtol=1e-3, atol=1e-3)


def test_config():
    backbone = flat()
    head = HeadConfig(kind="class_queue").build(M, 16, None, None, backbone=backbone)
    assert isinstance(head, DynamicClassQueue) and len(head.identities) == 8192
    assert head.encoder.momentum == 0.999 and head.scale == 50.0 and head.margin == AngularMargin(m2=0.0, m3=0.3)
    head = KINDS["class_pool"].build(M, 16, None, None, backbone=backbone)
    assert isinstance(head, DynamicClassPool) and len(head.identities) == 10 and head.scale == 12.0
    head = HeadConfig(kind="prototype_memory", group_size=3, refresh=0.2).build(M, 16, None, None)
    assert isinstance(head, PrototypeMemory) and (head.group_size, head.refresh) == (3, 0.2)
    head = KINDS["virtual_fc"].build(M, 16, None, None)
    assert isinstance(head, VirtualFC) and head.weight.shape == (10, 16)
    with pytest.raises(ValueError, match="has an encoder that follows the backbone; build it with one"):
        HeadConfig(kind="class_pool").build(M, 16, None, None)
    with pytest.raises(ValueError, match="kind virtual_fc does not use momentum; they are for kind class_queue"):
        HeadConfig(kind="virtual_fc", momentum=0.9)
    with pytest.raises(ValueError, match="kind softmax does not use pool_size"):
        HeadConfig(kind="softmax", pool_size=3)
    with pytest.raises(ValueError, match="kind class_queue does not use centers"):
        HeadConfig(kind="class_queue", centers="vectors")


def test_an_overflow_does_not_stay():
    z = torch.randn(4, WIDTH)
    z[1] = math.inf
    labels = torch.tensor([0, 0, 1, 2])
    head = PrototypeMemory(M, WIDTH, memory_size=5)
    with suppress(ValueError):  # on an accelerator the loss is not finite
        head(z, labels)
    assert head.prototypes.isfinite().all()
    backbone = Table(z)
    queue = DynamicClassQueue(M, backbone, WIDTH, queue_size=5)
    queue.before_step(backbone, lambda: torch.arange(4), labels)
    assert queue.weights.isfinite().all()
