"""The examples run, on data small enough for a test."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from gif.backbones import BackboneConfig
from gif.data import IdentityImages, IdentitySplit


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
        start = trained.loss_fn.vectors.table.clone()
        trainer.fit(trained, loader)
        moved = trained.loss_fn.vectors.table
        assert not torch.equal(moved, start)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

        again = module.Recognition(BACKBONE, module.prepare(images, 16))
        onwards = make()
        seen = []
        again.on_train_start = lambda: seen.append(again.loss_fn.vectors.table.clone())
        onwards.fit(again, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
        assert torch.equal(seen[0], moved)
        assert onwards.global_step == 2 * len(loader)
