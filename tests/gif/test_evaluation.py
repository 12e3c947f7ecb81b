"""Judging embeddings: each measure against its definition, written out plainly."""

import io
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_curve

from gif.evaluation import curves, judge, open_set, plot_roc, rank1, roc, tar_at_far, verify_pairs
from gif.evaluation.open_set import _Scores

EXACT: Any = {"rtol": 0, "atol": 1e-12}  # ratios of the same counts
FARS = (0.0, 1e-4, 1e-3, 0.013, 0.1, 0.375, 0.5, 1.0)


def people(sizes, width=16, noise=1.0, seed=0, dtype=torch.float64):
    """Shuffled embeddings around one centre an identity, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = torch.randn(len(sizes), width, generator=generator, dtype=dtype)
    return centers[labels] + noise * torch.randn(len(labels), width, generator=generator, dtype=dtype), labels


def signs(sizes, width=16, seed=0):
    """Corners of a cube: their cosines are exact multiples of 1/8 in any order of summation, so ties abound."""
    embeddings, labels = people(sizes, width, seed=seed)
    return embeddings.sign(), labels


def every_pair(embeddings, labels):
    """Cosine and sameness of each pair i < j."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    i, j = torch.triu_indices(len(labels), len(labels), 1)
    return (unit @ unit.T)[i, j].numpy(), (labels[i] == labels[j]).numpy()


class TestVerifyPairs:
    def test_by_hand(self):
        east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
        pairs = [east, [5.0, 0.0], east, west, [3.0, 0.0], north, north, north]  # squared distances 0, 4, 2, 0
        result = verify_pairs(np.array(pairs), [True, False, True, False], folds=2)
        # Fold 0 is judged at 0, the first of two equally good thresholds: half right. Fold 1 at 0.01: all wrong.
        assert result.thresholds.tolist() == [0.0, 0.01]
        assert (result.accuracy, result.std) == (0.25, 0.25)

    @pytest.mark.parametrize(("n", "folds"), [(60, 10), (53, 10), (7, 7), (11, 2)])
    def test_plain_loops(self, n, folds):
        rng = np.random.default_rng(n)
        embeddings = rng.normal(size=(2 * n, 5))
        issame = rng.random(n) < 0.5
        embeddings[1::2][issame] += 1.5 * embeddings[::2][issame]
        distances = []
        for i in range(n):
            a, b = (x / math.sqrt(sum(x * x)) for x in embeddings[2 * i : 2 * i + 2])
            distances.append(sum((a - b) ** 2))
        sizes = [n // folds + (fold < n % folds) for fold in range(folds)]
        accuracies, thresholds = [], []
        for fold in range(folds):
            held_out = range(sum(sizes[:fold]), sum(sizes[: fold + 1]))
            best, best_right = None, -1
            for threshold in np.arange(0, 4, 0.01):
                right = sum((distances[i] < threshold) == issame[i] for i in range(n) if i not in held_out)
                if right > best_right:
                    best, best_right = threshold, right
            thresholds.append(best)
            accuracies.append(sum((distances[i] < best) == issame[i] for i in held_out) / len(held_out))
        mean = sum(accuracies) / folds
        std = math.sqrt(sum((x - mean) ** 2 for x in accuracies) / folds)
        result = verify_pairs(embeddings, issame, folds)
        np.testing.assert_allclose([result.accuracy, result.std], [mean, std], rtol=0, atol=1e-9)
        np.testing.assert_allclose(result.thresholds, thresholds, rtol=0, atol=1e-9)
        assert 0.5 < mean < 1  # neither chance nor saturated: the comparison means something

    def test_inputs_it_takes(self):
        embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
        issame = torch.arange(20) % 3 == 0
        expected = verify_pairs(embeddings.detach().double().numpy(), issame.tolist())
        assert verify_pairs(embeddings, issame).accuracy == expected.accuracy
        rows = embeddings.detach().double().numpy()
        before = rows.copy()
        rows[:2] = 0  # no direction: the distance is 0, as in the field's code
        assert math.isfinite(verify_pairs(rows, issame).accuracy)
        assert np.array_equal(rows[2:], before[2:])

    @pytest.mark.parametrize("kind", [np.bool_, np.int8, np.uint8, np.int64, np.float32])
    def test_truth_values(self, kind):
        embeddings = np.random.default_rng(1).normal(size=(40, 5))
        same = np.arange(20) % 2 == 0
        assert verify_pairs(embeddings, same.astype(kind)).accuracy == verify_pairs(embeddings, same).accuracy
        for bad in (np.where(same, 1, -1), np.where(same, 2, 0), np.where(same, 1.0, np.nan), np.where(same, "1", "0")):
            with pytest.raises(ValueError, match="issame must be bool, or 1 for genuine and 0 for impostor pairs, got"):
                verify_pairs(embeddings, bad)
            with pytest.raises(ValueError, match="labels must be bool, or 1 for genuine and 0 for impostor pairs, got"):
                tar_at_far(np.arange(20.0), bad, [0.1])
        assert verify_pairs(embeddings, torch.tensor(same).int()).one_kind == 0

    def test_folds_of_one_kind_are_told(self):
        rng = np.random.default_rng(3)
        embeddings = rng.normal(size=(200, 5))
        embeddings[1:100:2] += embeddings[:100:2]  # the genuine pairs come first
        with pytest.warns(UserWarning, match="10 of 10 folds hold genuine pairs alone, or impostor pairs alone"):
            sorted_by_kind = verify_pairs(embeddings, np.arange(100) < 50)
        assert sorted_by_kind.one_kind == sorted_by_kind.to_dict()["folds_of_one_kind"] == 10
        mixed = np.arange(100).reshape(2, 50).T.flatten()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = verify_pairs(embeddings.reshape(100, 2, 5)[mixed].reshape(200, 5), mixed < 50)
        assert result.one_kind == 0 and set(result.to_dict()) == {"accuracy", "std"}

    def test_bad_input(self):
        good = np.ones((20, 3))
        with pytest.raises(
            ValueError, match=r"wanted embeddings \(2n, d\) and issame \(n,\), got \(20, 3\) and \(9,\)"
        ):
            verify_pairs(good, np.ones(9))
        with pytest.raises(ValueError, match=r"folds must lie in \[2, 10\]"):
            verify_pairs(good, np.ones(10), folds=11)
        good[3, 1] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            verify_pairs(good, np.ones(10))


class TestRoc:
    SCORES = np.array([0.85, 0.9, 0.3, 0.5, 0.2, 0.8, 0.1])
    LABELS = np.array([0, 1, 1, 0, 0, 1, 0])

    def test_every_distinct_score_is_a_point(self):
        rng = np.random.default_rng(0)
        scores, labels = rng.integers(0, 12, 80) / 8, rng.random(80) < 0.3
        curve = roc(scores, labels)
        assert curve.thresholds.tolist() == [np.inf, *sorted(set(scores), reverse=True)]
        for fpr, tpr, threshold in zip(curve.fpr, curve.tpr, curve.thresholds, strict=True):
            np.testing.assert_allclose(fpr, (scores[~labels] >= threshold).mean(), **EXACT)
            np.testing.assert_allclose(tpr, (scores[labels] >= threshold).mean(), **EXACT)

    @pytest.mark.filterwarnings("ignore:TAR at FAR")
    def test_tar_by_hand(self):
        expected = {
            0.0: 1 / 3,
            1e-9: 1 / 3,
            0.25: 2 / 3,  # two thresholds have this FPR: the larger TPR
            0.375: 1.0,  # as near to FPR 0.25 (TPR 2/3) as to 0.5 (TPR 1)
            0.37: 2 / 3,
            1.0: 1.0,
        }
        assert tar_at_far(self.SCORES, self.LABELS, list(expected)) == pytest.approx(expected, abs=1e-12)
        assert tar_at_far(torch.tensor(self.SCORES), torch.tensor(self.LABELS), [0.25])[0.25] == pytest.approx(2 / 3)

    def test_insightfaces_point(self):
        """Four impostors in a row are one line from FPR 0 to 0.8: its end is nearest to 0.5, where TPR is 1."""
        scores, truth = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [1, 0, 0, 0, 0, 1, 0]
        assert tar_at_far(scores, truth, [0.5]) == {0.5: 1.0}
        assert roc(scores, truth).fpr.tolist() == [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 1]  # every point is drawn

    @pytest.mark.filterwarnings("ignore:TAR at FAR")
    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("seed", range(40))
    def test_is_what_scikit_learns_default_and_the_nearest_point_give(self, seed, ties):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(3, 60))
        truth = rng.random(count) < rng.choice([0.1, 0.5, 0.9])
        truth[:2] = True, False
        scores = rng.normal(size=count) + truth
        scores = scores.round(1) if ties else scores
        fpr, tpr, _ = roc_curve(truth, scores)
        found = tar_at_far(scores, truth, FARS)
        for far in FARS:  # from the last point to the first, the first that is nearest
            nearest = min(range(len(fpr))[::-1], key=lambda i: abs(fpr[i] - far))
            assert found[far] == tpr[nearest]

    def test_what_the_impostors_do_not_resolve_is_told(self):
        rng = np.random.default_rng(0)
        scores, truth = rng.normal(size=120), np.arange(120) < 20
        with pytest.warns(UserWarning, match=r"FAR 0\.001, 0\.009 is not known: 100 impostor pairs resolve 1\.0e-02"):
            tar_at_far(scores, truth, [0.001, 0.009, 0.01])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tar_at_far(scores, truth, [0.0, 0.01, 0.1])

    def test_bad_input(self):
        with pytest.raises(ValueError, match="no genuine pair"):
            roc(self.SCORES, np.zeros(7))
        with pytest.raises(ValueError, match="no impostor pair"):
            roc(self.SCORES, np.ones(7))
        with pytest.raises(ValueError, match=r"wanted scores \(n,\) and labels \(n,\), got \(7,\) and \(6,\)"):
            roc(self.SCORES, self.LABELS[:6])
        with pytest.raises(ValueError, match="NaN"):
            roc(np.where(self.SCORES == 0.5, np.nan, self.SCORES), self.LABELS)
        with pytest.raises(ValueError, match=r"fars must lie in \[0, 1\]"):
            tar_at_far(self.SCORES, self.LABELS, [10])


class TestRank1:
    def test_definition(self):
        embeddings, labels = people([1, 2, 5, 1, 3, 1, 4] * 5, width=6)
        unit = embeddings / embeddings.norm(dim=1, keepdim=True)
        hits = []
        for i in range(len(labels)):
            others = [j for j in range(len(labels)) if j != i]
            if any(labels[j] == labels[i] for j in others):
                nearest = max(others, key=lambda j: float(unit[i] @ unit[j]))
                hits.append(bool(labels[nearest] == labels[i]))
        assert len(hits) == 70
        assert 0.1 < np.mean(hits) < 0.9
        assert rank1(embeddings, labels) == pytest.approx(np.mean(hits), abs=1e-12)

    def test_single_images_distract_but_are_not_probes(self):
        embeddings = np.array([[1.0, 0.0], [1.0, 0.3], [0.0, 1.0], [0.1, 1.0]])
        assert rank1(embeddings, np.array([7, 7, 8, 9])) == 1.0
        assert rank1(embeddings, np.array([7, 8, 9, 7])) == 0.0

    def test_bad_input(self):
        embeddings, labels = people([2, 2])
        with pytest.raises(ValueError, match="no identity has two images"):
            rank1(embeddings, torch.arange(4))
        with pytest.raises(ValueError, match=r"wanted embeddings \(n, d\) and labels \(n,\), got \(4, 16\) and \(3,\)"):
            rank1(embeddings, labels[:3])
        for bad in (labels.float(), labels > 0):
            with pytest.raises(TypeError, match="labels must be integers"):
                rank1(embeddings, bad)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint64])
    def test_every_integer_dtype(self, dtype):
        embeddings, labels = people([1, 2, 5, 1, 3] * 3, width=6)
        assert rank1(embeddings, labels.numpy().astype(dtype)) == rank1(embeddings, labels)
        assert judge(embeddings, labels.numpy().astype(dtype)).to_dict() == judge(embeddings, labels).to_dict()


class TestJudge:
    @pytest.fixture(params=["one tile", "many tiles"])
    def tiles(self, request, monkeypatch):
        if request.param == "many tiles":
            monkeypatch.setattr(open_set, "ROWS", 7)
            monkeypatch.setattr(open_set, "COLUMNS", 13)
            monkeypatch.setattr(open_set, "PENDING", 50)

    @pytest.mark.filterwarnings("ignore:TAR at FAR")
    @pytest.mark.parametrize("make", [people, signs])
    @pytest.mark.parametrize("sizes", [[2, 1], [1, 1, 2, 1], [3] * 29 + [31], list(range(1, 13)), [1, 60, 1]])
    def test_equals_the_list_of_all_pairs(self, tiles, make, sizes):
        embeddings, labels = make(sizes)
        scores, same = every_pair(embeddings, labels)
        expected = tar_at_far(scores, same, FARS)
        for fars in (FARS, (1e-3,), (0.1,), (0.5,)):  # what is kept depends on the largest
            judgement = judge(embeddings, labels, fars=fars)
            assert judgement.tar == pytest.approx({far: expected[far] for far in fars}, abs=1e-12)
            assert (judgement.genuine, judgement.impostor) == (same.sum(), (~same).sum())
            assert judgement.rank1 == rank1(embeddings, labels)

    @pytest.mark.filterwarnings("ignore:TAR at FAR")
    @pytest.mark.parametrize("seed", range(20))
    def test_long_runs_of_impostors(self, tiles, seed):
        """Few genuine pairs: the curve goes straight on far beyond the rate that is asked for."""
        embeddings, labels = people([2] * 3 + [1] * 60, width=4, noise=2.0, seed=seed)
        scores, same = every_pair(embeddings, labels)
        for far in (0.001, 0.02, 0.3, 0.6):
            assert judge(embeddings, labels, fars=(far,)).tar == tar_at_far(scores, same, (far,))

    def test_what_the_impostors_do_not_resolve_is_marked(self):
        judgement = judge(*people([4] * 12))  # 1,056 impostor pairs
        assert judgement.to_dict()["tar"]["0.0001"] is None and judgement.to_dict()["tar"]["0.001"] is not None
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(judgement.table())
        text = console.export_text()
        assert f"{judgement.tar[1e-4]:.4f} ?" in text and f"{judgement.tar[1e-3]:.4f} ?" not in text
        assert "TAR at FAR 0.0001 is not known: 1,056 impostor pairs" in " ".join(text.split())

    def test_identical_embeddings(self, tiles):
        judgement = judge(torch.ones(60, 4), torch.arange(60) // 3)
        assert judgement.tar == {1e-3: 0.0, 1e-4: 0.0}
        assert judgement.pair_accuracy == 0.5

    @pytest.mark.parametrize("make", [people, signs])
    def test_roc_points_lie_on_the_curve(self, make):
        embeddings, labels = make([6] * 40)
        scores, same = every_pair(embeddings, labels)
        curve = judge(embeddings, labels, fars=(1e-3,)).roc
        assert len(curve.fpr) <= 2000
        assert (curve.fpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 1, 1)
        assert (np.diff(curve.fpr) > 0).all()
        assert (np.diff(curve.tpr) >= 0).all()
        for fpr, tpr, threshold in zip(curve.fpr, curve.tpr, curve.thresholds, strict=True):
            np.testing.assert_allclose(fpr, (scores[~same] >= threshold).mean(), **EXACT)
            np.testing.assert_allclose(tpr, (scores[same] >= threshold).mean(), **EXACT)
        if make is people:  # few ties: the points are dense
            assert np.diff(np.log(curve.fpr[curve.fpr > 1e-3])).max() < 0.05

    def test_memory_is_bounded_whatever_the_ties(self, monkeypatch):
        monkeypatch.setattr(open_set, "PENDING", 1000)
        kept = _Scores(200, 20, np.dtype(np.float32))
        scores = torch.rand(200, 500, generator=torch.Generator().manual_seed(0)).mul(1000).round() / 1000
        for chunk in scores:
            kept.add(chunk[:1], chunk)
            assert kept.pending_added <= 1000
            assert len(kept.values) <= 21
        assert kept.exact_roc(scores.numel()).fpr[-1] >= 20 / scores.numel()
        assert kept.histogram.sum() == scores.numel()

    def test_scores_that_begin_with_one_great_tie(self, monkeypatch):
        monkeypatch.setattr(open_set, "PENDING", 10)
        kept = _Scores(4, 20, np.dtype(np.float32))
        impostor = torch.tensor([0.5] * 40 + [0.25] * 30 + [-0.5] * 30)
        genuine = torch.tensor([0.75, 0.3, 0.2, 0.0])
        for i in range(0, 100, 10):
            kept.add(genuine if i == 0 else genuine[:0], impostor[i : i + 10])
        curve = kept.exact_roc(100)
        assert curve.fpr.tolist() == [0, 0.4]
        assert curve.tpr.tolist() == [0.25, 0.5]

    def test_pair_sample(self, monkeypatch):
        embeddings, labels = people([5] * 40, dtype=torch.float32)
        calls = []

        def recorded(rows, issame):
            nearest = (rows @ (embeddings / embeddings.norm(dim=1, keepdim=True)).T).argmax(1)
            calls.append((nearest.reshape(-1, 2), issame))
            return verify_pairs(rows, issame)

        monkeypatch.setattr(open_set, "verify_pairs", recorded)
        results = [judge(embeddings, labels, pairs=300, seed=seed) for seed in (0, 0, 1)]
        (sample, issame), (again, _), (other, _) = calls
        assert len(issame) == 300
        assert (issame.reshape(10, 30).sum(1) == 15).all()
        assert np.array_equal((labels[sample[:, 0]] == labels[sample[:, 1]]).numpy(), issame)
        assert len({frozenset(pair) for pair in sample.tolist()}) == 300
        assert torch.equal(sample, again)
        assert not torch.equal(sample, other)
        assert results[0].pair_accuracy == results[1].pair_accuracy
        assert results[0].pair_std == results[1].pair_std

    def test_every_pair_can_be_drawn(self):
        partners, first = (
            np.array([3, 2, 1, 0, 2, 1, 0, 1, 0, 0, 1, 0]),
            np.arange(1, 13),
        )  # identities of 4, 3, 2, 1, 2
        drawn = [open_set._draw(np.random.default_rng(seed), 1, partners, first).reshape(-1, 2) for seed in range(20)]
        assert all(len(np.unique(pairs, axis=0)) == 10 for pairs in drawn)
        identity = np.array([0] * 4 + [1] * 3 + [2] * 2 + [3] + [4] * 2)
        everything = {(i, j) for j in range(12) for i in range(j) if identity[i] == identity[j]}
        assert {tuple(pair) for pairs in drawn for pair in pairs.tolist()} == everything

    def test_few_pairs_have_no_folds(self):
        embeddings, labels = people([2] * 9)
        judgement = judge(embeddings, labels)
        assert math.isnan(judgement.pair_accuracy)
        assert math.isnan(judgement.pair_std)
        assert json.loads(json.dumps(judgement.to_dict(), allow_nan=False))["pair_accuracy"] is None
        assert not math.isnan(judge(*people([2] * 10)).pair_accuracy)

    def test_inputs_it_takes(self):
        embeddings, labels = people([4] * 50, dtype=torch.float32)

        def numbers(*arguments):
            """In five digits: a threshold in float32 is another number than in float64."""
            text = json.dumps(judge(*arguments).to_dict())
            return json.loads(text, parse_float=lambda number: round(float(number), 5))

        expected = numbers(embeddings.double(), labels)
        assert numbers(embeddings.numpy(), labels.int().numpy()) == expected
        assert numbers(embeddings.requires_grad_(), labels - 1) == expected
        with torch.autocast("cpu", torch.bfloat16):
            assert numbers(embeddings, labels) == expected
        half = embeddings.detach().half()
        assert judge(half, labels).to_dict() == judge(half.float(), labels).to_dict()

    def test_bad_input(self):
        embeddings, labels = people([3, 3])
        with pytest.raises(ValueError, match="no genuine pair"):
            judge(embeddings, torch.arange(6))
        with pytest.raises(ValueError, match="no impostor pair"):
            judge(embeddings, torch.zeros(6, dtype=torch.int64))
        with pytest.raises(ValueError, match="no genuine pair"):
            judge(embeddings[:0], labels[:0])
        with pytest.raises(ValueError, match=r"wanted embeddings \(n, d\) and labels \(n,\)"):
            judge(embeddings[0], labels)
        with pytest.raises(ValueError, match=r"fars must lie in \[0, 1\]"):
            judge(embeddings, labels, fars=(1.5,))
        with pytest.raises(ValueError, match="pairs must be at least 20"):
            judge(embeddings, labels, pairs=10)
        for bad in (math.nan, math.inf):
            broken = embeddings.clone()
            broken[2, 3] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                judge(broken, labels)


class TestPlotRoc:
    def test_draws_each_curve_with_its_tar(self, tmp_path, monkeypatch):
        embeddings, labels = people([5] * 30)
        judgement = judge(embeddings, labels)
        explicit = roc(*every_pair(embeddings, labels))
        drawn = []
        monkeypatch.setattr(curves, "save_figure", lambda drawing, path: drawn.append(drawing))
        plot_roc({"judged": judgement, "listed": explicit}, tmp_path / "roc.png")
        texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
        assert texts == [f"{judgement.tar[1e-4]:.3f}  judged", f"{judgement.tar[1e-4]:.3f}  listed"]
        assert len({line.get_color() for line in drawn[0].axes[0].lines}) == 2

    def test_file(self, tmp_path):
        judgement = judge(*people([5] * 30))
        plot_roc({str(i): judgement for i in range(9)}, tmp_path / "new" / "roc.png")  # more curves than colours
        assert (tmp_path / "new" / "roc.png").read_bytes().startswith(b"\x89PNG")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["roc.png"]
        with pytest.raises(ValueError, match="no curve to draw"):
            plot_roc({}, tmp_path / "none.png")
