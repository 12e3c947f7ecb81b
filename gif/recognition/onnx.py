"""A model from an ONNX file of `gif export`: all that is needed to embed images is in the file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from gif.backbones import BackboneConfig
from gif.data.decoding import ImageDecoder
from gif.errors import InputError, in_short
from gif.evaluation.calibration import Calibration
from gif.export import CONFIG_KEY, FINGERPRINT_KEY, INPUT, OUTPUT, PREPROCESSING_KEY, THRESHOLDS_KEY
from gif.packages import needs
from gif.recognition.model import Model


class OnnxNetwork(nn.Module):
    """An ONNX file as a network, run by ONNX Runtime on the CPU.

    Args:
        path: of the file.

    Raises ValueError for a file that ONNX Runtime does not load.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        with needs("gif-recognition[export]", "models in ONNX files"):
            import onnxruntime
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own share no class
            raise InputError(f"{path} is damaged, or no ONNX file ({in_short(error)}); export it again") from error
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def forward(self, images: Tensor) -> Tensor:
        (embeddings,) = self._session.run([OUTPUT], {INPUT: images.cpu().contiguous().numpy()})
        return torch.from_numpy(embeddings)


def load_onnx(path: Path) -> Model:
    """The model in an ONNX file. Raises ValueError where it does not say how its images are prepared."""
    network = OnnxNetwork(path)
    told = network.metadata
    if not {CONFIG_KEY, PREPROCESSING_KEY, FINGERPRINT_KEY} <= told.keys():
        raise InputError(f"{path} does not say how its images are prepared; export the model with gif export")
    try:
        config = BackboneConfig(**json.loads(told[CONFIG_KEY]))
        fit = json.loads(told[PREPROCESSING_KEY])["fit"]
        stored = json.loads(told[THRESHOLDS_KEY]) if THRESHOLDS_KEY in told else None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged, or from a newer version ({error}); export it again") from error
    decoder = ImageDecoder(config.image_size, config.channels, fit=fit)
    calibration = None if stored is None else Calibration.from_stored(path, stored)
    return Model(network.eval(), config, decoder, told[FINGERPRINT_KEY], calibration)
