"""The `gif` command, as a user types it, on a data set small enough for a test."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.run import get_args_parser

from gif import cli
from gif.arguments import CONFIGS, parsed
from gif.backbones import BackboneConfig, load_backbone
from gif.codes import IdentityCodes
from gif.errors import DivergedError, InputError, MissingFileError, UnavailableError
from gif.experiments import glyph_bench
from gif.experiments import sweep as sweep_module
from gif.files import load_tensors, read_json
from gif.losses import RECIPES
from gif.run import command as run_module
from gif.vectors import CodeVectors
from gif.vectors import commands as vectors_commands

TINY = ["--backbone.embedding_size=16", "--backbone.image_size=16", "--backbone.width=4"]


def test_step_by_step(tiny_data, gif, tmp_path, monkeypatch):
    vectors, spread, codes = (tmp_path / f"{name}.safetensors" for name in ("vectors", "spread", "codes"))
    assert gif("vectors", "--output", vectors, "--width=16")[0] == 0
    assert gif("spread", "--vectors", vectors, "--output", spread, "--epochs=2")[0] == 0
    assert gif("tokenize", "--vectors", spread, "--output", codes, "--vocab_size=5")[0] == 0
    assert len(CodeVectors.load(spread)) == len(IdentityCodes.load(codes)) == 24
    assert spread.with_suffix(".png").exists()
    assert not list(tmp_path.glob("*.partial"))

    run = tmp_path / "run"
    train = ["train", "--output", run, "--codes", codes, "--vectors", spread, *TINY]
    train += ["--training.epochs=2", "--training.batch_size=16"]
    assert gif(*train)[0] == 0
    before = load_backbone(run / "backbone.safetensors")[0].state_dict()
    assert gif(*train)[0] == 0  # finished: the same command changes nothing
    after = load_backbone(run / "backbone.safetensors")[0].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    code, printed = gif(*train, "--head.overrides.scale=17")
    assert code == 1 and "holds a run with other settings" in printed
    with monkeypatch.context() as later:  # a version whose default recipe is another would not go on with this run
        later.setitem(RECIPES, "live", replace(RECIPES["live"], fades=1.0))
        code, printed = gif(*train)
    assert code == 1 and "recipe.fades is 0.5 there and 1.0 here" in printed

    code, printed = gif("evaluate", "--model", run / "backbone.safetensors", "--data=glyphs")
    assert code == 0 and "rank-1" in printed
    assert 0 <= json.loads((run / "evaluation.json").read_text())["held_out"]["rank1"] <= 1
    assert (run / "roc.png").exists() and (run / "det.png").exists()


def test_training_with_a_sample_writes_its_centres(tiny_data, gif, tmp_path):
    run = tmp_path / "run"
    command = ["train", "--output", run, *TINY, "--head.kind=partial_fc", "--head.samples=8"]
    command += ["--training.epochs=2", "--training.batch_size=16"]
    assert gif(*command)[0] == 0
    centers = load_tensors(run / "centers.safetensors", format="gif.head/1")[0]["weight"]
    assert centers.shape == (24, 16)
    assert all(list((run / "checkpoints" / table).iterdir()) for table in ("weight", "momentum"))
    assert gif(*command)[0] == 0  # finished: the same command changes nothing
    again = load_tensors(run / "centers.safetensors", format="gif.head/1")[0]["weight"]
    assert torch.equal(again, centers)


def test_training_is_validated_and_resumed(tiny_data, gif, tmp_path, png, write_bin):
    pictures = tiny_data.held_out.images.expand(-1, 3, -1, -1)
    first = torch.arange(0, 40)
    pairs = torch.stack([first, torch.where(first % 2 == 0, first + 12, first + 13)], 1)
    write_bin(tmp_path / "lfw.bin", list(map(png, pictures[pairs.flatten()])), (first % 2 == 0).tolist())
    run = tmp_path / "run"
    command = ["train", "--output", run, *TINY, "--head.kind=softmax", "--training.batch_size=16"]
    command += ["--training.epochs=3", "--training.keep=1"]
    judged = [f"--validation.pairs={tmp_path / 'lfw.bin'}", "--validation.identities=6", "--validation.every=10"]
    code, printed = gif(*command, *judged, "--loggers=tensorboard")
    assert code == 0
    scores = json.loads((run / "validations.json").read_text())
    assert list(scores) == ["10", "20", "27"]
    assert all(score.keys() == {"lfw", "held-out TAR@0.001"} for score in scores.values())
    for step, found in scores.items():
        told = f"validation after {step} steps: lfw {found['lfw']:.4f}"
        assert told in printed and f"mean {sum(found.values()) / 2:.4f}" in printed
    best = max(scores, key=lambda step: sum(scores[step].values()))
    assert f"the best one, after {best} steps" in printed
    assert {f"step-{int(best):09d}", "step-000000027"} == {path.name for path in run.glob("checkpoints/step-*")}
    assert (run / "validations.png").read_bytes()[:4] == b"\x89PNG"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scored = [(event.step, event.value) for event in events.Scalars("validation/lfw")]
    assert scored == [(int(step), pytest.approx(found["lfw"])) for step, found in scores.items()]
    assert "validation/mean" in events.Tags()["scalars"]

    assert gif("evaluate", "--model", run / "best.safetensors", "--pairs", tmp_path / "lfw.bin")[0] == 0
    assert json.loads((run / "evaluation.json").read_text())["pairs"]["lfw"]["accuracy"] == scores[best]["lfw"]

    code, printed = gif(*command, "--resume=never")
    assert code == 1 and f"{run} exists; give another --output, or --resume auto" in printed
    assert gif(*command, "--resume=auto")[0] == 0  # what it is judged by may change: the run is the same
    assert json.loads((run / "validations.json").read_text()) == scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation.pairs=none.bin"], "no file none.bin"),
        (["--validation.ijb=none"], "aligned to 112 x 112 in 3 channels"),
        (["--validation.identities=13"], "13 identities are to validate and 12 are held out"),
        (["--validation.identities=1"], "wanted identities >= 2, got identities=1"),
        (["--validation.every=0"], "wanted every >= 1, got every=0"),
    ],
)
def test_validation_is_looked_at_before_training(tiny_data, gif, tmp_path, options, message):
    code, printed = gif("train", "--output", tmp_path / "run", *TINY, "--head.kind=softmax", *options)
    assert code == 1 and message in printed
    assert not (tmp_path / "run").exists()


@pytest.fixture
def tiny_bench(tiny_data, monkeypatch):
    backbone = BackboneConfig(embedding_size=16, image_size=16, width=4)
    monkeypatch.setattr(glyph_bench, "BACKBONE", backbone)
    monkeypatch.setattr(glyph_bench, "VOCAB_SIZE", 5)
    return tiny_data


def test_accuracy(tiny_bench, gif, tmp_path):
    heads = list(glyph_bench.CONTENDERS)
    command = ["accuracy", "--output", tmp_path / "a", "--seeds=2", "--batch_size=16"]
    code, printed = gif(*command, "--epochs=1", f"--heads={json.dumps(heads)}")
    assert code == 0 and "Partial FC" in printed
    report = (tmp_path / "a" / "accuracy.md").read_text()
    assert all(report.count(f"| {head} |") == 4 for head in heads)  # all images, and three tables by their number
    assert "±" in report and "| 4-7 images |" in report
    for picture in ("roc.png", "rarity.png"):
        assert (tmp_path / "a" / picture).read_bytes()[:4] == b"\x89PNG"
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("result.json")}
    assert len(results) == 2 * len(heads)
    docs = tmp_path / "docs" / "accuracy.md"
    (docs.parent / "pictures").mkdir(parents=True)
    docs.write_text("<!-- begin accuracy glyphs -->\n<!-- end accuracy glyphs -->\n")
    assert gif(*command, "--epochs=1", "--docs", docs)[0] == 0  # continues: nothing to do
    assert report in docs.read_text()
    assert gif(*command, "--epochs=3", "--output", tmp_path / "c", "--docs", tmp_path / "nothing.md")[0] == 1
    assert not (tmp_path / "c").exists()  # said before any work
    assert (docs.parent / "pictures" / "accuracy-glyphs-rarity.png").exists()
    assert results == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("result.json")}
    code, printed = gif(*command, "--epochs=2")
    assert code == 1 and "other settings" in printed
    code, printed = gif("accuracy", "--output", tmp_path / "b", '--heads=["arcface"]')
    assert code == 1 and "arcface" in printed and "full softmax" in printed


def test_accuracy_by_epochs(tiny_bench, gif, tmp_path):
    output = tmp_path / "a"
    command = ["accuracy", "--output", output, "--batch_size=16", "--data=glyphs"]
    heads = ["GIF", "Faster Face Classification", "Virtual FC"]
    code, _ = gif(*command, "--seeds=1", "--budgets=1,2", f"--heads={json.dumps(heads[:2])}")
    assert code == 0
    report = (output / "curves.md").read_text()
    assert "| head | 1 epoch | 2 epochs |" in report and all(report.count(f"| {head} |") == 4 for head in heads[:2])
    for picture in ("curves-epochs.png", "curves-time.png"):
        assert (output / picture).read_bytes()[:4] == b"\x89PNG"
    results = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    assert {str(path.relative_to(output)) for path in results} == {
        f"{head}/epochs-{count}/seed-0/result.json"
        for head in ("gif", "faster-face-classification")
        for count in (1, 2)
    }
    assert all(json.loads(path.read_text())["processor_seconds"] > 0 for path in results)
    docs = tmp_path / "docs" / "accuracy.md"
    (docs.parent / "pictures").mkdir(parents=True)
    docs.write_text("<!-- begin accuracy curves glyphs -->\n<!-- end accuracy curves glyphs -->\n")
    code, _ = gif(*command, "--seeds=2", "--budgets=[2,1]", f"--heads={json.dumps(heads)}", "--docs", docs)
    assert code == 0  # another head and another seed join what is there
    assert len(list(output.rglob("result.json"))) == 12
    assert results == {path: path.stat().st_mtime_ns for path in results}
    assert (output / "curves.md").read_text() in docs.read_text() and "±" in docs.read_text()
    assert (docs.parent / "pictures" / "accuracy-curves-glyphs-time.png").exists()
    code, printed = gif(*command, "--budgets=1", "--batch_size=8")
    assert code == 1 and "other settings (batch_size is 16 there and 8 here" in printed
    for wrong in ("0,4", "four"):
        code, printed = gif("accuracy", "--output", tmp_path / "b", f"--budgets={wrong}")
        assert code == 1 and "wanted budgets" in printed and not (tmp_path / "b").exists()


def test_sweep_tries_settings_on_identities_it_keeps_from_training(tiny_bench, gif, tmp_path, monkeypatch):
    trained, judged = set(), set()
    spy = glyph_bench.train
    monkeypatch.setattr(glyph_bench, "train", lambda *args, **k: trained.update(args[2].names) or spy(*args, **k))
    spy_judge = glyph_bench.embed
    monkeypatch.setattr(glyph_bench, "embed", lambda net, data: judged.add(tuple(data.names)) or spy_judge(net, data))
    monkeypatch.setitem(sweep_module.KNOBS, "full softmax", {"lr": (0.05, 0.1), "margin": (0.2, 0.3)})
    command = ["sweep", "--output", tmp_path / "s", '--heads=["full softmax"]', "--seeds=1", "--epochs=1"]
    code, _ = gif(*command, "--batch_size=16")
    assert code == 0
    report = (tmp_path / "s" / "sweep.md").read_text()
    assert all(f"| full softmax{setting} |" in report for setting in ("", ", lr=0.05", ", margin=0.3"))
    assert report.count("best |") == 2  # the column, and one setting
    names = set(tiny_bench.train.names)
    assert len(trained) == 19 and trained < names
    assert all(set(part) == names - trained or set(part) <= trained for part in judged)
    code, printed = gif("sweep", "--output", tmp_path / "b", '--heads=["GIF, no tokens"]')
    assert code == 1 and "GIF, no tokens" in printed

    monkeypatch.setattr(glyph_bench.GlyphBench, "seconds_a_step", lambda self, heads, training: [0.7 for _ in heads])
    code, printed = gif(*command[:2], tmp_path / "t", *command[3:], "--batch_size=16", "--seconds=2")
    assert code == 0 and "2 s" in printed
    results = list((tmp_path / "t").rglob("result.json"))
    assert len(results) == 3 and all(read_json(path)["steps"] == 3 for path in results)  # all as the head's own
    assert read_json(tmp_path / "t" / "full-softmax" / "pace.json") == {"processor_seconds_a_step": 0.7}
    code, printed = gif(*command[:2], tmp_path / "u", *command[3:], "--seconds=0")
    assert code == 1 and "at least one" in printed and not (tmp_path / "u").exists()


@pytest.mark.parametrize("data", ["glyphs", "glyph-words"])
@pytest.mark.parametrize("head", list(sweep_module.KNOBS))
def test_every_head_of_the_sweep_gets_as_many_trials(head, data):
    base = glyph_bench.contenders_on(data)[head]
    trials = dict(sweep_module.variations(head, base))
    assert len(trials) == 10
    contenders = list(trials.values())
    assert all(a != b for i, a in enumerate(contenders) for b in contenders[:i])
    assert contenders[0] == base


def test_a_sweep_turns_around_what_was_found_for_that_kind_of_data(tmp_path, monkeypatch):
    tried = {}
    monkeypatch.setattr(sweep_module, "compare", lambda output, contenders, *rest: tried.update(contenders) or 1 / 0)
    for data, lr in (("glyphs", 0.1), ("glyph-words", 0.2)):
        with pytest.raises(ZeroDivisionError):
            sweep_module.sweep(tmp_path, data=data, heads=["GIF"])
        assert tried["GIF"].lr == tried["GIF, siblings=8"].lr == lr


def test_quickstart(tiny_images, tiny_data, monkeypatch, gif, tmp_path):
    whole = tiny_images(36, 0)
    monkeypatch.setattr(run_module, "open_data", lambda name, **options: whole)
    monkeypatch.setattr(run_module, "load_data", lambda name, **options: tiny_data)
    output = tmp_path / "quick"
    code, printed = gif("quickstart", "--output", output, "--epochs=1")
    assert code == 0 and "full softmax" in printed
    report = (output / "report.md").read_text()
    code, printed = gif("quickstart", "--output", output, "--epochs=1")
    assert code == 0 and "already finished" in printed and "TAR@0.001" in printed and "full softmax" in printed
    code, printed = gif("quickstart", "--output", output, "--epochs=2")  # another run: nothing is lost
    assert code == 1 and "other settings" in printed
    assert (output / "report.md").read_text() == report
    assert all(f"| {head} |" in report for head in ("GIF", "GIF, published", "full softmax"))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    code, printed = gif("quickstart", "--output", tmp_path / "mine")
    assert code == 1 and "holds something that is no run" in printed
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["evaluate", "--pairs", "a.bin", "b.bin"], ["evaluate", "--pairs", '["a.bin", "b.bin"]']),
        (
            ["evaluate", "--pairs=a.bin", "b.bin", "--flip", "no"],
            ["evaluate", '--pairs=["a.bin", "b.bin"]', "--flip", "no"],
        ),
        (["codes", "inspect", "--codes", "c"], ["codes", "inspect", "--codes", "c"]),
        (["--config", "c.yaml", "train", "--output", "o"], ["--config", "c.yaml", "train", "--output", "o"]),
        (
            ["experiments", "forces", "--quick", "--output", "o"],
            ["experiments", "forces", "--quick=true", "--output", "o"],
        ),
        (["embed", "a.png", "--flip", "true", "b"], ["embed", "--flip", "true", '["a.png", "b"]']),
        (["verify", "--model=m", "a.png", "b.png"], ["verify", "--model=m", "a.png", "b.png"]),
        (["train", "--training.lr", "-1"], ["train", "--training.lr", "-1"]),
        (["data", "inspect", "--input", "faces", "--debug"], ["data", "inspect", "--data", "faces"]),
    ],
)
def test_words_after_an_option_are_a_list(given, taken):
    assert parsed(given) == taken


def test_doctor_says_what_runs_and_why(gif):
    code, printed = gif("doctor")
    assert code == 0
    for op in ("token_margin_loss", "gaussian_potential", "uniformity_step_"):
        assert op in printed
    assert "blocked" in printed or torch.cuda.is_available()


@pytest.mark.parametrize("command", [*(name for name in cli.COMMANDS if name != "data"), "data glyphs"])
def test_help(gif, command, capsys):
    code, _ = gif(*command.split(), "--help")
    assert code == 0
    printed = capsys.readouterr().out
    assert "options:" in printed
    assert command == "doctor" or ("--config" in printed and len(printed) > 900)


def test_help_says_what_each_command_is_for(gif, capsys):
    """Read from its docstring, without importing it."""
    assert gif("--help")[0] == 0
    printed = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens too
    assert gif("codes", "--help")[0] == 0
    printed += "".join(capsys.readouterr().out.split())
    functions = cli._each(cli.COMMANDS, cli._function)
    for function in [*functions.values(), *functions["codes"].values()]:
        if callable(function):
            assert "".join(function.__doc__.splitlines()[0].split()) in printed


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train", "--help"], {"train": "train_command"}),
        (["codes", "inspect"], {"codes": {"inspect": "inspect_codes"}}),
    ],
)
def test_only_the_command_of_a_line_is_imported(arguments, names):
    found = cli._components(arguments)

    def named(level):
        if not isinstance(level, dict):
            return level.__name__
        return {key: named(value) for key, value in level.items() if key != cli.HELP}

    assert named(found) == names
    assert named(cli._components(["--config", "x", *arguments])).keys() == cli.COMMANDS.keys()


def test_an_unknown_command(gif, capsys):
    assert gif("trian")[0] == 2
    assert "train" in capsys.readouterr().err


def test_recipes_have_names(gif, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed(["train", "--config", "glyphs"]) == ["train", "--config", str(CONFIGS / "glyphs.yaml")]
    assert parsed(["train", "--config=glyphs"])[1] == f"--config={CONFIGS / 'glyphs.yaml'}"
    code, printed = gif("train", "--config", "glyhps")
    assert code == 1 and "--config glyhps: no such file" in printed and "glyphs, ms1mv2_r100" in printed
    (tmp_path / "glyphs").write_text("head: {kind: gif}")
    assert parsed(["train", "--config", "glyphs"])[2] == "glyphs"  # a file of that name comes first


class TestErrorsAreOneLine:
    def test_missing_file(self, gif, tmp_path):
        code, printed = gif("spread", "--vectors", tmp_path / "none", "--output", tmp_path / "x")
        assert code == 1 and printed.startswith("error: no file")

    def test_codes_as_vectors(self, gif, tmp_path):
        IdentityCodes(torch.tensor([[0], [1]]), 2).save(tmp_path / "codes")
        code, printed = gif("spread", "--vectors", tmp_path / "codes", "--output", tmp_path / "x")
        assert code == 1 and "holds gif.identity_codes/1, wanted gif.code_vectors/1" in printed

    def test_codes_of_another_data_set(self, tiny_data, gif, tmp_path):
        IdentityCodes(torch.tensor([[0], [1]]), 2).save(tmp_path / "codes")
        code, printed = gif("train", "--codes", tmp_path / "codes", "--output", tmp_path / "run", *TINY)
        assert code == 1 and "codes are for 2 identities and the data set has 24" in printed
        assert not (tmp_path / "run").exists()

    def test_too_many_identities(self, gif, tmp_path):
        CodeVectors(torch.randn(30, 4)).save(tmp_path / "v")
        arguments = ["--vectors", tmp_path / "v", "--vocab_size=5", "--length=2", "--output", tmp_path / "c"]
        code, printed = gif("tokenize", *arguments)
        assert code == 1 and "30 identities" in printed and "length >= 3" in printed

    def test_missing_weights(self, tiny_data, gif, tmp_path):
        code, printed = gif("vectors", "--encoder=clip", "--weights", tmp_path / "w.pt", "--output", tmp_path / "v")
        assert code == 1 and "w.pt" in printed

    def test_interrupt(self, tiny_data, gif, tmp_path, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(vectors_commands, "fitted_code_vectors", interrupted)
        code, printed = gif("vectors", "--output", tmp_path / "v.safetensors")
        assert code == 130 and "nothing was kept" in printed
        assert not list(tmp_path.iterdir())


BUGS = [KeyError("label"), ValueError("x"), RuntimeError("a\nb"), TypeError("f"), AssertionError(), OSError(9, "bad")]
MENDABLE = {
    "input": (InputError("no such\n  thing"), "error: no such thing"),
    "missing": (MissingFileError("no file x"), "error: no file x"),
    "hub": (UnavailableError("cannot load it"), "error: cannot load it"),
    "diverged": (DivergedError("the loss is nan"), "error: the loss is nan"),
    "permission": (PermissionError(13, "Permission denied", "/x/y"), "/x/y"),
    "full disk": (OSError(28, "No space left on device"), "No space left on device"),
    "by hand": (OSError("x needs 3 GB"), "error: x needs 3 GB"),
    "memory": (MemoryError(), "error: out of memory (the system gave no more); lower batch_size"),
    "gpu memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        "error: out of memory (CUDA out of memory.",
    ),
    "cpu memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "error: out of memory ("),
    "peer": (RuntimeError("[pair.cc:534] Connection closed by peer"), "error: the processes of this run have lost"),
    "reset": (RuntimeError("gloo/transport/tcp/pair.cc:545] Read error"), "error: the processes of this run have lost"),
    "name": (InputError("no file \udcff.png"), "error: no file \\udcff.png"),
}


class Unreadable(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise InputError("image 7 cannot be read")


class TestWhatIsNotAUsersFault:
    """A bug is said to be one; what a user can mend is one line, wherever it comes from."""

    @pytest.fixture
    def raising(self, tiny_data, gif, tmp_path, monkeypatch):
        """Run a command in which an error comes up; the exit code and what was printed."""

        def run(error, *options):
            def broken(*_, **__):
                raise error

            monkeypatch.setattr(vectors_commands, "fitted_code_vectors", broken)
            return gif("vectors", "--output", tmp_path / "v.safetensors", *options)

        return run

    @pytest.mark.parametrize("error", BUGS, ids=repr)
    def test_bugs(self, raising, error, capsys):
        code, printed = raising(error)
        assert code == 70 and printed.startswith(f"bug: {type(error).__name__}: ")
        assert "(test_cli.py, line " in printed and "Please report it" in printed and "--debug" in printed
        assert len(printed.splitlines()) == 2 and "Traceback" not in printed + capsys.readouterr().err

    @pytest.mark.parametrize("name", MENDABLE)
    def test_mendable(self, raising, name):
        error, line = MENDABLE[name]
        code, printed = raising(error)
        assert code == 1 and printed.startswith("error: ") and line in printed and len(printed.splitlines()) == 1

    def test_what_a_loaders_worker_raised_is_one_line(self, raising):
        with pytest.raises(InputError) as told:
            list(torch.utils.data.DataLoader(Unreadable(), num_workers=1))
        assert raising(told.value) == (1, "error: image 7 cannot be read\n")

    @pytest.mark.parametrize("error", [InputError("wrong"), KeyError("label")], ids=repr)
    def test_debug_shows_the_traceback_wherever_it_stands(self, raising, error, gif, tmp_path, capsys):
        code, printed = raising(error, "--debug")
        assert code in (1, 70) and ("wrong" in printed or "label" in printed)
        assert "Traceback (most recent call last)" in (shown := capsys.readouterr().err) and "in broken" in shown
        assert gif("--debug", "spread", "--vectors", tmp_path / "n", "--output", tmp_path / "x")[0] == 1
        assert "MissingFileError" in capsys.readouterr().err

    def test_what_is_missing_is_named_as_it_is_given(self, gif, capsys):
        for command, options in (
            ("train", "--output"),
            ("spread", "--vectors, --output"),
            ("data convert", "--data, --output"),
        ):
            code, _ = gif(*command.split())
            assert code == 2 and f"arguments are required: {options}" in capsys.readouterr().err

    @pytest.mark.parametrize("device", ["cuda:99", "gpu"])
    @pytest.mark.parametrize("command", [["vectors"], ["train", "--head.kind=softmax", *TINY]])
    def test_a_device_that_is_not_there(self, tiny_data, gif, tmp_path, device, command):
        option = "--training.device" if command[0] == "train" else "--device"
        code, printed = gif(*command, option, device, "--output", tmp_path / "x")
        assert code == 1 and f'device "{device}"' in printed
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_python_drops_comes_again(number):
    """In a destructor, as of what an import or the garbage collector throws away."""
    script = f"""
import signal, time
from gif import cli

class Thrown:
    def __del__(self):
        signal.raise_signal({int(number)})

def work(given):
    Thrown()
    time.sleep(60)

cli._run = work
cli.main()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert run.returncode == 128 + number and "interrupted" in run.stdout + run.stderr, run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def test_every_option_goes_through_torchrun(gif, tmp_path):
    """Before Python 3.14 torchrun looks for short forms of its own options in the module's part too."""
    torchrun = get_args_parser()
    for command, options in {
        "spread": ["--closed_form", "whiten"],
        "tokenize": ["--vectors", "x", "--vocab_size=9", "--length=4", "--slack=0", "--seed=1", "--alignment", "none"],
        "train": ["--training.epochs=1", "--data", "x"],
    }.items():
        given = torchrun.parse_args(["-m", "gif.cli", command, *options])
        assert given.training_script_args == [command, *options]
    CodeVectors(torch.randn(30, 4) + 1).save(tmp_path / "v")
    outputs: list[Path] = []
    for option in ("--start", "--closed_form"):
        for options in ([option, "whiten"], [f"{option}=whiten"]):
            outputs.append(tmp_path / f"{len(outputs)}.safetensors")
            assert gif("spread", "--vectors", tmp_path / "v", "--output", outputs[-1], "--epochs=1", *options)[0] == 0
    tables = [CodeVectors.load(output).table for output in outputs]
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert gif("spread", "--vectors", tmp_path / "v", "--output", tmp_path / "n", "--epochs=1")[0] == 0
    assert not torch.equal(CodeVectors.load(tmp_path / "n").table, tables[0])


def test_a_config_that_is_no_text(gif, tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\x80\x04")
    code, printed = gif("codes", "inspect", "--config", tmp_path / "config.yaml")
    assert code == 1 and "config.yaml is no UTF-8 text" in printed
