"""Several processes, each with its share of the table: to the result of one, and continued after a kill."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from gif import distributed, files
from gif.vectors import CodeVectors, SpreadConfig, recovery, spread_code_vectors, spread_file, stages
from gif.vectors.distributed_table import DistributedTable

PROCESSES = 2
OPTIONS: dict[str, Any] = {"epochs": 2, "batch": 150, "neighbor_epochs": 1, "neighbors": 16, "seed": 3}
CPU = torch.device("cpu")


def table(dtype=torch.float32):
    return (torch.randn(1003, 24, generator=torch.Generator().manual_seed(5)) + 1).to(dtype)


def share(rank, rows):
    return (rows[:400], rows[400:])[rank].clone()  # unequal, and neither a multiple of the batch


def _process(rank, folder):
    torch.set_num_threads(1)
    files.fsync = recovery.fsync = lambda path: None  # a kill needs none
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    rows = torch.arange(6).view(3, 2) + 10 * rank
    found: dict[Any, Any] = {
        "exchanged": distributed.exchange_rows(rows, [1, 2], [[1, 1], [2, 2]][rank]),
        "least": distributed.least_of_processes(5 - rank),
        "file": spread_a_file(rank, folder),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for start in ("none", "whiten"):
            own = CodeVectors(share(rank, table(dtype)))
            report = spread_code_vectors(own, SpreadConfig(**OPTIONS, start=start))
            found[dtype, start] = own.table, report.to_dict()
    with pytest.raises(ValueError, match="several processes keep a checkpoint of a table in a file only"):
        spread_code_vectors(own, checkpoint=folder / "copy")
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def spread_a_file(rank, folder):
    """Killed in the middle of a round's writing, then while one process has noted a flush and the other has not."""
    recovery.UNDO_BYTES = 4 * 150 * 24 * 4
    stages.ROWS_A_BLOCK = 128
    put, save = DistributedTable.put, recovery.UnfinishedWork.save
    calls = {"put": 0, "save": 0}

    def torn_put(self, rows, vectors):
        calls["put"] += 1
        if calls["put"] == 3:
            put(self, rows[:5], vectors[:5])
            raise KeyboardInterrupt
        put(self, rows, vectors)

    def torn_save(self, tensors):
        calls["save"] += 1
        if calls["save"] == 6:
            if rank == 0:
                save(self, tensors)
            raise KeyboardInterrupt
        save(self, tensors)

    options: dict[str, Any] = {**OPTIONS, "start": "whiten"}
    DistributedTable.put, recovery.UnfinishedWork.save = torn_put, torn_save
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            spread_file(folder / "v.safetensors", folder / "out.safetensors", SpreadConfig(**options), device=CPU)
    assert calls["save"] == 6
    return spread_file(
        folder / "v.safetensors", folder / "out.safetensors", SpreadConfig(**options), device=CPU
    ).to_dict()


def test_two_processes_come_to_the_result_of_one(tmp_path):
    CodeVectors(table()).save(tmp_path / "v.safetensors")
    spawn(_process, (tmp_path,), nprocs=PROCESSES)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    assert found[0]["exchanged"].tolist() == [[0, 1], [10, 11]]
    assert found[1]["exchanged"].tolist() == [[2, 3], [4, 5], [12, 13], [14, 15]]
    assert found[0]["least"] == found[1]["least"] == 4

    def both(key):
        assert found[0][key][1] == found[1][key][1]  # the reports
        return torch.cat([result[key][0] for result in found]), found[0][key][1]

    for dtype, step in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        alone = CodeVectors(table(dtype))
        report = spread_code_vectors(alone, SpreadConfig(**OPTIONS)).to_dict()
        rows, shared = both((dtype, "none"))
        assert torch.equal(rows, alone.table) and shared == report

        alone = CodeVectors(table(dtype))
        spread_code_vectors(alone, SpreadConfig(**OPTIONS, start="whiten"))
        # the sums of the shares add up in another order; a bfloat16 may then be rounded to its neighbour
        torch.testing.assert_close(both((dtype, "whiten"))[0], alone.table, rtol=0, atol=step)

    CodeVectors(table()).save(tmp_path / "alone.safetensors")
    wanted = spread_file(
        tmp_path / "alone.safetensors",
        tmp_path / "one.safetensors",
        SpreadConfig(**OPTIONS, start="whiten"),
        device=CPU,
    )
    result = CodeVectors.load(tmp_path / "out.safetensors").table
    torch.testing.assert_close(result, CodeVectors.load(tmp_path / "one.safetensors").table, rtol=0, atol=1e-5)
    assert found[0]["file"] == found[1]["file"]
    assert found[0]["file"]["after"]["gap"] == pytest.approx(wanted.after.gap, abs=1e-5)
    assert not (tmp_path / "out.partial").exists()
