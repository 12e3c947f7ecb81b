"""Verification .bin files: pickles of both Pythons, written here opcode by opcode, and what must not be unpickled."""

import pickle
import struct

import numpy as np
import pytest
import torch

from gif.data import BrokenImageError, ImageDecoder, read_bin
from gif.data.convert import convert
from gif.data.pairs import read_pairs

IMAGES = [b"first", b"second \x80\xff", b"third" * 99, b""]
ISSAME = [True, False]


def python2(images, issame, arrays=False):
    """What Python 2's cPickle writes at protocol 2: its str are BINSTRING, its arrays hold str."""

    def text(data):
        return b"T" + struct.pack("<i", len(data)) + data

    def array(data):
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        return new + b"(K\x01(J" + struct.pack("<i", len(data)) + b"t" + dtype + b"\x89" + text(data) + b"tb"

    items = b"".join(map(array if arrays else text, images))
    flags = b"".join(b"\x88" if same else b"\x89" for same in issame)
    return b"\x80\x02(](" + items + b"e](" + flags + b"et."


def write(folder, content):
    (folder / "lfw.bin").write_bytes(content)
    return folder / "lfw.bin"


@pytest.mark.parametrize("arrays", [False, True])
def test_python_2(tmp_path, arrays):
    pairs = read_bin(write(tmp_path, python2(IMAGES, ISSAME, arrays)))
    assert pairs.encoded == IMAGES and pairs.issame.tolist() == ISSAME and pairs.issame.dtype == torch.bool


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["bytes", "arrays", "array of objects", "numbers"])
def test_python_3(tmp_path, protocol, kind):
    arrays = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
    content = {
        "bytes": (IMAGES, ISSAME),
        "arrays": [arrays, [np.bool_(same) for same in ISSAME]],
        "array of objects": (np.array([*IMAGES, None], dtype=object)[:-1], np.array(ISSAME)),
        "numbers": (tuple(IMAGES), [1, 0]),
    }[kind]
    pairs = read_bin(write(tmp_path, pickle.dumps(content, protocol)))
    assert pairs.encoded == IMAGES and pairs.issame.tolist() == ISSAME


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil",
    [
        Evil(print, "ran"),
        Evil(eval, "print('ran')"),
        Evil(__import__("os").system, "echo ran"),
        Evil(np.load, "lfw.bin"),
        Evil(getattr, "x", "upper"),
        Evil(__import__("codecs").encode, "ran", "rot13"),
    ],
)
def test_nothing_else_is_unpickled(tmp_path, capfd, evil):
    path = write(tmp_path, pickle.dumps(([evil, b""], [True])))
    with pytest.raises(ValueError, match=r"no verification \.bin file: (it refers to|the codec rot13)"):
        read_bin(path)
    assert "ran" not in capfd.readouterr().out


def test_damage(tmp_path):
    whole = pickle.dumps((IMAGES, ISSAME))
    for content in (b"", whole[:-40], whole[:1], b"\x80\x04" + b"\xff" * 30, b"not a pickle", python2(IMAGES, [])[:-9]):
        with pytest.raises(ValueError, match=r"lfw\.bin is damaged, or no verification \.bin file"):
            read_bin(write(tmp_path, content))
    for content, message in (
        (IMAGES, "no two lists"),
        ({"bins": IMAGES}, "no two lists"),
        ((IMAGES, 2), "no two lists"),
        ((IMAGES, [True]), "4 images and 1 truth values; wanted 2n"),
        (([], []), "0 images and 0 truth values"),
        (([1, b""], [True]), "image 0 is a int, wanted bytes"),
        (([b"", np.zeros((2, 2), np.uint8)], [True]), "image 1 is a ndarray"),
        (([b"", np.zeros(2)], [True]), "image 1 is a ndarray"),
        (([b"", b""], [2]), "truth value 0 is 2"),
        (([b"", b""], [None]), "truth value 0 is None"),
    ):
        with pytest.raises(ValueError, match=message):
            read_bin(write(tmp_path, pickle.dumps(content)))
    with pytest.raises(FileNotFoundError):
        read_bin(tmp_path / "none.bin")


@pytest.fixture
def people(tmp_path, png):
    """Images name/name_0001.png and so on of two people, each of one colour."""
    for y, name in enumerate(("Ann", "Bob")):
        (tmp_path / name).mkdir()
        for i in (1, 2):
            image = torch.full((3, 4, 4), 100 * y + i, dtype=torch.uint8)
            (tmp_path / name / f"{name}_000{i}.png").write_bytes(png(image))
    return tmp_path


@pytest.mark.parametrize(
    "lines",
    [
        "Ann/Ann_0001.png Ann/Ann_0002.png 1\nBob/Bob_0001.png\tAnn/Ann_0002.png\t0\n",
        "1\t300\nAnn\t1\t2\nBob\t1\tAnn\t2\n",
    ],
)
def test_from_a_folder_and_pairs(people, lines):
    (people / "pairs.txt").write_text(lines)
    convert(str(people), people / "own.bin", pairs=people / "pairs.txt")
    pairs = read_bin(people / "own.bin")
    assert pairs.issame.tolist() == [True, False]
    batches = list(pairs.batches(3, ImageDecoder(4)))
    assert [len(batch) for batch in batches] == [3, 1]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [1, 2, 101, 2]
    images, issame = pickle.loads((people / "own.bin").read_bytes(), encoding="bytes")  # as insightface reads it
    assert images == pairs.encoded and issame == [True, False]


def test_pair_errors(people):
    path = people / "pairs.txt"
    for text, message in (("", "names no pair"), ("1 300\n\nAnn 1 Bob\n", "line 3: 'Ann 1 Bob'"), ("a b 2", "line 1")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pairs(path, people)
    path.write_text("Ann 1 7\n")
    with pytest.raises(FileNotFoundError, match=r"Ann_0007\.jpg"):
        convert(str(people), people / "own.bin", pairs=path)
    assert not (people / "own.bin").exists()


def test_a_broken_image_is_named(tmp_path, png):
    image = png(torch.zeros(3, 4, 4, dtype=torch.uint8))
    pairs = read_bin(write(tmp_path, pickle.dumps(([image] * 3 + [image[:40]], ISSAME))))
    with pytest.raises(BrokenImageError, match="image 1 of pair 1 is broken"):
        list(pairs.batches(2, ImageDecoder(4)))
