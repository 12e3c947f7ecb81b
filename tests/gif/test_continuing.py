"""Runs that begin with another's weights, go on for longer, end early, average, or leave parts as they are."""

import csv
import json
from typing import Any

import pytest
import torch

from gif.backbones import BackboneConfig, load_backbone, save_backbone
from gif.errors import InputError, UnavailableError
from gif.files import load_tensors
from gif.losses import MarginSoftmax
from gif.progress import console
from gif.training import TrainingConfig, train
from gif.training.average import WARM_UP, AverageBackbone
from gif.training.early_stopping import is_stale
from gif.training.freezing import freeze
from gif.training.loggers import MeasuresFile, MeasuresTable, TensorBoard, WeightsAndBiases, loggers_of

TINY = ["--backbone.embedding_size=16", "--backbone.image_size=16", "--backbone.width=4"]


def command(run, *options):
    given = ["train", "--output", run, *TINY, "--head.kind=softmax", "--training.batch_size=16"]
    return [*given, "--training.epochs=2", *options]


def weights(path):
    return load_backbone(path)[0].state_dict()


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


class Net(torch.nn.Module):
    body: Any
    norm: Any

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 16))
        self.norm = torch.nn.BatchNorm1d(16)

    def forward(self, images):
        return self.norm(self.body(images))


def fresh(identities=24) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return Net(), MarginSoftmax(identities, 16, scale=8.0)


CONFIG: dict[str, Any] = {"batch_size": 16, "lr": 0.05, "device": "auto"}


class TestAverage:
    def test_is_the_moving_average(self):
        torch.manual_seed(0)
        network: Any = Net()
        average: Any = AverageBackbone(network, 0.9)
        wanted = network.body[1].weight.detach().clone()
        for step in range(1, 6):
            with torch.no_grad():
                network.body[1].weight.normal_()
                network.norm.running_mean.normal_()
            average.update(network, step)
            decay = min(0.9, (1 + step) / (WARM_UP + step))
            wanted = decay * wanted + (1 - decay) * network.body[1].weight.detach()
        assert torch.allclose(average.network.body[1].weight, wanted, atol=1e-6)
        assert not average.network.body[1].weight.requires_grad
        assert torch.equal(average.network.norm.num_batches_tracked, network.norm.num_batches_tracked)
        assert not average.train().network.training

    def test_is_judged_kept_and_continued(self, tiny_images, tmp_path):
        judged = []

        def validate(network):
            judged.append({name: value.clone() for name, value in network.state_dict().items()})
            return {"score": float(len(judged))}

        images = tiny_images(24, 0)
        config = TrainingConfig(epochs=2, ema=0.95, **CONFIG)
        network, head = fresh()
        log: Any = train(network, head, images, config, validate=validate)
        plain, _ = fresh()
        trained = train(plain, fresh()[1], images, TrainingConfig(epochs=2, **CONFIG))
        assert torch.equal(log.losses, trained.losses) and trained.average is None  # averaging changes no step
        assert equal(judged[-1], {f"network.{name}": value for name, value in log.average.state_dict().items()})
        assert not torch.equal(log.average.body[1].weight, network.body[1].weight)

        steps = []

        def interrupted(images):
            steps.append(1)
            if len(steps) == 14:
                raise KeyboardInterrupt
            return images

        unchanged = [lambda images: images, interrupted]
        whole = train(*fresh(), images, config, augment=unchanged[0])
        with pytest.raises(KeyboardInterrupt):
            train(*fresh(), images, config, augment=interrupted, checkpoints=tmp_path / "c")
        again = train(*fresh(), images, config, augment=unchanged[0], checkpoints=tmp_path / "c")
        assert equal(whole.average.state_dict(), again.average.state_dict())

    def test_what_the_command_writes_is_the_average(self, tiny_data, gif, tmp_path):
        run = tmp_path / "run"
        code, _ = gif(*command(run, "--training.ema=0.9", "--validation.identities=6"))
        assert code == 0
        state, _ = load_tensors(
            next(run.glob("checkpoints/step-000000018")) / "state.safetensors", format="gif.training_state/2"
        )
        written = weights(run / "backbone.safetensors")
        assert equal({f"model.average.network.{name}": value for name, value in written.items()}, state)
        assert not torch.equal(written["embed.1.weight"], state["model.backbone.embed.1.weight"])
        best = weights(run / "best.safetensors")
        assert any(
            equal(
                {f"model.average.network.{name}": value for name, value in best.items()},
                load_tensors(path, format="gif.training_state/2")[0],
            )
            for path in run.glob("checkpoints/step-*/state.safetensors")
        )


class TestFreezing:
    def test_frozen_parts_stay(self, tiny_images):
        network, head = fresh()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        train(network, head, tiny_images(24, 0), TrainingConfig(epochs=1, freeze=["norm", "body.1.bias"], **CONFIG))
        after = network.state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {"body.1.weight"}  # and not the running statistics

    def test_all_of_it(self, tiny_images):
        network, head = fresh()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        train(network, head, tiny_images(24, 0), TrainingConfig(epochs=1, freeze=["*"], **CONFIG))
        assert equal(before, network.state_dict())

    def test_a_name_of_nothing(self, tiny_data, gif, tmp_path):
        with pytest.raises(InputError, match=r"no part 'head' to freeze; it has body \(0\.0 million weights\), norm"):
            freeze(Net(), ["head"])
        code, printed = gif(*command(tmp_path / "run", "--training.freeze=[conv1]"))
        assert code == 1 and "no part 'conv1'" in printed and "features" in printed
        assert not (tmp_path / "run").exists()


class TestEarlyStopping:
    @pytest.mark.parametrize(
        ("scores", "patience", "stale"),
        [
            ([], 1, False),
            ([0.5], 1, False),
            ([0.5, 0.5], 1, True),
            ([0.5, 0.6], 1, False),
            ([0.5, 0.4, 0.45], 2, True),
            ([0.5, 0.4, 0.55], 2, False),
            ([0.5, 0.4, 0.3, 0.2], None, False),
        ],
    )
    def test_patience(self, scores, patience, stale):
        assert is_stale({10 * step: {"a": score} for step, score in enumerate(scores)}, patience) is stale

    def test_a_run_ends_and_stays_ended(self, tiny_images, tmp_path):
        scores = iter([0.1, 0.3, 0.2, 0.2, 0.9])
        config = TrainingConfig(epochs=8, patience=2, **CONFIG)
        arguments: dict[str, Any] = {"validate_every": 5, "checkpoints": tmp_path / "c"}
        with console.capture() as capture:
            log = train(*fresh(), tiny_images(24, 0), config, validate=lambda network: {"a": next(scores)}, **arguments)
        assert list(log.validations) == [5, 10, 15, 20] and len(log.losses) == 20
        assert "ends after step 20 of 72: the last 2 validations" in capture.get()
        assert bool(log.losses.isfinite().all())
        again = train(*fresh(), tiny_images(24, 0), config, validate=lambda network: {"a": next(scores)}, **arguments)
        assert torch.equal(again.losses, log.losses) and next(scores) == 0.9

    def test_patience_without_validation(self, tiny_data, gif, tmp_path):
        code, printed = gif(*command(tmp_path / "run", "--training.patience=2"))
        assert code == 1 and "patience counts validations, and there is none" in printed


class TestLonger:
    def test_a_finished_run_goes_on(self, tiny_data, gif, tmp_path):
        run = tmp_path / "run"
        assert gif(*command(run))[0] == 0
        first = load_tensors(run / "losses.safetensors", format="gif.losses/1")[0]["losses"]
        longer = [*command(run), "--training.epochs=4"]
        code, printed = gif(*longer)
        assert code == 1 and "training.epochs is 2 there and 4 here" in printed and "--resume longer" in printed
        code, printed = gif(*longer, "--resume=longer")
        assert code == 0, printed
        losses = load_tensors(run / "losses.safetensors", format="gif.losses/1")[0]["losses"]
        assert len(losses) == 36 and torch.equal(losses[:18], first)
        assert gif(*longer)[0] == 0  # it is the run of this command now
        code, printed = gif(*command(run), "--resume=longer")
        assert code == 1 and "the run in" in printed and "36 steps" in printed
        code, printed = gif(*longer, "--resume=longer", "--training.lr=0.3")
        assert code == 1 and "training.lr is 0.1 there" in printed
        code, printed = gif(*command(tmp_path / "none"), "--resume=longer")
        assert code == 1 and "holds no run that could go on" in printed


class TestInit:
    def test_a_run_begins_with_another_and_its_head(self, tiny_data, gif, tmp_path):
        assert gif(*command(tmp_path / "a"))[0] == 0
        code, printed = gif(*command(tmp_path / "b", "--init", tmp_path / "a", "--training.lr=1e-8"))
        assert code == 0 and f"the head begins with that of {tmp_path / 'a'}" in printed
        one, other = (weights(tmp_path / name / "backbone.safetensors") for name in "ab")
        assert torch.allclose(one["embed.1.weight"], other["embed.1.weight"], atol=1e-5)
        heads = [load_tensors(tmp_path / name / "head.safetensors", format="gif.head/1")[0] for name in "ab"]
        assert all(torch.allclose(value, heads[1][name], atol=1e-5) for name, value in heads[0].items())
        code, printed = gif(*command(tmp_path / "b", "--training.lr=1e-8"))
        assert code == 1 and "init is" in printed and "not set here" in printed

    def test_the_default_backbone_becomes_the_models(self, tiny_data, gif, tmp_path):
        config = BackboneConfig("small", 16, 1, 16, width=4)
        save_backbone(tmp_path / "m.safetensors", config.build(), config)
        given = [word for word in command(tmp_path / "a", "--init", tmp_path / "m.safetensors") if word not in TINY]
        code, printed = gif(*given)
        assert code == 0 and "--backbone.embedding_size 16 --backbone.image_size 16 --backbone.width 4" in printed
        assert load_backbone(tmp_path / "a" / "backbone.safetensors")[1] == config

    def test_another_width_begins_afresh_and_is_named(self, tiny_data, gif, tmp_path):
        config = BackboneConfig("small", 8, 1, 16, width=4)
        torch.manual_seed(7)
        save_backbone(tmp_path / "m.safetensors", config.build(), config)
        options = ["--init", tmp_path / "m.safetensors", "--training.lr=1e-8"]
        code, printed = gif(*command(tmp_path / "a", *options))
        assert code == 0 and "begin afresh" in printed and "embed.1.weight" in printed
        name = "features.0.0.weight"
        there, here = weights(tmp_path / "m.safetensors"), weights(tmp_path / "a" / "backbone.safetensors")
        assert torch.allclose(here[name], there[name], atol=1e-5)

    def test_what_does_not_fit(self, tiny_data, gif, tmp_path):
        config = BackboneConfig("mbf", 16, 3, 16)
        torch.save(config.build().state_dict(), tmp_path / "m.pt")
        code, printed = gif(*command(tmp_path / "a", "--init", tmp_path / "m.pt"))
        assert code == 1 and "another backbone" in printed and "--backbone.name mbf" in printed
        code, printed = gif(*command(tmp_path / "a", "--init", tmp_path / "none.pt"))
        assert code == 1 and "no file" in printed
        code, printed = gif(*command(tmp_path / "a", "--init", "timm"))
        assert code == 1 and "timm has weights for --backbone.name vit" in printed
        (tmp_path / "empty").mkdir()
        code, printed = gif(*command(tmp_path / "a", "--init", tmp_path / "empty"))
        assert code == 1 and "without a model.safetensors or backbone.safetensors" in printed
        assert not (tmp_path / "a").exists()

    def test_timms_weights_in_another_size(self, tiny_data, gif, tmp_path):
        import timm

        torch.manual_seed(3)
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10)
        torch.save(theirs.state_dict(), tmp_path / "timm.pth")
        options = ["--backbone.name=vit", "--backbone.model=vit_tiny_patch16_224", "--init", tmp_path / "timm.pth"]
        given = [
            word
            for word in command(tmp_path / "a", *options)
            if "width" not in str(word) and "image_size" not in str(word)
        ]
        code, printed = gif(*given, "--backbone.image_size=16", "--training.lr=1e-8", "--training.steps=1")
        assert code == 0 and "the last layer begins afresh: head.weight, head.bias" in printed, printed
        here = weights(tmp_path / "a" / "backbone.safetensors")
        assert torch.allclose(
            here["blocks.3.attn.qkv.weight"], theirs.state_dict()["blocks.3.attn.qkv.weight"], atol=1e-5
        )
        assert here["pos_embed"].shape == (1, 2, 192) and here["patch_embed.proj.weight"].shape == (192, 1, 16, 16)


class TestLoggers:
    def test_measures_of_a_run_that_goes_on_are_those_of_one_that_did_not(self, tmp_path):
        path = tmp_path / "measures.jsonl"
        with MeasuresFile(path).open(0) as write:
            for step in (10, 20, 30):
                write(step, {"loss": float(step), "gap": float("nan")})
        path.write_text(path.read_text() + '{"step": 40, "lo')  # a killed run's last line
        with MeasuresFile(path).open(20) as write:
            write(30, {"loss": 3.0})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines == [
            {"step": 10, "loss": 10.0, "gap": None},
            {"step": 20, "loss": 20.0, "gap": None},
            {"step": 30, "loss": 3.0},
        ]

    def test_the_command_writes_every_measure(self, tiny_data, gif, tmp_path):
        assert gif(*command(tmp_path / "run", "--validation.identities=6"))[0] == 0
        lines = [json.loads(line) for line in (tmp_path / "run" / "measures.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [9, 10, 18, 18]  # the last step is measured, and judged
        assert {"loss", "learning rate", "images a second"} <= lines[1].keys()
        assert lines[0].keys() == {"step", "validation/held-out TAR@0.001"}

    def test_a_table_of_a_run_that_goes_on(self, tmp_path):
        path = tmp_path / "measures.csv"
        with MeasuresTable(path).open(0) as write:
            write(10, {"loss": 1.5})
            write(12, {"score, held-out": 0.25})  # comes later: a new column
            write(20, {"loss": float("nan")})
            write(30, {"loss": 2.0})
        path.write_text(path.read_text() + "1")  # of step 12: what a killed run left of a row
        with MeasuresTable(path).open(20) as write:
            write(30, {"loss": 3.0, "score, held-out": 0.5})
        assert path.read_text().splitlines() == [
            'step,loss,"score, held-out"',
            "10,1.5,",
            "12,,0.25",
            "20,nan,",
            "30,3.0,0.5",
        ]

    def test_the_table_holds_what_the_file_holds(self, tiny_data, gif, tmp_path):
        assert gif(*command(tmp_path / "run", "--validation.identities=6", "--loggers", "csv", "tensorboard"))[0] == 0
        lines = [json.loads(line) for line in (tmp_path / "run" / "measures.jsonl").read_text().splitlines()]
        with (tmp_path / "run" / "measures.csv").open(newline="") as file:
            rows = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
        assert rows == lines and len(rows) == 4
        assert list((tmp_path / "run" / "tensorboard").iterdir())

    def test_names(self, tmp_path):
        found = loggers_of(tmp_path, ["csv", "tensorboard", "wandb"], {})
        assert [type(logger) for logger in found] == [MeasuresFile, MeasuresTable, TensorBoard, WeightsAndBiases]
        assert [type(logger) for logger in loggers_of(tmp_path, "tensorboard", {})] == [MeasuresFile, TensorBoard]
        wrong: Any = ["mlflow"]
        with pytest.raises(InputError, match="no logger mlflow; there are csv, tensorboard, wandb"):
            loggers_of(tmp_path, wrong, {})

    @pytest.mark.parametrize("name", ["tensorboard", "wandb"])
    def test_a_package_that_is_not_there(self, tiny_images, tmp_path, monkeypatch, name):
        monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
        with pytest.raises(
            UnavailableError, match=rf'{name} is not installed; pip install "gif-recognition\[{name}\]"'
        ):
            train(*fresh(), tiny_images(24, 0), TrainingConfig(**CONFIG), loggers=loggers_of(tmp_path, [name], {}))

    def test_wandb_offline(self, tiny_data, gif, tmp_path, monkeypatch):
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        code, printed = gif(*command(tmp_path / "run", "--loggers=wandb"))
        assert code == 0, printed
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
