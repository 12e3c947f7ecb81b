"""Wherever code vectors lie, and however many processes divide them, training moves them the same way."""

from contextlib import suppress

import pytest
import torch
from torch.multiprocessing import spawn

from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.data import IdentityImages
from gif.errors import InputError
from gif.files import is_mapped
from gif.resume import WORKING
from gif.training import TrainingConfig, train
from gif.vectors.divided import DividedCodeVectors
from gif.vectors.placement import choose_placement, place_code_vectors
from gif.vectors.store import unit_rows
from tests.gif.test_distributed import group, interrupted_in, unchanged

M, WIDTH = 60, 12
CPU = torch.device("cpu")


def images():
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (120, 1, 8, 8), generator=generator).to(torch.uint8)
    return IdentityImages(pixels, torch.randint(M, (120,), generator=generator), [str(i) for i in range(M)])


def code_vectors(dtype=torch.float32):
    table = torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(1))
    return CodeVectors(torch.nn.functional.normalize(table, dim=1).to(dtype), normalized=True)


def identity_codes():
    return IdentityCodes(torch.cartesian_prod(*[torch.arange(4)] * 3)[:M], 4)


def network(vectors, **overrides):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.GELU())
    head = GIFLoss(identity_codes(), vectors, WIDTH, vector_lr=0.1, **overrides)
    return backbone.append(torch.nn.Linear(16, WIDTH)), head


def run(vectors, *, checkpoints=None, augment=unchanged, micro=None, **overrides):
    """Twenty steps; all that they lead to."""
    backbone, head = network(vectors, **overrides)
    config = TrainingConfig(epochs=2, batch_size=12, lr=0.01, save_steps=4, micro_batch_size=micro)
    log = train(backbone, head, images(), config, augment=augment, checkpoints=checkpoints)
    head.settle()
    state = {name: value for name, value in head.state_dict().items() if not name.startswith("_extra")}
    return {**backbone.state_dict(), **state, "table": head.vectors.table.clone(), "losses": log.losses}


def in_a_file(folder, dtype=torch.float32):
    vectors, place = place_code_vectors(
        code_vectors(dtype), CPU, "file", folder / WORKING, moves=True, goes_on=(folder / WORKING).exists()
    )
    assert place.placement == "file" and is_mapped(vectors.table) and vectors.file == folder / WORKING
    return vectors


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


class TestOneProcess:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", [{}, {"micro": 3}, {"negatives": 20}, {"recipe": "paper"}], ids=str)
    def test_a_file_gives_the_bits_of_memory(self, tmp_path, dtype, options):
        """Rows are asked for while the step before runs, which moves some of them."""
        expected = run(code_vectors(dtype), **options)
        vectors = in_a_file(tmp_path, dtype)
        assert same(run(vectors, **options), expected)
        if "recipe" not in options:
            assert not torch.equal(expected["table"], code_vectors(dtype).table)
        assert torch.equal(CodeVectors.load(tmp_path / WORKING).table, expected["table"])

    def test_a_run_that_was_stopped_goes_on(self, tmp_path):
        """What its file has by then is of later steps than its checkpoint."""
        expected = run(code_vectors(torch.bfloat16), negatives=20)
        with suppress(KeyboardInterrupt):
            run(
                in_a_file(tmp_path, torch.bfloat16),
                checkpoints=tmp_path / "c",
                augment=interrupted_in(10),
                negatives=20,
            )
        left = CodeVectors.load(tmp_path / WORKING).table
        assert not torch.equal(left, code_vectors(torch.bfloat16).table)
        assert same(run(in_a_file(tmp_path, torch.bfloat16), checkpoints=tmp_path / "c", negatives=20), expected)

    def test_prepared_labels_are_labels(self):
        """As the loop gives them, once, and of the batch that they were prepared for."""
        embeddings, labels = torch.randn(6, WIDTH), torch.tensor([3, 1, -1, 3, 59, 0])
        results = []
        for prepares in (False, True):
            head = network(code_vectors())[1]
            some = embeddings.clone().requires_grad_()
            loss = head(some, head.prepare(labels, CPU) if prepares else labels)
            loss.backward()
            results.append((loss.detach(), some.grad, head.centers.grad, head.vectors.table))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with pytest.raises(InputError, match="6 labels were prepared, for 5 embeddings"):
            head(embeddings[:5], head.prepare(labels, CPU))
        with pytest.raises(ValueError, match=r"labels must lie in \[-1, 60\)"):
            head.prepare(torch.tensor([60]), CPU)

    def test_negatives_of_the_step_that_labels_are_prepared_for(self):
        head = network(code_vectors(), negatives=20)[1]
        now, later = (head.candidates(torch.tensor([3]), ahead)[0][-20:] for ahead in (0, 2))
        assert not torch.equal(now, later)
        for _ in range(2):
            head(torch.randn(2, WIDTH, requires_grad=True), torch.tensor([1, 2])).backward()
        assert torch.equal(head.candidates(torch.tensor([3]))[0][-20:], later)
        state = head.state_dict()
        again = network(code_vectors(), negatives=20)[1]
        again.candidates(torch.tensor([3]))
        again.load_state_dict(state)
        assert torch.equal(again.candidates(torch.tensor([3]))[0][-20:], later)


class TestChoice:
    def test_auto_is_the_first_place_that_fits(self, monkeypatch):
        import psutil

        free = psutil.virtual_memory()._replace(available=100 << 30)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
        cuda, table = torch.device("cuda"), 61 << 30  # 64 million x 512 in bfloat16
        assert choose_placement(table, CPU).placement == "host"
        assert choose_placement(2 * table, CPU).placement == "file"
        assert choose_placement(table, cuda).placement == "host"
        assert choose_placement(table, cuda, processes=8).placement == "device"
        assert choose_placement(2 * table, cuda).placement == "file"
        assert str(choose_placement(10 << 30, cuda)) == "device (10.0 GiB of 40.0 GiB that are free on cuda)"
        for placement in ("device", "host", "file"):
            assert choose_placement(1 << 20, cuda, placement).placement == placement
        with pytest.raises(InputError, match=r"61\.0 GiB of 40\.0 GiB that are free on cuda; give --placement host"):
            choose_placement(table, cuda, "device")
        with pytest.raises(InputError, match="placement must be one of 'auto', 'device', 'host', 'file', got 'gpu'"):
            choose_placement(1, CPU, "gpu")  # type: ignore[arg-type]

    def test_vectors_that_stay_are_not_copied(self, tmp_path):
        code_vectors().save(tmp_path / "v.safetensors")
        source = CodeVectors.load(tmp_path / "v.safetensors", mmap=True)
        for placement in ("auto", "file"):
            found, _ = place_code_vectors(source, CPU, placement, tmp_path / WORKING, moves=False, goes_on=False)
            assert found is source
        found, _ = place_code_vectors(source, CPU, "host", tmp_path / WORKING, moves=True, goes_on=False)
        assert not is_mapped(found.table) and torch.equal(found.table, source.table)
        assert not (tmp_path / WORKING).exists()


class TestCommand:
    def test_a_file_gives_the_files_that_memory_does(self, gif, png, tmp_path):
        for number in range(24):
            folder = tmp_path / "data" / f"{number // 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(png(torch.randint(256, (3, 16, 16), dtype=torch.uint8)))
        data = ("--data", str(tmp_path / "data"), "--held_out", "0")
        gif("vectors", *data, "--width", "8", "--image_size", "16", "--output", str(tmp_path / "v.safetensors"))
        code_options = ("--vocab_size", "4", "--output", str(tmp_path / "c.safetensors"))
        gif("tokenize", "--vectors", str(tmp_path / "v.safetensors"), *code_options)
        run = ["train", *data, "--codes", str(tmp_path / "c.safetensors"), "--vectors", str(tmp_path / "v.safetensors")]
        run += ["--backbone.embedding_size", "8", "--backbone.image_size", "16", "--backbone.width", "4"]
        run += ["--backbone.channels", "3", "--training.batch_size", "4", "--training.epochs", "2"]
        run += ["--head.overrides", "{negatives: 4}", "--augmentation", "none"]
        for placement in ("host", "file"):
            output = tmp_path / placement
            code, printed = gif(*run, "--placement", placement, "--output", str(output))
            assert code == 0 and f"code vectors: {placement} (" in printed
            assert not (output / WORKING).exists()
        for name in ("vectors.safetensors", "head.safetensors", "backbone.safetensors"):
            assert (tmp_path / "host" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()

    def test_plan_and_doctor_say_where(self, gif):
        assert "code vectors in training: 61.0 GiB, on the host or" in gif("plan")[1]
        assert "code vectors in training: 1.0 GiB, on the device" in gif("plan", "--identities", "1048576")[1]
        assert "more in a file" in gif("doctor")[1]


def divided(folder, dtype, *, file):
    if file:
        return in_a_file(folder, dtype)
    return place_code_vectors(code_vectors(dtype), CPU, "host", folder / WORKING, moves=True, goes_on=False)[0]


def health(vectors, rank):
    """Of a process's own embeddings, whose number and identities differ from the other's."""
    head = network(vectors)[1].eval()
    generator = torch.Generator().manual_seed(rank)
    labels = torch.randint(M, (4 + 3 * rank,), generator=generator)
    embeddings = torch.randn(len(labels), WIDTH, generator=generator)
    return {**head.health(embeddings, labels), "loss": head.regression_loss(embeddings, labels)}


def whole(vectors, table):
    """The table that ``table`` is this process's part of."""
    return vectors.with_table(table).lookup(torch.arange(M)) if isinstance(vectors, DividedCodeVectors) else table


def together(rank, folder):
    """Two processes, then one, then three, each going on where the others were stopped; and whole runs."""
    torch.set_num_threads(1)
    options = {"negatives": 20}
    for kind, file in (("host", False), ("file", True)):
        place = folder / kind
        if rank < 2:
            with group(folder, rank, 2) if not file else group(place, rank, 2):
                for dtype in (torch.float32, torch.bfloat16):
                    own = divided(place / str(dtype), dtype, file=file)
                    assert isinstance(own, DividedCodeVectors) and len(own.table) == M // 2 and len(own) == M
                    found = run(own, **options)
                    found["table"] = whole(own, found["table"])
                    own.save(place / f"saved-{dtype}.safetensors")
                    torch.save(health(own, rank), place / f"health-{rank}-{dtype}.pt")
                    torch.save(found, place / f"{rank}-{dtype}.pt")
                with suppress(KeyboardInterrupt):
                    own = divided(place / "run", torch.float32, file=file)
                    run(own, augment=interrupted_in(7), checkpoints=place / "c", **options)  # saved at 4
        if rank == 0:
            with suppress(KeyboardInterrupt):
                own = divided(place / "run", torch.float32, file=file)
                run(own, augment=interrupted_in(10), checkpoints=place / "c", **options)  # saved at 12
        with group(place / "three", rank, 3):
            own = divided(place / "run", torch.float32, file=file)
            found = run(own, checkpoints=place / "c", **options)
            torch.save({**found, "table": whole(own, found["table"])}, place / f"{rank}-of-3.pt")


@pytest.fixture(scope="module")
def trained_together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    for kind in ("host", "file"):
        (folder / kind / "three").mkdir(parents=True)
    spawn(together, (folder,), nprocs=3)
    return folder


@pytest.mark.parametrize("kind", ["host", "file"])
class TestDivided:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_two_processes_do_what_one_does(self, trained_together, kind, dtype):
        expected = run(code_vectors(dtype), negatives=20)
        first, second = (torch.load(trained_together / kind / f"{rank}-{dtype}.pt") for rank in (0, 1))
        assert same(first, second)
        if dtype == torch.float32:  # bfloat16 rounds one way or the other for a last bit of the gradients
            for name, value in expected.items():
                torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6, msg=name)
        saved = CodeVectors.load(trained_together / kind / f"saved-{dtype}.safetensors")
        assert torch.equal(saved.table, unit_rows(first["table"]))

    @pytest.mark.parametrize("rank", [0, 1])
    def test_each_process_judges_its_own_embeddings(self, trained_together, kind, rank):
        saved = CodeVectors.load(trained_together / kind / f"saved-{torch.float32}.safetensors")
        found = torch.load(trained_together / kind / f"health-{rank}-{torch.float32}.pt")
        expected = health(saved, rank)
        assert found.keys() == expected.keys() and len(found) > 5
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)

    def test_another_number_of_processes_goes_on(self, trained_together, kind):
        expected = run(code_vectors(), negatives=20)
        found = [torch.load(trained_together / kind / f"{rank}-of-3.pt") for rank in range(3)]
        assert same(found[0], found[1]) and same(found[0], found[2])
        for name, value in expected.items():
            torch.testing.assert_close(found[0][name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_fewer_vectors_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr("gif.vectors.divided.world_size", lambda: 61)
    with pytest.raises(InputError, match="61 processes divide 60 code vectors"):
        DividedCodeVectors.of(code_vectors())
