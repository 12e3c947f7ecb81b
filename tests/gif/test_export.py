"""ONNX, as ONNX Runtime runs it."""

import json
from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gif import cli, export
from gif.backbones import BackboneConfig
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


def test_command_takes_insightfaces_checkpoints(tmp_path, monkeypatch):
    config = BackboneConfig("iresnet18", 16, 3, 16)
    backbone = trained(config)
    torch.save(backbone.state_dict(), tmp_path / "model.pt")
    output = tmp_path / "new" / "model.onnx"
    monkeypatch.setattr("sys.argv", ["gif", "export", "--model", str(tmp_path / "model.pt"), "--output", str(output)])
    cli.main()
    check_any_batch(output, backbone, config)
