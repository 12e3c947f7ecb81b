"""What tests of several modules share."""

import io

import pytest
import torch
from PIL import Image

from benchmarks.campaign.inputs import write_ijb, write_python2_bin
from gif import cli
from gif.data.glyphs.halves import MIN_DRAWINGS, Halves, group_alike
from gif.progress import console


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
