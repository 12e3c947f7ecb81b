"""The examples run, on data small enough for a test."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gif.backbones import BackboneConfig
from gif.data import IdentityImages, IdentitySplit, ImageDecoder
from gif.evaluation.alignment import FIVE_POINTS


def example(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(identities, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(identities).repeat(8)
    looks = torch.randint(0, 200, (identities, 1, 16, 16), generator=generator)
    noise = torch.randint(0, 55, (len(labels), 1, 16, 16), generator=generator)
    return IdentityImages((looks[labels] + noise).to(torch.uint8), labels, [str(i) for i in range(identities)])


BACKBONE = BackboneConfig(embedding_size=16, image_size=16, width=4)


class StopAfterOneEpoch(lightning.Callback):
    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = True


class TestExamples:
    def test_plain_loop(self, capsys):
        split = IdentitySplit(train=pictures(24, 0), held_out=pictures(12, 1))
        judgement = example("plain_loop").run(split, BACKBONE, epochs=8, batch_size=32)
        assert judgement.rank1 > 0.3  # one in twelve by chance
        losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
        assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]

    def test_lightning(self, tmp_path):
        module = example("lightning_module")
        images = pictures(24, 0)
        loader = DataLoader(images, 32, shuffle=True, drop_last=True, collate_fn=IdentityImages.collate)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        make = partial(lightning.Trainer, max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer = make(callbacks=[StopAfterOneEpoch()])
        trained = module.Recognition(BACKBONE, module.prepare(images, 16))
        start = trained.loss.vectors.table.clone()
        trainer.fit(trained, loader)
        moved = trained.loss.vectors.table
        assert not torch.equal(moved, start)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

        again = module.Recognition(BACKBONE, module.prepare(images, 16))
        onwards = make()
        seen = []
        again.on_train_start = lambda: seen.append(again.loss.vectors.table.clone())
        onwards.fit(again, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
        assert torch.equal(seen[0], moved)
        assert onwards.global_step == 2 * len(loader)

    def test_metric_learning(self):
        split = IdentitySplit(train=pictures(24, 0), held_out=pictures(12, 1))
        found = example("metric_learning").run(split, BACKBONE, epochs=6, batch_size=32)
        key = next(name for name in found if name.startswith("precision_at_1"))
        assert found[key] > 0.3  # one in twelve by chance

    def test_hugging_face_trainer(self, tmp_path):
        module = example("hugging_face_trainer")
        images = pictures(24, 0)
        options: dict[str, Any] = {
            "per_device_train_batch_size": 32,
            "num_train_epochs": 4,
            "save_steps": 10,
            "use_cpu": True,
        }
        options |= {"logging_steps": 1, "disable_tqdm": True, "save_strategy": "steps"}
        torch.manual_seed(0)
        whole = module.trainer_of(images, BACKBONE, tmp_path / "run", **options)
        start = whole.model.loss.vectors.table.clone()
        whole.train()
        moved = whole.model.loss.vectors.table
        assert not torch.equal(moved, start)
        losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
        assert len(losses) == 24 and sum(losses[-4:]) < 0.8 * sum(losses[:4])

        torch.manual_seed(0)
        again = module.trainer_of(images, BACKBONE, tmp_path / "run", **options)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
        torch.testing.assert_close(again.model.loss.vectors.table, moved, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["hugging_face_trainer", "lightning_module"])
    def test_what_moved_is_saved_after_the_module_went_elsewhere(self, name):
        """A move replaces what a module has by copies; the table that steps move is saved and restored all the same."""
        module, images = example(name), pictures(24, 0)
        model = module.Recognition(BACKBONE, module.prepare(images, 16))
        model._apply(lambda tensor: tensor.clone())
        start = model.loss.vectors.table.clone()
        model.loss(model.backbone(torch.randn(8, 1, 16, 16)), torch.arange(8)).backward()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        moved = model.loss.vectors.table
        assert not torch.equal(moved, start) and torch.equal(state["moved_vectors"], moved)
        again = module.Recognition(BACKBONE, module.prepare(images, 16))
        again._apply(lambda tensor: tensor.clone())
        table = again.loss.vectors.table
        again.load_state_dict(state)
        assert again.loss.vectors.table is table and torch.equal(table, moved)

    def test_align_faces(self, tmp_path, monkeypatch):
        """With a detector that finds two faces: the larger one's landmarks come to their places."""
        cv2 = pytest.importorskip("cv2")
        module = example("align_faces")
        landmarks = FIVE_POINTS.numpy() * 0.5 + 20

        class Detector:
            def setInputSize(self, size):
                self.size = size

            def detect(self, image):
                if not image.any():
                    return 0, None
                assert self.size == (image.shape[1], image.shape[0])
                small = [0, 0, 5, 5, *range(10), 0.9]
                return 1, np.array([small, [20, 20, 60, 60, *landmarks.ravel(), 0.9]], np.float32)

        monkeypatch.setattr(module, "detector", lambda: Detector())
        pixels = np.zeros((90, 100, 3), np.uint8)
        for x, y in landmarks.round().astype(int):
            pixels[y - 1 : y + 2, x - 1 : x + 2] = (255, 0, 0)
        face = module.align(pixels)
        assert face.shape == (112, 112, 3)
        for x, y in FIVE_POINTS.round().int().tolist():
            assert face[y, x, 0] > 200 and face[y, x, 1:].max() < 10
        assert module.align(np.zeros((90, 100, 3), np.uint8)) is None

        for name, image in (("ann/1.png", pixels), ("bob/2.png", np.zeros_like(pixels))):
            (tmp_path / "in" / name).parent.mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "in" / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        (tmp_path / "in" / "ann" / "3.jpg").write_bytes(b"nothing")
        assert module.align_folder(tmp_path / "in", tmp_path / "out") == (1, 2)
        assert torch.equal(
            ImageDecoder(fit="exact")((tmp_path / "out/ann/1.png").read_bytes()).permute(1, 2, 0),
            torch.from_numpy(face),
        )

    def test_align_faces_says_where_its_detector_is(self, monkeypatch, tmp_path):
        pytest.importorskip("cv2")
        monkeypatch.setenv("YUNET", str(tmp_path / "none.onnx"))
        with pytest.raises(FileNotFoundError, match="opencv_zoo"):
            example("align_faces").detector()
