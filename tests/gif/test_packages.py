"""What works where next to nothing is installed: on a machine with a GPU, a checkout, torch and NumPy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gif
import gif_kernels
from gif.errors import InputError, UnavailableError
from gif.packages import needs

ROOT = Path(__file__).parents[2]
MODULES = {
    "open_clip_torch": "open_clip",
    "nvidia-ml-py": "pynvml",
    "fonttools": "fontTools",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
PRESENT = ("torch", "triton", "numpy", "filelock")  # filelock is torch's own dependency


def absent() -> list[str]:
    """The modules of all dependencies but those that are there, and of what the tests and benchmarks alone need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[>;\[]", line)[0] for line in project["dependencies"]}
    assert needed == {"torch", "triton", "numpy"}
    names = [re.split(r"[>;\[]", line)[0] for line in project["optional-dependencies"]["train"]]
    assert {"rich", "jsonargparse", "timm"} <= set(names)
    return [MODULES.get(name, name) for name in names if name not in PRESENT] + ["ortools", "faiss", "pandas"]


def run_bare(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in an interpreter where none of `absent` can be imported."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({absent()!r}))\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", block + code], env=environment, capture_output=True, text=True)


STEP = """
import torch
import gif, gif_kernels
generator = torch.Generator().manual_seed(0)
table = torch.randn(40, 16, generator=generator)
codes = gif.IdentityCodes(torch.cartesian_prod(torch.arange(7), torch.arange(7))[:40].to(torch.uint8), 7)
loss_fn = gif.GIFLoss(codes, gif.CodeVectors(table), embedding_size=16)
embeddings = torch.randn(8, 16, generator=generator, requires_grad=True)
loss = loss_fn(embeddings, torch.arange(8))
loss.backward()
assert loss.isfinite() and embeddings.grad.abs().sum() > 0 and loss_fn.centers.grad.abs().sum() > 0
softmax = gif.MarginSoftmax(40, 16)
softmax(embeddings, torch.arange(8)).backward()
assert softmax.weight.grad.abs().sum() > 0
sampled = gif.PartialFC(40, 16, samples=10)
sampled(embeddings, torch.arange(8)).backward()
assert sampled.momentum.abs().sum() > 0
assert len(gif.tokenize(table, gif.TokenizeConfig(vocab_size=7, alignment="none"))) == 40
"""

TRAINING = """
from torch import nn
from gif.data import IdentityImages
from gif.training import TrainingConfig, train
pixels = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8)
images = IdentityImages(pixels, torch.arange(40), [str(i) for i in range(40)])
backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 16))
log = train(backbone, loss_fn, images, TrainingConfig(epochs=2, batch_size=20), augment=lambda pixels: pixels)
assert log.losses.isfinite().all() and len(log.losses) == 4
"""


def test_a_step_without_optional_packages():
    done = run_bare(STEP)
    assert done.returncode == 0, done.stderr


def test_training_without_optional_packages():
    done = run_bare(STEP + TRAINING)
    assert done.returncode == 0, done.stderr
    assert "training: 80/80 images" in done.stdout


NEEDS = {
    "gif.tokenize(torch.randn(40, 16), gif.TokenizeConfig(vocab_size=7))": "scipy",
    "from gif.data import glyphs; glyphs()": "matplotlib",
    "from gif.data.glyphs.drawing import font_characters; font_characters('font.ttf')": "fonttools",
    "from gif.data.glyphs.drawing import open_font; open_font('font.ttf', 8)": "pillow",
    "from gif.data import ImageDecoder; ImageDecoder()(b'')": "pillow",
    "from gif.data.shards import _find_images; _find_images([])": "joblib",
    "from gif.evaluation import roc; roc([0.0, 1.0], [False, True])": "scikit-learn",
    "from gif.vectors import judge_vectors; judge_vectors(torch.randn(9, 4))": "scipy",
    "from gif.encoders import CLIPEncoder; CLIPEncoder()": "open_clip_torch",
    "from gif.encoders import DINOEncoder; DINOEncoder()": "timm",
    "from gif.backbones import BackboneConfig; BackboneConfig(name='vit').build()": "timm",
    "from gif.plotting import figure; figure()": "matplotlib",
    "from gif.progress import new_table; new_table()": "rich",
    "from gif.cli import _run; _run([])": "jsonargparse",
}


def test_what_needs_a_package_names_it():
    """One interpreter for all: starting it takes most of the time."""
    code = "import torch\nimport gif\nfrom gif.errors import InputError\n"
    for use in NEEDS:
        code += f"try:\n    exec({use!r})\nexcept InputError as error:\n    print(error)\n"
        code += "except BaseException as error:\n    print(repr(error))\nelse:\n    print('ran')\n"
    done = run_bare(code)
    lines = done.stdout.splitlines()
    assert len(lines) == len(NEEDS), done.stderr
    for (use, package), line in zip(NEEDS.items(), lines, strict=True):
        assert f"the package {package}" in line, f"{use}: {line}"
        assert f"pip install '{package}" in line, f"{use}: {line}"


def test_an_extra_of_this_project_is_all_that_is_named():
    told = {
        "gif-recognition[export]": "; pip install 'gif-recognition[export]'",
        "pillow": "; pip install 'pillow', or all that training needs: pip install 'gif-recognition[train]'",
    }
    for package, end in told.items():
        with pytest.raises(UnavailableError) as missing, needs(package, "pictures"):
            raise ModuleNotFoundError("No module named 'x'")
        assert str(missing.value).endswith(end)


def test_the_command_line_says_what_is_missing_in_a_line():
    done = run_bare("from gif.cli import main\nmain()")
    assert done.returncode == 1
    assert done.stdout.startswith("error: the command line: the package jsonargparse[signatures] is needed")
    assert "Traceback" not in done.stdout + done.stderr


HEAVY = (
    "scipy",
    "matplotlib",
    "sklearn",
    "fontTools",
    "joblib",
    "PIL",
    "torchvision",
    "timm",
    "open_clip",
    "lightning",
)
COMPILERS = ("triton", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.run", "torch.utils.tensorboard")
STARTS = {
    "import gif_kernels": ("gif", "rich", "jsonargparse", *HEAVY, *COMPILERS),
    "import gif": ("torch", "numpy", "rich", "jsonargparse", *HEAVY, *COMPILERS),
    "import gif; [getattr(gif, name) for name in gif.__all__]": ("rich", "jsonargparse", *HEAVY, *COMPILERS),
    "from gif import cli; cli._run(['--help'])": ("gif.training", "gif.vectors", "gif.data", *HEAVY, *COMPILERS),
}
"""What is started, and what may not be imported by it: all that a user would wait for and not use."""


@pytest.mark.parametrize("code", STARTS)
def test_import_is_light(code):
    run = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    run += f"print([name for name in {STARTS[code]!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_names_that_are_imported_late():
    assert set(gif._MODULE_OF) == set(gif.__all__) <= set(dir(gif))
    assert gif.__version__ == gif_kernels.__version__
    with pytest.raises(AttributeError, match="module 'gif' has no attribute 'nothing'"):
        gif.nothing  # noqa: B018


def test_other_errors_of_an_import_are_not_hidden():
    with pytest.raises(ZeroDivisionError), needs("package", "nothing"):
        1 / 0  # noqa: B018
    with pytest.raises(InputError, match="pictures: the package matplotlib is needed and not installed"):  # noqa: SIM117
        with needs("matplotlib", "pictures"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
