"""Templates, identification and IJB's files: each against its protocol, written out plainly."""

import io
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from gif.errors import InputError
from gif.evaluation import (
    Identification,
    Ijb,
    IjbFaces,
    IjbResult,
    PairAccuracy,
    TemplateSums,
    align_face,
    embed_images,
    evaluate_ijb,
    identification_table,
    identify,
    pairs_table,
    plot_det,
    plot_identification,
    roc,
    tar_at_far,
    template_features,
    verification_table,
    verify_templates,
)
from gif.evaluation import embedding as embedding_module
from gif.evaluation import identification as identification_module
from gif.evaluation import ijb as ijb_module
from gif.evaluation import templates as templates_module
from gif.evaluation.alignment import FIVE_POINTS
from gif.progress import console

EXACT: Any = {"rtol": 0, "atol": 1e-12}  # float64 against float64


def protocol(features, template_ids, media_ids, faceness):
    """IJB's templates, in loops: the mean within each medium, the sum over media, normalised."""
    features = features * faceness[:, None]
    rows = []
    for template in sorted(set(template_ids)):
        media = sorted({m for t, m in zip(template_ids, media_ids, strict=True) if t == template})
        total = sum(features[(template_ids == template) & (media_ids == medium)].mean(0) for medium in media)
        rows.append(total / np.sqrt((total**2).sum()))
    return sorted(set(template_ids)), np.array(rows)


class TestTemplateFeatures:
    def test_by_hand(self):
        features = np.array([[4.0, 0.0], [0.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
        # Template 7: medium 1 has the mean (2, 1), medium 5 is (0, 3); their sum (2, 4). Template 3 shares medium 5.
        found = template_features(features, [7, 7, 7, 3], [1, 1, 5, 5])
        assert found.ids.tolist() == [3, 7]
        np.testing.assert_allclose(found.features, [[0.5**0.5] * 2, [0.2**0.5, 2 * 0.2**0.5]], **EXACT)
        weighted = template_features(features, [7, 7, 7, 3], [1, 1, 5, 5], faceness=[0.5, 1.0, 0.0, 0.1])
        np.testing.assert_allclose(weighted.features, [[0.5**0.5] * 2, [0.5**0.5] * 2], **EXACT)

    @pytest.mark.parametrize("block", [1 << 14, 7])
    def test_protocol(self, block, monkeypatch):
        monkeypatch.setattr(templates_module, "_IMAGES_A_BLOCK", block)
        rng = np.random.default_rng(0)
        features = rng.normal(size=(300, 9)) * rng.lognormal(size=(300, 1))
        template_ids, media_ids = rng.integers(0, 40, 300) * 3 - 5, rng.integers(0, 6, 300)
        faceness = rng.random(300)
        ids, expected = protocol(features, template_ids, media_ids, faceness)
        found = template_features(features, template_ids, media_ids, faceness)
        assert found.ids.tolist() == ids
        np.testing.assert_allclose(found.features, expected, **EXACT)
        low = template_features(torch.tensor(features).float(), torch.tensor(template_ids), media_ids, faceness)
        assert low.features.dtype == torch.float32
        np.testing.assert_allclose(low.features, expected, rtol=0, atol=1e-6)  # float32's rounding
        np.testing.assert_array_equal(found.rows(ids[::-1]), range(len(ids))[::-1])

    def test_images_come_in_any_order_but_once(self):
        rng = torch.Generator().manual_seed(0)
        features = torch.randn(20, 4, generator=rng, dtype=torch.float64)
        templates, media = torch.arange(20) % 3, torch.arange(20) % 2
        expected = template_features(features, templates, media)
        sums = TemplateSums(templates, media)
        for rows in torch.randperm(20, generator=rng).split(6)[:-1]:
            sums.add(rows, features[rows])
        with pytest.raises(ValueError, match=r"was added 0 times"):
            sums.templates()
        missing = (sums._times == 0).nonzero().flatten()
        sums.add(missing, features[missing])
        np.testing.assert_allclose(sums.templates(torch.float64).features, expected.features, **EXACT)
        sums.add(torch.tensor([4]), features[4:5])
        with pytest.raises(ValueError, match=r"image 4 was added 2 times"):
            sums.templates()

    def test_bad_input(self):
        good = np.ones((3, 2))
        with pytest.raises(ValueError, match=r"got \(3,\), \(2,\), \(3,\)"):
            template_features(good, [0, 0, 1], [0, 0])
        with pytest.raises(ValueError, match=r"wanted features \(3, d\)"):
            template_features(good[:2], [0, 0, 1], [0, 0, 0])
        with pytest.raises(ValueError, match="faceness holds NaN"):
            template_features(good, [0, 0, 1], [0, 0, 0], [1, 1, math.nan])
        with pytest.raises(ValueError, match="features hold NaN"):
            template_features(good * math.inf, [0, 0, 1], [0, 0, 0])
        with pytest.raises(ValueError, match=r"template 5 has no image \(1 of 2 have none\)"):
            template_features(good, [0, 0, 1], [0, 0, 0]).of([1, 5])


class TestVerifyTemplates:
    @pytest.mark.parametrize("block", [1 << 12, 11])
    def test_is_the_roc_of_the_cosines(self, block, monkeypatch):
        monkeypatch.setattr(templates_module, "_PAIRS_A_BLOCK", block)
        rng = np.random.default_rng(1)
        people = rng.normal(size=(12, 6))
        features = people.repeat(4, 0) + 0.8 * rng.normal(size=(48, 6))
        templates = template_features(features, np.arange(48) + 100, np.zeros(48, int))
        first, second = (part + 100 for part in np.triu_indices(48, 1))
        same = (first - 100) // 4 == (second - 100) // 4
        blocks = [(first[i : i + 100], second[i : i + 100], same[i : i + 100]) for i in range(0, len(same), 100)]
        fars = (1e-3, 1e-2, 0.1)
        result = verify_templates(templates, blocks, fars=fars)

        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        scores = (unit[first - 100] * unit[second - 100]).sum(1)
        assert result.tar == pytest.approx(tar_at_far(scores, same, fars), abs=1e-12)
        assert (result.genuine, result.impostor) == (same.sum(), (~same).sum())
        whole = roc(scores, same)
        for fpr, tpr in zip(result.roc.fpr, result.roc.tpr, strict=True):
            assert tpr == pytest.approx(whole.tpr[whole.fpr <= fpr + 1e-12].max(), abs=1e-12)
        assert len(result.roc.fpr) > 50
        assert json.loads(json.dumps(result.to_dict()))["tar"]["0.01"] == result.tar[1e-2]

    def test_no_pairs(self):
        templates = template_features(np.ones((1, 2)), [0], [0])
        with pytest.raises(ValueError, match="no genuine pair"):
            verify_templates(templates, [])


class TestIdentify:
    def test_by_hand(self):
        angles = {"a": 0.0, "b": 40.0, "c": 80.0}
        unit = lambda *degrees: np.array([[math.cos(math.radians(x)), math.sin(math.radians(x))] for x in degrees])  # noqa: E731
        gallery, subjects = unit(*angles.values()), [10, 20, 30]
        # Mated: a at 10 (right, cos 10), b at 65 (c is nearer: rank 2), c at 78 (right, cos 2).
        # Unmated: at 95 (best cos 15), at 140 (best cos 60). Thresholds: the first for FPIR 0.01, the second for 1.
        probes, whose = unit(10, 65, 95, 78, 140), [10, 20, 7, 30, 8]
        found = identify(probes, whose, gallery, subjects, ranks=(1, 2), fpirs=(0.01, 1))
        assert found.ranks == pytest.approx({1: 2 / 3, 2: 1.0})
        assert found.tpir == pytest.approx({0.01: 2 / 3, 1: 2 / 3})
        assert (found.mated, found.unmated) == (3, 2)
        stricter = identify(unit(10, 65, 85, 78), [10, 20, 7, 30], gallery, subjects, fpirs=(0.01,))
        assert stricter.tpir == pytest.approx({0.01: 1 / 3})  # threshold cos 5: a at cos 10 is lost
        assert identify(np.ones((1, 2)), [10], np.eye(2), [10, 20]).ranks[1] == 0  # a tie is no hit

    @pytest.mark.parametrize("block", [1024, 13])
    @pytest.mark.parametrize("ties", [False, True])
    def test_protocol(self, block, ties, monkeypatch):
        monkeypatch.setattr(identification_module, "_PROBES_A_BLOCK", block)
        rng = np.random.default_rng(2)
        people = rng.normal(size=(60, 16))
        subjects = rng.permutation(60)[:40] * 7  # some people are in no gallery
        gallery = people[subjects // 7] + 0.9 * rng.normal(size=(40, 16))
        probe_subjects = rng.integers(0, 60, 400) * 7
        probes = people[probe_subjects // 7] + 0.9 * rng.normal(size=(400, 16))
        if ties:  # corners of a cube: cosines are multiples of 1/8, exactly
            gallery, probes = np.sign(gallery), np.sign(probes)
        unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
        scores = unit(probes) @ unit(gallery).T

        own: Any = []
        beaten_by: Any = []
        unmated: Any = []
        for row, subject in zip(scores, probe_subjects, strict=True):
            if subject in subjects:
                (place,) = np.flatnonzero(subjects == subject)
                others = np.delete(row, place)
                own.append(row[place])
                beaten_by.append((others >= row[place]).sum())
            else:
                unmated.append(row.max())
        own, beaten_by, unmated = np.array(own), np.array(beaten_by), np.sort(unmated)[::-1]
        ranks, fpirs = (1, 2, 5, 40), (0.001, 0.01, 0.1, 0.5, 1.0)
        found = identify(probes, probe_subjects, gallery, subjects, ranks=ranks, fpirs=fpirs)
        assert found.ranks == pytest.approx({k: (beaten_by < k).mean() for k in ranks}, abs=1e-12)
        assert 0.1 < found.ranks[1] < 0.95
        for fpir in fpirs:
            threshold = unmated[max(int(len(unmated) * fpir) - 1, 0)]
            expected = ((beaten_by == 0) & (own > threshold)).mean()
            assert found.tpir[fpir] == pytest.approx(expected, abs=1e-9)
        for fpir, tpir, threshold in zip(found.curve.fpr, found.curve.tpr, found.curve.thresholds, strict=True):
            threshold += 1e-9  # it is one of the scores, computed in another order
            assert fpir == pytest.approx((unmated > threshold).mean(), abs=1e-12)
            assert tpir == pytest.approx(((beaten_by == 0) & (own > threshold)).mean(), abs=1e-12)

    def test_everyone_is_in_the_gallery(self):
        found = identify(np.eye(3), [1, 2, 3], np.eye(3), [1, 2, 3])
        assert found.ranks == {1: 1.0, 5: 1.0, 10: 1.0}
        assert found.curve is None
        assert found.to_dict()["tpir"] == {"0.01": None, "0.1": None}

    def test_bad_input(self):
        with pytest.raises(ValueError, match="subject 5 is in the gallery twice"):
            identify(np.eye(2), [5, 6], np.eye(3, 2), [6, 5, 5])
        with pytest.raises(ValueError, match="no probe's subject is in the gallery"):
            identify(np.eye(2), [1, 2], np.eye(2), [3, 4])
        with pytest.raises(ValueError, match=r"fars must lie in \[0, 1\]"):
            identify(np.eye(2), [1, 2], np.eye(2), [1, 2], fpirs=(1.5,))


class TestAlignment:
    def ramps(self, height, width):
        """An image that says where each of its pixels is: x in the first channel, y in the second, 255 in the third."""
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([x, y, torch.full_like(x, 255)]).to(torch.uint8)

    def test_landmarks_in_place_leave_the_image(self):
        image = torch.randint(0, 256, (3, 112, 112), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        assert torch.equal(align_face(image, FIVE_POINTS), image)

    def test_least_squares_similarity(self):
        rng = np.random.default_rng(3)
        angle, scale, shift = 0.3, 1.4, (90.0, 20.0)
        rotation = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        landmarks = FIVE_POINTS.numpy() @ rotation.T + shift + rng.normal(size=(5, 2))
        # The same similarity from the linear equations u = a x - b y + c, v = b x + a y + d.
        x, y, one, zero = landmarks[:, 0], landmarks[:, 1], np.ones(5), np.zeros(5)
        equations = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
        a, b, c, d = np.linalg.lstsq(equations, FIVE_POINTS.numpy().T.ravel(), rcond=None)[0]
        inverse = np.linalg.inv([[a, -b], [b, a]])
        v, u = np.mgrid[:112, :112]
        place = np.einsum("ij,jhw->ihw", inverse, np.stack([u - c, v - d]))
        crop = align_face(self.ramps(250, 250), torch.tensor(landmarks)).numpy()
        inside = ((place > 0) & (place < 249)).all(0)
        assert 0.9 < inside.mean() <= 1
        for channel in (0, 1):
            error = np.abs(crop[channel] - place[channel])[inside]
            assert error.max() <= 0.5 + 1e-6  # rounded to the nearest grey level
        outside = ((place < -1) | (place > 250)).any(0)
        assert (crop[:, outside] == 0).all()

    def test_the_border_fades_into_black(self):
        image = torch.full((1, 112, 112), 200, dtype=torch.uint8)
        crop = align_face(image, FIVE_POINTS + torch.tensor([0.25, 0.0]))  # the last column lies a quarter outside
        assert crop[0, 50, -2] == 200
        assert crop[0, 50, -1] == 150

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"wanted an image \(c, h, w\) uint8"):
            align_face(torch.zeros(3, 9, 9), FIVE_POINTS)
        with pytest.raises(ValueError, match="coincide"):
            align_face(torch.zeros(3, 9, 9, dtype=torch.uint8), torch.ones(5, 2))


class Grey(torch.nn.Module):
    """Mean colours of 14 x 14 patches, and not the same for a mirrored image."""

    def forward(self, images):
        return torch.nn.functional.avg_pool2d(images, 8).flatten(1) * torch.linspace(0.5, 1.5, 588)


@pytest.fixture(scope="module")
def ijb_folder(tmp_path_factory, write_benchmark):
    return write_benchmark(tmp_path_factory.mktemp("ijb"), "ijbc", ("G1", "G2"))


class TestIjb:
    def test_blank_lines_and_byte_order_marks(self, tmp_path, write_benchmark, monkeypatch):
        """pandas, which the field reads these files with, takes either."""
        expected = Ijb.read(write_benchmark(tmp_path / "a", "ijbc", ("G1", "G2")), "ijbc")
        meta = write_benchmark(tmp_path / "b", "ijbc", ("G1", "G2")) / "meta"
        for path in meta.iterdir():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\r\n \n"[: 3 if path.suffix == ".csv" else 5])
        monkeypatch.setattr(ijb_module, "_PAIRS_A_BLOCK", 22)  # the blank lines are a block
        found = Ijb.read(tmp_path / "b", "ijbc")
        found.check()
        assert found.files == expected.files and torch.equal(found.landmarks, expected.landmarks)
        for mine, theirs in ((found.pairs(), expected.pairs()), ([found.probes()], [expected.probes()])):
            for a, b in zip(mine, theirs, strict=True):
                assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True))

    def test_broken_images(self, tmp_path, write_benchmark):
        """Left out, named, counted: templates are what their other images make them, here by files that lack them."""
        folder = write_benchmark(tmp_path / "broken", "ijbc", ("G1", "G2"))
        crops = folder / "loose_crop"
        (crops / "1.jpg").write_bytes(b"?")
        (crops / "8.jpg").write_bytes((crops / "8.jpg").read_bytes()[:200])
        for number in (16, 17, 18):  # all of template 6
            (crops / f"{number}.jpg").write_bytes(b"")
        with console.capture() as capture:
            result = evaluate_ijb(Grey(), Ijb.read(folder, "ijbc"), batch_size=5)
        assert result.broken == tuple(f"{number}.jpg" for number in (1, 8, 16, 17, 18)) and result.lost == (6,)
        assert "images that are broken and were left out: 5 (1.jpg, 8.jpg, 16.jpg, ...)" in capture.get()
        assert "templates without an image, like nobody: 1 (6)" in capture.get()
        other = write_benchmark(tmp_path / "without", "ijbc", ("G1", "G2"))
        for file in ("face_tid_mid", "name_5pts_score"):
            path = other / "meta" / f"ijbc_{file}.txt"
            gone = tuple(f"{number}.jpg " for number in (1, 8))
            path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(gone)))
        whole = Ijb.read(other, "ijbc")
        pairs = ((first, second, same) for first, second, same in whole.pairs())
        kept = [(a[(a != 6) & (b != 6)], b[(a != 6) & (b != 6)], c[(a != 6) & (b != 6)]) for a, b, c in pairs]
        seen = []

        def spy(templates, blocks, **options):
            seen.append(templates)
            return verify_templates(templates, kept, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ijb_module, "verify_templates", spy)
            for ijb in (Ijb.read(folder, "ijbc"), whole):
                evaluate_ijb(Grey(), ijb, batch_size=5, protocols=["1:1"])
        with_broken, without = seen
        others = with_broken.ids != 6
        torch.testing.assert_close(with_broken.features[others], without.features[others], rtol=0, atol=1e-6)
        assert not with_broken.features[~others].any()

    def test_what_is_wrong_with_images_is_found_first(self, tmp_path, write_benchmark):
        folder = write_benchmark(tmp_path, "ijbc", ("G1", "G2"))
        for number in (3, 5):
            (folder / "loose_crop" / f"{number}.jpg").rename(tmp_path / f"{number}")
        with pytest.raises(FileNotFoundError, match=r"lacks 2 \(3\.jpg, 5\.jpg\) of 36 images"):
            Ijb.read(folder, "ijbc").check()
        path = folder / "meta" / "ijbc_name_5pts_score.txt"
        text = path.read_text()
        for line in ("2.jpg" + " 7" * 10 + " 0.5", "2.jpg 1 2 3 4 5 6 7 8 9 nan 0.5", "2.jpg 1 2 3 4 5 6 7 8 9 1 inf"):
            lines = text.splitlines()
            path.write_text("\n".join([lines[0], line, *lines[2:]]))
            with pytest.raises(InputError, match=r"landmarks that coincide, .* 1 \(2\.jpg\)"):
                Ijb.read(folder, "ijbc")
        path.write_text(text.replace("2.jpg ", "2.jpg x", 1))
        with pytest.raises(InputError, match="line 2: "):
            Ijb.read(folder, "ijbc")
        for crop in (folder / "loose_crop").iterdir():
            crop.write_bytes(b"?")
        for number in (3, 5):
            (folder / "loose_crop" / f"{number}.jpg").write_bytes(b"?")
        path.write_text(text)
        with pytest.raises(InputError, match="is a broken image: it is no JPEG"):
            evaluate_ijb(Grey(), Ijb.read(folder, "ijbc"))

    def test_lists_that_contradict_themselves(self, tmp_path, write_benchmark):
        meta = write_benchmark(tmp_path, "ijbc", ("G1", "G2")) / "meta"
        gallery = meta / "ijbc_1N_gallery_G1.csv"
        gallery.write_text(gallery.read_text() + "1,999,x.jpg\n")
        with pytest.raises(InputError, match=r"line 5: template 1 is of person 101 and of 999"):
            Ijb.read(tmp_path, "ijbc").gallery("G1")
        pairs = meta / "ijbc_template_pair_label.txt"
        pairs.write_text(pairs.read_text() + "1 2 -1\n")
        with pytest.raises(InputError, match="a pair is labelled -1, wanted 0 or 1"):
            list(Ijb.read(tmp_path, "ijbc").pairs())

    def test_files(self, ijb_folder, monkeypatch):
        found = Ijb.read(ijb_folder, "ijbc")
        assert found.files[:2] == ["1.jpg", "2.jpg"]
        assert found.template_ids.tolist() == [i // 3 + 1 for i in range(36)]
        assert found.media_ids.tolist() == [1000, 1001] * 18
        line = (ijb_folder / "meta" / "ijbc_name_5pts_score.txt").read_text().splitlines()[6].split()
        assert found.landmarks[6].flatten().tolist() == [float(x) for x in line[1:11]]
        assert found.faceness[6] == float(line[11])
        monkeypatch.setattr(ijb_module, "_PAIRS_A_BLOCK", 20)
        blocks = list(found.pairs())
        assert [len(block[0]) for block in blocks] == [20, 20, 20, 6]
        assert blocks[0][0][:3].tolist() == [1, 1, 1]
        assert blocks[0][1][:3].tolist() == [2, 3, 4]
        assert blocks[0][2][:3].tolist() == [True, False, False]
        assert [ids.tolist() for ids in found.gallery("G1")] == [[1, 3], [101, 102]]
        assert [ids.tolist() for ids in found.probes()] == [[2, 4, 6, 8, 10, 12], [101, 102, 103, 104, 105, 106]]
        image, number = IjbFaces(found)[4]
        assert (image.shape, image.dtype, number) == ((3, 112, 112), torch.uint8, 4)

    @pytest.mark.parametrize(("flip", "faceness"), [(True, True), (False, False)])
    def test_evaluation_is_the_protocol(self, ijb_folder, flip, faceness):
        ijb = Ijb.read(ijb_folder, "ijbc")
        backbone = Grey()
        result = evaluate_ijb(backbone, ijb, flip=flip, faceness=faceness, batch_size=5, fars=(0.01, 0.1))
        assert backbone.training
        images = IjbFaces(ijb)
        faces = torch.stack([images[i][0] for i in range(len(images))])
        pixels = (faces.double() / 255 - 0.5) / 0.5
        with torch.no_grad():
            features = backbone(pixels.float()).double()
            if flip:
                features = features + backbone(pixels.flip(3).float()).double()
        weights = ijb.faceness.numpy() if faceness else np.ones(36)
        ids, unit = protocol(features.numpy(), ijb.template_ids.numpy(), ijb.media_ids.numpy(), weights)
        row = {template: place for place, template in enumerate(ids)}
        scores, same = [], []
        for line in (ijb_folder / "meta" / "ijbc_template_pair_label.txt").read_text().splitlines():
            a, b, label = map(int, line.split())
            scores.append(unit[row[a]] @ unit[row[b]])
            same.append(label == 1)
        assert result.verification.tar == pytest.approx(tar_at_far(scores, same, (0.01, 0.1)), abs=1e-9)
        for name, gallery, people in (("G1", [1, 3], [101, 102]), ("G2", [5, 7], [103, 104])):
            expected = identify(unit[1::2], range(101, 107), unit[[row[t] for t in gallery]], people)
            assert result.identification[name].to_dict() == expected.to_dict()
        assert 0 < result.verification.tar[0.01] < 1

    def test_what_is_printed_and_drawn(self, ijb_folder, tmp_path):
        result = evaluate_ijb(Grey(), Ijb.read(ijb_folder, "ijbc"))
        console = Console(width=120, record=True, file=io.StringIO())
        pairs = {"LFW": PairAccuracy(0.9984, 0.0021, np.zeros(10)), "AgeDB": PairAccuracy(0.98, 0.01, np.zeros(10))}
        for table in (
            pairs_table(pairs),
            verification_table({"IJB-C": result}),
            identification_table({"IJB-C": result}),
        ):
            console.print(table)
        text = console.export_text()
        for wanted in ("99.84", "98.92", "1e-06", "0.1", "rank-10", "TPIR@0.01", "IJB-C G2", "IJB-C mean"):
            assert wanted in text
        assert f"{100 * result.verification.tar[1e-4]:.2f}" in text
        plot_det({"IJB-C": result.verification, "its ROC": result.verification.roc}, tmp_path / "det.png")
        plot_identification(result.identification, tmp_path / "identification.png")
        for picture in ("det", "identification"):
            assert (tmp_path / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
        assert "60 impostor pairs resolve 1.7e-02" in " ".join(text.split()) and "?" in text
        found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert found["1:N"]["G1"]["mated"] == 2
        assert found["1:1"]["tar"]["0.01"] is None and found["1:1"]["tar"]["0.1"] == result.verification.tar[0.1]
        with pytest.raises(ValueError, match="no curve to draw"):
            plot_identification({}, tmp_path / "none.png")

    def test_the_mean_of_ranks_pools_the_probes(self):
        def gallery(rank1, mated, tpir):
            return Identification({1: rank1}, {0.01: tpir}, mated, 5, None)

        result = IjbResult(None, {"G1": gallery(0.1, 300, 0.2), "G2": gallery(0.106, 100, 0.4)})
        table = identification_table({"IJB-C": result})
        cells = [list(column.cells) for column in table.columns]
        assert cells[0][-1] == "IJB-C mean"
        assert cells[1][-1] == "10.15"  # (30 + 10.6) of 400; alike they would be 10.30
        assert cells[2][-1] == "30.00"

    def test_one_protocol_needs_its_files_alone(self, tmp_path, write_benchmark):
        folder = write_benchmark(tmp_path, "ijbb", ("S1", "S2"))
        assert list(evaluate_ijb(Grey(), Ijb.read(folder, "ijbb")).identification) == ["S1", "S2"]
        for file in (folder / "meta").glob("*.csv"):
            file.unlink()
        result = evaluate_ijb(Grey(), Ijb.read(folder, "ijbb"), protocols=["1:1"])
        assert result.identification == {}
        with pytest.raises(FileNotFoundError, match=r"ijbb_1N_probe_mixed\.csv"):
            evaluate_ijb(Grey(), Ijb.read(folder, "ijbb"), protocols=["1:N"])

    def test_lists_of_people_lose_no_row(self, tmp_path, write_benchmark):
        """A quotation that does not end takes the rows after it in; a list without a header loses its first."""
        path = write_benchmark(tmp_path, "ijbc", ("G1", "G2")) / "meta" / "ijbc_1N_gallery_G1.csv"
        header, *people = path.read_text().splitlines()
        for lines, message in (
            ([header.replace("FILE", '"FILE'), *people], "the quotation in line 1 does not end"),
            ([header, '1,101,"a.jpg', *people[1:]], "the quotation in line 2 does not end"),
            (people, "line 1: it begins with '1,101,a.jpg', wanted a header"),
        ):
            path.write_text("\n".join(lines) + "\n")
            with pytest.raises(InputError, match=message):
                Ijb.read(tmp_path, "ijbc").gallery("G1")

    def test_damaged_files(self, tmp_path, write_benchmark):
        meta = write_benchmark(tmp_path, "ijbc", ("G1", "G2")) / "meta"

        def damage(file, old, new):
            text = (meta / file).read_text()
            assert old in text
            (meta / file).write_text(text.replace(old, new, 1))

        damage("ijbc_template_pair_label.txt", "1 3 0\n", "1 3\n")
        with pytest.raises(ValueError, match=r"pair_label\.txt, after line 0: .*wanted 'template template 0\|1'"):
            list(Ijb.read(tmp_path, "ijbc").pairs())
        damage("ijbc_template_pair_label.txt", "1 3\n", "1 3 -1\n")
        with pytest.raises(ValueError, match=r"_label\.txt, after line 0: a pair is labelled -1, wanted 0 or 1"):
            list(Ijb.read(tmp_path, "ijbc").pairs())
        damage("ijbc_1N_probe_mixed.csv", "4,102,", "four,102,")
        with pytest.raises(ValueError, match=r"probe_mixed\.csv, line 3: .*wanted 'template,person"):
            Ijb.read(tmp_path, "ijbc").probes()
        damage("ijbc_face_tid_mid.txt", "3.jpg 1 ", "4.jpg 1 ")
        with pytest.raises(ValueError, match="do not list the same images in one order"):
            Ijb.read(tmp_path, "ijbc")
        damage("ijbc_face_tid_mid.txt", "2.jpg 1 1001\n", "2.jpg 1\n")
        with pytest.raises(ValueError, match=r"face_tid_mid\.txt, line 2 has 2 columns, wanted 3: '2\.jpg 1"):
            Ijb.read(tmp_path, "ijbc")
        with pytest.raises(FileNotFoundError, match=r"ijbb_face_tid_mid\.txt"):
            Ijb.read(tmp_path, "ijbb")

    def test_processes_share_the_images(self, ijb_folder, monkeypatch):
        ijb, own = Ijb.read(ijb_folder, "ijbc"), threading.local()  # two threads stand for two processes
        sent: list[Any] = [None, None]
        everyone = threading.Barrier(2)
        embedded = [0, 0]

        def sum_over_processes(values):
            sent[own.rank] = values
            everyone.wait(timeout=60)
            total = sent[0] + sent[1]
            everyone.wait(timeout=60)
            return total

        class Counting(Grey):
            def forward(self, images):
                embedded[own.rank] += len(images)
                return super().forward(images)

        def work(rank):
            own.rank = rank
            return evaluate_ijb(Counting(), ijb, flip=False).to_dict()

        alone = evaluate_ijb(Grey(), ijb, flip=False).to_dict()
        monkeypatch.setattr(embedding_module, "rank", lambda: own.rank)
        monkeypatch.setattr(embedding_module, "world_size", lambda: 2)
        monkeypatch.setattr(templates_module, "sum_over_processes", sum_over_processes)
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(work, (0, 1))) == [alone, alone]
        assert embedded == [18, 18]


def test_embeddings_with_their_mirror_images():
    images = torch.randint(0, 256, (7, 3, 112, 112), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    backbone = Grey()
    pixels = (images.float() / 255 - 0.5) / 0.5
    plain = embed_images(backbone, images.split(3), flip=False)
    torch.testing.assert_close(plain, backbone(pixels), rtol=0, atol=1e-6)
    both = embed_images(backbone, images.split(3))
    torch.testing.assert_close(both, backbone(pixels) + backbone(pixels.flip(3)), rtol=0, atol=1e-6)
    assert not torch.allclose(both, 2 * plain)
