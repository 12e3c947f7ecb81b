"""Backbones: their shapes by name, insightface's weights, files, and the order of colours."""

import json
import random
from collections import OrderedDict
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gif.backbones import BackboneConfig, insightface_vit, load_backbone, load_insightface, save_backbone
from gif.backbones.files import FORMAT
from gif.errors import InputError
from gif.files import save_tensors

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
SMALL = {
    "small": BackboneConfig("small", 16, 1, 32, width=4),
    "iresnet18": BackboneConfig("iresnet18", 16, 3, 32, dropout=0.1),
    "mobilefacenet": BackboneConfig("mobilefacenet", 16, 3, 32),
    "vit": BackboneConfig("vit", 16, 3, 32, model="vit_tiny_patch16_224"),
}


def norm(name, width):
    yield from ((f"{name}.{part}", (width,)) for part in ("weight", "bias", "running_mean", "running_var"))
    yield f"{name}.num_batches_tracked", ()


def insightface_names(blocks, embedding_size=512, last_map=7):
    """Names and shapes of the published checkpoints' tensors, in their order."""
    yield "conv1.weight", (64, 3, 3, 3)
    yield from norm("bn1", 64)
    yield "prelu.weight", (64,)
    inputs = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            yield from norm(f"{name}.bn1", inputs)
            yield f"{name}.conv1.weight", (width, inputs, 3, 3)
            yield from norm(f"{name}.bn2", width)
            yield f"{name}.prelu.weight", (width,)
            yield f"{name}.conv2.weight", (width, width, 3, 3)
            yield from norm(f"{name}.bn3", width)
            if block == 0:
                yield f"{name}.downsample.0.weight", (width, inputs, 1, 1)
                yield from norm(f"{name}.downsample.1", width)
            inputs = width
    yield from norm("bn2", 512)
    yield "fc.weight", (embedding_size, 512 * last_map**2)
    yield "fc.bias", (embedding_size,)
    yield from norm("features", embedding_size)


def resnet(name: Any) -> Any:
    """Any, for its layers are known by their names alone."""
    return BackboneConfig(name, 512, 3, 112).build()


class TestIResNet:
    @pytest.mark.parametrize("depth", BLOCKS)
    def test_names_and_shapes_are_insightfaces(self, depth):
        with torch.device("meta"):
            network = resnet(f"iresnet{depth}")
        ours = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
        assert ours == list(insightface_names(BLOCKS[depth]))
        assert not network.features.weight.requires_grad

    @pytest.mark.parametrize(("depth", "millions"), [(18, 24.02), (50, 43.59), (100, 65.15)])
    def test_parameters(self, depth, millions):
        with torch.device("meta"):
            network = resnet(f"iresnet{depth}")
        assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)

    @pytest.mark.parametrize("training", [True, False])
    def test_is_the_network_written_out(self, training):
        torch.manual_seed(0)
        network = BackboneConfig("iresnet18", 8, 3, 32).build().double().train(training)
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        for tensor in state.values():  # no norm or slope at its initial value
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 4:
                tensor.mul_((2 / tensor[0].numel()) ** 0.5 / 0.1)
        network.load_state_dict(state)

        def batch_norm(x, name):
            statistics = (state[f"{name}.running_mean"].clone(), state[f"{name}.running_var"].clone())
            return F.batch_norm(x, *statistics, state[f"{name}.weight"], state[f"{name}.bias"], training)

        def conv(x, name, stride=1):
            weight = state[f"{name}.weight"]
            return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

        images = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
        x = F.prelu(batch_norm(conv(images, "conv1"), "bn1"), state["prelu.weight"])
        for stage in range(1, 5):
            for block in range(2):
                name, stride = f"layer{stage}.{block}", 2 - block
                y = conv(batch_norm(x, f"{name}.bn1"), f"{name}.conv1")
                y = F.prelu(batch_norm(y, f"{name}.bn2"), state[f"{name}.prelu.weight"])
                y = batch_norm(conv(y, f"{name}.conv2", stride), f"{name}.bn3")
                if block == 0:
                    x = batch_norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
                x = x + y
        x = F.linear(batch_norm(x, "bn2").flatten(1), state["fc.weight"], state["fc.bias"])
        expected = batch_norm(x, "features")
        torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("prefix", ["", "module."])  # saved from inside DDP, or not
    def test_checkpoints_go_both_ways(self, tmp_path, prefix):
        torch.manual_seed(1)
        state = {
            prefix + name: torch.randn(shape) if shape else torch.tensor(3)
            for name, shape in insightface_names(BLOCKS[18], 24, last_map=2)
        }
        torch.save(state, tmp_path / "model.pt")
        network, config = load_backbone(tmp_path / "model.pt")
        assert config == BackboneConfig("iresnet18", 24, 3, 32)
        assert not network.training
        assert all(torch.equal(tensor, state[prefix + name]) for name, tensor in network.state_dict().items())

        torch.save(network.state_dict(), tmp_path / "ours.pt")
        again = torch.load(tmp_path / "ours.pt", weights_only=True)
        assert [(name, tuple(t.shape)) for name, t in again.items()] == list(insightface_names(BLOCKS[18], 24, 2))

    def small_state(self):
        torch.manual_seed(1)
        shapes = insightface_names(BLOCKS[18], 24, last_map=2)
        return {name: torch.randn(shape) if shape else torch.tensor(3) for name, shape in shapes}

    @pytest.mark.parametrize("file", ["m.pt", "m.pth", "m.ckpt", "m.pth.tar", "m.bin", "m", "epoch=3-step=9.ckpt"])
    @pytest.mark.parametrize("old", [False, True])
    def test_any_suffix(self, tmp_path, file, old):
        state = self.small_state()
        torch.save(state, tmp_path / file, _use_new_zipfile_serialization=not old)
        network, config = load_backbone(tmp_path / file)
        assert config.name == "iresnet18"
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone."])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"epoch": 1, "state_dict_backbone": state, "state_optimizer": {"state": {0: {"step": 1}}}},
            lambda state: {"state_dict": state, "head": {"weight": torch.ones(3)}},
            lambda state: {"model": state, "best": 0.5},
            lambda state: {"step": 1, "checkpoint": {"net": state}},
        ],
    )
    def test_wrapped_networks_and_whole_checkpoints(self, tmp_path, prefix, wrap):
        state = self.small_state()
        torch.save(wrap({prefix + name: tensor for name, tensor in state.items()}), tmp_path / "checkpoint.pt")
        network, _ = load_backbone(tmp_path / "checkpoint.pt")
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())

    def test_a_head_beside_a_network_that_has_a_name(self, tmp_path):
        state = self.small_state()
        named = OrderedDict({**{f"backbone.{name}": x for name, x in state.items()}, "head.weight": torch.ones(2, 3)})
        torch.save(OrderedDict({"state_dict": named}), tmp_path / "checkpoint.pt")
        network, _ = load_backbone(tmp_path / "checkpoint.pt")
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())

    def test_wrappers_within(self, tmp_path):
        state = self.small_state()
        torch.save({name.replace("layer2.", "layer2._orig_mod."): x for name, x in state.items()}, tmp_path / "m.pt")
        loaded: Any = load_backbone(tmp_path / "m.pt")[0]
        assert torch.equal(loaded.layer2[0].conv1.weight, state["layer2.0.conv1.weight"])

    @pytest.mark.parametrize("old", [False, True])
    def test_damaged_files_are_named(self, tmp_path, old):
        tensors = {"conv1.weight": torch.ones(4, 3, 3, 3), "fc.weight": torch.ones(2, 8), "bn1.bias": torch.ones(3)}
        torch.save(tensors, tmp_path / "whole.pt", _use_new_zipfile_serialization=not old)
        whole = (tmp_path / "whole.pt").read_bytes()
        rng = random.Random(0)
        path = tmp_path / "m.pt"
        for _ in range(300):
            place, cut = rng.randrange(len(whole)), rng.randrange(len(whole))
            changed = whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :]
            path.write_bytes(whole[:cut] if rng.random() < 0.2 else changed)
            with pytest.raises(InputError, match=r"m\.pt"):
                load_backbone(path)

    def test_foreign_files(self, tmp_path):
        path = tmp_path / "model.pt"
        with pytest.raises(FileNotFoundError, match=r"no file .*model\.pt"):
            load_insightface(path)
        torch.save(BackboneConfig(width=4).build(), path)  # a whole module: code, not tensors alone
        with pytest.raises(ValueError, match="more than tensors"):
            load_insightface(path)
        torch.save(BackboneConfig(width=4).build().state_dict(), path)
        with pytest.raises(ValueError, match="no state dict of an IResNet"):
            load_insightface(path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match="damaged"):
            load_insightface(path)
        shapes = dict(insightface_names((2, 2, 2, 1), 8, 1))
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
        with pytest.raises(ValueError, match=r"\(2, 2, 2, 1\) blocks a stage"):
            load_insightface(path)
        shapes = dict(insightface_names(BLOCKS[18], 8, 1)) | {"layer1.0.bn1.weight": (3,)}
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
        with pytest.raises(ValueError, match="does not fit"):
            load_insightface(path)

    def test_embeddings_are_float32_under_autocast(self):
        network: Any = BackboneConfig("iresnet18", 8, 3, 16).build()
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = network(torch.rand(2, 3, 16, 16))
        assert embeddings.dtype == torch.float32
        embeddings.sum().backward()
        assert network.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
class TestEveryBackbone:
    def test_learns_with_every_parameter(self, name):
        torch.manual_seed(2)
        config = SMALL[name]
        network = config.build()
        embeddings = network(torch.rand(4, config.channels, 32, 32) * 2 - 1)
        assert embeddings.shape == (4, 16)
        embeddings.square().mul(torch.rand(4, 16)).sum().backward()
        still = [key for key, value in network.named_parameters() if value.requires_grad and not value.grad.any()]
        assert not still

    def test_file_names_its_network(self, name, tmp_path):
        config = SMALL[name]
        network = config.build().eval()
        save_backbone(tmp_path / "b.safetensors", network, config)
        loaded, found = load_backbone(tmp_path / "b.safetensors")
        images = torch.rand(2, config.channels, 32, 32)
        assert found == config
        assert torch.equal(loaded(images), network(images))


class Ddp(torch.nn.Module):
    """What DistributedDataParallel's names look like, without a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPS: dict[str, Any] = {
    "compiled": torch.compile,
    "parallel": torch.nn.DataParallel,
    "distributed": Ddp,
    "compiled in distributed": lambda network: Ddp(torch.compile(network)),
    "distributed in compiled": lambda network: torch.compile(Ddp(network)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged parallel": lambda network: torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(network)),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_network_is_saved_as_itself(tmp_path, wrap):
    config = SMALL["small"]
    network = config.build()
    save_backbone(tmp_path / "plain.safetensors", network, config)
    save_backbone(tmp_path / "wrapped.safetensors", WRAPS[wrap](network), config)
    (plain, _), (wrapped, found) = (load_backbone(tmp_path / f"{name}.safetensors") for name in ("plain", "wrapped"))
    assert found == config and list(plain.state_dict()) == list(wrapped.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in wrapped.state_dict().items())


def test_a_compiled_part_is_saved_as_itself(tmp_path):
    network: Any = BackboneConfig("iresnet18", 8, 3, 16).build()
    wanted = network.state_dict()
    network.layer1 = torch.compile(network.layer1)
    save_backbone(tmp_path / "b.safetensors", network, BackboneConfig("iresnet18", 8, 3, 16))
    loaded, _ = load_backbone(tmp_path / "b.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_files_of_compiled_networks_that_were_written_with_the_wrapper(tmp_path):
    network: Any = SMALL["small"].build()
    state = {f"_orig_mod.{name}": tensor for name, tensor in network.state_dict().items()}
    save_tensors(tmp_path / "old", state, format=FORMAT, config=json.dumps(asdict(SMALL["small"])))
    loaded: Any = load_backbone(tmp_path / "old")[0]
    assert torch.equal(loaded.embed[1].weight, network.embed[1].weight)


def test_what_the_config_does_not_build_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"is not what its config builds, a small: \d+ weights differ"):
        save_backbone(tmp_path / "b.safetensors", SMALL["mobilefacenet"].build(), SMALL["small"])
    assert not (tmp_path / "b.safetensors").exists()


def test_mobilefacenet_has_a_million_parameters():
    with torch.device("meta"):
        network: Any = BackboneConfig("mobilefacenet", 128, 3, 112).build()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(0.99e6, rel=0.02)  # the paper's table 2
    assert network.embed[0].kernel_size == (7, 7)


def test_bgr_turns_the_channels_round(tmp_path):
    torch.manual_seed(3)
    rgb, bgr = (BackboneConfig("mobilefacenet", 8, 3, 32, color=color) for color in ("rgb", "bgr"))
    network = rgb.build().eval()
    save_backbone(tmp_path / "b.safetensors", network, bgr)
    turned, _ = load_backbone(tmp_path / "b.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(turned(images), network(images[:, [2, 1, 0]]))
    assert not torch.equal(turned(images), network(images))
    assert list(turned.state_dict()) == list(network.state_dict())


def test_bad_configs():
    for options, message in (
        ({"width": 8, "name": "iresnet18"}, "iresnet18 does not use width"),
        ({"model": "vit_x"}, "small does not use model"),
        ({"dropout": 0.5, "name": "mobilefacenet"}, "does not use dropout"),
        ({"color": "bgr"}, "with 3 channels"),
        ({"color": "gbr", "channels": 3}, "color must be"),
    ):
        with pytest.raises(ValueError, match=message):
            BackboneConfig(**options)
    for name in ("iresnet18", "mobilefacenet", "small"):
        with pytest.raises(ValueError, match="image_size must be a multiple of 16, got 100"):
            BackboneConfig(name, image_size=100).build()
    with pytest.raises(ValueError, match="unknown backbone 'resnet'"):
        BackboneConfig("resnet").build()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"timm has no model 'vit_tiny_patch17'; there are .*vit_tiny_patch16_224"):
        BackboneConfig("vit", model="vit_tiny_patch17").build()
    with pytest.raises(ValueError, match="cannot be built for an image size"):
        BackboneConfig("vit", model="resnet18").build()


def test_files_of_other_versions(tmp_path):
    config = {"name": "small", "embedding_size": 16, "channels": 1, "image_size": 32, "width": 4}
    state = SMALL["small"].build().state_dict()
    save_tensors(tmp_path / "old", state, format=FORMAT, config=json.dumps(config))
    assert load_backbone(tmp_path / "old")[1] == SMALL["small"]
    save_tensors(tmp_path / "new", state, format=FORMAT, config=json.dumps(config | {"flavour": 1}))
    with pytest.raises(ValueError, match=r"unknown backbone .*flavour"):
        load_backbone(tmp_path / "new")


def reference_networks():
    """insightface's networks by its names, and tensors that its published checkpoints have, with their shapes."""
    return {
        "mbf": {
            "layers.0.layers.0.weight": (128, 3, 3, 3),
            "layers.1.layers.0.weight": (128, 2, 3, 3),
            "layers.3.layers.3.layers.1.layers.0.weight": (128, 1, 3, 3),
            "layers.7.layers.1.layers.2.layers.0.weight": (256, 256, 1, 1),
            "conv_sep.layers.2.weight": (512,),
            "features.layers.0.layers.0.weight": (512, 1, 7, 7),
            "features.layers.2.weight": (512, 512),
            "features.layers.3.running_mean": (512,),
        },
        "mbf_large": {
            "layers.1.layers.1.layers.1.layers.0.weight": (128, 1, 3, 3),
            "layers.5.layers.11.layers.0.layers.0.weight": (256, 512, 1, 1),
        },
        "vit_t": {
            "mask_token": (1, 1, 256),
            "pos_embed": (1, 144, 256),
            "patch_embed.proj.weight": (256, 3, 9, 9),
            "blocks.11.attn.qkv.weight": (768, 256),
            "blocks.11.attn.proj.bias": (256,),
            "blocks.0.mlp.fc1.weight": (1024, 256),
            "norm.weight": (256,),
            "feature.0.weight": (256, 144 * 256),
            "feature.1.running_var": (256,),
            "feature.2.weight": (512, 256),
            "feature.3.weight": (512,),
        },
    }


class TestInsightFaceNetworks:
    @pytest.mark.parametrize("name", ["mbf", "mbf_large", "vit_t"])
    def test_names_shapes_and_files(self, name, tmp_path):
        network = BackboneConfig(name, 512, 3, 112).build().eval()
        state = network.state_dict()
        for tensor, shape in reference_networks()[name].items():
            assert tuple(state[tensor].shape) == shape, tensor
        torch.save({"state_dict_backbone": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "m.pt")
        loaded, config = load_backbone(tmp_path / "m.pt")
        assert config == BackboneConfig(name, 512, 3, 112)
        images = torch.rand(2, 3, 112, 112) * 2 - 1
        with torch.inference_mode():
            assert torch.equal(loaded(images), network(images))

    @pytest.mark.parametrize("name", ["vit_t", "vit_b_dp005_mask_005"])
    def test_a_transformer_masks_and_drops_in_training_alone(self, name, monkeypatch):
        kind = insightface_vit.TRANSFORMERS[name]
        monkeypatch.setitem(insightface_vit.TRANSFORMERS, name, replace(kind, width=16, depth=3))
        network = BackboneConfig(name, 8, 1, 30).build()
        images = torch.randn(4, 1, 30, 30, requires_grad=True)
        torch.manual_seed(0)
        first, second = network(images), network(images)
        assert first.shape == (4, 8) and not torch.allclose(first, second)
        first.sum().backward()
        assert all(weights.grad is not None for weights in network.parameters())
        network.eval()
        assert torch.equal(network(images), network(images))

    def test_attention_is_softmax_of_scaled_products(self):
        attention = insightface_vit._Attention(16).double()
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        q, k, v = (part.unflatten(2, (8, 2)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=2))
        weights = (q @ k.transpose(2, 3) / 2**0.5).softmax(3)
        wanted = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 16))
        assert torch.allclose(attention(x), wanted)

    def test_a_network_that_is_not_known(self, tmp_path):
        state = BackboneConfig("vit_t", 8, 3, 36).build().state_dict()
        cut = {name: value for name, value in state.items() if not name.startswith("blocks.11.")}
        torch.save(cut, tmp_path / "m.pt")
        with pytest.raises(InputError, match=r"width and depth are \(256, 11\)"):
            load_backbone(tmp_path / "m.pt")
        torch.save({"a": torch.zeros(3)}, tmp_path / "n.pt")
        with pytest.raises(InputError, match="no state dict of an IResNet, MobileFaceNet or vision transformer"):
            load_backbone(tmp_path / "n.pt")
