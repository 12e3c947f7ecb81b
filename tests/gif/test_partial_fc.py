"""Partial FC: the sampled rows take SGD's step, others stay to the bit, and no step knows how many rows there are."""

import statistics
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from gif import AngularMargin, MarginSoftmax, PartialFC
from gif.backbones import BackboneConfig
from gif.data import IdentityImages
from gif.files import load_tensors
from gif.losses import HeadConfig
from gif.losses.sampling import brought, stratified
from gif.planning.heads import partial_fc_cost
from gif.training import TrainingConfig, train
from gif.training import loop as loop_module

M, WIDTH, BATCH = 60, 12, 8
MARGIN, SCALE = AngularMargin(m2=0.0, m3=0.2), 12.0
ROUNDING = 1e-5
"""Of a few steps in float32, whose products are summed in another order."""


def head(num_classes: int = M, **options: Any) -> PartialFC:
    torch.manual_seed(0)
    return PartialFC(num_classes, WIDTH, **{"margin": MARGIN, "scale": SCALE, "centers": None, **options})


def batches(count: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings that need gradients, and labels, of which one is ignored and one comes twice."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        labels = torch.randint(M, (BATCH,), generator=generator)
        labels[2], labels[5] = -1, labels[0]
        found.append((torch.randn(BATCH, WIDTH, generator=generator).requires_grad_(), labels))
    return found


def state(of: PartialFC) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in of.named_buffers()}


def same(first: PartialFC, second: PartialFC) -> bool:
    return all(torch.equal(value, state(second)[name]) for name, value in state(first).items())


class TestStep:
    @pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 5e-4), (0.5, 0.1), (0.0, 0.0)])
    @pytest.mark.parametrize("drawn", [{"sample_rate": 1}, {"samples": M}, {"samples": 2 * M}], ids=str)
    def test_of_all_rows_is_that_of_sgd_on_the_full_softmax(self, momentum, weight_decay, drawn):
        dense = MarginSoftmax(M, WIDTH, margin=MARGIN, scale=SCALE)
        ours = head(momentum=momentum, weight_decay=weight_decay, **drawn)
        ours.weight.copy_(dense.weight.detach())
        optimizer = torch.optim.SGD(dense.parameters(), 0.1, momentum=momentum, weight_decay=weight_decay)
        for step, (embeddings, labels) in enumerate(batches(8)):
            optimizer.param_groups[0]["lr"] = rate = 0.01 * (8 - step)
            ours.begin_step(rate, (8 - step) / 8, step / 8)
            wanted, found = embeddings, embeddings.detach().clone().requires_grad_()
            losses = dense(wanted, labels), ours(found, labels)
            for loss in losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(losses[1], losses[0], rtol=ROUNDING, atol=0)
            torch.testing.assert_close(found.grad, wanted.grad, rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(ours.weight, dense.weight.detach(), rtol=ROUNDING, atol=ROUNDING)
        if momentum:
            buffer = optimizer.state[dense.weight]["momentum_buffer"]
            torch.testing.assert_close(ours.momentum, buffer, rtol=ROUNDING, atol=ROUNDING * float(buffer.abs().max()))

    def test_of_a_sample_by_its_definition(self):
        """In float64, each class by itself: a margin softmax over the sample, and v and w of the classes in it."""
        ours = head(samples=20, momentum=0.8, weight_decay=0.01, lr=0.05)
        weight, velocity = ours.weight.double(), torch.zeros(M, WIDTH, dtype=torch.float64)
        for embeddings, labels in batches(6):
            classes = ours.sample(labels).tolist()
            kept = labels >= 0
            rows = weight[classes].requires_grad_()
            cosine = F.normalize(embeddings[kept].double(), dim=1) @ F.normalize(rows, dim=1).T
            places = torch.tensor([classes.index(label) for label in labels[kept].tolist()])
            wanted = F.cross_entropy(SCALE * (cosine - 0.2 * F.one_hot(places, len(classes))), places)
            loss = ours(embeddings, labels)
            assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=ROUNDING)
            wanted.backward()
            loss.backward()
            assert rows.grad is not None
            for place, k in enumerate(classes):
                velocity[k] = 0.8 * velocity[k] + (rows.grad[place] + 0.01 * weight[k])
                weight[k] = weight[k] - 0.05 * velocity[k]
        torch.testing.assert_close(ours.weight.double(), weight, rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(ours.momentum.double(), velocity, rtol=ROUNDING, atol=ROUNDING * 10)

    def test_rows_out_of_the_sample_stay_to_the_bit(self):
        ours = head(samples=6)
        moved = {name: torch.zeros(M, dtype=torch.bool) for name in ours.tables()}
        ours.mark_moves(moved)
        for embeddings, labels in batches(12):
            before, classes = state(ours), ours.sample(labels)
            moved["weight"].zero_()
            ours(embeddings, labels).backward()
            others = torch.ones(M, dtype=torch.bool).index_fill_(0, classes, False)
            assert int(others.sum()) >= M - 6 - BATCH
            for name, table in ours.tables().items():
                assert isinstance(table, torch.Tensor)
                assert torch.equal(table[others], before[name][others])
                assert (table[classes] != before[name][classes]).any(1).all()
            assert torch.equal(moved["weight"], ~others)
        assert int(moved["momentum"].sum()) > 2 * (6 + BATCH), "marks stay until they are cleared"

    def test_it_comes_with_the_backward_pass_and_once(self):
        ours, ((embeddings, labels),) = head(samples=6), batches(1)
        before = head(samples=6)
        loss = ours(embeddings, labels)
        assert same(ours, before)
        loss.backward(retain_graph=True)
        once = state(ours)
        assert not torch.equal(once["weight"], before.weight)
        loss.backward()
        assert all(torch.equal(value, state(ours)[name]) for name, value in once.items())

    def test_activation_checkpointing_repeats_no_step(self):
        plain, repeated, ((embeddings, labels),) = head(samples=6), head(samples=6), batches(1)
        plain(embeddings, labels).backward()
        checkpoint(repeated, embeddings, labels, use_reentrant=False).backward()
        assert same(repeated, plain)

    def test_embeddings_without_gradient_take_it_at_once(self):
        frozen, trained, ((embeddings, labels),) = head(samples=6), head(samples=6), batches(1)
        trained(embeddings, labels).backward()
        frozen(embeddings.detach(), labels)
        assert same(frozen, trained)

    def test_nothing_moves_in_evaluation_nor_without_gradients(self):
        ours, ((embeddings, labels),) = head(samples=6), batches(1)
        trained = ours(embeddings, labels)
        with torch.no_grad():
            quiet = ours(embeddings, labels)
        judged = ours.eval()(embeddings, labels)
        judged.backward()
        assert embeddings.grad is not None and embeddings.grad.any()
        assert same(ours, head(samples=6)) and float(quiet) == float(trained.detach()) == float(judged.detach())

    def test_rows_whose_step_is_not_finite_stay(self):
        ours, ((embeddings, labels),) = head(sample_rate=1), batches(1)
        ours.momentum[7, 3], ours.momentum[9, 0] = torch.inf, torch.nan
        before = state(ours)
        ours(embeddings, labels).backward()
        stays = torch.zeros(M, dtype=torch.bool).index_fill_(0, torch.tensor([7, 9]), True)
        for name in ours.tables():
            after, was = state(ours)[name], before[name]
            assert torch.equal(after[stays].nan_to_num(), was[stays].nan_to_num())
            assert (after[~stays] != was[~stays]).any(1).all() and after[~stays].isfinite().all()

    def test_a_micro_batch_takes_its_share_of_the_rate(self):
        half, whole, ((embeddings, labels),) = head(samples=6, lr=0.1), head(samples=6, lr=0.05), batches(1)
        with half.share_of_a_step(0.5):
            half(embeddings, labels).backward()
        whole(embeddings, labels).backward()
        assert same(half, whole) and half.step_share == 1

    def test_a_batch_of_ignored_rows_or_of_none(self):
        ours = head(samples=6, weight_decay=0.0)
        for labels in (torch.full((3,), -1), torch.empty(0, dtype=torch.int64)):
            embeddings = torch.randn(len(labels), WIDTH, requires_grad=True)
            loss = ours(embeddings, labels)
            loss.backward()
            assert float(loss.detach()) == 0 and embeddings.grad is not None and not embeddings.grad.any()
        assert torch.equal(ours.weight, head(samples=6).weight)  # no gradient, no decay: v is 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_rounds_the_operands_alone(self, dtype):
        exact, narrow = head(samples=20), head(samples=20)
        for embeddings, labels in batches(3):
            loss = exact(embeddings, labels)
            loss.backward()
            with torch.autocast("cpu", dtype):
                rounded = narrow(embeddings, labels)
            rounded.backward()
            eps = torch.finfo(dtype).eps
            assert rounded.dtype == torch.float32
            assert 0 < abs(float(rounded.detach()) - float(loss.detach())) < 2 * SCALE * eps  # of a logit
        assert narrow.weight.dtype == narrow.momentum.dtype == torch.float32
        error = (narrow.momentum - exact.momentum).norm() / exact.momentum.norm()
        assert 0 < error < 8 * SCALE * eps  # a slope's, which the logits' error is a factor of; 3 steps carry it on

    def test_under_torch_compile_it_is_the_same(self):
        eager, inner = head(samples=6), head(samples=6)
        compiled = torch.compile(inner, backend="eager")
        for embeddings, labels in batches(3):
            eager(embeddings, labels).backward()
            compiled(embeddings, labels).backward()
        assert same(inner, eager)


class TestDraws:
    def test_a_sample_is_in_order_and_holds_the_batch_and_so_many_others(self):
        ours = head(1000, samples=200)
        labels = torch.tensor([99, 3, -1, 3])
        for _ in range(20):
            found = ours.sample(labels)
            assert torch.equal(found, found.unique()) and {3, 99} <= set(found.tolist())
            assert 200 <= len(found) <= 202
            ours.draws.add_(1)

    @pytest.mark.parametrize(("total", "count"), [(100, 25), (1009, 10), (64_000_000, 50)])
    def test_each_is_as_likely_as_any_other(self, total, count):
        """Each draw is of a part of its own; the hits of a class, of a bin of classes here, are binomial."""
        rounds, bins = 4000, 20
        found = torch.stack([stratified(count, total, torch.tensor(draw)) for draw in range(rounds)])
        assert found.shape == (rounds, count) and int(found.min()) >= 0 and int(found.max()) < total
        parts = (found.double() + 1) * count / total
        assert ((parts - torch.arange(count) > 0) & (parts - torch.arange(count) < 1 + 2 * count / total)).all()
        hits = torch.bincount((found * bins // total).flatten(), minlength=bins)
        expected = torch.bincount(torch.arange(total) * bins // total) / total if total < 10**6 else 1 / bins
        deviations = (hits - rounds * count * expected) / (rounds * count * expected) ** 0.5
        assert float(deviations.abs().max()) < 4.5  # of 20 bins in 3 cases, by chance once in 2,000
        if total % count == 0:
            assert all(len(row.unique()) == count for row in found[:200])

    def test_one_class_by_another(self):
        total, count, rounds = 60, 20, 5000
        hits = torch.zeros(total)
        for draw in range(rounds):
            hits[stratified(count, total, torch.tensor(draw))] += 1
        share = count / total
        assert float((hits - rounds * share).abs().max()) < 4.5 * (rounds * share * (1 - share)) ** 0.5

    def test_all_are_taken_once(self):
        for count in (7, 8, 100):
            assert stratified(count, 7, torch.tensor(3)).tolist() == list(range(7))

    def test_each_step_draws_others_and_the_state_knows_which(self):
        first = head(1000, samples=50)
        labels = torch.tensor([3])
        samples = []
        for _ in range(3):
            samples.append(first.sample(labels))
            first(torch.randn(1, WIDTH, requires_grad=True), labels).backward()
        assert not torch.equal(samples[0], samples[1]) and not torch.equal(samples[1], samples[2])
        torch.manual_seed(5)
        again = PartialFC(1000, WIDTH, samples=50)
        assert not torch.equal(again.sample(labels), first.sample(labels))
        again.load_state_dict(first.state_dict())
        assert torch.equal(again.sample(labels), first.sample(labels))

    def test_what_a_batch_brings(self):
        assert brought(torch.tensor([4, -1, 9])).tolist() == [4, 9, 9]
        assert brought(torch.tensor([-1, -1])).tolist() == [0, 0] and len(brought(torch.empty(0).long())) == 0

    def test_share_or_number(self):
        assert PartialFC(1000, 4, sample_rate=0.1).samples == 100 and PartialFC(5, 4, sample_rate=0.01).samples == 1
        assert PartialFC(1000, 4, samples=7).samples == 7 and PartialFC(5, 4, samples=7).samples == 5
        assert "7 of them in a step" in repr(PartialFC(1000, 4, samples=7))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "wanted one of sample_rate and samples, got sample_rate=None and samples=None"),
            ({"sample_rate": 0.1, "samples": 5}, "wanted one of sample_rate and samples"),
            ({"sample_rate": 0}, r"sample_rate must lie in \(0, 1\], got 0"),
            ({"sample_rate": 1.1}, r"sample_rate must lie in \(0, 1\], got 1.1"),
            ({"sample_rate": float("nan")}, r"sample_rate must lie in \(0, 1\], got nan"),
            ({"samples": 0}, "samples must be a finite number > 0, got 0"),
            ({"samples": 2.5}, "samples must be a whole number, got 2.5"),
            ({"samples": 5, "momentum": 1}, r"momentum must lie in \[0, 1\), got 1"),
            ({"samples": 5, "weight_decay": -1}, "weight_decay must be >= 0, got -1"),
            ({"samples": 5, "lr": float("inf")}, "lr must be a finite number, got inf"),
            ({"samples": 5, "centers": torch.zeros(9, 4)}, r"centers must have shape \(10, 4\), got \(9, 4\)"),
        ],
        ids=str,
    )
    def test_of_the_constructor(self, options, message):
        with pytest.raises(ValueError, match=message):
            PartialFC(10, 4, **options)

    def test_of_a_call(self):
        ours = PartialFC(10, 4, samples=5)
        with pytest.raises(ValueError, match=r"labels must lie in \[-1, 10\)"):
            ours(torch.randn(1, 4), torch.tensor([10]))
        with pytest.raises(ValueError, match=r"embeddings must have shape \(B, 4\), got \(1, 5\)"):
            ours(torch.randn(1, 5), torch.tensor([1]))

    def test_of_a_config(self):
        with pytest.raises(ValueError, match="kind softmax does not use samples; they are for kind partial_fc"):
            HeadConfig(kind="softmax", samples=5)
        with pytest.raises(ValueError, match="kind softmax does not use sample_rate"):
            HeadConfig(kind="softmax", sample_rate=0.3)


def test_a_config_builds_it():
    built: Any = HeadConfig(kind="partial_fc").build(1000, 4, None, None)
    assert isinstance(built, PartialFC) and built.samples == 100
    built = HeadConfig(kind="partial_fc", samples=7, scale=12.0, margin=MARGIN).build(1000, 4, None, None)
    assert isinstance(built, PartialFC) and (built.samples, built.scale, built.margin) == (7, 12.0, MARGIN)
    assert (built.mu, built.weight_decay) == (0.9, 5e-4)


def test_centres_start_from_vectors_and_are_written(tmp_path):
    directions = torch.randn(M, WIDTH)
    ours = head(samples=5, centers=directions)
    torch.testing.assert_close(F.normalize(ours.weight, dim=1), F.normalize(directions, dim=1))
    ours.save_tables(tmp_path)
    tensors, _ = load_tensors(tmp_path / "centers.safetensors", format="gif.head/1")
    assert torch.equal(tensors["weight"], ours.weight)
    assert ours.state_dict().keys() == {"draws"} and not list(ours.parameters())


BACKBONE = BackboneConfig(embedding_size=WIDTH, image_size=16, width=4)
CONFIG = TrainingConfig(epochs=3, batch_size=8, save_steps=2, keep=9)


@pytest.fixture(scope="module")
def dataset() -> IdentityImages:
    """A fixed pattern an identity, under noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(M)
    patterns = torch.randint(0, 200, (M, 1, 16, 16), generator=generator)
    noise = torch.randint(0, 55, (M, 1, 16, 16), generator=generator)
    return IdentityImages((patterns + noise).to(torch.uint8), labels, [str(i) for i in range(M)])


def run(dataset: IdentityImages, seed: int = 0, config: TrainingConfig = CONFIG, **options: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    backbone, ours = BACKBONE.build(), PartialFC(M, WIDTH, samples=10, margin=MARGIN, scale=SCALE)
    log = train(backbone, ours, dataset, config, **options)
    return {"losses": log.losses, **backbone.state_dict(), **dict(ours.named_buffers())}


class TestTraining:
    def test_a_run_that_was_stopped_continues_bit_by_bit(self, dataset, tmp_path):
        whole = run(dataset)
        steps = []

        def stopped(images):
            steps.append(1)
            if len(steps) == 10:
                raise KeyboardInterrupt
            return loop_module.RandomAffine()(images)

        with pytest.raises(KeyboardInterrupt):
            run(dataset, augment=stopped, checkpoints=tmp_path)
        again = run(dataset, seed=1, checkpoints=tmp_path)
        assert again.keys() == whole.keys() and {"weight", "momentum", "draws"} <= whole.keys()
        assert all(torch.equal(again[name], value) for name, value in whole.items())
        for table in ("weight", "momentum"):
            kinds = {path.stem.partition("-")[2] for path in (tmp_path / table).iterdir()}
            assert kinds == {"all", "rows"}, "a table is copied once in a while, then its moves"

    def test_it_steps_at_the_rate_of_the_schedule(self, dataset, monkeypatch):
        rates = []
        begin_step = PartialFC.begin_step
        monkeypatch.setattr(
            PartialFC, "begin_step", lambda self, *given: (rates.append(given), begin_step(self, *given))[1]
        )
        config = TrainingConfig(epochs=2, batch_size=8, lr=0.2)
        run(dataset, config=config)
        assert rates == [(config.rate(step / 14), config.rate(step / 14) / 0.2, step / 14) for step in range(14)]
        assert max(share for _, share, _ in rates) > 0.9 and min(share for _, share, _ in rates) == 0

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_it_learns(self, dataset, precision):
        config = TrainingConfig(epochs=20, batch_size=20, precision=precision)
        losses = run(dataset, config=config, augment=lambda images: images)["losses"]
        assert losses[-5:].nanmean() < 0.3 * losses[:5].nanmean()


class TestOfAMillion:
    """Classes: neither the time of a step nor its memory knows them."""

    WIDTH, BATCH, SAMPLES = 128, 128, 10_000

    def step(self, ours, batch):
        embeddings = torch.randn(batch, self.WIDTH, requires_grad=True)
        ours(embeddings, torch.randint(ours.num_classes, (batch,))).backward()

    def test_time(self):
        heads = [PartialFC(m, self.WIDTH, samples=self.SAMPLES) for m in (100_000, 1_000_000)]
        seconds: list[list[float]] = [[], []]
        for _ in range(12):  # in turn: the machine is slower at one moment than at the next
            for taken, ours in zip(seconds, heads, strict=True):
                begin = time.process_time()
                self.step(ours, self.BATCH)
                taken.append(time.process_time() - begin)
        few, many = (statistics.median(taken[2:]) for taken in seconds)
        assert many < 1.5 * few

    def test_memory(self):
        ours = PartialFC(1_000_000, self.WIDTH, samples=100)
        ours.mark_moves({name: torch.zeros(1_000_000, dtype=torch.bool) for name in ours.tables()})
        self.step(ours, 8)
        peak = peak_bytes(partial(self.step, ours, 8), "cpu")
        assert peak < 1.15 * partial_fc_cost(1_000_000, 100, width=self.WIDTH, batch=8).step + 8 * 1024
        assert peak < 1_000_000, "not a byte a class"
