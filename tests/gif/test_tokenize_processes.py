"""Several processes cut the codes of one, to the bit, and continue from each other's levels."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from benchmarks.clusters import clustered
from gif.codes import IdentityCodes, TokenizeConfig, blocks, clustering, commands, tokenize
from gif.codes.nodes import Nodes
from gif.resume import UnfinishedWork
from gif.vectors import CodeVectors

PROCESSES = 2
CASES = {
    "aligned": (2500, TokenizeConfig(vocab_size=9, iterations=2)),
    "a root of one block": (100, TokenizeConfig(vocab_size=7, capacity_factor=1.0)),
    "names at random, tight": (
        1200,
        TokenizeConfig(vocab_size=11, iterations=2, alignment="none", capacity_factor=1.0),
    ),
    "codes of nine bytes": (300, TokenizeConfig(vocab_size=256, length=5, iterations=1, centroid_levels=2)),
    "a root of fewer rows than tokens": (5, TokenizeConfig(vocab_size=6, length=2)),
    "one identity": (1, TokenizeConfig(vocab_size=6, length=2)),
}
KILLED = "aligned"
BLOCK = 1 << 13  # of floats: the root of 2,500 rows of 16 is cut in five
SAMPLED = 20  # rows a child, which every process looks at where they share a node


class Killed(BaseException):
    pass


def small_blocks():
    torch.set_num_threads(1)
    blocks.BLOCK_FLOATS = BLOCK
    clustering.LLOYD_ROWS = clustering.SEEDING_ROWS = SAMPLED


def of_file(folder, name):
    return CodeVectors.load(folder / f"{CASES[name][0]}.safetensors", mmap=True)


def everything(codes):
    directions = [] if codes.directions is None else [codes.directions]
    return [codes.codes, codes.table.order, codes.table.starts, *codes.centroids, *directions]


def _process(rank, folder, ports):
    small_blocks()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    read, gather = [], Nodes._gather
    Nodes._gather = lambda self, columns: read.append(self.index[:, columns].numel()) or gather(self, columns)
    found: dict[object, object] = {}
    for name, (_, config) in CASES.items():
        found[name] = everything(tokenize(of_file(folder, name), config))
        found["read", name], read[:] = sum(read), []

    save = UnfinishedWork.save

    def save_and_die(self, tensors):
        save(self, tensors)
        raise Killed

    for run in ("two", "one"):
        UnfinishedWork.save = save_and_die
        with pytest.raises(Killed if rank == 0 else RuntimeError):
            tokenize(of_file(folder, KILLED), CASES[KILLED][1], checkpoint=folder / f"{run}.partial")
            raise RuntimeError("the first process is gone")
        UnfinishedWork.save = save
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/{run}", rank=rank, world_size=PROCESSES)
    found["resumed"] = everything(
        tokenize(of_file(folder, KILLED), CASES[KILLED][1], checkpoint=folder / "two.partial")
    )
    dist.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")
    by_command(rank, folder, ports)


def by_command(rank, folder, ports):
    """`gif tokenize` as torchrun starts it."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in told.items()} | {"TORCHELASTIC_RUN_ID": "none"}
    torch.cuda.device_count = lambda: 0
    ports = iter(ports)

    def run(vectors, **options):
        os.environ["MASTER_PORT"] = str(next(ports))
        commands.tokenize_command(folder / vectors, folder / "codes.safetensors", vocab_size=9, **options)

    with pytest.raises(ValueError, match='device "cuda" was asked for, and PyTorch sees 0 GPUs'):
        run("2500.safetensors", device="cuda")
    with pytest.raises(ValueError, match="do not fit in codes of 2 tokens of 9"):
        run("2500.safetensors", length=2)
    with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged"):
        run("damaged.safetensors")
    with pytest.raises(ValueError, match="NaN, infinity or a row of zeros"):
        run("zeros.safetensors")
    run("2500.safetensors", device="auto")


def free_ports(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for m, _ in CASES.values():
        CodeVectors(clustered(m, 16)).save(folder / f"{m}.safetensors")
    damaged = bytearray((folder / "2500.safetensors").read_bytes())
    damaged[-1000] ^= 255
    (folder / "damaged.safetensors").write_bytes(damaged)
    rows = clustered(2500, 16)
    rows[2400] = 0  # of the second process
    CodeVectors(rows, normalized=True).save(folder / "zeros.safetensors")
    spawn(_process, (folder, free_ports(5)), nprocs=PROCESSES)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(autouse=True)
def as_the_processes(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(blocks, "BLOCK_FLOATS", BLOCK)
    for name in ("LLOYD_ROWS", "SEEDING_ROWS"):
        monkeypatch.setattr(clustering, name, SAMPLED)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_cut_the_codes_of_one(folder, found, name):
    alone = everything(tokenize(of_file(folder, name), CASES[name][1]))
    for each in found:
        assert len(each[name]) == len(alone)
        assert all(map(torch.equal, each[name], alone))


def test_each_gathers_a_share_of_the_rows(folder, found, monkeypatch):
    read, gather = [], Nodes._gather
    monkeypatch.setattr(
        Nodes, "_gather", lambda self, columns: read.append(self.index[:, columns].numel()) or gather(self, columns)
    )
    tokenize(of_file(folder, KILLED), CASES[KILLED][1])
    # half of them, and the samples of the root, and of a level as many chunks of nodes more as one can have
    assert max(each["read", KILLED] for each in found) < 0.75 * sum(read)


def test_killed_together_and_resumed_by_two_or_one(folder, found):
    config = CASES[KILLED][1]
    wanted = everything(tokenize(of_file(folder, KILLED), config))
    assert all(all(map(torch.equal, each["resumed"], wanted)) for each in found)
    assert not (folder / "two.partial").exists()
    assert (folder / "one.partial").exists()
    alone = tokenize(of_file(folder, KILLED), config, checkpoint=folder / "one.partial")
    assert all(map(torch.equal, everything(alone), wanted))


def test_the_command(folder):
    written = IdentityCodes.load(folder / "codes.safetensors")
    wanted = tokenize(CodeVectors.load(folder / "2500.safetensors"), TokenizeConfig(vocab_size=9))
    assert all(map(torch.equal, everything(written), everything(wanted)))
    assert not list(folder.glob("codes.partial*")) and not list(folder.glob(".*.lock"))
