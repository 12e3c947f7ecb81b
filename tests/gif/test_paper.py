"""`gif experiments`: each command's quick form on a data set small enough for a test."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gif.backbones import BackboneConfig
from gif.codes import IdentityCodes
from gif.data import IdentityImages, IdentitySplit
from gif.evaluation import groups_by_images
from gif.experiments import glyph_bench
from gif.experiments.paper import cost as cost_module
from gif.experiments.paper import encoders as encoders_module
from gif.experiments.paper import forces as forces_module
from gif.experiments.paper import token_lambda as lambda_module
from gif.experiments.paper.adaptive_tokens import AdaptiveTokens
from gif.experiments.paper.force_probe import ForceProbe
from gif.experiments.paper.self_distillation import SelfDistillation
from gif.losses import GIFLoss, MarginSoftmax, PartialFC
from gif.training import TrainingConfig, train
from gif.vectors import CodeVectors
from gif_kernels import AngularMargin

TINY = BackboneConfig(embedding_size=16, image_size=16, width=4)
OF_ENCODERS = ["--backbone.embedding_size=16", "--backbone.image_size=16", "--backbone.width=4"]


def noisy_images(sizes, seed, first="a"):
    """An identity of each of ``sizes``, which has so many images: a pattern and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    patterns = torch.randint(0, 200, (len(sizes), 1, 16, 16), generator=generator)
    noise = torch.randint(0, 55, (len(labels), 1, 16, 16), generator=generator)
    names = [chr(ord(first) + i) for i in range(len(sizes))]
    return IdentityImages((patterns[labels] + noise).to(torch.uint8), labels, names)


@pytest.fixture
def tiny(monkeypatch):
    """Long-tailed identities, a backbone of a moment, and sizes to match."""
    split = IdentitySplit(noisy_images([2] * 25 + [9] * 25, 0), noisy_images([6] * 12, 1, "豆"))
    for module in (glyph_bench, encoders_module):
        monkeypatch.setattr(module, "load_data", lambda name, **options: split)
    monkeypatch.setattr(glyph_bench, "BACKBONE", TINY)
    monkeypatch.setattr(glyph_bench, "VOCAB_SIZE", 5)
    for module in (forces_module, lambda_module):
        monkeypatch.setattr(module, "BATCH_SIZE", 16)
    return split


def results(folder):
    """When each of the runs' results was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if path.parent != folder}


def published(name, folder, docs, command, gif):
    """Run with ``docs`` once more: nothing is done again, and the block has the tables and the pictures."""
    done = results(folder)
    (docs.parent / "pictures").mkdir(parents=True)
    docs.write_text(f"before\n<!-- begin experiments {name} -->\n<!-- end experiments {name} -->\nafter\n")
    assert gif(*command, "--docs", docs)[0] == 0
    assert results(folder) == done
    text = docs.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| --- |" in text
    pictures = sorted(path.name for path in (docs.parent / "pictures").iterdir())
    assert pictures == sorted(f"experiments-{name}-{path.name}" for path in folder.glob("*.png"))
    assert all(f"](pictures/{picture})" in text for picture in pictures)
    return json.loads((folder / f"{name}.json").read_text())


class TestForces:
    def command(self, folder):
        return ["experiments", "forces", "--quick", "--steps=40", "--output", folder]

    def test_quick(self, tiny, gif, tmp_path):
        folder = tmp_path / "out"
        code, printed = gif(*self.command(folder))
        assert code == 0, printed
        found = published("forces", folder, tmp_path / "docs" / "paper.md", self.command(folder), gif)
        assert found["layer-peeled"]["exact"]["threshold"] == pytest.approx(24.6, abs=0.1)
        assert set(found["training"]) == {"full softmax", "Partial FC 0.1", "GIF"}
        (run,) = found["training"]["GIF"]
        assert len(run) >= 2 and all(look["pull 2-3 images"] > 0 for look in run.values())
        code, printed = gif(*self.command(folder), "--bound=2")
        assert code == 1 and "model.bound is 3.0 there and 2.0 here" in printed

    @pytest.mark.parametrize("option", ["--seeds=0", "--steps=0", "--epochs=0", "--bound=-1"])
    def test_wrong_numbers(self, tiny, gif, tmp_path, option):
        code, printed = gif(*self.command(tmp_path / "out"), option)
        assert code == 1 and "wanted at least" in printed and not (tmp_path / "out").exists()

    def test_too_few_identities(self, tiny, gif, tmp_path, monkeypatch):
        monkeypatch.setattr(forces_module, "groups_by_images", lambda labels: [])
        code, printed = gif(*self.command(tmp_path / "out"))
        assert code == 1 and "give more --identities" in printed
        assert not (tmp_path / "out" / "peeled").exists()  # said before any of the work

    def test_a_document_without_its_block(self, tiny, gif, tmp_path):
        (tmp_path / "paper.md").write_text("nothing")
        code, printed = gif(*self.command(tmp_path / "out"), "--docs", tmp_path / "paper.md")
        assert code == 1 and "experiments forces" in printed and not (tmp_path / "out").exists()


class TestForceProbe:
    M, WIDTH, SCALE, MARGIN = 50, 16, 8.0, AngularMargin(m2=0.0, m3=0.2)

    def heads(self, data):
        codes = IdentityCodes(torch.cartesian_prod(torch.arange(8), torch.arange(8))[: self.M].to(torch.uint8), 8)
        vectors = CodeVectors(torch.randn(self.M, self.WIDTH))
        options: dict[str, Any] = {"margin": self.MARGIN, "scale": self.SCALE}
        yield MarginSoftmax(self.M, self.WIDTH, **options)
        yield PartialFC(self.M, self.WIDTH, samples=10, **options)
        contrast: dict[str, Any] = {"contrast_margin": self.MARGIN, "contrast_scale": self.SCALE, "negatives": 10}
        yield GIFLoss(codes, vectors, self.WIDTH, code_weight=0.0, regression_weight=0.0, **contrast)

    def test_forces_are_those_of_the_loss(self, tiny):
        data = tiny.train
        torch.manual_seed(0)
        backbone = TINY.build()
        groups = groups_by_images(data.labels)
        full, sampled, contrast = self.heads(data)
        whole = ForceProbe(full, data, groups, batch_size=64).forces(backbone)
        embeddings = backbone.eval()(data.images.float() / 127.5 - 1).detach()
        centers = F.normalize(full.weight.detach()).requires_grad_()
        cosine = F.normalize(embeddings) @ F.normalize(centers).T
        own = F.one_hot(data.labels, self.M).bool()
        logits = self.SCALE * torch.where(own, self.MARGIN(cosine), cosine)
        F.cross_entropy(logits, data.labels, reduction="sum").backward()
        torch.testing.assert_close(
            whole.pull.add(whole.push).float(), -centers.grad, rtol=1e-3, atol=1e-4
        )  # of float32 sums
        for head in (sampled, contrast):
            found = ForceProbe(head, data, groups, batch_size=8).forces(backbone)
            assert (found.pull.norm(dim=1) > 0).all()  # each has images
            assert found.push.norm() > 0
        told = ForceProbe(full, data, groups, batch_size=64)(backbone)
        rare = groups[0]
        assert told[f"pull {rare.name}"] == pytest.approx(float(whole.pull[rare.identities].norm(dim=1).mean()))

    def test_a_head_without_centres(self, tiny):
        codes = IdentityCodes(torch.arange(50)[:, None].to(torch.uint8) % 50, 50)
        head = GIFLoss(codes, None, 16, recipe="paper", regression_weight=0.0)
        with pytest.raises(ValueError, match="has no centre of an identity"):
            ForceProbe(head, tiny.train, [], 8)


class TestLambda:
    def command(self, folder):
        return ["experiments", "lambda", "--quick=true", "--lengths=2", "--output", folder]

    def test_quick(self, tiny, gif, tmp_path):
        folder = tmp_path / "out"
        assert gif(*self.command(folder))[0] == 0
        found = published("lambda", folder, tmp_path / "docs" / "paper.md", self.command(folder), gif)
        by_name = {run["weights"]: run for run in found["runs"]}
        assert set(by_name) == {"uniform", "increasing", "decreasing", "gaussian", "learned", "by difficulty"}
        assert all(sum(run["lambda"]) == pytest.approx(1, abs=1e-5) for run in by_name.values())
        assert by_name["increasing"]["lambda"] == pytest.approx([1 / 3, 2 / 3])
        assert by_name["learned"]["lambda"] != pytest.approx([0.5, 0.5], abs=1e-3)
        assert "uniform" in found["verdict"][0]
        assert gif(*self.command(folder), "--seeds=2", "--lengths=2,3")[0] == 0  # more may join
        code, printed = gif(*self.command(folder), "--epochs=2")
        assert code == 1 and "other settings" in printed

    def test_lengths_that_there_are_not(self, tiny, gif, tmp_path):
        code, printed = gif(*self.command(tmp_path / "out"), "--lengths=9")
        assert code == 1 and "have the lengths 2, 3; got 9" in printed
        code, printed = gif(*self.command(tmp_path / "out"), "--lengths=two")
        assert code == 1 and "wanted lengths such as 3,5" in printed

    @pytest.mark.parametrize("adaptive", ["learned", "difficulty"])
    def test_weights_follow_the_losses(self, adaptive):
        torch.manual_seed(0)
        tokens = torch.stack([torch.arange(40) % 2, torch.arange(40) // 2 % 20], 1).to(torch.uint8)
        codes = GIFLoss(
            IdentityCodes(tokens, 20), None, 8, recipe="paper", regression_weight=0.0, margin=AngularMargin(m2=0.0)
        )
        with torch.no_grad():
            codes.centers[0] = 0  # its loss is log 20, whatever the embedding
        head = AdaptiveTokens(codes, adaptive)
        embeddings, labels = torch.randn(32, 8), torch.randint(40, (32,))
        optimizer = torch.optim.SGD([head.log_losses], 0.05) if adaptive == "learned" else None
        for _ in range(400):
            head.zero_grad()
            head(embeddings, labels).backward()
            if optimizer:
                optimizer.step()
        losses = head.token_losses(embeddings, labels).detach()
        wanted = (1 / losses if adaptive == "learned" else losses) / (
            1 / losses if adaptive == "learned" else losses
        ).sum()
        assert head.token_weights.tolist() == pytest.approx(wanted.tolist(), abs=0.02)
        assert head(embeddings, labels).item() == pytest.approx(float((head.token_weights * losses).sum()), rel=0.02)

    def test_of_codes_alone(self):
        codes = IdentityCodes(torch.arange(5)[:, None].to(torch.uint8), 5)
        with pytest.raises(ValueError, match="L_C alone"):
            AdaptiveTokens(GIFLoss(codes, CodeVectors(torch.randn(5, 4)), 4), "learned")


class TestCost:
    def command(self, folder):
        return ["experiments", "cost", "--quick=true", "--width=8", "--batch=32", "--output", folder]

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        quick = cost_module.Size((1000, 4000, 64_000_000), width=8, batch=32)
        monkeypatch.setattr(cost_module, "QUICK", quick)

    def test_quick(self, gif, tmp_path):
        folder = tmp_path / "out"
        code, printed = gif(*self.command(folder), "--memory_gib=0.01")
        assert code == 0 and "ours, 64,000,000 rows: needs" in printed
        command = [*self.command(folder), "--memory_gib=0.01"]
        found = published("cost", folder, tmp_path / "docs" / "paper.md", command, gif)
        assert set(found["points"]["ours"]) == {"1000", "4000"}  # what fits is measured
        assert set(found["points"]["ours, table in a file"]) == {"1000", "4000", "64000000"}
        point = found["points"]["ours"]["4000"]
        assert point["seconds"] > 0 and point["held_bytes"] >= 4000 * 8 * 2
        report = (folder / "cost.md").read_text()
        assert "| 64,000,000 | (" in report  # planned beyond

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--batch=1", "wanted width >= 1 and a batch of 2"),
            ("--memory_gib=0", "memory_gib must be > 0"),
            ("--device=abacus", 'unknown device "abacus"'),
        ],
    )
    def test_errors(self, gif, tmp_path, option, message):
        code, printed = gif(*self.command(tmp_path / "out"), option)
        assert code == 1 and message in printed and not (tmp_path / "out").exists()


class TestEncoders:
    def command(self, folder, *options):
        given = ["--training.batch_size=16", "--vocab_size=5", "--identities=50", *OF_ENCODERS]
        return ["experiments", "encoders", "--quick=true", *given, "--output", folder, *options]

    def test_quick(self, tiny, gif, tmp_path, png, write_bin):
        pictures = tiny.held_out.images.expand(-1, 3, -1, -1)
        first = torch.arange(0, 60)
        partner = torch.where(first % 2 == 0, first // 6 * 6 + (first + 1) % 6, (first + 6) % 72)
        pairs = torch.stack([first, partner], 1)
        write_bin(tmp_path / "lfw.bin", list(map(png, pictures[pairs.flatten()])), (first % 2 == 0).tolist())
        folder = tmp_path / "out"
        command = self.command(folder, '--heads=["GIF, published"]')
        code, printed = gif(*command)
        assert code == 0, printed
        assert "Table 4" not in (folder / "encoders.md").read_text()
        command += ["--pairs", tmp_path / "lfw.bin"]
        assert gif(*command)[0] == 0  # what is trained is judged by what is new
        found = published("encoders", folder, tmp_path / "docs" / "paper.md", command, gif)
        assert set(found["vectors"]) == {
            f"{name}{spread}" for name in ("pixels", "distilled", "random") for spread in ("", ", spread")
        }
        assert all(0 <= run["benchmarks"]["lfw"] <= 1 for run in found["runs"])
        assert "| Method | Train Set | LFW |" in (folder / "encoders.md").read_text()
        assert found["vectors"]["random"]["the encoder alone"] == {}
        vectors = {
            name: CodeVectors.load(folder / "vectors" / name / "initial.safetensors") for name in ("pixels", "random")
        }
        apart = encoders_module.split_identities(tiny.train, encoders_module.APART, encoders_module.SPLIT)[1]
        for table in vectors.values():  # nobody whose images the encoder saw is trained on
            assert not set(table.identities.names) & set(apart.names)

    def test_the_embedding_is_as_wide_as_a_pretrained_encoder(self, tiny, gif, tmp_path, monkeypatch):
        asked = []

        class Pretrained:
            name, embedding_size, fit = "dino", 24, None

            def __call__(self, images):
                return images.float().flatten(1)[:, 100:124] + 1

        def make(name, **options):
            asked.append((name, options["model"], options["weights"]))
            return Pretrained()

        monkeypatch.setattr(encoders_module, "make_encoder", make)
        chosen = ['--encoders=["dino"]', "--weights.dino_model=vit", "--weights.dino=w.pth", '--heads=["GIF"]']
        folder = tmp_path / "out"
        code, printed = gif(*self.command(folder, *chosen))
        assert code == 0, printed
        assert asked == [("dino", "vit", "w.pth")]  # once: the vectors are kept
        assert CodeVectors.load(folder / "vectors" / "dino" / "spread.safetensors").width == 24
        assert "| dino, spread |" in (folder / "encoders.md").read_text()

    def test_unknown_names(self, tiny, gif, tmp_path):
        code, printed = gif(*self.command(tmp_path / "out", '--heads=["full softmax"]'))
        assert code == 1 and "wanted heads among" in printed and not (tmp_path / "out").exists()
        code, _ = gif(*self.command(tmp_path / "out", '--encoders=["sobel"]'))
        assert code == 2
        code, printed = gif(*self.command(tmp_path / "out", f"--pairs={tmp_path / 'none.bin'}"))
        assert code == 1 and "none.bin" in printed and not (tmp_path / "out").exists()

    def test_distillation_reads_no_label(self, tiny):
        found = []
        for labels in (tiny.train.labels, tiny.train.labels.flip(0)):
            data = IdentityImages(tiny.train.images, labels, list(tiny.train.names))
            torch.manual_seed(0)
            backbone = TINY.build()
            log = train(backbone, SelfDistillation(backbone, 16, 8), data, TrainingConfig(epochs=1, batch_size=16))
            found.append(log.losses)
        torch.testing.assert_close(*found)
        with pytest.raises(ValueError, match="before_step"):
            SelfDistillation(backbone, 16, 8)(torch.randn(4, 16), torch.zeros(4, dtype=torch.int64))


def test_an_interrupt_keeps_the_pieces_that_are_done(tmp_path):
    """SIGINT after a descent: the message says where they are."""
    output = tmp_path / "out"
    line = [sys.executable, "-m", "gif.cli", "experiments", "forces", "--quick=true", "--output", str(output)]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = output / "peeled" / "exact.json"
    end = time.monotonic() + 240
    while not list(first.parent.glob("*-seed-0.json")):
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.1)
    os.kill(running.pid, signal.SIGINT)
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 130, printed
    assert f"the same command continues from what {output}" in printed
    assert json.loads(first.read_text())["threshold"] == pytest.approx(24.6, abs=0.1)
