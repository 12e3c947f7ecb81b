"""`gif evaluate`: the field's benchmarks by one command, on files written byte by byte."""

import json
import re

import numpy as np
import pytest
import torch

from gif.backbones import BackboneConfig, load_backbone, save_backbone
from gif.data import IdentityImages, ImageDecoder, open_data, read_bin
from gif.errors import InputError
from gif.evaluation import (
    Embedder,
    HeldOutIdentities,
    Ijb,
    IjbFolders,
    PairFiles,
    Roc,
    benchmarks,
    curves,
    embed,
    embed_images,
    evaluate_ijb,
    judge,
    plot_roc,
    tar_at_far,
    verify_pairs,
)
from gif.evaluation import embedding as embedding_module

PAIRS = 40
TINY = BackboneConfig(embedding_size=16, image_size=16, width=4, channels=3)
FACES = BackboneConfig(embedding_size=16, image_size=112, width=4, channels=3)


@pytest.fixture
def gif(gif):
    """Run `gif evaluate arguments...` in this process; returns the exit code and what was printed."""
    return lambda *arguments: gif("evaluate", *arguments)


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "tiny.safetensors", TINY)


def save(path, config):
    torch.manual_seed(0)
    save_backbone(path, config.build(), config)
    return path


@pytest.fixture
def bins(tmp_path, png, write_bin):
    """A folder of two .bin files, of noisy pictures of a few patterns."""
    folder = tmp_path / "bins"
    folder.mkdir()
    for seed, name in enumerate(("lfw", "cfp_fp")):
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randint(0, 120, (6, 3, 16, 16), generator=generator)
        issame = torch.arange(PAIRS) % 3 != 0
        people = torch.randint(6, (PAIRS, 2), generator=generator)
        people[issame, 1] = people[issame, 0]
        noise = torch.randint(0, 135, (2 * PAIRS, 3, 16, 16), generator=generator)
        images = (patterns[people.flatten()] + noise).to(torch.uint8)
        write_bin(folder / f"{name}.bin", list(map(png, images)), issame.tolist())
    return folder


def results(folder):
    return json.loads((folder / "evaluation.json").read_text())


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG"


class TestPairs:
    @pytest.mark.parametrize("flip", [True, False])
    def test_the_fields_table(self, gif, model, bins, tmp_path, flip):
        code, printed = gif("--model", model, "--pairs", bins, f"--flip={flip}", "--output", tmp_path / "out")
        assert code == 0
        backbone, _ = load_backbone(model)
        found = results(tmp_path / "out")
        assert list(found["pairs"]) == ["cfp_fp", "lfw"] and found["settings"]["flip"] is flip
        accuracies = []
        for name in ("cfp_fp", "lfw"):
            pairs = read_bin(bins / f"{name}.bin")
            embeddings = embed_images(backbone, pairs.batches(7, ImageDecoder(16)), flip=flip)
            expected = verify_pairs(embeddings, pairs.issame)
            unit = embeddings / embeddings.norm(dim=1, keepdim=True)
            tar = tar_at_far((unit[::2] * unit[1::2]).sum(1), pairs.issame, [1e-3])[1e-3]
            thresholds = found["pairs"][name].pop("thresholds")
            assert thresholds["genuine"] + thresholds["impostor"] == PAIRS and 0 <= thresholds["eer"] <= 1
            assert thresholds["at"]["0.001"] is None  # which so few impostor pairs do not resolve
            assert found["pairs"][name] == {
                "accuracy": pytest.approx(expected.accuracy, abs=1e-12),
                "std": pytest.approx(expected.std, abs=1e-12),
                "tar": {"0.001": pytest.approx(tar, abs=1e-12)},
                "pairs": PAIRS,
            }
            assert f"{100 * expected.accuracy:.2f}" in printed and f"{100 * expected.std:.2f}" in printed
            accuracies.append(expected.accuracy)
        assert min(accuracies) > 0.5 and f"{100 * np.mean(accuracies):.2f}" in printed
        assert all(is_picture(tmp_path / "out" / name) for name in ("roc.png", "det.png"))
        assert not (tmp_path / "out" / "identification.png").exists()

    @pytest.mark.filterwarnings("error")
    def test_what_a_number_is_not_is_said(self, gif, model, bins, tmp_path, write_bin):
        pairs = read_bin(bins / "lfw.bin")
        order = torch.cat([pairs.issame.nonzero(), (~pairs.issame).nonzero()]).flatten().tolist()
        images = [pairs.encoded[2 * i + side] for i in order for side in (0, 1)]
        write_bin(tmp_path / "sorted.bin", images, [bool(pairs.issame[i]) for i in order])
        code, printed = gif("--model", model, "--pairs", tmp_path / "sorted.bin", "--output", tmp_path / "out")
        wanted = [
            "sorted: TAR at FAR 0.001 is not known: 14 impostor pairs resolve 7.1e-02 and above",
            "sorted: 9 of 10 folds hold genuine pairs alone, or impostor pairs alone",
        ]
        assert code == 0 and all(f"warning: {line}" in printed for line in wanted)
        found = results(tmp_path / "out")
        assert [note[: len(line)] for note, line in zip(found["settings"]["notes"], wanted, strict=True)] == wanted
        assert found["pairs"]["sorted"]["folds_of_one_kind"] == 9

    def test_files_one_by_one_beside_the_model_and_by_workers(self, gif, model, bins):
        assert gif("--model", model, "--pairs", bins / "lfw.bin")[0] == 0
        alone = results(model.parent)["pairs"]
        both = json.dumps([str(bins / "cfp_fp.bin"), str(bins / "lfw.bin")])
        assert gif("--model", model, f"--pairs={both}", "--workers=2", "--batch_size=11")[0] == 0
        assert list(results(model.parent)["pairs"]) == ["cfp_fp", "lfw"]
        assert results(model.parent)["pairs"]["lfw"] == alone["lfw"]

    def test_insightfaces_checkpoint(self, gif, bins, tmp_path):
        torch.manual_seed(0)
        network = BackboneConfig(name="iresnet18", embedding_size=16, channels=3, image_size=16).build()
        weights = {f"module.{name}": value for name, value in network.state_dict().items()}
        torch.save(weights, tmp_path / "model.pt")
        assert gif("--model", tmp_path / "model.pt", "--pairs", bins / "lfw.bin")[0] == 0
        pairs = read_bin(bins / "lfw.bin")
        expected = verify_pairs(embed_images(network, pairs.batches(256, ImageDecoder(16))), pairs.issame)
        assert results(tmp_path)["pairs"]["lfw"]["accuracy"] == pytest.approx(expected.accuracy, abs=1e-12)


class TestIjb:
    def test_both_protocols(self, gif, tmp_path, write_benchmark):
        model = save(tmp_path / "faces.safetensors", FACES)
        folders = [
            write_benchmark(tmp_path / "C", "ijbc", ("G1", "G2")),
            write_benchmark(tmp_path / "B", "ijbb", ("S1", "S2")),
        ]
        code, printed = gif("--model", model, f"--ijb={json.dumps(list(map(str, folders)))}", "--batch_size=16")
        assert code == 0
        expected = evaluate_ijb(load_backbone(model)[0], Ijb.read(folders[0], "ijbc"), batch_size=16)
        found = results(tmp_path)["ijb"]
        assert list(found) == ["IJB-C", "IJB-B"]
        assert found["IJB-C"] == json.loads(json.dumps(expected.to_dict()))
        for wanted in ("IJB-C G1", "IJB-C mean", "IJB-B S2", "rank-10", "TPIR@0.01", "1e-06"):
            assert wanted in printed
        assert f"{100 * expected.verification.tar[0.1]:.2f}" in printed
        assert all(is_picture(tmp_path / name) for name in ("roc.png", "det.png", "identification.png"))

    def test_whatever_lies_in_a_folder(self, tmp_path, write_benchmark):
        folder = write_benchmark(tmp_path / "both", "ijbc", ("G1", "G2"))
        other = write_benchmark(tmp_path / "other", "ijbb", ("S1", "S2"))
        for file in (other / "meta").iterdir():
            file.rename(folder / "meta" / file.name)
        assert [ijb.name for ijb in Ijb.find(folder)] == ["ijbb", "ijbc"]
        assert list(IjbFolders(folder, ImageDecoder(112)).benchmarks) == ["IJB-B", "IJB-C"]
        with pytest.raises(ValueError, match="holds IJB-B once more"):
            IjbFolders([folder, folder], ImageDecoder(112))

    @pytest.mark.parametrize(
        ("file", "old", "new", "message"),
        [
            ("template_pair_label.txt", "1 3 0\n", "1 99 0\n", r"template 99 has no image \(1 of 66"),
            ("1N_probe_mixed.csv", "4,102,", "77,102,", r"template 77 has no image \(1 of 6"),
            ("1N_gallery_G2.csv", "5,103,", "five,103,", "gallery_G2.csv, line 2"),
        ],
    )
    def test_damage_is_found_before_any_work(self, tmp_path, write_benchmark, file, old, new, message):
        path = write_benchmark(tmp_path, "ijbc", ("G1", "G2")) / "meta" / f"ijbc_{file}"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            IjbFolders(tmp_path, ImageDecoder(112))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=file):
            IjbFolders(tmp_path, ImageDecoder(112))


class TestHeldOut:
    @pytest.fixture
    def folder(self, tmp_path, png):
        """Four people of five images, of which one cannot be read."""
        generator = torch.Generator().manual_seed(3)
        patterns = torch.randint(0, 120, (4, 3, 16, 16), generator=generator)
        for person in range(4):
            (tmp_path / "people" / str(person)).mkdir(parents=True)
            for number in range(5):
                noise = torch.randint(0, 135, (3, 16, 16), generator=generator)
                image = png((patterns[person] + noise).to(torch.uint8))
                damaged = (person, number) == (1, 2)
                (tmp_path / "people" / f"{person}" / f"{number}.png").write_bytes(image[:40] if damaged else image)
        return tmp_path / "people"

    @pytest.mark.parametrize("workers", [0, 2])
    def test_everybody_in_a_folder_beside_pairs(self, gif, model, bins, folder, workers, tmp_path):
        arguments = ["--data", folder, "--held_out=1", "--pairs", bins, "--batch_size=3", f"--workers={workers}"]
        code, printed = gif("--model", model, *arguments)
        assert code == 0 and "1 of 20 images are broken" in printed and "1/2.png" in printed
        data = open_data(str(folder), decoder=ImageDecoder(16))
        embeddings = embed(load_backbone(model)[0], data, batch_size=3)
        labels = torch.cat([data.labels[:7], data.labels[8:]])
        found = results(tmp_path)
        assert found["held_out"] == judge(embeddings, labels).to_dict()
        assert list(found) == ["settings", "held_out", "pairs"]

    def test_images_are_not_mirrored(self):
        images = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        data = IdentityImages(images, torch.arange(12) // 3, list("abcd"))
        torch.manual_seed(0)
        backbone = TINY.build()
        found = HeldOutIdentities(data).judge(backbone, Embedder(flip=True, batch_size=5))
        expected = judge(embed_images(backbone, images.split(4), flip=False), data.labels)
        assert found.numbers == expected.to_dict() and backbone.training

    def test_pairs_are_judged_where_images_are_embedded(self, monkeypatch):
        class Judged(Exception):
            pass

        def look(embeddings, labels):
            assert embeddings.device.type == "meta"
            raise Judged

        images = IdentityImages(torch.zeros(6, 3, 16, 16, dtype=torch.uint8), torch.arange(6) // 2, list("abc"))
        shares = torch.arange(6), torch.zeros(6, 16)
        monkeypatch.setattr(Embedder, "all_shares", lambda *_: shares)
        monkeypatch.setattr(benchmarks, "judge", look)
        with pytest.raises(Judged):
            HeldOutIdentities(images).judge(TINY.build(), Embedder(device="meta"))

    def test_no_image_that_can_be_read(self, tmp_path):
        """Fewer than a batch of eight, of which all being broken is an error by itself."""
        for name in ("ann", "bob"):
            (tmp_path / name).mkdir()
            for number in range(2):
                (tmp_path / name / f"{number}.png").write_bytes(b"?")
        with pytest.raises(InputError, match="embedding: none of 4 images can be read"):
            embed(TINY.build(), open_data(str(tmp_path), decoder=ImageDecoder(16)))

    def test_nobody_to_judge(self):
        images = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"0 identities are held out, .* or to 1 to judge all"):
            HeldOutIdentities(IdentityImages(images[:0], torch.arange(0), []))
        with pytest.raises(ValueError, match="no genuine pair"):
            HeldOutIdentities(IdentityImages(images, torch.arange(4), list("abcd")))


class TestErrorsBeforeWork:
    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch):
        def embed_batch(*_, **__):
            raise AssertionError("there was work before the error")

        monkeypatch.setattr(embedding_module, "embed_batch", embed_batch)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], r"nothing to judge by; give --pairs lfw\.bin, --ijb IJBC, --data DATA"),
            (['--pairs=["bins/lfw.bin","bins/agedb_30.bin"]'], r"no file bins/agedb_30\.bin"),
            (["--pairs=empty"], r"no \.bin file in empty"),
            (['--pairs=["bins","other"]'], r"two files are called lfw\.bin"),
            (["--pairs=bins", "--ijb=bins"], "aligned to 112 x 112 in 3 channels, and the backbone takes 16 x 16 in 3"),
            (["--pairs=bins", "--data=nothing"], "unknown data set 'nothing'"),
            (["--pairs=bins", "--batch_size=0"], "wanted batch_size >= 1, got batch_size=0"),
            (["--pairs=few.bin"], r"few\.bin has 4 pairs, fewer than the 10 folds"),
            (["--pairs=genuine.bin"], r"genuine\.bin: there is no impostor pair"),
            (["--pairs=text.bin"], r"text\.bin: image 0 of pair 0 is broken: it is no JPEG"),
        ],
    )
    def test_message(self, gif, model, bins, tmp_path, monkeypatch, write_bin, png, arguments, message):
        image = png(torch.zeros(3, 16, 16, dtype=torch.uint8))
        (tmp_path / "empty").mkdir()
        (tmp_path / "other").mkdir()
        write_bin(tmp_path / "other" / "lfw.bin", [image] * 40, [True, False] * 10)
        write_bin(tmp_path / "few.bin", [image] * 8, [True, False] * 2)
        write_bin(tmp_path / "genuine.bin", [image] * 40, [True] * 20)
        write_bin(tmp_path / "text.bin", [b"text"] * 40, [True, False] * 10)
        monkeypatch.chdir(tmp_path)
        code, printed = gif("--model", model, *arguments, "--output=out")
        assert code == 1 and re.search(f"error: .*{message}", printed), printed
        assert not (tmp_path / "out").exists()

    def test_ijb_needs_its_folder(self, gif, tmp_path):
        model = save(tmp_path / "faces.safetensors", FACES)
        code, printed = gif("--model", model, "--ijb", tmp_path)
        assert code == 1 and "no meta/ijbb_face_tid_mid.txt or meta/ijbc_face_tid_mid.txt in" in printed


class TestEmbedder:
    def test_random_numbers_go_on_as_if_it_had_not_run(self, bins):
        pairs = PairFiles(bins, ImageDecoder(16))
        backbone = TINY.build()
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        pairs.judge(backbone, Embedder(workers=1))
        assert torch.equal(torch.rand(3), expected)

    def test_more_processes_than_images(self, monkeypatch):
        monkeypatch.setattr(embedding_module, "world_size", lambda: 3)
        data = IdentityImages(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.arange(2), ["a", "b"])
        with pytest.raises(ValueError, match="2 images for 3 processes"):
            embed(TINY.build(), data)


def test_the_legend_tells_a_rate_that_every_curve_has():
    def curve(impostors):
        rates = np.arange(impostors + 1) / impostors
        return Roc(rates, rates, rates)

    assert curves._legend_far({"many": curve(10_000_000)}) == 1e-4
    assert curves._legend_far({"many": curve(10_000_000), "LFW": curve(3000)}) == 1e-3
    assert curves._legend_far({"exactly": curve(1000)}) == 1e-3
    assert curves._legend_far({"few": curve(150)}) == 1e-2


def test_a_picture_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no curve to draw"):
        plot_roc({}, tmp_path / "roc.png")
