"""What tests of several modules share."""

import io

import pytest
import torch
from PIL import Image

from benchmarks.campaign.inputs import write_ijb, write_python2_bin
from gif import cli
from gif.data import IdentityImages, IdentitySplit
from gif.data.glyphs.halves import MIN_DRAWINGS, Halves, group_alike
from gif.evaluation import command as evaluate_module
from gif.experiments import glyph_bench
from gif.progress import console
from gif.training import command as training_command
from gif.vectors import commands as vectors_commands


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
def make_halves():
    """Random drawings, 4 to 15 of a letter."""

    def make(seed: int, letters: int = 40, size: int = 8, begin: int = 0x4E00) -> Halves:
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(MIN_DRAWINGS, 16, (letters,), generator=generator)
        ends = counts.cumsum(0)
        drawings = torch.randint(256, (int(ends[-1]), size, size // 2), dtype=torch.uint8, generator=generator)
        return Halves(drawings, ends, "".join(map(chr, range(begin, begin + letters))), group_alike(drawings, ends))

    return make


@pytest.fixture(scope="session")
def tiny_images():
    """(number of identities, seed, first name) -> images that tell them apart, 6 each, 16 x 16."""

    def make(identities: int, seed: int, first: str = "a") -> IdentityImages:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(identities).repeat(6)
        patterns = torch.randint(0, 200, (identities, 1, 16, 16), generator=generator)
        noise = torch.randint(0, 55, (len(labels), 1, 16, 16), generator=generator)
        names = [chr(ord(first) + i) for i in range(identities)]
        return IdentityImages((patterns[labels] + noise).to(torch.uint8), labels, names)

    return make


@pytest.fixture
def tiny_data(tiny_images, monkeypatch):
    """Commands find some of them, whatever data set they are given."""
    split = IdentitySplit(train=tiny_images(24, 0), held_out=tiny_images(12, 1, "A"))
    for module in (vectors_commands, training_command, evaluate_module, glyph_bench):
        monkeypatch.setattr(module, "load_data", lambda name, **options: split)
    return split


@pytest.fixture(scope="session")
def write_benchmark():
    """(folder, "ijbb" or "ijbc", its galleries) -> folder."""
    return write_ijb


@pytest.fixture(scope="session")
def write_bin():
    """(path, encoded images, issame) -> path."""
    return write_python2_bin


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
                code = stop.code  # type: ignore[assignment]
        return code, capture.get()

    return run
