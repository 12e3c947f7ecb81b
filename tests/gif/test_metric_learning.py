"""The loss as one of pytorch-metric-learning's, against the library itself."""

import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ArcFaceLoss
from pytorch_metric_learning.reducers import ClassWeightedReducer, DoNothingReducer, MeanReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from torch import nn

import gif
from gif import CodeVectors, IdentityCodes
from gif.integrations import metric_learning

M, WIDTH, PIXELS, BATCH = 27, 12, 20, 16


def tables() -> tuple[IdentityCodes, CodeVectors]:
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(3)] * 3), 3)
    return codes, CodeVectors(torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(1)))


def batches(count, size=BATCH):
    """Images that look like their identity."""
    generator = torch.Generator().manual_seed(2)
    looks = torch.randn(M, PIXELS, generator=generator)
    for _ in range(count):
        labels = torch.randint(M, (size,), generator=generator)
        yield looks[labels] + 0.3 * torch.randn(size, PIXELS, generator=generator), labels


class TestMetricLearning:
    @pytest.fixture
    def batch(self):
        generator = torch.Generator().manual_seed(5)
        return torch.randn(6, WIDTH, generator=generator), torch.tensor([3, 1, 3, 26, 0, 1])

    def rows(self, embeddings, labels, **options: Any):
        """The loss of each row by itself."""
        torch.manual_seed(6)
        loss_fn = gif.GIFLoss(*tables(), WIDTH, **options).eval()
        return torch.stack([loss_fn(embeddings[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])

    def make(self, **options: Any):
        torch.manual_seed(6)
        return metric_learning.GIFLoss(*tables(), WIDTH, **options)

    def test_reducers(self, batch):
        embeddings, labels = batch
        rows = self.rows(embeddings, labels, recipe="paper")
        torch.testing.assert_close(self.make(recipe="paper")(embeddings, labels), rows.mean())
        weights = torch.linspace(0.1, 2, M)
        weighted = self.make(recipe="paper", reducer=ClassWeightedReducer(weights))(embeddings, labels)
        torch.testing.assert_close(weighted, (weights[labels] * rows).mean())
        found = self.make(recipe="paper", reducer=DoNothingReducer())(embeddings, labels)["loss"]
        torch.testing.assert_close(found["losses"], rows)
        assert found["reduction_type"] == "element"

    def test_miners_and_regularizers(self, batch):
        embeddings, labels = batch
        rows = self.rows(embeddings, labels, recipe="paper")
        triplets = (torch.tensor([0, 0]), torch.tensor([2, 2]), torch.tensor([1, 3]))
        counts = torch.tensor([2, 1, 2, 1, 0, 0]) / 2
        found = self.make(recipe="paper")(embeddings, labels, triplets)
        torch.testing.assert_close(found, (rows * counts).mean())
        regular = self.make(recipe="paper", embedding_regularizer=LpRegularizer(), embedding_reg_weight=0.5)
        expected = rows.mean() + 0.5 * embeddings.norm(dim=1).mean()
        torch.testing.assert_close(regular(embeddings, labels), expected)
        with pytest.raises(ValueError, match="ref_emb is not supported"):
            self.make()(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels)

    def test_arguments_of_the_librarys_base(self, batch):
        expected = self.make(recipe="paper")(*batch)
        loss_func = self.make(recipe="paper", collect_stats=True, distance=CosineSimilarity(), reducer=MeanReducer())
        assert torch.equal(loss_func(*batch), expected)
        assert loss_func.collect_stats and not self.make(collect_stats=False).collect_stats
        assert isinstance(self.make().distance, CosineSimilarity)
        with pytest.raises(TypeError, match="the loss compares by cosine, got distance LpDistance"):
            self.make(distance=LpDistance())
        with pytest.raises(TypeError, match="weight_regularizer belong to losses with a weight for each class"):
            self.make(weight_regularizer=LpRegularizer())
        with pytest.raises(TypeError, match="temperature: no option of GIFLoss and no field of a recipe"):
            self.make(temperature=0.1)

    @pytest.mark.parametrize("recipe", ["live", "paper"])
    def test_is_the_projects_loss_in_training(self, batch, recipe):
        embeddings, labels = batch
        results = []
        torch.manual_seed(6)
        for loss_fn in (gif.GIFLoss(*tables(), WIDTH, recipe=recipe), self.make(recipe=recipe)):
            z = embeddings.clone().requires_grad_()
            loss_fn(z, labels).backward()
            inner = getattr(loss_fn, "loss", loss_fn)
            results.append((z.grad, inner.centers.grad, inner.vectors.table))
        torch.testing.assert_close(*results)

    def test_trains_like_the_librarys(self):
        torch.manual_seed(7)
        for loss_func in (self.make(), ArcFaceLoss(M, WIDTH)):
            model = nn.Linear(PIXELS, WIDTH)
            optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], 0.1, momentum=0.9)
            losses = []
            for images, labels in batches(40):
                optimizer.zero_grad()
                loss = loss_func(model(images), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert math.isfinite(losses[-1]) and sum(losses[-5:]) < 0.8 * sum(losses[:5])

    def test_the_state_holds_the_vectors_that_moved(self):
        torch.manual_seed(8)
        trained, again = self.make(), self.make()
        start = again.loss.vectors.table.clone()
        trained(torch.randn(6, WIDTH, requires_grad=True), torch.arange(6)).backward()
        again.load_state_dict(trained.state_dict())
        assert torch.equal(again.loss.vectors.table, trained.loss.vectors.table)
        assert not torch.equal(again.loss.vectors.table, start)
        with pytest.raises(ValueError, match="take the recipe it was trained with"):
            self.make(recipe="paper").load_state_dict(trained.state_dict())

    def test_arguments_as_its_users_write_them(self):
        codes, vectors = tables()
        loss_func = metric_learning.GIFLoss(num_classes=M, embedding_size=WIDTH, codes=codes, vectors=vectors)
        assert loss_func.num_classes == M
        with pytest.raises(ValueError, match="num_classes is 30 and the codes are for 27"):
            metric_learning.GIFLoss(num_classes=30, embedding_size=WIDTH, codes=codes, vectors=vectors)

    def test_logits_are_scaled_cosines_to_code_vectors(self):
        loss_func = self.make()
        table = loss_func.loss.vectors.table
        table[3] *= 5  # steps make rows longer
        logits = loss_func.get_logits(2 * table)
        assert torch.equal(logits.argmax(1), torch.arange(M))
        wanted = loss_func.loss.recipe.contrast_scale * nn.functional.cosine_similarity(table[1], table[3], dim=0)
        torch.testing.assert_close(logits[1, 3], wanted)
        with pytest.raises(ValueError, match="there are none; give vectors"):
            bare: dict[str, Any] = {
                "vectors": None,
                "embedding_size": WIDTH,
                "regression_weight": 0,
                "contrast_weight": 0,
            }
            metric_learning.GIFLoss(tables()[0], **bare).get_logits(table)
