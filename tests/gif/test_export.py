"""ONNX, as ONNX Runtime runs it."""

import json
import logging
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gif import cli, export
from gif.backbones import BackboneConfig
from gif.errors import InputError
from gif.export import export_onnx

CONFIG = BackboneConfig("small", 16, 3, 16, width=4, color="bgr")


def trained(config):
    """A backbone whose batch norms have seen images."""
    torch.manual_seed(0)
    backbone = config.build().train()
    with torch.no_grad():
        for _ in range(20):
            backbone(torch.rand(8, config.channels, config.image_size, config.image_size) * 2 - 1)
    return backbone


def check_any_batch(path, backbone, config):
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3, 8):
        images = torch.rand(batch, config.channels, config.image_size, config.image_size) * 2 - 1
        found: Any
        (found,) = session.run(["embeddings"], {"images": images.numpy()})
        with torch.no_grad():
            expected = backbone.eval()(images).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)  # float32 sums in another order


def test_any_batch_gives_pytorchs_embeddings(tmp_path, monkeypatch):
    backbone, path, programs = trained(CONFIG), tmp_path / "model.onnx", []
    torch_export = torch.onnx.export

    def recorded(*arguments, **options):
        programs.append(torch_export(*arguments, **options))
        return programs[-1]

    monkeypatch.setattr(torch.onnx, "export", recorded)
    assert 0 <= export_onnx(backbone, CONFIG, path) <= export.TOLERANCE
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # the weights are inside
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["gif.backbone"]) == asdict(CONFIG)
    check_any_batch(path, backbone, CONFIG)

    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: programs[0])
    torch.manual_seed(1)
    other = CONFIG.build()  # the file is not this network
    with pytest.raises(ValueError, match=r"the ONNX model differs from PyTorch by .*wanted at most 1e-04"):
        export_onnx(other, CONFIG, tmp_path / "bad.onnx")
    assert not (tmp_path / "bad.onnx").exists()


class Halves(torch.nn.Module):
    """Parts a constant, as position embeddings of some of timm's networks do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.rand(16, 2))
        self.table: torch.Tensor

    def forward(self, images):
        cosine, sine = (self.table * 2).chunk(2, 1)
        return images.flatten(1)[:, :16] * cosine.flatten() + sine.flatten()


def test_the_exporters_insides_are_not_told(tmp_path, caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(Halves(), CONFIG, tmp_path / "model.onnx")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")
    logging.getLogger("mine").warning("still heard")
    assert "still heard" in caplog.text


class Undecided(torch.nn.Module):
    """Goes one way or another by what it is given, which no graph can."""

    def forward(self, images):
        return images.flatten(1)[:, :16] if images.sum() > 0 else images.flatten(1)[:, 16:32]


def test_what_the_exporter_cannot_translate_is_one_line(tmp_path):
    with pytest.raises(InputError, match="PyTorch's exporter does not translate this small") as told:
        export_onnx(Undecided(), CONFIG, tmp_path / "model.onnx")
    assert len(str(told.value)) < 600 and not (tmp_path / "model.onnx").exists()


def test_command_takes_insightfaces_checkpoints(tmp_path, monkeypatch):
    config = BackboneConfig("iresnet18", 16, 3, 16)
    backbone = trained(config)
    torch.save(backbone.state_dict(), tmp_path / "model.pt")
    output = tmp_path / "new" / "model.onnx"
    monkeypatch.setattr("sys.argv", ["gif", "export", "--model", str(tmp_path / "model.pt"), "--output", str(output)])
    cli.main()
    check_any_batch(output, backbone, config)
