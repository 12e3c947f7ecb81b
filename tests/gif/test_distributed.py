"""Processes that train together: the same code vectors on each, and the step of the whole batch."""

from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.backbones import BackboneConfig
from gif.data import IdentityImages
from gif.distributed import gather_rows, mean_over_processes, replicate, world_size
from gif.evaluation import Embedder, HeldOutIdentities, embed
from gif.losses import MarginSoftmax, PartialFC
from gif.training import TrainingConfig
from gif.training import train as train_network

M, WIDTH, BATCH, PROCESSES = 27, 12, 8, 2


def train(dtype, embeddings, labels):
    """Three steps of the live recipe; the table, and the gradient of the embeddings in the last step."""
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(3)] * 3), 3)
    table = torch.nn.functional.normalize(torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    torch.manual_seed(2)
    loss_fn = GIFLoss(codes, CodeVectors(table.to(dtype), normalized=True), WIDTH, vector_lr=2.0)
    for _ in range(3):
        embeddings = embeddings.detach().requires_grad_()
        loss_fn(embeddings, labels).backward()
    return loss_fn.vectors.table, embeddings.grad


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, WIDTH, generator=generator), torch.randint(M, (BATCH,), generator=generator)


@contextmanager
def group(folder, rank, processes):
    """Be one of ``processes`` that train together."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group-{processes}", rank=rank, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shared_step(rank):
    embeddings, labels = (part.chunk(PROCESSES)[rank] for part in batch())
    return [train(dtype, embeddings, labels) for dtype in (torch.float32, torch.bfloat16)]


def uneven(rank):
    torch.manual_seed(rank)
    rows = torch.arange(3 * rank).view(-1, 1) + 10 * rank  # none on rank 0
    embeddings = torch.randn(3 * rank, WIDTH)
    table, _ = train(torch.float32, embeddings, torch.arange(3 * rank))
    return gather_rows(rows), mean_over_processes(torch.tensor([float(rank)])), table


def rounded(rank):
    """Steps of a bfloat16 table with negatives, by heads that begin with random numbers of their own."""
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(3)] * 3), 3)
    table = torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.manual_seed(rank)
    loss_fn = GIFLoss(codes, CodeVectors(table), WIDTH, negatives=7)
    replicate(loss_fn)
    for _ in range(3):
        loss_fn(torch.randn(4, WIDTH, requires_grad=True), torch.randint(M, (4,))).backward()
    return loss_fn.vectors.table, loss_fn.draws, loss_fn.stayed


def sampled(embeddings, labels):
    """Three steps of Partial FC, some of whose rows are ignored; its state, and the last gradient of the embeddings."""
    torch.manual_seed(2)
    head = PartialFC(M, WIDTH, samples=9, scale=8.0, lr=0.01)
    for _ in range(3):
        embeddings = embeddings.detach().requires_grad_()
        head(embeddings, labels).backward()
    return dict(head.named_buffers()), embeddings.grad


def shared_sample(rank):
    embeddings, labels = (part.chunk(PROCESSES)[rank] for part in batch())
    return sampled(embeddings, labels)


def uneven_sample(rank):
    """No row on the first process, and heads that begin with random numbers of their own."""
    torch.manual_seed(rank)
    head = PartialFC(M, WIDTH, samples=9)
    replicate(head)
    for _ in range(3):
        head(torch.randn(3 * rank, WIDTH, requires_grad=True), torch.arange(3 * rank)).backward()
    return dict(head.named_buffers())


def test_one_process_needs_no_group():
    rows = torch.randn(3, 2)
    assert world_size() == 1 and gather_rows(rows) is rows and mean_over_processes(rows) is rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_group_a_step_is_reproducible(dtype):
    assert torch.equal(train(dtype, *batch())[0], train(dtype, *batch())[0])


def unchanged(images):
    return images


def interrupted_in(step):
    """Augmentation that changes nothing, and ends the run in ``step``."""
    left = [step]

    def augment(images):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return images

    return augment


def network():
    """A backbone without batch normalisation, whose statistics would be each process's own, and a head."""
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(3)] * 3), 3)
    table = CodeVectors(torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(1)))
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.GELU())
    # A code vector's step multiplies rounding by contrast_scale * vector_lr: 32 by default, 1.6 here.
    return backbone.append(torch.nn.Linear(16, WIDTH)), GIFLoss(codes, table, WIDTH, vector_lr=0.1)


def sampled_network():
    """The same backbone, and Partial FC."""
    backbone, _ = network()
    return backbone, PartialFC(M, WIDTH, samples=9, scale=8.0)


def long_run(rank, *, augment=unchanged, micro=None, checkpoints=None, frozen=False, build=network):
    """Twenty steps of 12 images, which begin with rank 0's values; what they lead to."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (120, 1, 8, 8), generator=generator).to(torch.uint8)
    data = IdentityImages(images, torch.randint(M, (120,), generator=generator), [str(i) for i in range(M)])
    torch.manual_seed(rank)
    backbone, head = build()
    backbone.requires_grad_(not frozen)
    config = TrainingConfig(epochs=2, batch_size=12, lr=0.01, save_steps=4, micro_batch_size=micro)
    log = train_network(backbone, head, data, config, augment=augment, checkpoints=checkpoints)
    return {**backbone.state_dict(), **head.state_dict(), **head.tables(), "losses": log.losses}


def validated_run(rank):
    """Eight steps with batch normalisation, whose statistics are each process's own, judged after every third step."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(0, 256, (48, 1, 16, 16), generator=generator).to(torch.uint8)
    data = IdentityImages(images, torch.arange(48) // 6, [str(i) for i in range(8)])
    torch.manual_seed(rank)
    backbone, head = BackboneConfig(embedding_size=8, image_size=16, width=4).build(), MarginSoftmax(8, 8)
    judged = []

    def validate(network):
        judged.append({name: value.clone() for name, value in network.state_dict().items()})
        outcome = HeldOutIdentities(data).judge(network, Embedder(batch_size=5))
        return {**outcome.scores, "rank-1": outcome.numbers["rank1"]}

    config = TrainingConfig(epochs=2, batch_size=12, lr=0.02)
    log = train_network(backbone, head, data, config, augment=unchanged, validate=validate, validate_every=3)
    return {"scores": log.validations, "judged": judged, "embeddings": embed(backbone, data), "images": images}


def plain_loop(rank, wrap_head):
    """Two accumulated backward passes as a user writes them; the gradients of the head."""
    torch.manual_seed(rank)
    backbone, head = network()
    backbone = DistributedDataParallel(backbone)
    replicate(head)
    loss_fn = DistributedDataParallel(head) if wrap_head else head
    for _ in range(2):
        images, labels = torch.randn(4, 64) + rank, torch.arange(4) + rank
        loss_fn(backbone(images), labels).backward()
    return {name: parameter.grad for name, parameter in head.named_parameters()}


def mean_of_lone_gradients(processes):
    """The same as `plain_loop`, computed without processes: heads with rank 0's values, one for each."""
    total: dict[str, Any] = {}
    for rank in range(processes):
        torch.manual_seed(0)
        backbone, head = network()
        torch.manual_seed(rank)
        network()  # what the process drew before its images
        for _ in range(2):
            images, labels = torch.randn(4, 64) + rank, torch.arange(4) + rank
            head.code_loss(backbone(images), labels).mul(head.recipe.code_weight).backward()
        for name, parameter in head.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad / processes
    return total


def together(rank, folder):
    """Two processes, then one, then three, each going on where the others were stopped."""
    torch.set_num_threads(1)
    if rank < 2:
        with group(folder, rank, 2):
            found = {
                "shared step": shared_step(rank),
                "uneven": uneven(rank),
                "rounded": rounded(rank),
                "shared sample": shared_sample(rank),
                "uneven sample": uneven_sample(rank),
                "sampled run": long_run(rank, build=sampled_network),
                "whole": long_run(rank),
                "accumulated": long_run(rank, micro=3),
                "frozen": long_run(rank, frozen=True),
                "validated": validated_run(rank),
                "bare head": plain_loop(rank, wrap_head=False),
                "wrapped head": plain_loop(rank, wrap_head=True),
            }
            torch.save(found, folder / f"{rank}.pt")
            with suppress(KeyboardInterrupt):
                long_run(rank, augment=interrupted_in(7), checkpoints=folder / "run")  # saved at 4
    if rank == 0:
        with suppress(KeyboardInterrupt):
            long_run(5, augment=interrupted_in(10), checkpoints=folder / "run")  # in the second epoch; saved at 12
    with group(folder, rank, 3):
        torch.save(long_run(rank, checkpoints=folder / "run"), folder / f"{rank}-of-3.pt")


@pytest.fixture(scope="module")
def trained_together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    spawn(together, (folder,), nprocs=3)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def test_processes_take_the_step_of_the_whole_batch(trained_together):
    first, second = (trained_together[rank]["shared step"] for rank in ("0", "1"))
    for (table, _), (other, _) in zip(first, second, strict=True):  # float32, bfloat16
        assert torch.equal(table, other)
    alone, gradient = train(torch.float32, *batch())
    torch.testing.assert_close(first[0][0], alone, rtol=0, atol=1e-6)
    shared = torch.cat([first[0][1], second[0][1]]) / PROCESSES
    torch.testing.assert_close(shared, gradient, rtol=1e-5, atol=1e-6)


def test_a_process_may_have_fewer_rows_or_none(trained_together):
    first, second = (trained_together[rank]["uneven"] for rank in ("0", "1"))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True))
    assert first[0].tolist() == [[10], [11], [12]] and first[1].item() == 0.5


def test_processes_take_the_step_of_the_whole_batchs_sample(trained_together):
    (first, gradient), (second, other) = (trained_together[rank]["shared sample"] for rank in ("0", "1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone, wanted = sampled(*batch())
    assert_close(first, alone)
    torch.testing.assert_close(torch.cat([gradient, other]) / PROCESSES, wanted, rtol=1e-5, atol=1e-6)
    first, second = (trained_together[rank]["uneven sample"] for rank in ("0", "1"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_train_the_sampled_centres_of_one(trained_together):
    alone = long_run(0, build=sampled_network)
    first, second = (trained_together[rank]["sampled run"] for rank in ("0", "1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {"weight", "momentum"} <= alone.keys()
    assert_close(first, alone)


def test_rounding_and_negatives_are_those_of_the_first_process(trained_together):
    first, second = (trained_together[rank]["rounded"] for rank in ("0", "1"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[1] == rounded(0)[1]


def assert_close(found, wanted):
    for name, value in wanted.items():
        tolerance = 1e-5 if name == "losses" else 1e-6  # losses are near 10, where float32 is that coarse
        if name == "momentum":
            tolerance *= float(value.abs().max())  # gradients by short centres are large
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def test_two_processes_train_the_weights_of_one(trained_together):
    alone = long_run(0)
    for rank in ("0", "1"):
        assert_close(trained_together[rank]["whole"], alone)
    first, second = (trained_together[rank]["whole"] for rank in ("0", "1"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_frozen_backbone_needs_no_exchange(trained_together):
    alone = long_run(0, frozen=True)
    assert not torch.equal(alone["vectors"], network()[1].vectors.table)
    for rank in ("0", "1"):  # also the values that rank 0 began with
        assert_close(trained_together[rank]["frozen"], alone)


def test_a_run_goes_on_with_another_number_of_processes(trained_together):
    alone = long_run(0)
    for rank in range(3):
        assert_close(trained_together[f"{rank}-of-3"], alone)


def test_accumulated_gradients_are_the_same_on_each_process(trained_together):
    first, second = (trained_together[rank]["accumulated"] for rank in ("0", "1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["losses"].isfinite().all()


@pytest.mark.parametrize("how", ["bare head", "wrapped head"])
def test_a_head_gets_the_mean_gradient_in_a_plain_loop(trained_together, how):
    wanted = mean_of_lone_gradients(2)
    for rank in ("0", "1"):
        for name, gradient in wanted.items():
            torch.testing.assert_close(trained_together[rank][how][name], gradient, rtol=1e-5, atol=1e-6)


def test_processes_validate_one_network_and_share_its_images(trained_together):
    first, second = (trained_together[rank]["validated"] for rank in ("0", "1"))
    assert list(first["scores"]) == [3, 6, 8] and first["scores"] == second["scores"]
    for mine, other in zip(first["judged"], second["judged"], strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    backbone = BackboneConfig(embedding_size=8, image_size=16, width=4).build()
    backbone.load_state_dict(first["judged"][-1])
    data = IdentityImages(first["images"], torch.arange(48) // 6, [str(i) for i in range(8)])
    alone = HeldOutIdentities(data).judge(backbone, Embedder())
    assert first["scores"][8] == {**alone.scores, "rank-1": alone.numbers["rank1"]}
    torch.testing.assert_close(first["embeddings"], embed(backbone, data), rtol=0, atol=1e-5)  # batches of other sizes
    assert torch.equal(first["embeddings"], second["embeddings"])
