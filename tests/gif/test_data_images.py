"""Decoding, image folders, tar shards; files are made here byte by byte, or by Pillow."""

import json
import pickle
import struct
import zlib

import pytest
import torch
from joblib import parallel_config
from torchvision.transforms.v2 import functional as F

from gif.data import BrokenImageError, EncodedImages, ImageDecoder, broken_report, load_data, open_data
from gif.data.folder import read_folder
from gif.data.shards import _read_shard, find_shards, read_shards
from gif.data.stored import MappedFile


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_image(height=8, width=8):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


class TestDecoder:
    def test_rgb_in_this_order(self, png):
        red = torch.zeros(3, 2, 2, dtype=torch.uint8)
        red[0] = 200
        assert torch.equal(ImageDecoder(2)(png(red)), red)
        assert ImageDecoder(2, channels=1)(png(red)).tolist() == [[[60, 60], [60, 60]]]  # 0.299 of 200

    def test_grey_files_become_rgb(self):
        """A grey PNG written by hand: signature, IHDR, IDAT, IEND."""

        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        for bits, sample in ((8, b"\x11"), (16, b"\x11\x22")):
            head = struct.pack(">IIBBBBB", 1, 1, bits, 0, 0, 0, 0)
            body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + sample)) + chunk(b"IEND", b"")
            encoded = b"\x89PNG\r\n\x1a\n" + body
            if bits == 8:
                assert ImageDecoder(1)(encoded).flatten().tolist() == [0x11] * 3
            else:
                with pytest.raises(BrokenImageError, match="mode I;16, wanted 8 bits"):
                    ImageDecoder(1)(encoded)

    def test_sizes(self, png):
        image = random_image(6, 10)
        squashed = F.resize(image, [4, 4], antialias=True)
        assert torch.equal(ImageDecoder(4)(png(image)), squashed)
        covering = F.resize(image, [4, 6], antialias=True)
        assert torch.equal(ImageDecoder(4, fit="crop")(png(image)), covering[:, :, 1:5])
        with pytest.raises(BrokenImageError, match="it is 6 x 10, wanted 4 x 4"):
            ImageDecoder(4, fit="exact")(png(image))

    def test_exif_turns_an_image(self, png, jpeg):
        """Orientation 6: the camera was turned; rows are columns."""
        tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
        exif = b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff
        plain = jpeg(8, 16)
        turned = plain[:2] + exif + plain[2:]
        straight = ImageDecoder(8, fit="crop")(plain)
        assert torch.equal(ImageDecoder(8, fit="crop")(turned), straight.rot90(-1, (1, 2)))

    @pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "header", "png"])
    def test_broken(self, png, jpeg, damage):
        whole = jpeg()
        encoded = {
            "empty": b"",
            "garbage": b"GIF89a" * 9,
            "truncated": whole[: len(whole) // 2],
            "header": whole[:2] + b"\0" * 300,
            "png": png(random_image(64, 64))[:200],
        }[damage]
        with pytest.raises(BrokenImageError):
            ImageDecoder()(encoded)

    def test_errors(self):
        for options in ({"size": 0}, {"channels": 2}, {"fit": "stretch"}):
            with pytest.raises(ValueError, match="got"):
                ImageDecoder(**options)


@pytest.fixture
def faces(tmp_path, png):
    """A folder of 5 identities, 2 to 6 images each; image i of identity y is of one colour, 40 y + i."""
    for y in range(5):
        folder = tmp_path / "faces" / f"person {y}"
        folder.mkdir(parents=True)
        for i in range(2 + y):
            image = png(torch.full((3, 8, 8), 40 * y + i, dtype=torch.uint8))
            (folder / f"{i}{'.PNG' if i else '.png'}").write_bytes(image)
    (tmp_path / "faces" / "notes.txt").write_text("not an image")
    (tmp_path / "faces" / "person 0" / "Thumbs.db").write_bytes(b"x")
    return tmp_path / "faces"


COUNTS = [2, 3, 4, 5, 6]


def test_folder(faces):
    data = open_data(str(faces), decoder=ImageDecoder(8))
    assert data.names == [f"person {y}" for y in range(5)]
    assert data.labels.bincount().tolist() == COUNTS and len(data) == 20
    images, labels = data.__getitems__(list(range(20)))
    assert torch.equal(labels, data.labels) and images.shape == (20, 3, 8, 8)
    expected = [40 * y + i for y in range(5) for i in range(COUNTS[y])]
    assert images[:, 2, 7, 7].tolist() == expected
    assert data[3][0].unique().tolist() == [41] and int(data[3][1]) == 1
    part = data.of_identities(torch.tensor([4, 1]))
    assert part.names == ["person 1", "person 4"]
    assert torch.cat(list(part.image_batches(4)))[:, 0, 0, 0].tolist() == [40, 41, 42, 160, 161, 162, 163, 164, 165]


def test_nested_folders_and_links(faces, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "0").symlink_to(faces)
    assert read_folder(tmp_path / "all").names == [f"0/person {y}" for y in range(5)]


def test_folder_errors(tmp_path, png):
    (tmp_path / "faces" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no folder below .* holds images"):
        read_folder(tmp_path / "faces")
    (tmp_path / "faces" / "a.png").write_bytes(png(random_image()))
    with pytest.raises(ValueError, match=r"images lie directly in .*faces \(a\.png"):
        read_folder(tmp_path / "faces")


class TestBroken:
    def test_skipped_counted_and_named(self, faces):
        (faces / "person 1" / "2.PNG").write_bytes(b"\x89PNG\r\n\x1a\n")
        data = load_data(str(faces), held_out=0, decoder=ImageDecoder(8)).train
        assert broken_report(data) is None
        with pytest.raises(BrokenImageError, match=r"person 1/2\.PNG is a broken image: .*remove or replace it"):
            data[4]
        (faces / "person 3" / "0.png").unlink()  # or a link that leads nowhere
        for _ in range(3):  # epochs: an image counts once
            images, labels = data.__getitems__(list(range(20)))
            assert len(images) == len(labels) == 18 and labels.bincount().tolist() == [2, 2, 4, 4, 6]
        assert data.broken(torch.arange(20)).nonzero().flatten().tolist() == [4, 9]
        assert broken_report(data).startswith("2 of 20 images are broken and were left out: /")
        assert broken_report(data.of_identities(torch.tensor([1]))).startswith("1 of 3 images")
        images, labels = data.__getitems__([4, 9])
        assert images.shape == (0, 3, 8, 8) and labels.shape == (0,)
        assert sum(map(len, data.image_batches(1))) == 18

    def test_raise(self, faces):
        (faces / "person 1" / "2.PNG").write_bytes(b"")
        data = open_data(str(faces), decoder=ImageDecoder(8), on_broken="raise")
        with pytest.raises(BrokenImageError, match=r"person 1/2\.PNG"):
            data.__getitems__([0, 4])
        with pytest.raises(ValueError, match="on_broken must be"):
            open_data(str(faces), on_broken="retry")

    def test_where_all_are_broken_it_is_not_the_images(self, faces):
        for path in faces.glob("*/*.[pP][nN][gG]"):
            path.write_bytes(b"BM a bitmap")
        with pytest.raises(ValueError, match=r"none of 8 images that were tried .*no JPEG, PNG or WebP"):
            load_data(str(faces))
        data = open_data(str(faces))
        with pytest.raises(BrokenImageError, match="no JPEG"):
            data.__getitems__(list(range(8)))


def test_load_data_splits_by_identity(faces):
    split = load_data(str(faces), held_out=2, seed=1)
    assert split.train.num_identities == 3 and split.held_out.num_identities == 2
    assert {*split.train.names, *split.held_out.names} == {f"person {y}" for y in range(5)}
    assert len(split.train) + len(split.held_out) == 20
    everyone = load_data(str(faces), held_out=0)
    assert len(everyone.train) == 20 and len(everyone.held_out) == 0
    nobody = load_data(str(faces), held_out=1)
    assert len(nobody.train) == 0 and len(nobody.held_out) == 20
    for held_out in (1.5, -1):
        with pytest.raises(ValueError, match="held_out is"):
            load_data(str(faces), held_out=held_out)


def test_load_data_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"unknown data set '.*nothing'; there are: glyphs, .* and paths of a folder"):
        load_data(str(tmp_path / "nothing"))


def ustar(name, data):
    """A member of a tar file, from the ustar layout."""
    head = struct.pack("100s8s8s8s12s12s8s1s100s8s", name.encode(), b"0000644", b"0", b"0", b"%011o" % len(data), b"0",
                       b" " * 8, b"0", b"", b"ustar\x0000").ljust(512, b"\0")  # fmt: skip
    head = head[:148] + b"%06o\0 " % sum(head) + head[156:]
    return head + data + bytes(-len(data) % 512)


END = bytes(1024)


def samples(png, labels, begin=0):
    return [
        ustar(f"./{begin + i:05d}.png", png(torch.full((3, 4, 4), begin + i, dtype=torch.uint8)))
        + ustar(f"./{begin + i:05d}.cls", f"{label}\n".encode())
        for i, label in enumerate(labels)
    ]


class TestShards:
    def test_numbers(self, tmp_path, png):
        (tmp_path / "009.tar").write_bytes(b"".join(samples(png, [10, 2, 2])) + END)
        (tmp_path / "010.tar").write_bytes(b"".join(samples(png, [10, 3], 3)))  # no zeros at the end: some tools do so
        for pattern in ("", "*.tar", "{009..010}.tar"):
            data = open_data(str(tmp_path / pattern), decoder=ImageDecoder(4))
            assert data.names == ["2", "3", "10"] and data.labels.tolist() == [2, 0, 0, 2, 1]
            assert data.__getitems__([4, 0, 2, 3])[0][:, 0, 0, 0].tolist() == [4, 0, 2, 3]
        assert isinstance(data, EncodedImages) and data.place(3).startswith(f"{tmp_path}/010.tar, image at byte 512")
        (tmp_path / "identities.txt").write_text("".join(f"name {i}\n" for i in range(11)))
        assert open_data(str(tmp_path)).names == ["name 2", "name 3", "name 10"]
        (tmp_path / "identities.txt").write_text("only one\n")
        with pytest.raises(ValueError, match="names 1 identities, none of them 10"):
            open_data(str(tmp_path))

    def test_names_and_json(self, tmp_path, png):
        image = png(random_image(4, 4))
        members = ustar("a/x.JPG", image) + ustar("a/x.json", json.dumps({"label": "zoë", "other": 1}).encode())
        members += ustar("b/x.txt", b"?") + ustar("b/x.cls", b"ann") + ustar("b/x.webp", image)
        (tmp_path / "x.tar").write_bytes(members + END)
        found = read_shards(str(tmp_path / "x.tar"))
        assert found.names == ["ann", "zoë"] and found.labels.tolist() == [1, 0]
        assert found.source.read(0) == found.source.read(1) == image

    def test_many_shards_in_processes(self, tmp_path, png, monkeypatch):
        monkeypatch.setattr("gif.data.shards._SHARDS_A_PROCESS", 2)
        monkeypatch.setattr("gif.data.shards.cpu_count", lambda: 2)
        for shard in range(4):
            (tmp_path / f"{shard}.tar").write_bytes(samples(png, [shard], shard)[0] + END)
        with parallel_config(backend="threading"):  # processes take seconds to start
            found = read_shards(str(tmp_path))
        assert found.labels.tolist() == [0, 1, 2, 3]
        job = pickle.dumps((_read_shard, MappedFile.find(tmp_path / "2.tar")))
        function, file = pickle.loads(job)
        assert pickle.loads(pickle.dumps(function(file))).identities == ["2"]

    def test_damage(self, tmp_path, png):
        path = tmp_path / "x.tar"
        whole = samples(png, [0, 1, 2])
        second = len(whole[0])
        content = b"".join(whole) + END
        for damaged, message in (
            (content[: second + 600], "damaged"),
            (content[:second] + b"?" + content[second + 1 :], f"damaged at byte {second:,}"),
            (b"not a tar file" * 99, "no plain tar file"),
            (b"", "no plain tar file"),
            (END, "hold no image"),
        ):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=message):
                read_shards(str(path))
        image = ustar("7.png", png(random_image(4, 4)))
        for label in (b"", ustar("7.cls", b" "), ustar("7.json", b"{}"), ustar("7.json", b"[1"), ustar("7.json", b"3")):
            path.write_bytes(image + label + END)
            with pytest.raises(ValueError, match=r"sample 7 has no label .*wanted 7\.cls"):
                read_shards(str(path))

    def test_missing(self, tmp_path, png):
        (tmp_path / "0.tar").write_bytes(samples(png, [0])[0] + END)
        with pytest.raises(FileNotFoundError, match=r"2 of 3 shards are missing, first .*1\.tar"):
            find_shards(str(tmp_path / "{0..2}.tar"))
        with pytest.raises(FileNotFoundError, match="no file is named"):
            find_shards(str(tmp_path / "*x.tar"))
        assert [path.name for path in find_shards(str(tmp_path / "{0..0}.tar"))] == ["0.tar"]
