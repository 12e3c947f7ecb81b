"""torch.compile of backbone and head, and the head in a CUDA graph: one graph, and what eager mode gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.backbones import BackboneConfig

M, WIDTH, VOCAB, BATCH = 30, 12, 4, 6
RECIPES: dict[str, dict[str, Any]] = {
    "live": {},
    "live with negatives, in bfloat16": {"negatives": 6, "dtype": torch.bfloat16},
    "vectors that stay": {"negatives": 6, "vector_lr": 0},
}


def build(dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> GIFLoss:
    """Heads that are built alike are alike."""
    torch.manual_seed(0)
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)[:M].to(device), VOCAB)
    head = GIFLoss(codes, CodeVectors(torch.randn(M, WIDTH).to(device, dtype)), WIDTH, **options).to(device)
    head.mark_moves({"vectors": torch.zeros(M, dtype=torch.bool, device=device)})
    return head


CONFIG = BackboneConfig("small", WIDTH, width=4)


def network() -> nn.Module:
    torch.manual_seed(1)
    return CONFIG.build()


def state(head: GIFLoss) -> list[Tensor]:
    """What a step leaves behind."""
    draws = [] if head.draws is None else [head.draws]
    return [head.vectors.table, head.moved, head.stayed, *draws, *(each.grad for each in head.parameters())]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def losses(head: Callable[..., Any], inputs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The losses of some steps, and the gradients of their embeddings."""
    found = []
    for embeddings, labels in inputs:
        point = embeddings.clone().requires_grad_()
        loss = head(point, labels)
        loss.backward()
        found += [loss.detach().clone(), point.grad.clone()]  # a graph's next replay writes where they lie
    return found


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_a_compiled_head_does_what_eager_mode_does(options, compiled):
    eager, head = build(**options), build(**options)
    before = head.vectors.table.clone()
    inputs = [(torch.randn(BATCH, WIDTH), torch.randint(-1, M, (BATCH,))) for _ in range(3)]
    assert_alike(losses(compiled(head), inputs), losses(eager, inputs))
    assert_alike(state(head), state(eager))
    assert torch.equal(head.vectors.table, before) == (not head.recipe.moves_vectors)
    if head.draws is not None:
        assert int(head.draws) == int(build(**options).draws) + len(inputs)


def test_a_row_that_cannot_move_stays_and_is_counted(compiled):
    eager, head = build(), build()
    embeddings = torch.full((BATCH, WIDTH), torch.inf)
    for each in (eager, compiled(head)):
        given = embeddings.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)
            each(given, torch.arange(BATCH)).backward()
    assert head.stayed == eager.stayed > 0 and torch.equal(head.vectors.table, eager.vectors.table)


def test_a_step_where_the_embeddings_need_no_gradient(compiled):
    eager, head = build(negatives=6), build(negatives=6)
    embeddings, labels = torch.randn(BATCH, WIDTH), torch.arange(BATCH)
    loss, expected = compiled(head)(embeddings, labels), eager(embeddings, labels)
    assert_alike([loss.detach(), *state(head)[:4]], [expected.detach(), *state(eager)[:4]])


def test_a_compiled_backbone_and_head(compiled):
    found = []
    for compiles in (False, True):
        backbone, head = network(), build(negatives=6, vector_lr=4.0)
        optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.05)

        def loss_of(images, labels, backbone=backbone, head=head):
            return head(backbone(images), labels)

        step = compiled(loss_of) if compiles else loss_of
        values = []
        for seed in range(3):
            torch.manual_seed(seed)
            images = torch.randn(BATCH, CONFIG.channels, CONFIG.image_size, CONFIG.image_size)
            labels = torch.randint(M, (BATCH,))
            loss = step(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        found.append([*values, *state(head), *(each.detach() for each in backbone.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_a_share_of_a_step_is_may_change(compiled):
    eager, head = build(), build()
    step = compiled(head)
    for share in (1.0, 0.5, 0.25):
        for each, call in ((eager, eager), (head, step)):
            each.step_share = share
            losses(call, [(torch.ones(BATCH, WIDTH), torch.arange(BATCH))])
    assert_alike(state(head), state(eager))


def test_checkpointing_inside_of_a_compiled_step_moves_once(compiled):
    eager, head = build(negatives=6), build(negatives=6)
    inputs = [(torch.randn(BATCH, WIDTH), torch.arange(BATCH))]
    whole = compiled(lambda embeddings, labels: checkpoint(head, embeddings, labels, use_reentrant=False))
    assert_alike(losses(whole, inputs), losses(eager, inputs))
    assert_alike(state(head), state(eager))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
class TestCudaGraph:
    """A replay is a step: the vectors move, what moved is marked, and other numbers are drawn."""

    def inputs(self, steps: int) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(2)
        return [(torch.randn(BATCH, WIDTH).cuda(), torch.randint(M, (BATCH,)).cuda()) for _ in range(steps)]

    @pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
    def test_replays_are_steps(self, options):
        eager, head = build(device="cuda", **options), build(device="cuda", **options)
        inputs = self.inputs(6)
        point, labels = inputs[0][0].clone().requires_grad_(), inputs[0][1].clone()
        parameters = [point, *head.parameters()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for given, names in inputs[:3]:  # Triton compiles its kernels
                point.data.copy_(given)
                labels.copy_(names)
                torch.autograd.grad(head(point, labels), parameters)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = head(point, labels)
            gradients = torch.autograd.grad(loss, parameters)
        for step, (given, names) in enumerate(inputs):
            embeddings = given.clone().requires_grad_()
            expected = eager(embeddings, names)
            wanted = torch.autograd.grad(expected, [embeddings, *eager.parameters()])
            if step >= 3:
                point.data.copy_(given)
                labels.copy_(names)
                graph.replay()
                assert_alike([loss, *gradients], [expected, *wanted])
        kept = 3 if head.draws is None else 4
        assert_alike(state(head)[:kept], state(eager)[:kept])

    def test_what_pytorch_captures_itself(self):
        eager, head = build(device="cuda"), build(device="cuda")
        given, names = self.inputs(1)[0]
        graphed: Any = torch.cuda.make_graphed_callables(head, (given.clone().requires_grad_(), names))
        for each in (eager, head):  # the warm-up has moved them
            each.vectors.table.copy_(build(device="cuda").vectors.table)
        assert_alike(losses(graphed, self.inputs(3)), losses(eager, self.inputs(3)))
        assert_alike([head.vectors.table], [eager.vectors.table])
