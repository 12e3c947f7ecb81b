"""What tests of several modules share."""

import io
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from gif import cli
from gif.evaluation.alignment import FIVE_POINTS
from gif.progress import console

PEOPLE, TEMPLATES_EACH, IMAGES_EACH = 6, 2, 3
HEADER = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"


@pytest.fixture
def png():
    """An image (3, h, w) uint8 as PNG, by Pillow: no pixel changes."""

    def encode(image, format="PNG"):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, format)
        return file.getvalue()

    return encode


@pytest.fixture
def jpeg(png):
    """A random JPEG, 112 x 112 unless another size is given."""
    return lambda height=112, width=112: png(torch.randint(256, (3, height, width), dtype=torch.uint8), "JPEG")


@pytest.fixture(scope="session")
def write_benchmark():
    """Files of IJB's form, written byte by byte: (folder, "ijbb" or "ijbc", its galleries) -> folder."""

    def write(folder, name, galleries):
        """Noisy pictures of six people, two templates each, three images a template in two media."""
        rng = np.random.default_rng(4)
        (folder / "loose_crop").mkdir(parents=True)
        (folder / "meta").mkdir()
        patterns = rng.integers(0, 60, (PEOPLE, 30, 30, 3))
        members, points = [], []
        for number in range(PEOPLE * TEMPLATES_EACH * IMAGES_EACH):
            template = number // IMAGES_EACH
            person = template // TEMPLATES_EACH
            picture = (patterns[person] + rng.integers(0, 150, (30, 30, 3))).astype(np.uint8)
            size = (100 + number, 120 - number)
            Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(
                folder / "loose_crop" / f"{number + 1}.jpg", quality=95
            )
            members.append(f"{number + 1}.jpg {template + 1} {1000 + number % 2}\n")
            landmarks = FIVE_POINTS.numpy() / 112 * size + rng.normal(size=(5, 2))
            points.append(
                f"{number + 1}.jpg " + " ".join(f"{x:.3f}" for x in landmarks.ravel()) + f" {rng.random():.4f}\n"
            )
        templates = range(1, PEOPLE * TEMPLATES_EACH + 1)
        pairs = [f"{a} {b} {int((a - 1) // 2 == (b - 1) // 2)}\n" for a in templates for b in templates if a < b]
        files = {
            f"{name}_face_tid_mid.txt": "".join(members),
            f"{name}_name_5pts_score.txt": "".join(points),
            f"{name}_template_pair_label.txt": "".join(pairs),
            f"{name}_1N_gallery_{galleries[0]}.csv": f"{HEADER}1,101,a.jpg\n1,101,b.jpg\n3,102,c.jpg\n",
            f"{name}_1N_gallery_{galleries[1]}.csv": f'{HEADER}5,103,"d,e.jpg"\n7,104,f.jpg\n',
            f"{name}_1N_probe_mixed.csv": HEADER + "".join(f"{t},{101 + (t - 1) // 2},x\r\n" for t in range(2, 13, 2)),
        }
        for file, text in files.items():
            (folder / "meta" / file).write_bytes(text.encode("ascii"))
        return folder

    return write


@pytest.fixture(scope="session")
def write_bin():
    """A verification .bin file as Python 2 writes it, opcode by opcode: (path, encoded images, issame) -> path."""

    def write(path, images, issame):
        strings = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
        flags = b"".join(b"\x88" if same else b"\x89" for same in issame)
        path.write_bytes(b"\x80\x02(](" + strings + b"e](" + flags + b"et.")
        assert pickle.loads(path.read_bytes(), encoding="bytes") == (list(images), [bool(same) for same in issame])
        return path

    return write


@pytest.fixture
def gif(monkeypatch):
    """Run `gif arguments...` in this process; returns the exit code and what was printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["gif", *map(str, arguments)])
        with console.capture() as capture:
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code
        return code, capture.get()

    return run
