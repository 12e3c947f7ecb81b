"""The losses a user trains with."""

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gif import AngularMargin, CodeVectors, GIFLoss, IdentityCodes, MarginSoftmax, PartialFC
from gif.head import Head
from gif.integrations import insightface, metric_learning
from gif.losses import HeadConfig, token_weights
from gif.losses import gif_loss as gif_loss_module
from gif.losses.recipes import RECIPES, RecipeName
from gif_kernels import checks

M, WIDTH, VOCAB = 30, 12, 4


@pytest.fixture
def codes():
    return IdentityCodes(torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)[:M], VOCAB)


@pytest.fixture
def vectors():
    return CodeVectors(torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def by_hand(loss_fn, embeddings, labels):
    """L_C + gamma L_AR, one sample and one token at a time, in float64."""
    total, recipe = 0.0, loss_fn.recipe
    for z, y in zip(F.normalize(embeddings.double(), dim=1), labels.tolist(), strict=True):
        for j, token in enumerate(loss_fn.codes.codes[y].tolist()):
            u = z if loss_fn.projections is None else F.normalize(loss_fn.projections[j].double() @ z, dim=0)
            cosine = F.normalize(loss_fn.centers[j].double(), dim=1) @ u
            logits = recipe.scale * cosine
            logits[token] = recipe.scale * torch.cos(torch.acos(cosine[token]) + recipe.margin.m2)
            total += loss_fn.token_weights[j].double() * F.cross_entropy(logits[None], torch.tensor([token]))
        total += recipe.regression_weight * 0.5 * (z @ loss_fn.vectors.table[y].double() - 1) ** 2
    return total / len(labels)


class TestGIFLoss:
    @pytest.mark.parametrize("projection", ["linear", "none"])
    def test_value_by_hand(self, codes, vectors, projection):
        options = {"projection": projection, "token_weights": "decreasing", "regression_weight": 0.7, "scale": 8.0}
        loss_fn = GIFLoss(codes, vectors, WIDTH, recipe="paper", margin=AngularMargin(m2=0.2), **options)
        embeddings, labels = torch.randn(9, WIDTH), torch.randint(M, (9,))
        expected = by_hand(loss_fn, embeddings, labels)
        torch.testing.assert_close(loss_fn(embeddings, labels).double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("recipe", ["paper", "live"])
    def test_ignored_labels(self, codes, vectors, recipe):
        loss_fn = GIFLoss(codes, vectors, WIDTH, recipe=recipe, vector_lr=0.0)
        embeddings, labels = torch.randn(6, WIDTH, requires_grad=True), torch.tensor([3, -1, 7, -1, 0, 29])
        loss = loss_fn(embeddings, labels)
        torch.testing.assert_close(loss, loss_fn(embeddings[labels >= 0], labels[labels >= 0]))
        loss.backward()
        assert torch.equal(embeddings.grad[[1, 3]], torch.zeros(2, WIDTH))
        assert loss_fn(embeddings, torch.full((6,), -1)).item() == 0
        nobody = torch.empty(0, WIDTH, requires_grad=True)
        loss_fn(nobody, torch.empty(0, dtype=torch.int64)).backward()
        assert nobody.grad.shape == (0, WIDTH)

    def test_a_single_identity(self):
        loss_fn = GIFLoss(IdentityCodes(torch.tensor([[0]]), 2), CodeVectors(torch.randn(1, WIDTH)), WIDTH)
        loss_fn(torch.randn(3, WIDTH, requires_grad=True), torch.zeros(3, dtype=torch.int64)).backward()

    def test_learns_the_codes(self, codes, vectors):
        torch.manual_seed(0)
        options: dict[str, Any] = {"margin": AngularMargin(m2=0.1), "scale": 16.0, "regression_weight": 10.0}
        loss_fn = GIFLoss(codes, vectors, WIDTH, recipe="paper", **options)
        embeddings = torch.nn.Parameter(torch.randn(M, WIDTH))
        optimizer = torch.optim.Adam([embeddings, *loss_fn.parameters()], lr=0.05)
        labels = torch.arange(M)
        for _ in range(200):
            optimizer.zero_grad()
            loss_fn(embeddings, labels).backward()
            optimizer.step()
        assert (loss_fn.predict(embeddings) == codes.codes).all(1).float().mean() > 0.9
        assert F.cosine_similarity(embeddings, vectors.table).mean() > 0.8

    def test_state_knows_its_code_table(self, codes, vectors):
        loss_fn = GIFLoss(codes, vectors, WIDTH)
        state = loss_fn.state_dict()
        assert set(state) == {"centers", "projections", "draws", "_extra_state"}
        assert sum(value.numel() for value in state.values()) == 3 * VOCAB * WIDTH + 3 * WIDTH**2 + 1 + 32
        other = GIFLoss(codes, vectors, WIDTH)
        other.load_state_dict(state)
        assert torch.equal(other.centers, loss_fn.centers)
        swapped = IdentityCodes(codes.codes.flip(0), VOCAB)
        with pytest.raises(ValueError, match="trained with another code table"):
            GIFLoss(swapped, vectors, WIDTH).load_state_dict(state)

    def test_runs_in_float16_and_bfloat16(self, codes, vectors):
        loss_fn = GIFLoss(codes, vectors, WIDTH, vector_lr=0.0)
        embeddings, labels = torch.randn(8, WIDTH), torch.arange(8)
        for dtype in (torch.bfloat16, torch.float16):
            low = embeddings.to(dtype).requires_grad_()
            loss = loss_fn(low, labels)
            loss.backward()
            assert loss.dtype == torch.float32 and low.grad.dtype == dtype
            torch.testing.assert_close(loss, loss_fn(embeddings.to(dtype).float(), labels))

    def test_errors(self, codes, vectors):
        with pytest.raises(ValueError, match="codes are for 30 identities and vectors for 29"):
            GIFLoss(codes, CodeVectors(torch.randn(29, WIDTH)), WIDTH)
        with pytest.raises(ValueError, match="vectors have width 12, embedding_size is 16"):
            GIFLoss(codes, vectors, 16)
        with pytest.raises(ValueError, match="set regression_weight=0"):
            GIFLoss(codes, None, WIDTH)
        with pytest.raises(ValueError, match="recipe must be one of 'paper', 'live', got 'papper'"):
            GIFLoss(codes, vectors, WIDTH, recipe="papper")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="contrast_scale must be >= 0, got -1"):
            GIFLoss(codes, vectors, WIDTH, contrast_scale=-1)
        with pytest.raises(ValueError, match="vector_lr must be >= 0, got -1"):
            GIFLoss(codes, vectors, WIDTH, vector_lr=-1)
        with pytest.raises(TypeError, match="scal"):
            GIFLoss(codes, vectors, WIDTH, scal=3.0)
        with pytest.raises(ValueError, match="token_weights must be"):
            GIFLoss(codes, vectors, WIDTH, token_weights="triangular")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"token_weights must be \(3,\)"):
            GIFLoss(codes, vectors, WIDTH, token_weights=torch.tensor([1.0, -1.0, 1.0]))
        loss_fn = GIFLoss(codes, vectors, WIDTH)
        with pytest.raises(ValueError, match=r"labels"):
            loss_fn(torch.randn(2, WIDTH), torch.tensor([0, 30]))
        with pytest.raises(ValueError, match="NaN"):
            loss_fn(torch.full((2, WIDTH), math.nan), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"embeddings must have shape \(B, 12\), got \(2, 13\)"):
            loss_fn(torch.randn(2, WIDTH + 1), torch.tensor([0, 1]))

    def test_takes_files_by_their_paths(self, codes, vectors, tmp_path):
        codes.save(tmp_path / "codes.safetensors")
        vectors.save(tmp_path / "vectors.safetensors")
        for as_given in (str, Path):
            paths: Any = [as_given(tmp_path / f"{name}.safetensors") for name in ("codes", "vectors")]
            loss_fn = GIFLoss(paths[0], paths[1], WIDTH)
            assert torch.equal(loss_fn.codes.codes, codes.codes)
            assert torch.equal(loss_fn.vectors.table, vectors.table)
            assert len(metric_learning.GIFLoss(paths[0], paths[1], WIDTH).loss.codes) == M
        with pytest.raises(FileNotFoundError, match=r"no file .*none"):
            GIFLoss(str(tmp_path / "none"), vectors, WIDTH)
        with pytest.raises(TypeError, match="codes must be IdentityCodes or the path of their file, got CodeVectors"):
            GIFLoss(vectors, codes, WIDTH)
        with pytest.raises(TypeError, match="vectors must be CodeVectors or the path of their file, got Tensor"):
            GIFLoss(codes, vectors.table, WIDTH)

    def test_without_regression_needs_no_vectors(self, codes):
        loss_fn = GIFLoss(codes, None, WIDTH, recipe="paper", regression_weight=0)
        assert torch.isfinite(loss_fn(torch.randn(4, WIDTH), torch.arange(4)))


class TestLiveVectors:
    """The contrast L_CC, and the code vectors that follow it."""

    def contrast_by_hand(self, codes, table, embeddings, labels, siblings):
        order = sorted(range(M), key=lambda y: codes.codes[y].tolist())
        near = set(labels.tolist())
        for y in labels.tolist():
            place = order.index(y)
            near |= {order[(place + 1) % M], order[(place - 1) % M]} if siblings == 2 else set()
        candidates = sorted(near)
        cosine = F.normalize(embeddings.double(), dim=1) @ F.normalize(table[candidates], dim=1).T
        targets = torch.tensor([candidates.index(y) for y in labels.tolist()])
        logits = 12 * (cosine - 0.2 * F.one_hot(targets, len(candidates)))
        return F.cross_entropy(logits, targets), candidates

    @pytest.mark.parametrize("siblings", [0, 2])
    def test_contrast_and_step_by_hand(self, codes, vectors, siblings):
        before = vectors.table.clone()
        loss_fn = GIFLoss(codes, vectors, WIDTH, siblings=siblings, negatives=0, vector_lr=0.5)
        embeddings, labels = torch.randn(6, WIDTH, requires_grad=True), torch.tensor([3, 9, 3, 29, 0, 14])
        table = before.double().requires_grad_()
        expected, candidates = self.contrast_by_hand(codes, table, embeddings, labels, siblings)
        gradient_of_z, gradient_of_h = torch.autograd.grad(expected, (embeddings, table))
        loss = loss_fn.contrast_loss(embeddings, labels)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        torch.testing.assert_close(embeddings.grad, gradient_of_z.float(), rtol=1e-4, atol=1e-5)
        moved = (before.double() - 0.5 * gradient_of_h).float()
        torch.testing.assert_close(vectors.table, moved, rtol=1e-4, atol=1e-5)
        untouched = sorted(set(range(M)) - set(candidates))
        assert torch.equal(vectors.table[untouched], before[untouched])
        assert not torch.equal(vectors.table[candidates], before[candidates])

    def test_the_contrast_is_differentiated_once(self, codes, vectors):
        """The step of the code vectors takes both gradients; the backward pass multiplies no matrices again."""
        embeddings = torch.randn(6, WIDTH, requires_grad=True)
        loss = GIFLoss(codes, vectors, WIDTH).contrast_loss(embeddings, torch.arange(6))
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert counter.get_total_flops() == 0
        assert embeddings.grad.abs().max() > 0

    def test_vectors_move_in_training_only(self, codes, vectors):
        before = vectors.table.clone()
        loss_fn = GIFLoss(codes, vectors, WIDTH)
        embeddings, labels = torch.randn(6, WIDTH), torch.arange(6)
        with torch.no_grad():
            loss_fn(embeddings, labels)
        loss_fn.eval()(embeddings, labels)
        assert torch.equal(vectors.table, before)
        loss_fn.train()(embeddings, torch.full((6,), -1))
        torch.testing.assert_close(vectors.table, before)
        loss_fn.train()(embeddings, labels)
        assert not torch.equal(vectors.table, before)

    def test_tables_are_what_moves(self, codes, vectors):
        assert GIFLoss(codes, vectors, WIDTH).tables()["vectors"] is vectors.table
        assert GIFLoss(codes, vectors, WIDTH, recipe="paper").tables() == {}
        assert GIFLoss(codes, vectors, WIDTH, vector_lr=0).tables() == {}

    def test_small_steps_survive_in_bfloat16(self):
        table = CodeVectors(F.normalize(torch.ones(1, 512), dim=1).to(torch.bfloat16), normalized=True)
        gradient = torch.zeros(1, 512)
        gradient[0, :256] = -1e-5  # far below bfloat16's resolution of 1.7e-4 at this size
        start = table.table.float().clone()
        for seed in range(200):
            table.move_(torch.tensor([0]), gradient, lr=1.0, seed=seed)
        drift = (table.table.float() - start)[0]
        assert drift[:256].mean() == pytest.approx(2e-3, rel=0.2)
        assert not drift[256:].any()

    def test_the_rate_follows_the_optimizers(self, codes, vectors):
        """At a half of the peak a step is half as long, and no graph and no host need know it as a number."""
        before, labels, embeddings = vectors.table.clone(), torch.arange(6), torch.randn(6, WIDTH)
        whole, half = (CodeVectors(before.clone(), normalized=True) for _ in range(2))
        GIFLoss(codes, whole, WIDTH).contrast_loss(embeddings, labels)
        loss_fn = GIFLoss(codes, half, WIDTH)
        loss_fn.begin_step(0.05, 0.5, 0.3)
        loss_fn.contrast_loss(embeddings, labels)
        torch.testing.assert_close(half.table - before, (whole.table - before) / 2, rtol=1e-4, atol=1e-6)
        loss_fn.begin_step(0.0, 0.0, 1.0)
        kept = half.table.clone()
        loss_fn.contrast_loss(embeddings, labels)
        assert torch.equal(half.table, kept)
        assert not {"schedule", "faded"} & set(loss_fn.state_dict())  # whoever trains says them before each step

    def test_the_contrasts_scale_fits_the_identities(self, codes, vectors):
        assert GIFLoss(codes, vectors, WIDTH).recipe.contrast_scale == 12  # the least
        assert GIFLoss(codes, vectors, WIDTH, contrast_scale=7.0).recipe.contrast_scale == 7
        assert [RECIPES["live"].fitted(m).contrast_scale for m in (0, 1, 2, 4844)] == [12, 12, 12, pytest.approx(12)]
        assert RECIPES["live"].fitted(1_000_000).contrast_scale == pytest.approx(2**0.5 * math.log(999_999))
        assert RECIPES["paper"].fitted(1_000_000) == RECIPES["paper"]  # which contrasts nobody
        many = IdentityCodes(torch.cartesian_prod(*[torch.arange(20)] * 4), 20)
        assert GIFLoss(many, CodeVectors(torch.randn(len(many), WIDTH)), WIDTH).recipe.contrast_scale > 16

    def test_tokens_and_pull_fade(self, codes, vectors):
        loss_fn = GIFLoss(codes, vectors, WIDTH).eval()
        embeddings, labels = torch.randn(6, WIDTH), torch.arange(6)
        contrast = loss_fn.contrast_loss(embeddings, labels)
        rest = loss_fn(embeddings, labels) - contrast
        assert rest > 0.1
        for done in (0.125, 0.5, 1.0):  # of the run, in whose first half they fade
            loss_fn.begin_step(0.1, 1.0, done)
            left = max(0.0, 1 - 2 * done)
            torch.testing.assert_close(loss_fn(embeddings, labels) - contrast, left * rest, rtol=1e-4, atol=1e-4)
        kept = GIFLoss(codes, vectors, WIDTH, fades=0).eval()
        before = kept(embeddings, labels)
        kept.begin_step(0.1, 1.0, 0.5)
        assert torch.equal(kept(embeddings, labels), before)

    def test_files_hold_directions(self, codes, vectors, tmp_path):
        """Rows that moved at unit length; the others to the bit."""
        low = CodeVectors(vectors.table.to(torch.bfloat16), normalized=True)
        for table in (vectors, low):
            before = table.table.clone()
            table.move_(torch.tensor([2, 5]), torch.randn(2, WIDTH), lr=1.0)
            table.save(tmp_path / "vectors.safetensors")
            saved = CodeVectors.load(tmp_path / "vectors.safetensors").table
            eps = max(torch.finfo(saved.dtype).eps, 1e-6)
            assert (saved.float().norm(dim=1) - 1).abs().max() <= 2 * eps
            unmoved = [row for row in range(M) if row not in (2, 5)]
            assert torch.equal(saved[unmoved], before[unmoved])
            directions = F.normalize(table.table.float(), dim=1)
            torch.testing.assert_close(saved.float(), directions, rtol=2 * eps, atol=2 * eps)

    def test_a_bfloat16_table_moves_by_small_steps(self, codes, vectors):
        exact = GIFLoss(codes, vectors, WIDTH, vector_lr=1e-3)
        low = GIFLoss(codes, CodeVectors(vectors.table.to(torch.bfloat16), normalized=True), WIDTH, vector_lr=1e-3)
        start, start_low = vectors.table.clone(), low.vectors.table.float().clone()
        embeddings, labels = torch.randn(M, WIDTH), torch.arange(M)
        torch.manual_seed(0)
        for _ in range(60):  # each step is a fraction of bfloat16's resolution
            exact.contrast_loss(embeddings, labels)
            low.contrast_loss(embeddings, labels)
        moved, moved_low = exact.vectors.table - start, low.vectors.table.float() - start_low
        assert moved.abs().max() < 0.05
        assert F.cosine_similarity(moved.flatten(), moved_low.flatten(), dim=0) > 0.9

    def test_repeated_identities_take_the_sum(self):
        gradient = torch.randn(3, 4)
        once, thrice = (CodeVectors(torch.eye(4)) for _ in range(2))
        once.move_(torch.tensor([2]), gradient.sum(0, keepdim=True), lr=0.1)
        thrice.move_(torch.tensor([2, 2, 2]), gradient, lr=0.1)
        torch.testing.assert_close(once.table, thrice.table)


class TestRandomNumbers:
    """Negatives and rounding follow from one counter in the head, that no host reads."""

    @pytest.mark.parametrize(
        ("dtype", "options", "draws"),
        [
            (torch.float32, {"negatives": 0}, False),
            (torch.bfloat16, {"negatives": 0}, True),
            (torch.float16, {"negatives": 0}, True),
            (torch.bfloat16, {"negatives": 0, "vector_lr": 0}, False),
            (torch.bfloat16, {"contrast_weight": 0}, False),
            (torch.float32, {}, True),
            (torch.bfloat16, {"recipe": "paper"}, False),
            (torch.float32, {"negatives": 5}, True),
            (torch.float32, {"negatives": 5, "vector_lr": 0}, True),
        ],
    )
    def test_the_counter_is_in_the_state_where_it_decides_something(self, codes, dtype, options, draws):
        loss_fn = GIFLoss(codes, CodeVectors(torch.randn(M, WIDTH).to(dtype)), WIDTH, **options)
        assert ("draws" in loss_fn.state_dict()) == draws
        before = loss_fn.draws.clone() if draws else None
        for k in range(1, 3):
            loss_fn(torch.randn(6, WIDTH, requires_grad=True), torch.arange(6)).backward()
            assert not draws or loss_fn.draws == before + k

    def test_a_state_loads_with_the_counter_or_without(self, codes, vectors):
        low = CodeVectors(vectors.table.bfloat16(), normalized=True)
        with_it, without = GIFLoss(codes, low, WIDTH), GIFLoss(codes, vectors, WIDTH, negatives=0)
        state, earlier = with_it.state_dict(), without.state_dict()
        names, own = list(state), with_it.draws.clone()
        with_it.load_state_dict(earlier)  # as heads were saved when the host drew: it goes on with its own
        assert with_it.draws == own and "draws" not in earlier
        torch.nn.Sequential(without).load_state_dict({f"0.{name}": value for name, value in state.items()})
        assert list(without.state_dict()) == list(earlier) and list(state) == names
        other = GIFLoss(codes, low, WIDTH)
        assert other.draws != own
        other.load_state_dict(state)
        assert other.draws == own
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict({name: value for name, value in state.items() if name != "centers"})

    @pytest.mark.parametrize("negatives", [0, 9])
    def test_who_continues_draws_what_would_have_been_drawn(self, codes, vectors, negatives):
        def head():
            return GIFLoss(codes, CodeVectors(vectors.table.bfloat16(), normalized=True), WIDTH, negatives=negatives)

        embeddings, labels = torch.randn(8, WIDTH, requires_grad=True), torch.arange(8)
        whole, continued = head(), head()
        for step in range(4):
            if step == 2:
                continued.load_state_dict(whole.state_dict())
                continued.vectors.table.copy_(whole.vectors.table)
            random = torch.get_rng_state()
            whole(embeddings, labels).backward()
            assert torch.equal(torch.get_rng_state(), random)  # the host draws nothing
        for _ in range(2):
            continued(embeddings, labels).backward()
        assert torch.equal(whole.vectors.table, continued.vectors.table)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("vector_lr", [0, 4.0])
    def test_a_repeated_forward_pass_draws_what_the_first_drew(self, codes, vectors, reentrant, vector_lr):
        found = []
        for checkpointed in (False, True):
            table = CodeVectors(vectors.table.bfloat16(), normalized=True)
            torch.manual_seed(7)
            loss_fn = GIFLoss(codes, table, WIDTH, negatives=9, vector_lr=vector_lr)
            before = loss_fn.draws.clone()
            embeddings, labels = torch.randn(8, WIDTH, requires_grad=True), torch.arange(8)
            for _ in range(2):
                if checkpointed:
                    loss = checkpoint(loss_fn, embeddings, labels, use_reentrant=reentrant)
                else:
                    loss = loss_fn(embeddings, labels)
                loss.backward()
            assert loss_fn.draws == before + 2
            found.append((loss.detach(), embeddings.grad, table.table))
        for plain, repeated in zip(*found, strict=True):
            assert torch.equal(plain, repeated)

    def test_what_is_no_step_of_training_draws_nothing(self, codes, vectors):
        loss_fn = GIFLoss(codes, vectors, WIDTH, negatives=9)
        before = loss_fn.draws.clone()
        with torch.no_grad():
            loss_fn(torch.randn(6, WIDTH), torch.arange(6))
        loss_fn.eval()(torch.randn(6, WIDTH, requires_grad=True), torch.arange(6)).backward()
        assert loss_fn.draws == before


@pytest.fixture
def unchecked(monkeypatch):
    """Values are not looked at, as on an accelerator."""
    monkeypatch.setattr(checks, "looks_at_values", lambda tensor: False)


class TestStepsThatAreSkipped:
    """What a forward pass changes must not outlive an overflow, nor change twice."""

    PIXELS = 20

    def parts(self, codes, dtype=torch.float32, recipe="live"):
        torch.manual_seed(4)
        table = CodeVectors(torch.randn(M, WIDTH).to(dtype))
        return torch.nn.Linear(self.PIXELS, WIDTH), GIFLoss(codes, table, WIDTH, recipe=recipe)

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_an_overflow_costs_one_step(self, codes, unchecked, dtype, bad):
        network, loss_fn = self.parts(codes, dtype)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.SGD([*network.parameters(), *loss_fn.parameters()], 0.05)
        losses = []
        for step in range(8):
            images, labels = torch.randn(10, self.PIXELS), torch.randint(M, (10,))
            if step == 3:
                images[4] = bad
            before = loss_fn.vectors.table.clone()
            loss = loss_fn(network(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(loss_fn.vectors.table, before) == (step == 3)
            losses.append(float(loss.detach()))
        assert [math.isnan(loss) for loss in losses] == [step == 3 for step in range(8)]
        assert loss_fn.vectors.table.isfinite().all() and 10 <= int(loss_fn.stayed) <= 30
        assert all(parameter.isfinite().all() for parameter in loss_fn.parameters())

    @pytest.mark.parametrize("impl", ["reference", "blocked"])
    def test_no_implementation_poisons_a_row(self, codes, unchecked, impl, monkeypatch):
        whole = gif_loss_module.code_contrast_gradients
        monkeypatch.setattr(gif_loss_module, "code_contrast_gradients", partial(whole, impl=impl))
        network, loss_fn = self.parts(codes)
        images = torch.randn(10, self.PIXELS)
        images[0] = math.inf
        loss_fn(network(images), torch.arange(10)).backward()
        assert loss_fn.vectors.table.isfinite().all() and loss_fn.stayed > 0

    def test_only_rows_with_a_finite_step_move(self):
        table = CodeVectors(torch.eye(5, 6))
        gradient = torch.ones(5, 6)
        gradient[1, 2], gradient[2, 0], gradient[3] = math.nan, math.inf, 3e38  # the last overflows the norm
        stayed = table.move_(torch.tensor([0, 1, 2, 3, 4], dtype=torch.uint8), gradient, lr=1.5)
        moved = (table.table != torch.eye(5, 6)).any(1)
        assert moved.tolist() == [True, False, False, False, True] and int(stayed) == 3
        torch.testing.assert_close(table.table[[0, 4]], torch.eye(5, 6)[[0, 4]] - 1.5)

    def test_a_skipped_optimizer_step_alone_undoes_nothing(self, codes):
        """An overflow of the scaled gradient, in the backward pass: the vectors' own gradient is not scaled."""
        tables = []
        for scale in (1.0, 2.0**127):
            network, loss_fn = self.parts(codes)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            optimizer = torch.optim.SGD([*network.parameters(), *loss_fn.parameters()], 0.05)
            before = network.weight.clone()
            images = torch.randn(10, self.PIXELS, generator=torch.Generator().manual_seed(5))
            scaler.scale(loss_fn(network(images), torch.arange(10))).backward()
            scaler.step(optimizer)
            assert torch.equal(network.weight, before) == (scale > 1)
            tables.append(loss_fn.vectors.table)
        assert torch.equal(*tables)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("reentrant", "frozen"),
        [(False, False), (False, True), (True, False)],  # the fourth has no input with a gradient: nothing to repeat
    )
    def test_checkpointing_moves_once(self, codes, reentrant, frozen, dtype):
        results, calls = [], []
        for checkpointed in (False, True):
            network, loss_fn = self.parts(codes, dtype)
            network.requires_grad_(not frozen)
            images = torch.randn(10, self.PIXELS, requires_grad=not frozen)

            def forward(images, network=network, loss_fn=loss_fn):
                calls.append(1)
                return loss_fn(network(images), torch.arange(10))

            loss = checkpoint(forward, images, use_reentrant=reentrant) if checkpointed else forward(images)
            loss.backward()
            results.append((loss_fn.vectors.table, loss_fn.centers.grad, images.grad, network.weight.grad))
        assert len(calls) == 3  # once, and once more for the checkpoint
        for plain, repeated in zip(*results, strict=True):
            assert plain is repeated or torch.equal(plain, repeated)
        assert not torch.equal(results[0][0], self.parts(codes, dtype)[1].vectors.table)

    def test_a_forward_pass_moves_in_its_backward_pass_and_once(self, codes):
        network, loss_fn = self.parts(codes)
        before = loss_fn.vectors.table.clone()
        loss = loss_fn(network(torch.randn(10, self.PIXELS)), torch.arange(10))
        assert torch.equal(loss_fn.vectors.table, before)
        loss.backward(retain_graph=True)
        once = loss_fn.vectors.table.clone()
        loss.backward()
        assert torch.equal(loss_fn.vectors.table, once) and not torch.equal(once, before)


INTEGERS = [getattr(torch, name) for name in ("int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64")]
NO_LABELS: dict[str, Any] = {
    "float": (lambda labels: labels.float(), TypeError, "must be an integer tensor, got torch.float32"),
    "bool": (lambda labels: labels > 3, TypeError, "must be an integer tensor, got torch.bool"),
    "column": (lambda labels: labels[:, None], ValueError, r"labels must have shape \(6\), got \(6, 1\)"),
    "short": (lambda labels: labels[:5], ValueError, r"labels must have shape \(6\), got \(5,\)"),
    "list": (lambda labels: labels.tolist(), TypeError, "labels must be a torch.Tensor, got list"),
}


def heads(codes, vectors):
    """Every head, in training and out of it; what is drawn at random is drawn alike."""
    recipe: RecipeName
    for recipe in ("live", "paper"):
        yield f"GIF {recipe}", GIFLoss(codes, CodeVectors(vectors.table.clone()), WIDTH, recipe=recipe)
    yield "softmax", MarginSoftmax(M, WIDTH)
    yield "partial_fc", PartialFC(M, WIDTH, sample_rate=0.5)
    for recipe in ("live", "paper"):
        table = CodeVectors(vectors.table.clone())
        yield f"insightface {recipe}", insightface.PartialFC(None, WIDTH, M, codes=codes, vectors=table, recipe=recipe)
        table = CodeVectors(vectors.table.clone())
        yield f"metric learning {recipe}", metric_learning.GIFLoss(codes, table, WIDTH, recipe=recipe)


HEADS = ["GIF live", "GIF paper", "softmax", "partial_fc"]
HEADS += [f"{library} {recipe}" for library in ("insightface", "metric learning") for recipe in ("live", "paper")]
OF_METRIC_LEARNING: dict[str, Any] = {  # which looks at shapes itself
    "column": (ValueError, "labels must be a 1D tensor"),
    "short": (ValueError, "Number of embeddings must equal number of labels"),
    "list": (AttributeError, "'list' object has no attribute 'shape'"),
}
OF_INSIGHTFACES_LOADERS = ("float", "column")  # which its head takes, and for which it has tests of its own
REFUSED = [
    (name, change)
    for name in HEADS
    for change in NO_LABELS
    if not (name.startswith("insightface") and change in OF_INSIGHTFACES_LOADERS)
]


class TestLabels:
    """A label means the same in every integer dtype, and nothing else is a label."""

    LABELS = torch.tensor([1, 7, 0, 29, 7, 3])

    def head(self, name, codes, vectors):
        torch.manual_seed(3)
        head = dict(heads(codes, vectors))[name]
        torch.manual_seed(3)
        return head

    def step(self, head, embeddings, labels):
        z = embeddings.clone().requires_grad_()
        loss = head(z, labels)
        loss.backward()
        inner = getattr(head, "loss", head)
        tables = inner.tables().values() if isinstance(inner, Head) else []
        return (loss.detach(), z.grad, *tables)

    @pytest.mark.parametrize("name", HEADS)
    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    def test_every_integer_dtype(self, codes, vectors, name, dtype):
        embeddings = torch.randn(6, WIDTH)
        wanted = self.step(self.head(name, codes, vectors), embeddings, self.LABELS)
        found = self.step(self.head(name, codes, vectors), embeddings, self.LABELS.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    @pytest.mark.parametrize(("name", "change"), REFUSED)
    def test_what_is_no_label_is_said(self, codes, vectors, name, change):
        make, error, message = NO_LABELS[change]
        if name.startswith("metric"):
            error, message = OF_METRIC_LEARNING.get(change, (error, message))
        head = self.head(name, codes, vectors)
        with pytest.raises(error, match=message):
            head(torch.randn(6, WIDTH), make(self.LABELS))

    def test_tables_by_labels(self, codes, vectors):
        for dtype in INTEGERS:
            given = self.LABELS.to(dtype)
            assert torch.equal(vectors.lookup(given), vectors.table[self.LABELS])
            assert torch.equal(codes.lookup(given), codes.codes[self.LABELS].long())
            assert torch.equal(codes.siblings(given, 3), codes.siblings(self.LABELS, 3))
            assert torch.equal(codes.decode(codes.codes.to(dtype)), torch.arange(M))
        for table in (vectors.lookup, codes.lookup, lambda labels: codes.siblings(labels, 2)):
            for bad in (self.LABELS.float(), self.LABELS > 3):
                with pytest.raises(TypeError, match="labels must be an integer tensor"):
                    table(bad)
            with pytest.raises(ValueError, match=r"labels must have shape \(B\), got \(6, 1\)"):
                table(self.LABELS[:, None])
        with pytest.raises(TypeError, match="codes must be an integer tensor"):
            codes.decode(codes.codes.float())

    def test_a_label_that_int64_cannot_hold_is_none_to_ignore(self, codes, vectors):
        wraps = torch.tensor([2**64 - 1, 3], dtype=torch.uint64)
        for head in (MarginSoftmax(M, WIDTH), GIFLoss(codes, vectors, WIDTH)):
            with pytest.raises(ValueError, match=r"labels must lie in \["):
                head(torch.randn(2, WIDTH), wraps)

    def test_whole_numbers_of_insightfaces_loaders(self, codes, vectors):
        head = self.head("insightface paper", codes, vectors)
        for bad in (torch.tensor([1.5, 2.0]), torch.tensor([math.nan, 2.0]), torch.tensor([2.0**24, 1.0])):
            with pytest.raises(ValueError, match="must be whole numbers"):
                head(torch.randn(2, WIDTH), bad)
        with pytest.raises(ValueError, match=r"labels must lie in"):  # the largest that float32 tells from the next
            head(torch.randn(2, WIDTH), torch.tensor([2.0**24 - 1, 1.0]))
        with pytest.raises(TypeError, match=r"must be an integer tensor, got torch\.float16"):
            head(torch.randn(2, WIDTH), torch.tensor([1.0, 2.0]).half())


class TestMarginSoftmax:
    def test_value_by_hand(self):
        loss_fn = MarginSoftmax(7, 5, margin=AngularMargin(m2=0.0, m3=0.3), scale=20.0)
        embeddings, labels = torch.randn(4, 5), torch.tensor([6, 0, -1, 3])
        cosine = F.normalize(embeddings, dim=1) @ F.normalize(loss_fn.weight, dim=1).T
        logits = 20 * (cosine - 0.3 * F.one_hot(labels.clamp(min=0), 7))
        expected = F.cross_entropy(logits, labels, ignore_index=-1)
        torch.testing.assert_close(loss_fn(embeddings, labels), expected)

    def test_centers_start_from_vectors_at_the_length_of_random_ones(self, vectors):
        weight = MarginSoftmax(M, WIDTH, centers=vectors.table.double()).weight
        torch.testing.assert_close(F.normalize(weight, dim=1), vectors.table)
        random = MarginSoftmax(2000, WIDTH).weight.norm(dim=1).square().mean().sqrt()
        torch.testing.assert_close(weight.norm(dim=1), random.expand(M), rtol=0.05, atol=0)
        with pytest.raises(ValueError, match=r"centers must have shape \(30, 12\), got \(29, 12\)"):
            MarginSoftmax(M, WIDTH, centers=vectors.table[:29])

    def test_errors(self):
        with pytest.raises(ValueError, match=r"labels must lie in \[-1, 10\)"):
            MarginSoftmax(10, 5)(torch.randn(1, 5), torch.tensor([10]))


@pytest.mark.parametrize("pattern", ["uniform", "increasing", "decreasing", "gaussian"])
def test_token_weights(pattern):
    weights = token_weights(pattern, 5)
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).all()
    steps = weights.diff()
    expected = {"uniform": [0, 0, 0, 0], "increasing": [1] * 4, "decreasing": [-1] * 4, "gaussian": [1, 1, -1, -1]}
    assert steps.round(decimals=6).sign().tolist() == expected[pattern]


def test_head_config(codes, vectors):
    assert isinstance(HeadConfig().build(M, WIDTH, codes, vectors), GIFLoss)
    partial = HeadConfig(kind="partial_fc", sample_rate=0.5).build(M, WIDTH, None, None)
    assert isinstance(partial, PartialFC) and partial.samples == M // 2
    assert isinstance(HeadConfig(kind="softmax").build(M, WIDTH, None, None), MarginSoftmax)
    kind: Literal["softmax", "partial_fc"]
    for kind in ("softmax", "partial_fc"):
        started: Any = HeadConfig(kind=kind, centers="vectors").build(M, WIDTH, None, vectors)
        torch.testing.assert_close(F.normalize(started.weight, dim=1), vectors.table)
        with pytest.raises(ValueError, match="need code vectors"):
            HeadConfig(kind=kind, centers="vectors").build(M, WIDTH, None, None)
    with pytest.raises(ValueError, match=r"kind gif does not use scale; set the recipe's in overrides"):
        HeadConfig(scale=32.0)
    with pytest.raises(ValueError, match="kind softmax does not use overrides; they are for kind gif"):
        HeadConfig(kind="softmax", overrides={"scale": 8.0})
    with pytest.raises(ValueError, match="overrides scal are no fields of a recipe; there are code_weight"):
        HeadConfig(overrides={"scal": 8.0})
    with pytest.raises(ValueError, match="needs codes"):
        HeadConfig().build(M, WIDTH, None, vectors)
    with pytest.raises(ValueError, match="codes are for 30 identities and the data set has 31"):
        HeadConfig().build(M + 1, WIDTH, codes, vectors)
