"""The loss in the shape of insightface's, in a loop like insightface's."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from gif import AngularMargin, CodeVectors, IdentityCodes
from gif.integrations.insightface import PartialFC
from gif.losses import RECIPES
from gif.progress import console

M, WIDTH, PIXELS, BATCH = 27, 12, 20, 16


def tables():
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(3)] * 3), 3)
    return codes, CodeVectors(torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(1)))


def batches(count, size=BATCH):
    """Images that look like their identity."""
    generator = torch.Generator().manual_seed(2)
    looks = torch.randn(M, PIXELS, generator=generator)
    for _ in range(count):
        labels = torch.randint(M, (size,), generator=generator)
        yield looks[labels] + 0.3 * torch.randn(size, PIXELS, generator=generator), labels


class CombinedMarginLoss(nn.Module):
    """The attributes of insightface's."""

    def __init__(self, s, m1, m2, m3, interclass_filtering_threshold=0):
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold


def train_v2(PartialFC_V2, steps=60, resume=None):
    """The loop of arcface_torch's train_v2.py, step for step: its order of arguments, groups, clipping, checkpoint."""
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.BatchNorm1d(WIDTH, affine=False))
    backbone.train()
    margin_loss = CombinedMarginLoss(16, 1.0, 0.0, 0.2)
    module_partial_fc = PartialFC_V2(margin_loss, WIDTH, M, 0.1, False)
    module_partial_fc.train()
    opt = torch.optim.SGD(
        params=[{"params": backbone.parameters()}, {"params": module_partial_fc.parameters()}],
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
    )
    done = 0
    if resume is not None:
        done = resume["global_step"]
        backbone.load_state_dict(resume["state_dict_backbone"])
        module_partial_fc.load_state_dict(resume["state_dict_softmax_fc"])
        opt.load_state_dict(resume["state_optimizer"])
    losses = []
    for img, local_labels in list(batches(60))[done:steps]:
        local_embeddings = backbone(img)
        loss = module_partial_fc(local_embeddings, local_labels)
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, {
        "global_step": steps,
        "state_dict_backbone": backbone.state_dict(),
        "state_dict_softmax_fc": module_partial_fc.state_dict(),
        "state_optimizer": opt.state_dict(),
    }


class TestInsightface:
    @pytest.fixture
    def files(self, tmp_path):
        codes, vectors = tables()
        codes.save(tmp_path / "codes.safetensors")
        vectors.save(tmp_path / "vectors.safetensors")
        return {"codes": tmp_path / "codes.safetensors", "vectors": str(tmp_path / "vectors.safetensors")}

    @pytest.mark.parametrize("recipe", ["live", "paper"])
    def test_trains_in_their_loop_without_a_process_group(self, files, recipe, tmp_path):
        head = partial(PartialFC, **files, recipe=recipe)
        losses, end = train_v2(head)
        assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
        first, middle = train_v2(head, steps=25)
        torch.save(middle, tmp_path / "checkpoint_gpu_0.pt")
        rest, resumed = train_v2(head, resume=torch.load(tmp_path / "checkpoint_gpu_0.pt"))
        assert first + rest == losses  # to the bit, the code vectors that moved included
        for part in ("state_dict_backbone", "state_dict_softmax_fc"):
            torch.testing.assert_close(resumed[part], end[part], rtol=0, atol=0)

    def test_labels_as_their_loader_gives_them(self):
        codes, vectors = tables()
        head = PartialFC(None, WIDTH, M, codes=codes, vectors=vectors, recipe="paper")
        embeddings, labels = torch.randn(5, WIDTH), torch.tensor([3, 1, -1, 26, 0])
        expected = head.loss(embeddings, labels)
        for given in (labels, labels[:, None], labels.int(), labels.float()[:, None]):
            assert torch.equal(head(embeddings, given), expected)
        assert torch.equal(labels, torch.tensor([3, 1, -1, 26, 0]))

    def test_margins(self):
        class ArcFace(nn.Module):
            s, margin = 48.0, 0.4

        class CosFace(nn.Module):
            s, m = 30.0, 0.35

        codes, vectors = tables()
        for given, scale, margin in (
            (CombinedMarginLoss(64, 1.0, 0.5, 0.0), 64, AngularMargin(m2=0.5, gradient="straight_through")),
            (CombinedMarginLoss(64, 1.0, 0.0, 0.4), 64, AngularMargin(m2=0.0, m3=0.4)),
            (CombinedMarginLoss(64, 1.0, 0.5, 0.4), 64, AngularMargin(m2=0.0, m3=0.4)),  # m3 wins there too
            (ArcFace(), 48, AngularMargin(m2=0.4, gradient="straight_through")),
            (CosFace(), 30, AngularMargin(m2=0.0, m3=0.35)),
        ):
            make = partial(PartialFC, given, WIDTH, M, codes=codes, vectors=vectors)
            theirs = make(recipe="paper", scale="margin_loss")
            assert theirs.loss.recipe == replace(RECIPES["paper"], scale=scale, margin=margin)
            live = replace(RECIPES["live"], contrast_scale=scale, contrast_margin=margin)
            assert make(scale="margin_loss").loss.recipe == live
            with console.capture() as capture:
                assert make().loss.recipe == replace(RECIPES["live"], contrast_margin=margin).fitted(M)
            assert f"the recipe's scale, 12, is kept, and not the margin loss's, {scale}" in capture.get()
        wrong: Any = "mine"
        with pytest.raises(ValueError, match="scale"):
            make(scale=wrong)
        assert PartialFC(None, WIDTH, M, codes=codes, vectors=vectors).loss.recipe == RECIPES["live"].fitted(M)
        with pytest.raises(TypeError, match="interclass filtering needs a logit for every class"):
            PartialFC(CombinedMarginLoss(64, 1, 0.5, 0, 0.2), WIDTH, M, codes=codes, vectors=vectors)
        with pytest.raises(TypeError, match="cannot read scale and margin off function"):
            PartialFC(lambda logits, labels: logits, WIDTH, M, codes=codes, vectors=vectors)

    def test_what_does_not_fit(self):
        codes, vectors = tables()
        with pytest.raises(ValueError, match="num_classes is 30 and the codes are for 27 identities"):
            PartialFC(None, WIDTH, 30, codes=codes, vectors=vectors)
        state = PartialFC(None, WIDTH, M, codes=codes, vectors=vectors, recipe="paper").state_dict()
        with pytest.raises(ValueError, match=r"has the tables {}, wanted {'vectors': \(27, 12\)}"):
            PartialFC(None, WIDTH, M, codes=codes, vectors=vectors).load_state_dict(state)

    @pytest.mark.parametrize("recipe", ["paper", "live"])
    def test_processes_train_one_head(self, trained_together, recipe):
        """Two processes against one at the same batch: they differ by the order of sums, which float64 shows."""
        for dtype in (torch.float32, torch.float64):
            first, second = (found[recipe, dtype] for found in trained_together)
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            expected = train_with(recipe, dtype)
            for name, value in expected.items():
                tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
                if name == "vectors":  # whose step multiplies the rounding of a cosine by scale and rate
                    tolerance *= 16 * RECIPES[recipe].vector_lr
                torch.testing.assert_close(first[name], value, rtol=0, atol=tolerance, msg=f"{name} {dtype}")


@pytest.fixture(scope="module")
def trained_together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    spawn(train_process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def train_with(recipe, dtype, rank=None):
    """Four steps, each of two halves of a batch; a process takes its half of each. What was trained.

    There is no batch norm, which would see fewer rows in each process.
    """
    codes, vectors = tables()
    vectors = CodeVectors(vectors.table.to(dtype))
    torch.manual_seed(4)
    backbone = nn.Linear(PIXELS, WIDTH).to(dtype)
    model = backbone if rank is None else nn.parallel.DistributedDataParallel(backbone)
    margin = CombinedMarginLoss(16, 1.0, 0.3, 0.0)
    loss_fn = PartialFC(margin, WIDTH, M, codes=codes, vectors=vectors, recipe=recipe).to(dtype)
    if rank == 1:
        nn.init.zeros_(loss_fn.loss.centers)  # rank 0's values count
    opt = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], 0.1, momentum=0.9)
    for images, labels in batches(4):
        opt.zero_grad()
        for part in range(2):
            own = (images[part::2].to(dtype), labels[part::2])
            some, identities = own if rank is None else (half.chunk(2)[rank] for half in own)
            loss_fn(model(some), identities).div(2).backward()
        opt.step()
    return {**backbone.state_dict(), **{n: p.detach() for n, p in loss_fn.named_parameters()}, **loss_fn.loss.tables()}


def train_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    cases = [(recipe, dtype) for recipe in ("paper", "live") for dtype in (torch.float32, torch.float64)]
    torch.save({case: train_with(*case, rank) for case in cases}, folder / f"{rank}.pt")
    dist.destroy_process_group()
