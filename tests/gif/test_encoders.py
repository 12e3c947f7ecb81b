"""Encoders, against the networks run by hand and the libraries' own preprocessing."""

import json
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

from gif.encoders import CLIPEncoder, DINOEncoder, PixelEncoder, make_encoder
from gif.encoders import pixels as pixels_module
from gif.encoders.base import Preprocessing

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
TINY_TIMM = "test_vit.r160_in1k"  # 64 wide

# PIL and torch round between and after the two passes of a resize: mostly by a grey level differently, seldom by two.
# A level is 1/255, over a std of 0.22.
PREPROCESSING_TOLERANCE = 2 / 255 / 0.22


def images(n, channels=3, height=20, width=20):
    """Smooth random images: a face is no noise, and resizing noise would only test rounding."""
    coarse = torch.rand(n, channels, 4, 5)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "tiny.safetensors"
    save_file(timm.create_model(TINY_TIMM, num_classes=7).state_dict(), path)  # with a classifier, as many come
    return path


class TestPreprocessing:
    @pytest.mark.parametrize(("height", "width"), [(20, 20), (67, 41), (41, 67), (32, 90), (1, 1)])
    def test_is_open_clips_own(self, height, width):
        config: dict[str, Any] = {"size": 32, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
        ours = Preprocessing((32, 32), (32, 32), "bicubic", config["mean"], config["std"])
        theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)
        batch = images(3, height=height, width=width)
        expected = torch.stack([theirs(to_pil_image(image)) for image in batch])
        torch.testing.assert_close(ours(batch), expected, rtol=0, atol=PREPROCESSING_TOLERANCE)

    def test_squash_is_open_clips_own(self):
        config: dict[str, Any] = {"size": (32, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
        ours = Preprocessing((32, 48), (32, 48), "bicubic", config["mean"], config["std"], squash=True)
        theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)
        batch = images(2, height=50, width=30)
        expected = torch.stack([theirs(to_pil_image(image)) for image in batch])
        torch.testing.assert_close(ours(batch), expected, rtol=0, atol=PREPROCESSING_TOLERANCE)

    def test_grey_is_three_equal_channels(self):
        preprocessing = Preprocessing((8, 8), (8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3)
        grey = images(2, channels=1)
        assert torch.equal(preprocessing(grey), preprocessing(grey.expand(-1, 3, -1, -1)))


class TestCLIP:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_is_the_model_run_by_hand(self, clip_file, channels):
        encoder = CLIPEncoder("tiny-clip", str(clip_file))
        assert encoder.embedding_size == TINY_CLIP["embed_dim"]
        assert encoder.name == "clip tiny-clip tiny.pt"
        model, transform = open_clip.create_model_from_pretrained("tiny-clip", str(clip_file))
        batch = images(3, channels, height=32, width=32)  # no resizing: the two must agree but for summation order
        pixels = torch.stack([transform(to_pil_image(image)) for image in batch])
        with torch.no_grad():
            expected = model.eval().encode_image(pixels)
        features = encoder(batch)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
        assert encoder.fit is None

    def test_bf16(self, clip_file):
        encoder = CLIPEncoder("tiny-clip", str(clip_file), precision="bf16")
        assert encoder.name == "clip tiny-clip tiny.pt bf16"
        batch = images(5, height=32, width=32)
        features, exact = encoder(batch), CLIPEncoder("tiny-clip", str(clip_file))(batch)
        assert features.dtype == torch.float32 and not torch.equal(features, exact)
        cosine = torch.nn.functional.cosine_similarity(features, exact)
        assert (
            1 - cosine
        ).max() < 1e-3  # a bfloat16 has 8 bits: each product is off by up to 0.4 %, and errors average
        with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16', got 'fp16'"):
            CLIPEncoder("tiny-clip", str(clip_file), precision="fp16")  # type: ignore[arg-type]

    @pytest.mark.parametrize(("tag", "quick_gelu"), [("openai", True), ("laion2b_s34b_b79k", False)])
    def test_a_tag_gets_the_activation_it_was_trained_with(self, clip_file, monkeypatch, tag, quick_gelu):
        asked = []

        def create(*args, **options):
            asked.append((args, options))
            return open_clip.create_model("tiny-clip")

        monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
        encoder = CLIPEncoder(pretrained=tag)
        ((model, weights), options) = asked[0]
        assert (model, weights, options["force_quick_gelu"]) == ("ViT-B-32", tag, quick_gelu)
        assert encoder.name == f"clip ViT-B-32 {tag}"

    def test_errors(self, clip_file, timm_file, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="no CLIP model ViT-Z"):
            CLIPEncoder("ViT-Z")
        with pytest.raises(FileNotFoundError, match=r"no weight file .*none\.pt.*tags .*openai"):
            CLIPEncoder(pretrained=tmp_path / "none.pt")
        with pytest.raises(ValueError, match=r"tiny\.safetensors does not hold the weights of CLIP tiny-clip"):
            CLIPEncoder("tiny-clip", timm_file)
        (tmp_path / "garbage.pt").write_bytes(b"not weights")
        with pytest.raises(ValueError, match=r"garbage\.pt does not hold the weights of CLIP tiny-clip"):
            CLIPEncoder("tiny-clip", tmp_path / "garbage.pt")
        monkeypatch.setattr(open_clip, "create_model_from_pretrained", unreachable)
        with pytest.raises(RuntimeError, match=r"cannot load CLIP ViT-B-32 from its hub; .*path of the file.*no route"):
            CLIPEncoder()
        with pytest.raises(ValueError, match=r"images must be .* uint8, got \(2, 3, 8, 8\) torch.float32"):
            PixelEncoder()(torch.zeros(2, 3, 8, 8))


def unreachable(*args, **options):
    raise OSError("no route to host")


class TestDINO:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_is_the_model_run_by_hand(self, timm_file, channels):
        encoder = DINOEncoder(TINY_TIMM, timm_file)
        assert encoder.embedding_size == 64
        assert encoder.name == f"dino {TINY_TIMM} tiny.safetensors"
        model: Any = timm.create_model(TINY_TIMM, num_classes=7, checkpoint_path=timm_file).eval()
        config = timm.data.resolve_model_data_config(model)
        transform = timm.data.create_transform(**config, is_training=False)
        resized = round(160 / config["crop_pct"] - 0.5)
        batch = images(3, channels, height=resized, width=resized)  # no resizing, a crop alone
        pixels = torch.stack([transform(to_pil_image(image.expand(3, -1, -1))) for image in batch])
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(encoder(batch), expected, rtol=1e-5, atol=1e-5)

    def test_resizes_as_timm_does(self, timm_file):
        encoder = DINOEncoder(TINY_TIMM, timm_file)
        config = timm.data.resolve_model_data_config(timm.create_model(TINY_TIMM))
        transform = timm.data.create_transform(**config, is_training=False)
        batch = images(2, height=112, width=130)
        expected = torch.stack([transform(to_pil_image(image)) for image in batch])
        torch.testing.assert_close(encoder._preprocessing(batch), expected, rtol=0, atol=PREPROCESSING_TOLERANCE)

    def test_errors(self, timm_file, clip_file, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="no timm model vit_z"):
            DINOEncoder("vit_z")
        with pytest.raises(FileNotFoundError, match=r"no weight file .*none\.pth.*vit_base_patch16_224\.dino"):
            DINOEncoder(weights=tmp_path / "none.pth")
        with pytest.raises(ValueError, match=r"tiny\.safetensors does not hold the weights of timm vit_tiny"):
            DINOEncoder("vit_tiny_patch16_224", timm_file)
        part = {name: t for name, t in timm.create_model(TINY_TIMM).state_dict().items() if "blocks.3" not in name}
        save_file(part, tmp_path / "part.safetensors")
        with pytest.raises(ValueError, match="Missing key"):
            DINOEncoder(TINY_TIMM, tmp_path / "part.safetensors")
        monkeypatch.setattr(timm, "create_model", unreachable)
        with pytest.raises(RuntimeError, match=r"cannot load timm .* from its hub; .*path of the file.*no route"):
            DINOEncoder()


def whitened(width, means):
    return PixelEncoder(width).fit(means)(means)


class TestPixels:
    def test_features(self):
        encoder = PixelEncoder(4)
        grey = images(3, channels=1, height=64, width=96)
        expected = grey.double().reshape(3, 32, 2, 32, 3).mean((2, 4)).flatten(1) / 255
        torch.testing.assert_close(encoder(grey).double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder(grey.expand(-1, 3, -1, -1)), encoder(grey), rtol=0, atol=1e-6)
        red = torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 7, 5)
        torch.testing.assert_close(encoder(red), torch.full((1, 1024), 0.299))

    @pytest.mark.parametrize("rows_a_block", [1 << 14, 97])
    def test_coordinates_are_white(self, monkeypatch, rows_a_block):
        monkeypatch.setattr(pixels_module, "ROWS_WHITENED", rows_a_block)
        m, width, rank = 300, 6, 8
        factors = torch.randn(m, rank, dtype=torch.float64) * torch.linspace(3, 0.5, rank)
        basis = torch.linalg.qr(torch.randn(1024, rank, dtype=torch.float64)).Q
        vectors = whitened(width, (factors @ basis.T + 5).float())
        assert vectors.shape == (m, width) and vectors.dtype == torch.float32
        eigenvalues = torch.linalg.eigvalsh(torch.cov(factors.T, correction=0)).flip(0)
        ridge = pixels_module.RIDGE * eigenvalues.sum() / 1024
        shrink = eigenvalues[:width] / (eigenvalues[:width] + ridge)
        covariance = torch.cov(vectors.double().T, correction=0)
        # float32 pixels of size 5: 6e-8 * 5 of rounding in coordinates of size 1
        torch.testing.assert_close(covariance, shrink.diag(), rtol=0, atol=1e-5)
        torch.testing.assert_close(vectors.mean(0), torch.zeros(width), rtol=0, atol=1e-5)

    def test_rank_below_the_width(self):
        one = whitened(16, torch.rand(1, 1024))
        assert one.shape == (1, 16) and one[0, 0] > 0
        torch.testing.assert_close(one[0, 1:], torch.zeros(15), rtol=0, atol=1e-5)
        two = whitened(16, torch.rand(2, 1024))
        shrink = 1 / (1 + pixels_module.RIDGE / 1024)  # the one eigenvalue is 1024 times the mean
        torch.testing.assert_close(two[:, 0].abs(), torch.full((2,), shrink**0.5), rtol=0, atol=1e-5)
        torch.testing.assert_close(two[0], -two[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(two[:, 1:], torch.zeros(2, 15), rtol=0, atol=1e-5)

    def test_is_deterministic_and_follows_the_rows(self):
        means = torch.rand(200, 1024)
        vectors = whitened(8, means)
        assert torch.equal(vectors, whitened(8, means.clone()))
        order = torch.randperm(200)
        # a sum in another order moves the components by rounding over the gap of neighbouring eigenvalues
        torch.testing.assert_close(whitened(8, means[order]), vectors[order], rtol=0, atol=1e-6)

    def test_keeps_an_order_of_similarity_when_identities_are_few(self):
        means = torch.rand(20, 3) @ torch.rand(3, 1024) + 0.05 * torch.rand(20, 1024)
        vectors = whitened(64, means)  # whitened in full, all 20 would be equally far apart
        pairs = torch.stack([torch.pdist(means), torch.pdist(vectors)])
        assert torch.corrcoef(pairs)[0, 1] > 0.5

    def test_errors(self):
        with pytest.raises(ValueError, match=r"width must lie in \[1, 1024\].*got 1025"):
            PixelEncoder(1025)
        for same in (torch.zeros(1, 1024), torch.rand(1, 1024).expand(5, -1)):
            with pytest.raises(ValueError, match="all the same"):
                PixelEncoder(4).fit(same)


def test_make_encoder(clip_file, timm_file):
    assert make_encoder("pixels", width=32).embedding_size == 32
    assert make_encoder("clip", width=32, model="tiny-clip", weights=str(clip_file)).embedding_size == 24
    assert make_encoder("dino", width=32, model=TINY_TIMM, weights=str(timm_file)).embedding_size == 64
    with pytest.raises(ValueError, match="no encoder 'pixel'"):
        make_encoder("pixel", width=32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no weights"):
        make_encoder("pixels", width=32, weights="w.pt")
    with pytest.raises(ValueError, match="no precision"):
        make_encoder("pixels", width=32, precision="bf16")
    assert make_encoder("dino", width=1, model=TINY_TIMM, weights=str(timm_file), precision="bf16").name.endswith(
        "bf16"
    )
