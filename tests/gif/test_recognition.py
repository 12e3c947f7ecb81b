"""What a trained model is for: embeddings in files, one image against another, one against a gallery."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import gif as library
from gif.backbones import BackboneConfig, fingerprint, save_backbone
from gif.data import IdentityImages
from gif.data.decoding import BrokenImageError, ImageDecoder
from gif.errors import DamagedFileError, InputError, MissingFileError, OutputError
from gif.evaluation import Roc, judge, roc, thresholds_of
from gif.evaluation import command as evaluate_module
from gif.evaluation.calibration import Calibrated, Calibration, add_calibration, calibration_path, load_calibration
from gif.recognition import Embeddings, load_model, search
from gif.recognition import commands as commands_module
from gif.recognition.aligning import load_align

SIZE = 16


def make_model(path, seed=0, **options):
    torch.manual_seed(seed)
    config = BackboneConfig(**{"embedding_size": 8, "image_size": SIZE, "width": 4, **options})
    save_backbone(path, config.build(), config)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "backbone.safetensors")


@pytest.fixture
def faces(tmp_path):
    """Six images of three identities, one of them damaged; a file that is none; a hidden folder."""
    generator = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "faces" / f"person {number // 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20 + number, 18, 3), np.uint8)).save(path)
    (tmp_path / "faces" / "person 0" / "zé.jpg").write_bytes(b"\xff\xd8\xff no image")
    (tmp_path / "faces" / "notes.txt").write_text("x")
    (tmp_path / "faces" / ".hidden").mkdir()
    (tmp_path / "faces" / ".hidden" / "7.png").write_bytes(b"")
    return tmp_path / "faces"


NAMES = [f"person {number // 2}/{number}.png" for number in range(6)]


def thresholds(impostor=1000):
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([torch.rand(50, generator=generator), torch.rand(impostor, generator=generator) - 0.5])
    labels = torch.arange(len(scores)) < 50
    return thresholds_of(roc(scores, labels), 50, impostor), scores, labels


class TestThresholds:
    def test_accept_no_more_than_the_rate_and_as_many_as_they_say(self):
        found, scores, labels = thresholds()
        for far in (1e-2, 1e-3):
            one = found.at[far]
            accepted = scores.double() >= one.threshold
            assert int(accepted[~labels].sum()) == one.false_accepts <= far * 1000
            assert accepted[labels].double().mean().item() == pytest.approx(one.tar)
            lower = scores.double() >= scores[scores.double() < one.threshold].max()
            assert int(lower[~labels].sum()) > far * 1000 or int(lower[~labels].sum()) == one.false_accepts

    def test_a_rate_below_one_pair_has_none(self):
        found, _, _ = thresholds()
        assert found.at[1e-4] is None and found.at[1e-6] is None
        with pytest.raises(InputError, match=r"no threshold is known for FAR 0.0001: the 1,000 impostor pairs"):
            found.require(1e-4)
        with pytest.raises(InputError, match=r"there are 0\.01, 0\.001"):
            found.require(0.5)
        assert found.at[1e-2].is_firm is False and "fewer than the 30" in found.support(1e-2)

    def test_the_rate_where_none_is_named_is_one_that_is_known(self, model, faces):
        for impostor, far in ((1000, 1e-3), (200, 1e-2), (50, None)):
            found, _, _ = thresholds(impostor)
            assert found.usual_far == far
            judged = Calibration("abc", {"few": Calibrated(found, False, "faces")})
            decides, basis = replace(load_model(model), calibration=judged).threshold()
            if far is None:
                assert decides == found.eer_threshold and basis.startswith("equal error rate, ")
            else:
                assert decides == found.at[far].threshold and basis.startswith(f"FAR {far:g} on few of faces")

    def test_equal_error_rate_is_where_the_errors_are_equal(self):
        found, scores, labels = thresholds()
        accepted = scores.double() >= found.eer_threshold
        assert accepted[~labels].double().mean().item() == pytest.approx(found.eer, abs=2e-2)  # 1 of 50 genuine pairs
        assert 1 - accepted[labels].double().mean().item() == pytest.approx(found.eer, abs=2e-2)

    def test_impostors_that_share_the_highest_score(self):
        scores = torch.tensor([1.0] * 5 + [0.0] * 95 + [0.5])
        found = thresholds_of(roc(scores, torch.arange(101) == 100), 1, 100, fars=(0.02,))
        assert found.at[0.02].threshold > 1 and found.at[0.02].false_accepts == 0

    def test_every_judgement_has_them_and_they_are_those_of_all_its_pairs(self):
        torch.manual_seed(0)
        labels = torch.arange(40).repeat_interleave(5)
        rows = normalize(torch.randn(40, 16)[labels] + 0.8 * torch.randn(200, 16), dim=1)
        found = judge(rows, labels).thresholds
        first, second = torch.triu_indices(200, 200, 1)
        scores, same = (rows @ rows.T)[first, second], labels[first] == labels[second]
        for far in (1e-2, 1e-3, 1e-4):
            one = found.at[far]
            allowed = int(far * found.impostor)
            assert allowed - 2 - allowed // 50 <= one.false_accepts <= allowed  # binned to 1e-4 above FAR 2e-3
            assert int((scores[~same].double() >= one.threshold - 1e-6).sum()) >= one.false_accepts
            assert one.tar == pytest.approx((scores[same] >= one.threshold).double().mean().item(), abs=5e-3)
        assert found.at[1e-5] is None and judge(rows, labels).to_dict()["thresholds"]["at"]["1e-05"] is None

    def test_a_curve_may_end_at_the_first_impostor(self):
        curve = Roc(np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]), np.array([np.inf, 0.7, -np.inf]))
        found = thresholds_of(curve, 3, 4, fars=(0.5,))
        assert found.at[0.5].threshold == 0.7 and found.eer == 0


class TestCalibration:
    def test_is_stored_beside_the_model_and_refused_for_another(self, tmp_path):
        found, _, _ = thresholds()
        model = tmp_path / "m.safetensors"
        add_calibration(model, Calibration("abc", {"lfw": Calibrated(found, True, "its pairs")}))
        add_calibration(model, Calibration("abc", {"faces": Calibrated(found, False, "faces")}))
        again = load_calibration(model, "abc")
        assert set(again.sets) == {"lfw", "faces"} and again.sets["lfw"].thresholds == found
        with pytest.raises(InputError, match="other weights"):
            load_calibration(model, "abd")
        add_calibration(model, Calibration("abd", {"faces": Calibrated(found, False, "faces")}))
        assert set(load_calibration(model, "abd").sets) == {"faces"}  # another model's are replaced
        calibration_path(model).write_text('{"format": "gif.thresholds/1", "model": "abd", "sets": {"x": {"at": 3}}}')
        with pytest.raises(InputError, match="holds no thresholds of a model"):
            load_calibration(model, "abd")
        assert load_calibration(tmp_path / "other.safetensors", "abc") is None

    def test_evaluate_stores_them_and_verify_takes_them(self, gif, tmp_path, monkeypatch):
        model = make_model(tmp_path / "b.safetensors")
        torch.manual_seed(1)
        images = IdentityImages(
            torch.randint(0, 256, (60, 1, SIZE, SIZE)).byte(), torch.arange(60) // 3, list(map(str, range(20)))
        )
        split = type("Split", (), {"held_out": images, "sets": None})()
        monkeypatch.setattr(evaluate_module, "load_data", lambda *_, **__: split)
        code, printed = gif("evaluate", "--model", model, "--data", "x", "--output", tmp_path / "out")
        assert code == 0 and "Thresholds on the cosine" in printed and "b.thresholds.json" in printed
        Image.fromarray(images.images[0, 0].numpy()).save(tmp_path / "a.png")
        code, printed = gif("verify", tmp_path / "a.png", tmp_path / "a.png", "--model", model, "--far", "0.01")
        assert code == 0 and "cosine 1.0000" in printed and "the same identity" in printed
        assert "false accepts of 1,710 impostor pairs" in printed
        code, printed = gif("verify", tmp_path / "a.png", tmp_path / "a.png", "--model", model, "--far", "1e-6")
        assert code == 1 and "no threshold is known for FAR 1e-06" in printed
        code, printed = gif(
            "verify", tmp_path / "a.png", tmp_path / "a.png", "--model", model, "--far", "0.01", "--flip=true"
        )
        assert code == 1 and "of the image alone" in printed
        make_model(model, seed=1)  # trained on: the thresholds are of what it was
        code, printed = gif("verify", tmp_path / "a.png", tmp_path / "a.png", "--model", model)
        assert code == 1 and "other weights" in printed


class TestModel:
    def test_images_in_every_form_give_one_embedding(self, model, faces):
        loaded = library.load_model(model)
        path = faces / NAMES[0]
        image = Image.open(path)
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        rows = loaded.embed([path, str(path), image, array, tensor])
        assert rows.shape == (5, 8) and torch.equal(rows, rows[:1].expand(5, -1).contiguous())
        assert rows.norm(dim=1) == pytest.approx(1, abs=1e-6)
        assert torch.allclose(loaded.embed(path), rows[:1], atol=1e-6)
        assert loaded.embed([]).shape == (0, 8)
        assert loaded.cosine(path, array) == pytest.approx(1)

    def test_flip_adds_the_mirrored_image(self, model, faces):
        plain, flipped = load_model(model), load_model(model, flip=True)
        image = Image.open(faces / NAMES[0]).convert("L").resize((SIZE, SIZE))
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert torch.allclose(flipped.embed(image), flipped.embed(mirrored), atol=1e-5)
        assert not torch.allclose(plain.embed(image), plain.embed(mirrored), atol=1e-3)

    def test_without_thresholds_there_is_a_cosine_and_no_decision(self, model, faces):
        loaded = load_model(model)
        verdict = loaded.verify(faces / NAMES[0], faces / NAMES[1])
        assert verdict.same is None and "gif evaluate" in verdict.basis
        assert loaded.verify(faces / NAMES[0], faces / NAMES[0], threshold=0.9).same is True
        assert loaded.verify(faces / NAMES[0], faces / NAMES[1], threshold=1.0).same is False
        with pytest.raises(InputError, match=r"cosine in \[-1, 1\], got 3"):
            loaded.verify(faces / NAMES[0], faces / NAMES[1], threshold=3)

    def test_thresholds_of_other_embeddings_are_refused(self, model, faces):
        found, _, _ = thresholds()
        loaded = load_model(model)
        loaded = replace(loaded, calibration=Calibration("", {"lfw": Calibrated(found, True, "its pairs")}))
        with pytest.raises(InputError, match="with the mirrored image's added"):
            loaded.verify(faces / NAMES[0], faces / NAMES[1], far=0.01)
        with pytest.raises(InputError, match="no thresholds called 'ijb'; there are lfw"):
            loaded.verify(faces / NAMES[0], faces / NAMES[1], by="ijb")

    def test_what_is_no_image_is_named(self, model, faces):
        loaded = load_model(model)
        with pytest.raises(BrokenImageError, match=r"zé\.jpg cannot be used"):
            loaded.embed(faces / "person 0" / "zé.jpg")
        with pytest.raises(MissingFileError, match=r"none\.png"):
            loaded.embed("none.png")
        with pytest.raises(TypeError, match="uint8"):
            loaded.embed(np.zeros((4, 4, 3)))
        with pytest.raises(InputError, match=r"\(4, 4, 2\)"):
            loaded.embed(np.zeros((4, 4, 2), np.uint8))
        number: Any = 3
        with pytest.raises(TypeError, match="got int"):
            loaded.embed([number])

    def test_a_folder_that_holds_no_model(self, tmp_path):
        with pytest.raises(InputError, match=r"without a model\.safetensors"):
            load_model(tmp_path)
        with pytest.raises(MissingFileError):
            load_model(tmp_path / "none.safetensors")


class TestAlign:
    def test_the_hook_is_called_with_the_whole_image_in_colours(self, model, faces):
        seen = []

        def crop(pixels):
            seen.append(pixels.shape)
            return np.ascontiguousarray(pixels[2:10, 3:11])

        aligned = load_model(model, align=crop)
        plain = load_model(model)
        pixels = np.asarray(Image.open(faces / NAMES[0]))
        assert torch.equal(aligned.embed(faces / NAMES[0]), plain.embed(pixels[2:10, 3:11].copy()))
        assert seen == [(20, 18, 3)]

    @pytest.mark.parametrize(
        ("hook", "message"),
        [
            (lambda pixels: None, "finds nothing in it"),
            (lambda pixels: pixels[:, :, 0], r"returned \(20, 18\) uint8"),
            (lambda pixels: "x", "returned str"),
            (lambda pixels: 1 / 0, "failed at it"),
        ],
    )
    def test_what_it_cannot_find_is_no_image(self, model, faces, hook, message):
        with pytest.raises(BrokenImageError, match=message):
            load_model(model, align=hook).embed(faces / NAMES[0])

    def test_by_name(self, tmp_path):
        (tmp_path / "mine.py").write_text("def half(pixels):\n    return pixels[::2, ::2].copy()\n")
        assert load_align(f"{tmp_path / 'mine.py'}:half")(np.zeros((4, 4, 3), np.uint8)).shape == (2, 2, 3)
        assert load_align("gif.data.decoding:decode").__name__ == "decode"
        for name, message in (
            ("mine", "file.py:function"),
            (f"{tmp_path / 'none.py'}:half", "no file"),
            (f"{tmp_path / 'mine.py'}:whole", "has no function whole"),
            ("no.such.module:f", "cannot be imported"),
        ):
            with pytest.raises(InputError, match=message):
                load_align(name)


class TestEmbed:
    @pytest.mark.parametrize("suffix", [".npz", ".parquet"])
    def test_a_folder(self, gif, model, faces, tmp_path, suffix):
        output = tmp_path / f"faces{suffix}"
        code, printed = gif("embed", faces, "--model", model, "--output", output)
        assert code == 0 and "wrote 6 embeddings of width 8" in printed
        assert "1 of 7 images cannot be used and were left out: person 0/zé.jpg" in printed
        found = Embeddings.load(output)
        assert list(found.names) == NAMES
        assert torch.allclose(found.vectors, load_model(model).embed([faces / name for name in NAMES]), atol=1e-6)
        assert [path.name for path in tmp_path.iterdir() if path.name != "faces"] == [output.name]

    def test_files_other_programs_read(self, gif, model, faces, tmp_path):
        one, other = faces / NAMES[0], faces / NAMES[3]
        assert gif("embed", "--model", model, one, other, "--output", tmp_path / "e.npz")[0] == 0
        with np.load(tmp_path / "e.npz") as stored:
            assert stored["names"].tolist() == [str(one), str(other)] and stored["embeddings"].shape == (2, 8)
        pandas = pytest.importorskip("pandas")
        assert gif("embed", one, other, "--model", model, "--output", tmp_path / "e.parquet")[0] == 0
        table = pandas.read_parquet(tmp_path / "e.parquet")
        assert list(table.columns) == ["name", "embedding"] and len(table["embedding"][0]) == 8

    def test_killed_and_continued(self, gif, model, faces, tmp_path, monkeypatch):
        whole = tmp_path / "whole.npz"
        gif("embed", faces, "--model", model, "--output", whole, "--batch_size=2")
        share = commands_module.Embedder.own_share

        def interrupted(self, *arguments, **options):
            for number, batch in enumerate(share(self, *arguments, **options)):
                if number == 2:
                    raise KeyboardInterrupt
                yield batch

        monkeypatch.setattr(commands_module.Embedder, "own_share", interrupted)
        code, printed = gif("embed", faces, "--model", model, "--output", tmp_path / "e.npz", "--batch_size=2")
        assert code == 130 and "continues from what" in printed and not (tmp_path / "e.npz").exists()
        monkeypatch.setattr(commands_module.Embedder, "own_share", share)
        code, printed = gif("embed", faces, "--model", model, "--output", tmp_path / "e.npz", "--batch_size=2")
        assert code == 0 and "continuing after" in printed
        assert (tmp_path / "e.npz").read_bytes() == whole.read_bytes()
        assert not list(tmp_path.glob("*.partial"))

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (["none"], "no file or folder none"),
            (["empty"], "no image below empty"),
            (["faces/person 0/zé.jpg"], "none of 1 images that were tried can be decoded"),
            (["glyph-words-seen"], "no file or folder"),
        ],
    )
    def test_what_is_wrong_is_said(self, gif, model, faces, tmp_path, monkeypatch, inputs, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        code, printed = gif("embed", *inputs, "--model", model, "--output", "e.npz")
        assert code == 1 and message in printed and not (tmp_path / "e.npz").exists()

    def test_wrong_outputs(self, gif, model, faces, tmp_path):
        code, printed = gif("embed", faces, "--model", model, "--output", tmp_path / "e.csv")
        assert code == 1 and "ends in .npz or .parquet" in printed
        code, printed = gif("embed", faces, "--model", tmp_path / "none.pt", "--output", tmp_path / "e.npz")
        assert code == 1 and "no file" in printed


class TestStoredEmbeddings:
    def test_damaged_and_foreign_files(self, tmp_path):
        rows = normalize(torch.randn(3, 4), dim=1)
        Embeddings(["a", "b", "c"], rows, "m", False).save(tmp_path / "e.npz")
        whole = (tmp_path / "e.npz").read_bytes()
        (tmp_path / "cut.npz").write_bytes(whole[:-20])
        with pytest.raises(DamagedFileError):
            Embeddings.load(tmp_path / "cut.npz")
        np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
        with pytest.raises(InputError, match="no embeddings of gif embed"):
            Embeddings.load(tmp_path / "foreign.npz")
        np.savez_compressed(tmp_path / "packed.npz", names=np.array(["a"]), embeddings=np.zeros((1, 2)), metadata="{}")
        with pytest.raises(InputError, match="is packed"):
            Embeddings.load(tmp_path / "packed.npz")
        np.savez(
            tmp_path / "long.npz",
            names=np.array(["a"]),
            embeddings=np.ones((1, 2), np.float32),
            metadata=np.array(json.dumps({"format": "gif.embeddings/1", "model": "", "flip": False})),
        )
        with pytest.raises(DamagedFileError, match="unit length"):
            Embeddings.load(tmp_path / "long.npz")
        (tmp_path / "e.parquet").write_bytes(b"PAR1 nothing")
        with pytest.raises(DamagedFileError):
            Embeddings.load(tmp_path / "e.parquet")
        with pytest.raises(InputError, match="a name for each row"):
            Embeddings(["a"], rows, "m", False)


class TestSearch:
    @pytest.mark.parametrize("shape", [(1, 1, 1), (5, 300, 3), (40, 1000, 10)])
    def test_backends_give_the_same_answers(self, shape):
        queries, gallery = (normalize(torch.randn(rows, 16), dim=1) for rows in shape[:2])
        gallery[-1] = gallery[0]  # equal rows: the first counts as nearer
        queries[0] = gallery[0]
        exact = search(queries, gallery, shape[2], backend="exact")
        assert exact == search(queries, gallery, shape[2], backend="faiss")
        assert exact[0][0].row == 0 and exact[0][0].cosine == pytest.approx(1)
        wanted = (queries.double() @ gallery.double().T).sort(dim=1, descending=True).values[:, : shape[2]]
        assert torch.allclose(torch.tensor([[match.cosine for match in row] for row in exact]), wanted.float())

    def test_equal_rows_come_in_their_order(self):
        gallery = normalize(torch.ones(50, 4), dim=1)
        for backend in ("exact", "faiss"):
            assert [match.row for match in search(gallery[:1], gallery, 3, backend=backend)[0]] == [0, 1, 2]

    def test_wrong_arguments(self):
        rows = normalize(torch.randn(3, 4), dim=1)
        with pytest.raises(InputError, match="widths differ"):
            search(rows, rows[:, :2])
        with pytest.raises(InputError, match="at least one"):
            search(rows, rows[:0])
        wrong: Any = "annoy"
        with pytest.raises(ValueError, match="backend"):
            search(rows, rows, backend=wrong)

    def test_command(self, gif, model, faces, tmp_path):
        gallery = tmp_path / "g.npz"
        gif("embed", faces, "--model", model, "--output", gallery)
        options = ["--query", faces / NAMES[2], "--model", model, "--top=2", "--output", tmp_path / "a.json"]
        code, printed = gif("search", "--gallery", gallery, *options, "--threshold=0.99")
        assert code == 0 and NAMES[2] in printed and "yes" in printed
        found = json.loads((tmp_path / "a.json").read_text())
        (answers,) = found["answers"].values()
        assert answers[0] == {"image": NAMES[2], "cosine": pytest.approx(1)} and len(answers) == 2
        assert found["threshold"] == 0.99
        code, printed = gif("search", "--gallery", faces, *options)
        assert code == 0 and "no threshold is known" in printed and "1 of 7 images cannot be used" in printed
        assert json.loads((tmp_path / "a.json").read_text())["answers"] == found["answers"]

    def test_a_gallery_of_another_model(self, gif, model, faces, tmp_path):
        other = make_model(tmp_path / "other.safetensors", seed=3, embedding_size=12)
        gif("embed", faces, "--model", other, "--output", tmp_path / "g.npz")
        code, printed = gif("search", "--gallery", tmp_path / "g.npz", "--query", faces / NAMES[0], "--model", model)
        assert code == 1 and "embedded by another model" in printed and "width 12, this model's have 8" in printed
        code, printed = gif(
            "search", "--gallery", tmp_path / "g.npz", "--query", faces / NAMES[0], "--model", other, "--flip=true"
        )
        assert code == 1 and "was embedded with --flip false" in printed


def test_fingerprint_follows_from_the_weights_and_not_from_the_file(model, tmp_path):
    loaded = load_model(model)
    assert fingerprint(torch.nn.DataParallel(loaded.network)) == loaded.fingerprint
    assert load_model(make_model(tmp_path / "same.safetensors")).fingerprint == loaded.fingerprint
    assert load_model(make_model(tmp_path / "other.safetensors", seed=1)).fingerprint != loaded.fingerprint


def test_pixels_are_prepared_as_files_are(faces):
    for channels in (1, 3):
        decoder = ImageDecoder(SIZE, channels)
        path = faces / NAMES[1]
        assert torch.equal(decoder(path.read_bytes()), decoder.prepare(np.asarray(Image.open(path))))


def test_thresholds_are_not_stored_where_nothing_can_be_written(tmp_path):
    found, _, _ = thresholds()
    (tmp_path / "m.thresholds.json").mkdir()
    with pytest.raises((OutputError, OSError)):
        add_calibration(tmp_path / "m.safetensors", Calibration("a", {"x": Calibrated(found, False, "")}))
