"""Processes that train together: the same code vectors on each, and the step of the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.distributed import gather_rows, mean_over_processes, shared_seed, world_size

M, WIDTH, BATCH, PROCESSES = 27, 12, 8, 2


def train(dtype, embeddings, labels):
    """Three steps of the live recipe; the table, and the gradient of the embeddings in the last step."""
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(3)] * 3), 3)
    table = torch.nn.functional.normalize(torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    torch.manual_seed(2)
    loss_fn = GIFLoss(codes, CodeVectors(table.to(dtype), normalized=True), WIDTH)
    for _ in range(3):
        embeddings = embeddings.detach().requires_grad_()
        loss_fn(embeddings, labels).backward()
    return loss_fn.vectors.table, embeddings.grad


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, WIDTH, generator=generator), torch.randint(M, (BATCH,), generator=generator)


def run(work, folder):
    """``work(rank)`` in each of two processes; what they return, in the order of their ranks."""
    spawn(_process, (work, folder), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def _process(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def shared_step(rank):
    embeddings, labels = (part.chunk(PROCESSES)[rank] for part in batch())
    return [train(dtype, embeddings, labels) for dtype in (torch.float32, torch.bfloat16)]


def test_processes_take_the_step_of_the_whole_batch(tmp_path):
    first, second = run(shared_step, tmp_path)
    for (table, _), (other, _) in zip(first, second, strict=True):  # float32, bfloat16
        assert torch.equal(table, other)
    alone, gradient = train(torch.float32, *batch())
    torch.testing.assert_close(first[0][0], alone, rtol=0, atol=1e-6)
    shared = torch.cat([first[0][1], second[0][1]]) / PROCESSES
    torch.testing.assert_close(shared, gradient, rtol=1e-5, atol=1e-6)


def uneven(rank):
    torch.manual_seed(rank)
    rows = torch.arange(3 * rank).view(-1, 1) + 10 * rank  # none on rank 0
    embeddings = torch.randn(3 * rank, WIDTH)
    table, _ = train(torch.float32, embeddings, torch.arange(3 * rank))
    return gather_rows(rows), mean_over_processes(torch.tensor([float(rank)])), shared_seed(rows.device), table


def test_a_process_may_have_fewer_rows_or_none(tmp_path):
    first, second = run(uneven, tmp_path)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True))
    assert first[0].tolist() == [[10], [11], [12]] and first[1].item() == 0.5


def test_one_process_needs_no_group():
    rows = torch.randn(3, 2)
    assert world_size() == 1 and gather_rows(rows) is rows and mean_over_processes(rows) is rows
    assert 0 <= shared_seed(rows.device) < 1 << 31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_group_a_step_is_reproducible(dtype):
    assert torch.equal(train(dtype, *batch())[0], train(dtype, *batch())[0])
