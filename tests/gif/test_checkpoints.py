"""Checkpoints: killed at any step, a run continues bit by bit; a large table is kept by its changes."""

import math
import os
import pickle
import random
import re
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import get_context

from gif import CodeVectors, GIFLoss, IdentityCodes, files
from gif.backbones import BackboneConfig, load_backbone
from gif.data import IdentityImages
from gif.encoders import CLIPEncoder, DINOEncoder
from gif.errors import DamagedFileError, InputError
from gif.losses import MarginSoftmax
from gif.progress import console
from gif.training import Checkpoints, TrainingConfig, train
from gif.training import checkpoint as checkpoint_module
from gif.training import increments as increments_module
from gif.training.augmentation import RandomAffine
from gif.training.increments import TableIncrements
from gif.weights import load_pytorch

BACKBONE = BackboneConfig(embedding_size=16, image_size=16, width=4)
CONFIG = TrainingConfig(epochs=3, batch_size=8, save_steps=3)  # 5 steps an epoch: checkpoints at 3, 5, 6, 9, 10, ...
STEPS = 15


def dataset():
    """Forty-three images: three a batch leaves out."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (43, 1, 16, 16), generator=generator).to(torch.uint8)
    return IdentityImages(images, torch.randint(8, (43,), generator=generator), list("abcdefgh"))


def fresh(seed=0, dtype=torch.float32):
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(2)] * 3), 2)
    table = CodeVectors(torch.randn(8, 16, generator=torch.Generator().manual_seed(5))).table.to(dtype)
    torch.manual_seed(seed)
    return BACKBONE.build(), GIFLoss(codes, CodeVectors(table, normalized=True), 16, siblings=0)


class StopAt:
    """Augmentation that ends the run in step ``step``."""

    def __init__(self, step, end):
        self.left, self.end = step, end

    def __call__(self, images):
        self.left -= 1
        if self.left == 0:
            self.end()
        return RandomAffine()(images)


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder, *, end=interrupt, stop_at=None, seed=0, config=CONFIG, **options):
    """Train, or until step ``stop_at``; returns the log, the backbone and the head."""
    backbone, head = fresh(seed)
    augment = RandomAffine() if stop_at is None else StopAt(stop_at, end)
    return train(backbone, head, dataset(), config, augment=augment, checkpoints=folder, **options), backbone, head


def assert_same(first, second):
    (log, backbone, head), (other_log, other_backbone, other_head) = first, second
    assert torch.equal(log.losses, other_log.losses)
    assert torch.equal(head.vectors.table, other_head.vectors.table)
    for module, other in ((backbone, other_backbone), (head, other_head)):
        for name, value in module.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


@pytest.fixture(scope="module")
def whole():
    return run(None)


def names(folder):
    return sorted(path.name for path in folder.glob("step-*"))


@pytest.mark.parametrize("step", [4, 6, 8, 15])
def test_interrupted_at_a_step_it_continues_bit_by_bit(step, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=step)
    assert_same(run(tmp_path, seed=1), whole)
    assert names(tmp_path) == [f"step-{STEPS:09d}"]


def test_interrupted_again_and_again(whole, tmp_path):
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stop_at=4)
    assert_same(run(tmp_path, seed=1), whole)


def killed_run(folder):
    torch.set_num_threads(1)
    run(folder, stop_at=8, end=kill)


def test_killed_by_the_system_it_continues_bit_by_bit(whole, tmp_path):
    process = get_context("spawn").Process(target=killed_run, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == ["step-000000006"]
    assert_same(run(tmp_path, seed=1), whole)


def test_killed_before_the_last_ones_are_removed_they_are_removed_later(tmp_path, monkeypatch):
    def files_in(folder):
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            Checkpoints, "_remove_old", lambda self, _: interrupt() if names(self.folder)[-1].endswith("15") else None
        )
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    assert files_in(tmp_path / "killed") != files_in(tmp_path / "whole")
    run(tmp_path / "killed")
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")


def test_a_finished_run_trains_no_more(whole, tmp_path):
    run(tmp_path)
    assert_same(run(tmp_path, stop_at=1, seed=1), whole)


def test_a_kill_while_writing_leaves_the_checkpoint_before(whole, tmp_path, monkeypatch):
    save_tensors, calls = checkpoint_module.save_tensors, []

    def killed(path, *args, **options):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save_tensors(path, *args, **options)

    monkeypatch.setattr(checkpoint_module, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert names(tmp_path) == ["step-000000005"]
    monkeypatch.setattr(checkpoint_module, "save_tensors", save_tensors)
    assert_same(run(tmp_path, seed=1), whole)


def test_the_newest_and_the_best_are_kept(tmp_path):
    values = iter([0.1, 0.9, 0.2, 0.3])
    weights = []

    def validate(backbone):
        weights.append({name: value.clone() for name, value in backbone.state_dict().items()})
        return {"accuracy": next(values)}

    config = TrainingConfig(epochs=4, batch_size=8, save_steps=3, keep=2)
    log, *_ = run(tmp_path, config=config, validate=validate)
    assert names(tmp_path) == [f"step-{step:09d}" for step in (10, 18, 20)]
    backbone, _ = fresh(seed=1)
    assert Checkpoints(tmp_path).load_best(backbone) == 10
    assert all(torch.equal(value, weights[1][name]) for name, value in backbone.state_dict().items())
    assert torch.equal(run(tmp_path, config=config)[0].losses, log.losses)
    with pytest.raises(FileNotFoundError, match="validate"):
        Checkpoints(tmp_path / "none").load_best(backbone)


def scores_of(backbone):
    """Scores that say which weights were judged; it leaves what it should not: drawn numbers, eval mode."""
    backbone.eval()
    torch.rand(3)
    return {"weights": float(sum(value.detach().abs().sum() for value in backbone.parameters())), "other": 0.25}


def test_validation_changes_nothing_and_survives_a_kill(whole, tmp_path):
    judged = run(tmp_path / "judged", validate=scores_of, validate_every=4)
    assert_same(judged, whole)
    assert list(judged[0].validations) == [4, 8, 12, STEPS] and whole[0].validations == {}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=10, validate=scores_of, validate_every=4)
    assert "step-000000008" in names(tmp_path / "killed")  # the best so far, or the newest
    again = run(tmp_path / "killed", seed=1, validate=scores_of, validate_every=4)
    assert_same(again, whole)
    assert again[0].validations == judged[0].validations


def test_an_epoch_is_judged_where_no_steps_are_given():
    assert list(run(None, validate=scores_of)[0].validations) == [5, 10, 15]


def test_the_best_has_the_highest_mean_score(tmp_path):
    values = iter([{"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.6}, {"a": 0.1, "b": 0.9}])
    run(tmp_path, validate=lambda backbone: next(values))
    assert names(tmp_path) == ["step-000000010", "step-000000015"]
    assert Checkpoints(tmp_path).load_best(fresh()[0]) == 10


@pytest.mark.parametrize("scores", [{}, {"a": math.nan}])
def test_scores_are_numbers(scores):
    with pytest.raises(ValueError, match="at least one and finite"):
        run(None, validate=lambda backbone: scores)


def test_optimizer_state_of_adamw_is_exact(tmp_path):
    config = TrainingConfig(epochs=2, batch_size=8, save_steps=3, optimizer="adamw", lr=1e-3)

    def softmax() -> tuple[torch.nn.Module, torch.nn.Module]:
        torch.manual_seed(0)
        return BACKBONE.build(), MarginSoftmax(8, 16, scale=16.0)

    log = train(*softmax(), dataset(), config)
    with pytest.raises(KeyboardInterrupt):
        train(*softmax(), dataset(), config, augment=StopAt(8, interrupt), checkpoints=tmp_path)
    again = train(*softmax(), dataset(), config, checkpoints=tmp_path)
    assert torch.equal(again.losses, log.losses)


def test_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="run of 15 steps, this one has 20"):
        run(tmp_path, config=TrainingConfig(epochs=4, batch_size=8))


class TestTableIncrements:
    @pytest.fixture(params=[torch.float32, torch.bfloat16])
    def table(self, request, monkeypatch):
        monkeypatch.setattr(increments_module, "ROWS_A_BLOCK", 7)
        return torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(request.param)

    def change(self, increments, table, rows):
        table[rows] = torch.randn(len(rows), 3).to(table.dtype)
        increments.changed[rows] = True

    def test_every_saved_state_comes_back(self, table, tmp_path):
        increments = TableIncrements(tmp_path, table)
        states = []
        for step in range(12):
            self.change(increments, table, torch.randperm(50)[: 13 if step % 3 else 1])
            states.append((increments.save(step), table.clone()))
        assert len({files[0] for files, _ in states}) > 1, "the table was never copied again"
        assert all(len(files) <= 8 for files, _ in states)
        for names, wanted in states:
            other = torch.zeros_like(table)
            TableIncrements(tmp_path, other).load(names)
            assert torch.equal(other, wanted)

    def test_a_restored_table_goes_on(self, table, tmp_path):
        increments = TableIncrements(tmp_path, table)
        files = increments.save(0)
        other = torch.zeros_like(table)
        increments = TableIncrements(tmp_path, other)
        self.change(increments, other, torch.arange(5))  # a run that went on after its checkpoint
        increments.load(files)
        assert increments.save(1) == files, "nothing changed, so nothing is written"
        self.change(increments, other, torch.arange(3))
        last = increments.save(2)
        assert last == [*files, "000000002-rows.safetensors"]
        again = torch.zeros_like(table)
        TableIncrements(tmp_path, again).load(last)
        assert torch.equal(again, other)

    def test_a_save_costs_what_changed(self, tmp_path):
        table = torch.randn(4096, 64)
        increments = TableIncrements(tmp_path, table)
        (whole,) = increments.save(0)
        increments.changed[:40] = True
        _, change = increments.save(1)
        size = {name: (tmp_path / name).stat().st_size for name in (whole, change)}
        assert size[change] < 40 * (64 * 4 + 8) + 500 < size[whole] / 90

    def test_files_that_no_checkpoint_needs_go(self, table, tmp_path):
        increments = TableIncrements(tmp_path, table)
        first = increments.save(0)
        self.change(increments, table, torch.arange(5))
        increments.save(1)
        increments.remove_others(first)
        assert [path.name for path in tmp_path.iterdir()] == first


class Hostile:
    """A pickle of this touches a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class TestNothingIsExecuted:
    @pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "progress.safetensors", "state.safetensors"])
    def test_a_pickle_beside_or_over_a_checkpoints_file(self, whole, tmp_path, name):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", stop_at=8)
        (place,) = (tmp_path / "run").glob("step-*")
        (place / name).write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
        if name == "state.safetensors":
            with pytest.raises(DamagedFileError, match=r"state\.safetensors is damaged.*remove that folder"):
                run(tmp_path / "run", seed=1)
        else:
            assert_same(run(tmp_path / "run", seed=1), whole)
        assert not (tmp_path / "executed").exists()

    def test_a_checkpoint_of_a_version_that_kept_pickles_is_refused_unread(self, tmp_path):
        place = tmp_path / "run" / "step-000000003"
        place.mkdir(parents=True)
        for name in (".metadata", "progress.safetensors"):
            (place / name).write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
        with pytest.raises(InputError, match=r"step-000000003 is a checkpoint of an older version, .* a pickle is not"):
            run(tmp_path / "run")
        assert place.exists() and not (tmp_path / "executed").exists()

    def test_no_module_of_ours_reads_pickles(self):
        """Unpicklers of the standard library, torch, NumPy and joblib, by the names they are called by."""
        asked = re.compile(r"pickle\.load|Unpickler\(|torch\.load\(|dcp\.|joblib\.load|np\.load\(|allow_pickle")
        root = Path(files.__file__).parent
        found = {
            str(path.relative_to(root)): line.strip()
            for path in root.rglob("*.py")
            for line in path.read_text(encoding="utf-8").splitlines()
            if asked.search(line)
        }
        found.pop("data/pairs.py", None)  # judged by its own tests
        assert found == {
            "weights.py": 'return torch.load(path, map_location="cpu", weights_only=True)',
            "recognition/embeddings.py": "with np.load(path, allow_pickle=False) as stored:",
        }

    def test_weights_of_every_kind(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        files_of = {name: tmp_path / name for name in ("plain.pt", "zip.pt", "nested.pth")}
        files_of["plain.pt"].write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
        torch.save({"conv1.weight": Hostile(tmp_path / "executed")}, files_of["zip.pt"])
        torch.save({"state_dict": {"a": torch.zeros(1)}, "b": Hostile(tmp_path / "executed")}, files_of["nested.pth"])
        for path in files_of.values():
            for read in (
                load_backbone,
                lambda path: DINOEncoder("vit_tiny_patch16_224", path),
                lambda path: CLIPEncoder("ViT-B-32", path),
            ):
                with pytest.raises(InputError, match=path.name):
                    read(path)
        assert not (tmp_path / "executed").exists()

    def test_packed_archives_are_refused(self, tmp_path):
        torch.save({"conv1.weight": torch.zeros(1000)}, tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w") as packed:
            for member in archive.infolist():
                packed.writestr(member.filename, archive.read(member), zipfile.ZIP_DEFLATED)
        assert load_pytorch(tmp_path / "a.pt")["conv1.weight"].shape == (1000,)
        with pytest.raises(InputError, match=r"b\.pt is an archive that PyTorch did not write"):
            load_pytorch(tmp_path / "b.pt")

    def test_a_config_calls_nothing(self, gif, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text(f"data: !!python/object/apply:os.system ['touch {tmp_path / 'executed'}']\noutput: x\n")
        code, _ = gif("vectors", "--config", config)
        assert code != 0 and not (tmp_path / "executed").exists()


def damage(path, place=0.7):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x40
    path.write_bytes(data)


class TestDamage:
    @pytest.fixture
    def stopped(self, tmp_path):
        """A run with two checkpoints, after 5 and 6 steps."""
        self.config = TrainingConfig(epochs=3, batch_size=8, save_steps=3, keep=2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stop_at=8, config=self.config)
        assert names(tmp_path) == ["step-000000005", "step-000000006"]
        return tmp_path

    @pytest.mark.parametrize("what", ["state", "header", "short", "missing", "empty", "table", "table missing"])
    def test_it_falls_back_to_the_one_before(self, stopped, whole, what):
        newest = stopped / "step-000000006" / "state.safetensors"
        increment = sorted((stopped / "vectors").glob("*"))[-1]
        assert increment.name.startswith("000000006")
        {
            "state": lambda: damage(newest),
            "header": lambda: damage(newest, 0.001),
            "short": lambda: os.truncate(newest, newest.stat().st_size // 2),
            "missing": newest.unlink,
            "empty": lambda: os.truncate(newest, 0),
            "table": lambda: damage(increment),
            "table missing": increment.unlink,
        }[what]()
        with console.capture() as capture:
            result = run(stopped, seed=1, config=self.config)
        assert_same(result, whole)
        assert "continues from step-000000005" in capture.get()
        assert (increment if "table" in what else newest).name in capture.get()

    def test_where_none_is_whole_it_is_an_error_and_all_stays(self, stopped):
        for place in stopped.glob("step-*"):
            damage(place / "state.safetensors")
        before = sorted(stopped.rglob("*"))
        with pytest.raises(DamagedFileError, match=r"step-000000006.*no checkpoint in .* is whole; remove that folder"):
            run(stopped, config=self.config)
        assert sorted(stopped.rglob("*")) == before

    def test_no_changed_byte_is_silent(self, tmp_path, whole):
        """Each result is the whole run's, or an error of one line that names a file."""
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", stop_at=4)
        chance = random.Random(3)
        paths = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        for number in range(12):
            copy = tmp_path / str(number)
            shutil.copytree(tmp_path / "run", copy)
            path = copy / chance.choice(paths).relative_to(tmp_path / "run")
            damage(path, chance.random())
            with pytest.raises(DamagedFileError, match=path.name) as error:
                run(copy, seed=1)
            assert "\n" not in str(error.value)

    def test_a_damaged_best_is_named_and_the_next_best_taken(self, tmp_path):
        values = iter([0.2, 0.9, 0.1])
        run(tmp_path, validate=lambda backbone: {"a": next(values)})
        damage(tmp_path / "step-000000010" / "state.safetensors")
        with pytest.raises(DamagedFileError, match=r"step-000000010.*next best"):
            Checkpoints(tmp_path).load_best(fresh()[0])
        run(tmp_path)
        assert names(tmp_path) == ["step-000000015"]
        assert Checkpoints(tmp_path).load_best(fresh()[0]) == 15

    def test_another_network_is_named(self, tmp_path):
        run(tmp_path)
        torch.manual_seed(0)
        wider = BackboneConfig(embedding_size=16, image_size=16, width=8).build()
        with pytest.raises(InputError, match="of another backbone or head"):
            train(wider, fresh()[1], dataset(), CONFIG, checkpoints=tmp_path)

    def test_a_state_that_is_not_tensors_is_said_before_work(self, tmp_path):
        class Counting(MarginSoftmax):
            def get_extra_state(self):
                return {"count": 3}

            def set_extra_state(self, state):
                pass

        backbone = fresh()[0]
        with pytest.raises(InputError, match=r"the state of head\._extra_state is a dict"):
            train(backbone, Counting(8, 16), dataset(), CONFIG, checkpoints=tmp_path)
        assert not list(tmp_path.iterdir())

    def test_unfinished_checkpoints_of_killed_runs_are_removed(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stop_at=8)
        (tmp_path / ".step-000000099.tmp").mkdir()
        (tmp_path / ".step-000000099.tmp" / "state.safetensors").write_bytes(b"half")
        (tmp_path / "vectors" / ".000000099-all.safetensors.4194305.tmp").write_bytes(b"half")
        run(tmp_path)
        assert {path.name for path in tmp_path.rglob("*") if path.name.startswith(".")} == set()


def test_a_changed_bit_in_pytorchs_archive_is_found(tmp_path):
    """PyTorch itself reads on."""
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(300)}, path)
    whole = path.read_bytes()
    assert load_pytorch(path)["a"].sum() == 300
    weight, disks = whole.index(torch.ones(9).numpy().tobytes()), whole.rindex(b"PK\x06\x07") + 16
    for place, flip in ((weight, 2), (disks, 2), (0, None)):
        changed = bytearray(whole)
        if flip is None:
            del changed[place + 200]
        else:
            changed[place] ^= flip
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"w\.pt is damaged"):
            load_pytorch(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(300)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_pytorch(path)["a"].sum() == 300
