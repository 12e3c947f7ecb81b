"""What tests of several modules share."""

import io

import pytest
import torch
from PIL import Image

from benchmarks.campaign.inputs import write_ijb, write_python2_bin
from gif import cli
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
