"""Decoding, image folders, tar shards; files are made here byte by byte, or by Pillow."""

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zlib
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from joblib import parallel_config
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from gif.data import (
    BrokenImageError,
    EncodedImages,
    IdentityImages,
    ImageDecoder,
    broken_report,
    left_out,
    load_data,
    open_data,
    shared_memory,
)
from gif.data.encoded import check_identities
from gif.data.folder import read_folder
from gif.data.shards import _read_shard, find_shards, read_shards
from gif.data.shared_memory import check_workers
from gif.data.stored import MappedFile
from gif.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_image(height=8, width=8):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


def memory(kind):
    """Of this process, in kB: VmRSS what it has, VmHWM the most since 5 was written to clear_refs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


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
            assert ImageDecoder(1)(encoded).flatten().tolist() == [0x11] * 3  # of 16 bits the upper eight

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

    @pytest.mark.parametrize("tags", ["text for a width", "cut short", "no orientation", "an orientation of 9"])
    def test_metadata_decide_nothing_but_the_side_up(self, jpeg, tags):
        """EXIF with a tag that Pillow cannot write back, and EXIF that is damaged: the pixels are whole."""
        turn, width = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHII", 0x0100, 2, 4, 0x41424344)
        content = {
            "text for a width": b"\x02\0" + turn + width + bytes(4),
            "cut short": b"\xff\0" + turn[:7],
            "no orientation": b"\x01\0" + width + bytes(4),
            "an orientation of 9": b"\x01\0" + turn[:-4] + b"\x09\0\0\0" + bytes(4),
        }[tags]
        exif = b"Exif\0\0II*\0\x08\0\0\0" + content
        plain = jpeg(8, 8)
        marked = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
        straight = ImageDecoder(8)(plain)
        expected = straight.rot90(-1, (1, 2)) if tags == "text for a width" else straight
        assert torch.equal(ImageDecoder(8)(marked), expected)

    def test_a_damaged_text_in_a_png(self, png):
        image = random_image()
        whole = png(image)
        for kind in (b"tEXt", b"eXIf", b"iCCP", b"zTXt", b"iTXt"):
            chunk = struct.pack(">I", 5) + kind + b"a\0bcd" + bytes(4)  # a wrong checksum
            assert torch.equal(ImageDecoder(8)(whole[:33] + chunk + whole[33:]), image), kind

    @pytest.mark.parametrize(("format", "options"), [
        ("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"alpha": 1})
    ])  # fmt: skip
    def test_an_image_may_declare_so_many_pixels(self, format, options):
        """13,000 x 13,000 in a few hundred kilobytes: refused before memory is taken, and read where that is meant."""
        options = dict(options)
        mode = "RGBA" if options.pop("alpha", 0) else "L"
        sides = {}
        for side in (300, 13_000 if format == "PNG" else 8_000):
            file = io.BytesIO()
            Image.new(mode, (side, side)).save(file, format, **options)
            sides[side] = file.getvalue()
        small, large = sides.values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what is taken now
            before = memory("VmRSS")
            with pytest.raises(
                BrokenImageError, match=r"declares \d+,000 x .* pixels, more than 50,000,000; raise max_p"
            ):
                ImageDecoder(32)(large)
            assert memory("VmHWM") - before < 20_000  # kB
        assert ImageDecoder(32, max_pixels=300 * 300)(small).shape == (3, 32, 32)
        with pytest.raises(BrokenImageError, match="declares 300 x 300 = 90,000 pixels, more than 89,999"):
            ImageDecoder(32, max_pixels=300 * 300 - 1)(small)

    def test_where_memory_ends_no_image_is_broken(self, png, monkeypatch):
        def no_memory(*args, **kwargs):
            raise MemoryError

        monkeypatch.setattr(Image.Image, "convert", no_memory)
        with pytest.raises(MemoryError):
            ImageDecoder(8, channels=1)(png(random_image()))

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
        for options in ({"size": 0}, {"channels": 2}, {"fit": "stretch"}, {"max_pixels": 0}, {"max_pixels": 10**9}):
            with pytest.raises(ValueError, match="got"):
                ImageDecoder(**options)

    def test_where_pillow_has_no_limit(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert ImageDecoder(max_pixels=10**12).max_pixels == 10**12
        with pytest.raises(InputError, match="max_pixels must be at least 1, got 0"):
            ImageDecoder(max_pixels=0)


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
    images, labels = data.batch(list(range(20)))
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


class TestNothingInAFolderIsLostOrInvented:
    def test_folders_of_other_programs(self, faces):
        image = (faces / "person 0" / "0.png").read_bytes()
        for name in (".ipynb_checkpoints", "@eaDir", ".Trash-0/files", "__MACOSX", "person 1/.ipynb_checkpoints"):
            (faces / name).mkdir(parents=True)
            (faces / name / "0-checkpoint.png").write_bytes(image)
        (faces / "person 2" / "._0.png").write_bytes(b"AppleDouble")
        found = read_folder(faces)
        assert found.names == [f"person {y}" for y in range(5)] and found.labels.bincount().tolist() == COUNTS
        (line,) = [line for line in found.passed_over if "other programs" in line]
        assert line == (
            "files and folders passed over, hidden or of other programs: 6 (.Trash-0, .ipynb_checkpoints, @eaDir, ...)"
        )

    def test_links_are_followed_once(self, faces, tmp_path):
        """To a parent, to a sibling, to the folder that holds all, outside and from there back."""
        (faces / "person 1" / "all").symlink_to(faces)
        (faces / "person 9").symlink_to(faces / "person 1")
        (faces / "up").symlink_to(tmp_path)
        (tmp_path / "more" / "eve").mkdir(parents=True)
        (tmp_path / "more" / "eve" / "0.png").write_bytes((faces / "person 0" / "0.png").read_bytes())
        (tmp_path / "more" / "round").symlink_to(tmp_path / "more")
        (tmp_path / "more" / "home").symlink_to(faces)
        for name in ("x", "y"):
            (faces / name).symlink_to(tmp_path / "more")
        (faces / "itself").symlink_to(faces / "itself")
        found = read_folder(faces)
        assert found.names == [*(f"person {y}" for y in range(5)), "x/eve"]
        assert found.labels.bincount().tolist() == [*COUNTS, 1]
        assert "links passed over, to folders that are read where they are: 6 (person 1/all," in str(found.passed_over)
        assert "itself" in str(found.passed_over)

    def test_a_link_into_a_hidden_folder_is_followed(self, faces):
        (faces / ".store").mkdir()
        (faces / "person 4").rename(faces / ".store" / "4")
        (faces / "person 4").symlink_to(".store/4")
        assert read_folder(faces).labels.bincount().tolist() == COUNTS

    def test_other_formats_and_empty_folders(self, faces):
        for name in ("0.bmp", "0.tif", "0.gif", "0"):
            (faces / "person 3" / name).write_bytes(b"BM")
        (faces / "person 7").mkdir()
        (faces / "person 8").mkdir()
        (faces / "person 8" / "0.bmp").write_bytes(b"BM")
        passed = read_folder(faces).passed_over
        assert "files passed over, none of .jpg, .jpeg, .png, .webp: 7 (notes.txt, person 0/Thumbs.db," in passed[0]
        assert passed[1] == "folders without an image: 2 (person 7, person 8)"

    def test_they_are_named_to_whoever_asks(self, faces, gif):
        (faces / "person 7").mkdir()
        code, printed = gif("data", "inspect", "--data", faces)
        assert code == 0 and "every image can be decoded" in printed and "folders without an image: 1 (pers" in printed
        data = open_data(str(faces))
        assert broken_report(data) is None and "person 7" in left_out(data.of_identities(torch.tensor([0])))

    def test_a_folder_that_cannot_be_read(self, faces, monkeypatch):
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("person 3"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(InputError, match=r"person 3 cannot be read \(Permission denied\)"):
            read_folder(faces)

    def test_what_is_no_file_is_no_image(self, faces):
        os.mkfifo(faces / "person 0" / "pipe.png")  # to read from it is to wait for ever
        assert read_folder(faces).labels.bincount().tolist() == COUNTS

    def test_names_that_are_no_utf_8(self, faces):
        image = (faces / "person 0" / "0.png").read_bytes()
        folder = os.fsencode(faces) + b"/jos\xe9"
        os.mkdir(folder)
        for name, data in ((b"\xe9.png", image), (b"1.png", b"?")):
            with open(folder + b"/" + name, "wb") as file:
                file.write(data)
        data = open_data(str(faces), decoder=ImageDecoder(8))
        assert data.names[0] == "jos\\xe9"
        assert len(data.batch(list(range(len(data))))[0]) == 21
        assert broken_report(data).endswith("faces/jos\\xe9/1.png")
        assert isinstance(data, EncodedImages)
        assert data.place(1).encode().endswith(b"jos\\xe9/\\xe9.png")
        (faces / "jos\\xe9").mkdir()
        (faces / "jos\\xe9" / "0.png").write_bytes(image)
        with pytest.raises(InputError, match=r"two folders below .* are both called"):
            read_folder(faces)

    @pytest.mark.parametrize("place", ["", "train/"])
    @pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
    def test_an_imagefolder_with_metadata_is_refused(self, tmp_path, png, place, file):
        text = {"metadata.jsonl": '{"file_name": "0.png", "label": 3}\n', "metadata.csv": "file_name,label\n0.png,3\n"}
        (tmp_path / "hf" / "train").mkdir(parents=True)
        (tmp_path / "hf" / "train" / "0.png").write_bytes(png(random_image()))
        (tmp_path / "hf" / place / file).write_text(text[file])
        with pytest.raises(InputError, match=rf"{file} says whom the images show"):
            open_data(str(tmp_path / "hf"))
        (tmp_path / "hf" / place / file).write_text("key,colour\n1,red\n")  # of nobody's images
        assert open_data(str(tmp_path / "hf")).names == ["train"]


def test_folder_errors(tmp_path, png):
    (tmp_path / "faces" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no folder below .* holds images"):
        read_folder(tmp_path / "faces")
    (tmp_path / "faces" / "a.png").write_bytes(png(random_image()))
    with pytest.raises(ValueError, match=r"images lie directly in .*faces \(a\.png"):
        read_folder(tmp_path / "faces")


def test_labels_and_rows_are_whole_numbers():
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint32, torch.uint64):
        numbers = torch.tensor([1, 0]).to(dtype)
        data = IdentityImages(images, numbers, ["a", "b"], numbers)
        assert data.labels.dtype == torch.int64 and data.labels.tolist() == [1, 0]
        assert len(data.batch([0, 1])[0]) == 2
    for bad in (torch.tensor([1.0, 0.5]), torch.tensor([True, False])):
        with pytest.raises(TypeError, match="labels must be an integer tensor, got"):
            IdentityImages(images, bad, ["a", "b"])
        with pytest.raises(TypeError, match="rows must be an integer tensor, got"):
            IdentityImages(images, torch.tensor([1, 0]), ["a", "b"], bad)


def test_a_plain_loader(faces):
    """torch's own collate function, and the data set's: the same batches."""
    data = open_data(str(faces), decoder=ImageDecoder(8))
    for loader in (DataLoader(data, 64), DataLoader(data, 64, collate_fn=data.collate), DataLoader(data, None)):
        read = list(loader)
        images, labels = read[0] if len(read) == 1 else map(torch.stack, zip(*read, strict=True))
        assert torch.equal(images, data.batch(list(range(20)))[0]) and torch.equal(labels, data.labels)
    memory = IdentityImages(images, labels, data.names)
    (batch,) = DataLoader(memory, 64)
    assert torch.equal(batch[0], images) and torch.equal(batch[1], labels)
    pairs = memory.__getitems__([3, 1])
    assert len(list(pairs)) == 2 and torch.equal(pairs[1][0], images[1]) and pairs[0][1] == labels[3]
    assert memory.collate(pairs)[0] is memory.collate(pairs)[0]  # as it was read
    (faces / "person 1" / "2.PNG").write_bytes(b"")
    sizes = [len(labels) for _, labels in DataLoader(data, 4)]
    assert sizes == [4, 3, 4, 4, 4]
    with pytest.raises(InputError, match=r"none of the images of a batch can be read; give the DataLoader collate_fn"):
        list(DataLoader(data, 1))
    assert [len(labels) for _, labels in DataLoader(data, 1, collate_fn=data.collate)].count(0) == 1


class TestBroken:
    def test_identities_of_which_all_are(self, faces):
        for path in (faces / "person 1").iterdir():
            path.write_bytes(b"?")
        data = open_data(str(faces), decoder=ImageDecoder(8))
        data.batch(list(range(20)))
        assert broken_report(data).endswith("\n1 identities have no image that can be read: person 1")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_found_before_work_that_needs_each(self, faces, workers):
        for path in [*(faces / "person 1").iterdir(), faces / "person 2" / "0.png", faces / "person 2" / "1.PNG"]:
            path.write_bytes(b"?")
        data = open_data(str(faces), decoder=ImageDecoder(8))
        assert isinstance(data, EncodedImages)
        with pytest.raises(InputError, match=r"identities without an image that can be read: 1 \(person 1\); replace"):
            check_identities(data, torch.arange(20), workers)
        assert int(data.broken(torch.arange(20)).sum()) == 5
        check_identities(data, (data.labels != 1).nonzero().flatten(), workers)

    def test_skipped_counted_and_named(self, faces):
        (faces / "person 1" / "2.PNG").write_bytes(b"\x89PNG\r\n\x1a\n")
        data = load_data(str(faces), held_out=0, decoder=ImageDecoder(8)).train
        assert broken_report(data) is None
        with pytest.raises(BrokenImageError, match=r"person 1/2\.PNG is a broken image: .*remove or replace it"):
            data[4]
        (faces / "person 3" / "0.png").unlink()  # or a link that leads nowhere
        for _ in range(3):  # epochs: an image counts once
            images, labels = data.batch(list(range(20)))
            assert len(images) == len(labels) == 18 and labels.bincount().tolist() == [2, 2, 4, 4, 6]
        assert data.broken(torch.arange(20)).nonzero().flatten().tolist() == [4, 9]
        assert broken_report(data).startswith("2 of 20 images are broken and were left out: /")
        assert broken_report(data.of_identities(torch.tensor([1]))).startswith("1 of 3 images")
        images, labels = data.batch([4, 9])
        assert images.shape == (0, 3, 8, 8) and labels.shape == (0,)
        assert sum(map(len, data.image_batches(1))) == 18

    def test_raise(self, faces):
        (faces / "person 1" / "2.PNG").write_bytes(b"")
        data = open_data(str(faces), decoder=ImageDecoder(8), on_broken="raise")
        with pytest.raises(BrokenImageError, match=r"person 1/2\.PNG"):
            data.batch([0, 4])
        with pytest.raises(ValueError, match="on_broken must be"):
            open_data(str(faces), on_broken="retry")  # type: ignore[arg-type]

    def test_where_all_are_broken_it_is_not_the_images(self, faces):
        for path in faces.glob("*/*.[pP][nN][gG]"):
            path.write_bytes(b"BM a bitmap")
        with pytest.raises(ValueError, match=r"none of 8 images that were tried .*no JPEG, PNG or WebP"):
            load_data(str(faces))
        data = open_data(str(faces))
        with pytest.raises(BrokenImageError, match="no JPEG"):
            data.batch(list(range(8)))


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


@pytest.mark.parametrize("identities", [4, 5])
def test_any_number_of_the_identities_in_both_parts(faces, identities):
    """Also all but one of a part, of which a split by number would leave too few."""
    split = load_data(str(faces), identities=identities, held_out=0.5)
    found = split.train.num_identities, split.held_out.num_identities
    assert min(found) >= 2 and abs(sum(found) - identities) <= 1
    whole = load_data(str(faces), held_out=0.5)
    assert set(split.train.names) <= set(whole.train.names)


def test_load_data_says_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nothing; give the path of a folder"):
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
        (tmp_path / "010.tar").write_bytes(b"".join(samples(png, [10, 3], 3)) + END)
        for pattern in ("", "*.tar", "{009..010}.tar"):
            data = open_data(str(tmp_path / pattern), decoder=ImageDecoder(4))
            assert data.names == ["2", "3", "10"] and data.labels.tolist() == [2, 0, 0, 2, 1]
            assert data.batch([4, 0, 2, 3])[0][:, 0, 0, 0].tolist() == [4, 0, 2, 3]
        assert isinstance(data, EncodedImages) and data.place(3).startswith(f"{tmp_path}/010.tar, image at byte 512")
        (tmp_path / "identities.txt").write_text("".join(f"name {i}\n" for i in range(11)))
        data = open_data(str(tmp_path))
        assert data.names == ["name 2", "name 3", "name 10"]
        assert "names in identities.txt of nobody with an image: 8 (name 0, name 1, name 4, ...)" in left_out(data)
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

    def test_brackets_in_a_name_are_themselves(self, tmp_path, png):
        folder = tmp_path / "faces [v3] {a}"
        folder.mkdir()
        for name in ("0.tar", "1.tar"):
            (folder / name).write_bytes(samples(png, [0])[0] + END)
        for pattern in (folder, folder / "*.tar", folder / "{0..1}.tar", folder / "{0..1}*.tar"):
            assert len(open_data(str(pattern))) == 2, pattern

    def test_compressed_ones_are_refused(self, tmp_path, png, gif):
        for name in ("0.tar.gz", "0.tgz", "{0..3}.tar.zst"):
            code, printed = gif("data", "inspect", "--data", tmp_path / name)
            assert code == 1 and f"{name} is compressed" in printed and "decompress it" in printed
        (tmp_path / "only").mkdir()
        (tmp_path / "only" / "0.tar.gz").write_bytes(b"\x1f\x8b")
        with pytest.raises(InputError, match=r"holds images .*0\.tar\.gz"):
            open_data(str(tmp_path / "only"))
        (tmp_path / "only" / "1.tar").write_bytes(samples(png, [0])[0] + END)
        only: Any = open_data(str(tmp_path / "only"))
        assert only.passed_over == ("passed over beside the shards: 1 (0.tar.gz)",)


class TestNothingInAShardIsLostOrInvented:
    def read(self, tmp_path, *members):
        (tmp_path / "0.tar").write_bytes(b"".join(members) + END)
        found = read_shards(str(tmp_path / "0.tar"))
        return [found.names[label] for label in found.labels.tolist()], found

    def test_names_with_several_dots(self, tmp_path, png):
        """webdataset's key ends at the first dot; whoever writes y.0001.jpg has one that ends at the last."""
        a, b, c, d = (png(random_image(4, 4)) for _ in range(4))
        names, found = self.read(tmp_path, ustar("x.jpg", a), ustar("x.cls", b"0"), ustar("y.0001.jpg", b),
            ustar("y.0001.cls", b"1"), ustar("y.0002.jpg", c), ustar("y.0002.cls", b"2"), ustar("z.in.png", a),
            ustar("z.out.png", d), ustar("z.cls", b"3"))  # fmt: skip
        assert names == ["0", "1", "2", "3", "3"]
        assert [found.source.read(row) for row in range(5)] == [a, b, c, a, d]

    def test_names_that_come_again(self, tmp_path, png):
        a, b, c = (png(random_image(4, 4)) for _ in range(3))
        zero, one = ustar("0.cls", b"0"), ustar("0.cls", b"1")
        names, found = self.read(tmp_path, ustar("0.jpg", a), zero, ustar("0.jpg", b), one, ustar("2.jpg", c),
            ustar("2.cls", b"1"), ustar("0.jpg", c), zero)  # fmt: skip
        assert names == ["0", "1", "1", "0"]
        assert [found.source.read(row) for row in range(4)] == [a, b, c, c]
        with pytest.raises(ValueError, match="sample 0 has no label"):
            self.read(tmp_path, ustar("0.jpg", a), ustar("0.jpg", b), zero, one)
        names, _ = self.read(tmp_path, ustar("1.jpg", a), ustar("0.jpg", b), ustar("1.cls", b"7"), zero)
        assert names == ["7", "0"]  # labels after all images

    def test_links(self, tmp_path, png):
        """A hard link, a symbolic one, and one to a link: made by tar itself."""
        image = png(random_image(4, 4))
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "0.png").write_bytes(image)
        (tmp_path / "in" / "0.cls").write_bytes(b"ann")
        for ending in ("png", "cls"):
            os.link(tmp_path / "in" / f"0.{ending}", tmp_path / "in" / f"1.{ending}")
            (tmp_path / "in" / f"2.{ending}").symlink_to(f"0.{ending}")
            (tmp_path / "in" / f"3.{ending}").symlink_to(f"../in/2.{ending}")
        with tarfile.open(tmp_path / "0.tar", "w") as archive:
            archive.add(tmp_path / "in", "in")
            kinds = {member.type for member in archive.getmembers()}
        assert {tarfile.LNKTYPE, tarfile.SYMTYPE} <= kinds
        found = read_shards(str(tmp_path))
        assert found.labels.tolist() == [0] * 4 and {found.source.read(row) for row in range(4)} == {image}
        lonely = tarfile.TarInfo("4.png")
        lonely.type, lonely.linkname = tarfile.SYMTYPE, "elsewhere.png"
        with tarfile.open(tmp_path / "0.tar", "a") as archive:
            archive.addfile(lonely)
        with pytest.raises(InputError, match=r"4\.png is a link to elsewhere\.png, which is not in the shard"):
            read_shards(str(tmp_path))

    def test_what_is_neither_file_nor_link(self, tmp_path):
        for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, b"M"):
            member = tarfile.TarInfo("0.jpg")
            member.type = kind
            (tmp_path / "0.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + END)
            with pytest.raises(InputError, match="sparse file, a device or of an unknown type"):
                read_shards(str(tmp_path))

    def test_what_is_no_part_of_a_sample_is_named(self, tmp_path, png):
        image = png(random_image(4, 4))
        names, found = self.read(tmp_path, ustar("0.png", image), ustar("0.cls", b"0"), ustar("1.bmp", b"BM"),
            ustar("1.cls", b"1"), ustar("__MACOSX/._0.png", b"x"), ustar("._0.png", b"x"),
            ustar("0.txt", b"?"))  # fmt: skip
        assert names == ["0"]
        assert found.passed_over == (
            "files in shards passed over, neither .jpg, .jpeg, .png, .webp nor .cls or .json: 2 (1.bmp, 0.txt)",
            "files in shards passed over, of other programs: 2 (__MACOSX/._0.png, ._0.png)",
            "labels in shards without an image: 1 (1)",
        )
        assert read_shards(str(tmp_path / "0.tar")).passed_over == found.passed_over  # from the cache
        assert "labels in shards without an image" in left_out(open_data(str(tmp_path)))

    def test_a_label_of_zeros(self, tmp_path, png):
        with pytest.raises(InputError, match="sample 0 has no label"):
            self.read(tmp_path, ustar("0.png", png(random_image(4, 4))), ustar("0.cls", bytes(2)))

    @pytest.mark.parametrize("label", ["null", "true", "[1]", "{}", "1.5", "NaN", '""', '"\\ud800"'])
    def test_a_label_is_text_or_a_whole_number(self, tmp_path, png, label):
        image = png(random_image(4, 4))
        text = f'{{"label": {label}}}'.encode()
        with pytest.raises(InputError, match="sample 0 has no label"):
            self.read(tmp_path, ustar("0.png", image), ustar("0.json", text))

    def test_labels_in_json(self, tmp_path, png):
        image, names = png(random_image(4, 4)), ["3", "3.0", '"ann"']
        members = [
            ustar(f"{i}.png", image) + ustar(f"{i}.json", f'{{"label": {v}}}'.encode()) for i, v in enumerate(names)
        ]
        assert self.read(tmp_path, *members)[0] == ["3", "3", "ann"]
        assert self.read(tmp_path, ustar("0.png", image), ustar("0.cls", b"\xef\xbb\xbfann\n"))[0] == ["ann"]

    @pytest.mark.parametrize("padded", [False, True])
    def test_an_archive_that_was_cut_or_filled_with_zeros(self, tmp_path, png, padded):
        """At each block: an error, or every image is there. Only what is as it would have been made is taken."""
        content = b"".join(samples(png, range(12))) + END
        content += bytes(-len(content) % tarfile.RECORDSIZE) if padded else b""
        path = tmp_path / "0.tar"
        path.write_bytes(content)
        assert len(read_shards(str(path)).labels) == 12
        data = len(b"".join(samples(png, range(12))))
        for place in range(0, len(content), 512):
            for damaged in (content[:place], content[:place] + bytes(len(content) - place)):
                if damaged == content:
                    continue
                path.write_bytes(damaged)
                try:
                    found = read_shards(str(path))
                except InputError:
                    continue
                fewer = b"".join(samples(png, range(len(found.labels)))) + END
                fewer += bytes(-len(fewer) % tarfile.RECORDSIZE) if padded else b""
                assert len(found.labels) == 12 or (padded and damaged == fewer), place
            hole = content[:place] + bytes(512) + content[place + 512 :]
            if place % 1024 == 0 and place < data:  # a header, of members of a block each
                path.write_bytes(hole)
                with pytest.raises(InputError, match=r"0\.tar"):
                    read_shards(str(path))

    def test_archives_behind_each_other(self, tmp_path, png):
        whole = samples(png, [0])[0] + END
        for between in (b"", bytes(512), bytes(10240)):
            (tmp_path / "0.tar").write_bytes(whole + between + whole)
            with pytest.raises(InputError, match=r"goes on for .* bytes where it seems to end"):
                read_shards(str(tmp_path))


class TestSharedMemory:
    def test_workers_need_room(self, faces, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage(64e6, 0, 64e6))
        check_workers(0, 10**6, (3, 112, 112))
        check_workers(2, 256, (3, 112, 112))  # 5 batches of 9.6 MB
        with pytest.raises(
            InputError, match=r"/dev/shm has 64 MB free, and 4 workers read 9 batches of 256 images ahead: 87"
        ):
            check_workers(4, 256, (3, 112, 112))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(InputError, match="10 batches of 256"):
            check_workers(2, 256, (3, 112, 112))

    def test_every_command_looks_first(self, faces, gif, monkeypatch, tmp_path):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage(1e5, 0, 1e5))
        data = ("--data", faces, "--held_out", "2")
        backbone = ("--backbone.image_size=112", "--backbone.channels=3", "--backbone.width=4")
        for arguments in (
            ("data", "inspect", "--data", faces, "--workers", "1"),
            ("vectors", *data, "--output", tmp_path / "v.safetensors", "--width", "4", "--workers", "1"),
            ("train", *data, "--output", tmp_path / "run", "--head.kind=softmax", "--training.batch_size=4",
             "--training.workers=1", *backbone),
        ):  # fmt: skip
            code, printed = gif(*arguments)
            assert code == 1 and "/dev/shm has 0 MB free, and 1 workers" in printed, printed
            assert "docker run --shm-size" in printed
        monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage(1, 0, 1))
        with pytest.raises(InputError, match="20 images take a byte each there"):
            open_data(str(faces))


def test_images_that_are_kept_are_decoded_once(tmp_path, png):
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").write_bytes(png(torch.randint(256, (3, 9, 9), dtype=torch.uint8)))
    data = open_data(str(tmp_path), decoder=ImageDecoder(8))
    assert isinstance(data, EncodedImages)
    before = data.batch([0, 1, 2])[0]
    assert not data.keep(3 * 3 * 64 - 1) and data.keep(3 * 3 * 64)
    assert torch.equal(data.batch([2, 0])[0], before[[2, 0]])
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    assert torch.equal(data.batch([0, 2])[0], before[[0, 2]])  # as they were
    with pytest.raises(BrokenImageError):
        data[1]  # which was never decoded since
