"""A trained backbone as ONNX, for any runtime: dynamic batch, one file, compared with PyTorch before it is kept."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gif.backbones import BackboneConfig, fingerprint, image_fit, load_backbone, model_file
from gif.data import ImageDecoder
from gif.data.decoding import Fit
from gif.errors import InputError, in_short
from gif.evaluation.calibration import load_calibration
from gif.files import atomic_path
from gif.packages import needs
from gif.progress import say

INPUT, OUTPUT = "images", "embeddings"
CONFIG_KEY = "gif.backbone"
PREPROCESSING_KEY = "gif.preprocessing"
THRESHOLDS_KEY = "gif.thresholds"
FINGERPRINT_KEY = "gif.fingerprint"
OPSET = 18
BATCHES = (1, 2, 5)  # that are compared
TOLERANCE = 1e-4
"""Largest difference of an entry of a unit embedding: float32 sums in another order, through a hundred layers."""


def export_command(model: Path, output: Path) -> None:
    """Write a trained backbone as ONNX, and compare it with PyTorch in ONNX Runtime.

    The file takes any number of images at once: input "images" (B, channels, height, width) float32, RGB, in [-1, 1],
    that is (x / 255 - 0.5) / 0.5; output "embeddings" (B, d) float32, not normalised. Its metadata say which backbone
    it is, how an image becomes its input (gif.preprocessing, JSON), and the thresholds that `gif evaluate` has found:
    gif verify, gif search, gif embed and gif.load_model take the file by itself. Needs onnx, onnxscript and
    onnxruntime: pip install 'gif-recognition[export]'.

    Args:
        model: backbone.safetensors of `gif train`, a folder of it or of `gif hub`, or insightface's model.pt.
        output: where to write the ONNX file.
    """
    model = model_file(model)
    backbone, config = load_backbone(model)
    mark = fingerprint(backbone)
    told = {PREPROCESSING_KEY: json.dumps(preprocessing(config, image_fit(model))), FINGERPRINT_KEY: mark}
    if (thresholds := load_calibration(model, mark)) is not None:
        told[THRESHOLDS_KEY] = thresholds.to_json()
    difference = export_onnx(backbone, config, output, metadata=told)
    say(f"wrote {config.name} to {output}; unit embeddings differ from PyTorch's by at most {difference:.1e}")


def preprocessing(config: BackboneConfig, fit: Fit = ImageDecoder.fit) -> dict[str, Any]:
    """How an image file becomes the backbone's input, fit for JSON: in the order of the keys."""
    return {
        "color": "RGB" if config.channels == 3 else "grey",
        "size": [config.image_size, config.image_size],
        "fit": fit,
        "resize": "bilinear, antialiased",
        "mean": [127.5] * config.channels,
        "std": [127.5] * config.channels,
        "layout": "NCHW",
        "dtype": "float32",
        "output": "embeddings, not normalised; compared by cosine",
    }


def export_onnx(
    backbone: nn.Module, config: BackboneConfig, path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> float:
    """Write ``backbone`` as it evaluates to ``path`` as ONNX, and compare it with ONNX Runtime before it is kept.

    Input "images" (B, channels, image_size, image_size) float32 in [-1, 1], RGB, any B; output "embeddings" (B, d)
    float32, not normalised. The metadata key "gif.backbone" holds the configuration, and ``metadata`` what else the
    file says. The backbone is left in eval mode on the CPU.

    Returns the largest difference to PyTorch of an entry of a unit embedding. Raises ValueError, and leaves no file, if
    it is above `TOLERANCE` or the network cannot be translated; and where the libraries are missing.
    """
    with needs("gif-recognition[export]", "export to ONNX"):
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (the exporter needs it)
    backbone = backbone.cpu().eval()
    shape = (config.channels, config.image_size, config.image_size)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(size, *shape, generator=generator) * 2 - 1 for size in BATCHES]
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                backbone,
                (batches[-1],),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f"PyTorch's exporter does not translate this {config.name} ({in_short(error.__cause__ or error)}); export "
            "another network, or this one with another version of PyTorch"
        ) from error
    assert program is not None  # it is for dynamo=False
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {CONFIG_KEY: json.dumps(asdict(config)), **(metadata or {})})
    with atomic_path(path) as temporary:
        onnx.save(proto, temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        difference = max(_difference(backbone, session, images) for images in batches)
        if not difference <= TOLERANCE:
            raise InputError(f"the ONNX model differs from PyTorch by {difference:.1e}, wanted at most {TOLERANCE:.0e}")
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells of its own insides, by warnings and by log: 48 lines of some networks."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@torch.no_grad()
def _difference(backbone: nn.Module, session: Any, images: Tensor) -> float:
    (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
    return float((normalize(torch.from_numpy(found), dim=1) - normalize(backbone(images), dim=1)).abs().max())
