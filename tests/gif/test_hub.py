"""A trained model as a folder for a hub."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gif as library
from gif.backbones import BackboneConfig, fingerprint, save_backbone
from gif.data.identities import Identities, Names
from gif.evaluation import roc, thresholds_of
from gif.evaluation.calibration import Calibrated, Calibration, add_calibration


def test_a_folder_that_loads_by_itself(gif, tmp_path):
    torch.manual_seed(0)
    config = BackboneConfig(embedding_size=8, image_size=16, width=4)
    network = config.build()
    model = tmp_path / "b.safetensors"
    who = Identities(Names.of(["ann", "bob"]), {"size": 16, "channels": 1, "fit": "crop"}, "faces")
    save_backbone(model, network, config, trained_on=who)
    found = thresholds_of(roc(torch.rand(900), torch.arange(900) % 9 == 0), 100, 800)
    add_calibration(model, Calibration(fingerprint(network), {"lfw": Calibrated(found, True, "its pairs")}))
    code, printed = gif("hub", "--model", model, "--output", tmp_path / "hub", "--license=apache-2.0")
    assert code == 0 and "README.md, config.json, model.safetensors, model.thresholds.json" in printed
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: gif-recognition\n") and "license: apache-2.0" in card
    assert "trained on 2 identities" in card and "ann" not in card and "| 0.01 |" in card and "not known" in card
    told = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert told["preprocessing"]["fit"] == "crop" and told["architecture"]["embedding_size"] == 8
    assert set(load_file(tmp_path / "hub" / "model.safetensors")) == set(network.state_dict())  # nobody's digest

    loaded, first = library.load_model(tmp_path / "hub"), library.load_model(model)
    assert loaded.decoder == first.decoder and loaded.decoder.fit == "crop"
    assert loaded.fingerprint == first.fingerprint and loaded.flip and loaded.calibration == first.calibration
    image = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    assert torch.equal(loaded.embed(image), first.embed(image))

    assert gif("hub", "--model", model, "--output", tmp_path / "hub")[0] == 0  # once more, over itself
    assert gif("hub", "--model", tmp_path / "hub", "--output", tmp_path / "copy")[0] == 0  # and of a folder of its own
    copied = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert copied["preprocessing"]["fit"] == "crop" and copied["fingerprint"] == told["fingerprint"]
    (tmp_path / "hub" / "thesis.tex").write_text("years of work")
    code, printed = gif("hub", "--model", model, "--output", tmp_path / "hub")
    assert code == 1 and "holds other things (thesis.tex)" in printed


def test_the_folder_is_a_model_to_every_command(gif, jpeg, tmp_path, write_bin):
    """It is judged and exported as the model it was made of, with images fitted as to that one."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    config = BackboneConfig(embedding_size=8, image_size=16, width=4)
    model, hub = tmp_path / "run" / "backbone.safetensors", tmp_path / "hub"
    who = Identities(Names.of(["ann", "bob"]), {"size": 16, "channels": 1, "fit": "crop"}, "faces")
    save_backbone(model, config.build(), config, trained_on=who)
    assert gif("hub", "--model", model, "--output", hub)[0] == 0
    write_bin(tmp_path / "p.bin", [jpeg(40 + k, 60) for k in range(40)], [k % 2 == 0 for k in range(20)])
    for given, output in ((model, tmp_path / "a"), (tmp_path / "run", tmp_path / "b"), (hub, tmp_path / "c")):
        code, printed = gif("evaluate", "--model", given, "--pairs", tmp_path / "p.bin", "--output", output)
        assert code == 0, printed
    judged = [json.loads((tmp_path / name / "evaluation.json").read_text())["pairs"] for name in "abc"]
    assert judged[0] == judged[1] == judged[2]
    assert library.load_model(hub).calibration == library.load_model(model).calibration is not None
    assert gif("export", "--model", hub, "--output", tmp_path / "hub.onnx")[0] == 0
    exported, own = library.load_model(tmp_path / "hub.onnx"), library.load_model(model)
    assert exported.decoder.fit == "crop" and exported.fingerprint == own.fingerprint
    assert exported.calibration == own.calibration
    assert gif("hub", "--model", model, "--output", hub)[0] == 0  # anew, over thresholds that were found since


def test_a_model_that_was_not_judged(gif, tmp_path):
    config = BackboneConfig("mbf", 16, 3, 32)
    torch.save(config.build().state_dict(), tmp_path / "model.pt")
    assert gif("hub", "--model", tmp_path / "model.pt", "--output", tmp_path / "hub")[0] == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "no threshold is known" in card and "license" not in card
    assert library.load_model(tmp_path / "hub").config == config
