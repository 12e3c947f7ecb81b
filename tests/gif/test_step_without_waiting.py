"""On an accelerator a training step asks the device for no value, and a step of spreading and of tokenising neither.

Tensors of a fake CUDA device have no values: whoever would look at one raises. Autograd's engine needs a driver for
them, so a graph's nodes are called here one after the other.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gif import CodeVectors, GIFLoss, IdentityCodes
from gif.codes.clustering import Points, rounds, seed_centroids
from gif.codes.nodes import Nodes
from gif_kernels import dispatch, uniformity_step_

M, VOCAB, WIDTH, BATCH = 20, 5, 8, 6
OF_A_LIVE_STEP = 154
"""Operators of a forward pass, a backward pass and a step of the code vectors, where the Triton kernels run."""
LIVE: dict[str, dict[str, Any]] = {
    "live": {},
    "live with negatives": {"negatives": 6},
    "live without projections": {"projection": "none", "token_weights": "decreasing"},
    "vectors that stay": {"negatives": 6, "vector_lr": 0},
    "without a pull": {"regression_weight": 0},
    "paper": {"recipe": "paper"},
}


class Operators(TorchDispatchMode):
    """The operators that run, but for views and allocations, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.overloadpacket._qualified_op_name.split("::")
        without_work = ("empty", "new_empty", "detach", "lift", "promote_types")
        if not (function.is_view or namespace == "prim" or name.startswith(without_work)):
            self.names.append(f"{namespace}::{name}")
        return function(*args, **(kwargs or {}))


def backward(loss: Tensor) -> None:
    """`loss.backward()`, node by node."""
    order, incoming = [], {loss.grad_fn: [torch.ones_like(loss)]}

    def visit(node):
        if node is not None and node not in order:
            for following, _ in node.next_functions:
                visit(following)
            order.append(node)

    visit(loss.grad_fn)
    with torch.no_grad():
        for node in reversed(order):
            gradients = incoming.pop(node)
            if hasattr(node, "variable"):  # a leaf
                node.variable.grad = gradients[0]
                continue
            found = getattr(node, "apply", node)(*gradients)
            found = found if isinstance(found, tuple) else (found,)
            following = [after for after, _ in node.next_functions if after is not None]  # none for what is constant
            for after, gradient in zip(following, [each for each in found if each is not None], strict=True):
                (slot,) = incoming.setdefault(after, [None])
                incoming[after] = [gradient if slot is None else slot + gradient]


@pytest.fixture
def codes():
    return IdentityCodes(torch.tensor([[i // VOCAB, i % VOCAB] for i in range(M)]), VOCAB)


def fake_head(codes, fake, dtype=torch.bfloat16, **options):
    """A head whose tables and parameters are on a fake CUDA device."""
    tables = {name: getattr(codes.table, name) for name in ("numbers", "order", "starts")}
    for name, table in tables.items():
        object.__setattr__(codes.table, name, fake.from_tensor(table).to("cuda"))
    with torch.device("cuda"):
        head = GIFLoss(codes, CodeVectors(torch.empty(M, WIDTH, dtype=dtype), normalized=True), WIDTH, **options)
        head.mark_moves({"vectors": torch.zeros(M, dtype=torch.bool)})
    return head


@pytest.fixture(params=["triton", "blocked"])
def kernels(request, monkeypatch):
    """With the Triton kernels as nodes of a graph, or as the blocked implementations do it without them."""
    if request.param == "triton" and not dispatch.TRITON_INSTALLED:
        pytest.skip("Triton is not installed")
    if request.param == "blocked":
        monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    return request.param


@pytest.mark.fake_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", LIVE.values(), ids=LIVE)
def test_a_training_step(codes, kernels, options, dtype):
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        head = fake_head(codes, fake, dtype, **options)
        embeddings = torch.empty(BATCH, WIDTH, device="cuda", requires_grad=True)
        with Operators() as operators:
            loss = head(embeddings, torch.empty(BATCH, device="cuda", dtype=torch.int64))
            backward(loss)
        moves = head.recipe.moves_vectors
        assert operators.names.count("gif_kernels::vector_step_") == moves
        assert embeddings.grad.shape == (BATCH, WIDTH) and embeddings.grad.device.type == "cuda"
        assert all(each.grad.shape == each.shape for each in head.parameters())
        contrasts = operators.names.count("gif_kernels::code_contrast_backward")
        assert contrasts == (kernels == "triton" and head.recipe.contrast_weight > 0)
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.fake_cuda
def test_a_step_of_embeddings_that_need_no_gradient(codes, kernels):
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        head = fake_head(codes, fake, negatives=6)
        with Operators() as operators:
            head(torch.empty(BATCH, WIDTH, device="cuda"), torch.empty(BATCH, device="cuda", dtype=torch.int64))
        assert "gif_kernels::vector_step_" in operators.names


@pytest.mark.fake_cuda
def test_a_step_of_spreading(kernels):
    with FakeTensorMode(allow_non_fake_inputs=False):
        table = torch.empty(M, WIDTH, device="cuda", dtype=torch.bfloat16)
        loss = uniformity_step_(table, torch.empty(BATCH, device="cuda", dtype=torch.int64), lr=0.1)
        assert loss.shape == () and loss.device.type == "cuda"


@pytest.mark.fake_cuda
def test_the_blocked_step_of_spreading():
    """What that operator does, where there is no Triton."""
    from gif_kernels.uniformity_step import blocked
    from gif_kernels.uniformity_step.options import UniformityStepOptions

    with FakeTensorMode(allow_non_fake_inputs=False):
        table = torch.empty(M, WIDTH, device="cuda", dtype=torch.bfloat16)
        index = torch.empty(BATCH, device="cuda", dtype=torch.int64)
        assert blocked.step_(table, index, UniformityStepOptions(lr=0.1, t=2.0, seed=3)).device.type == "cuda"


@pytest.mark.fake_cuda
def test_clustering_the_nodes_of_a_level():
    """What tokenising does again and again; a level reads how large its nodes are, once each."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        with torch.device("cuda"):
            index = torch.empty(3, 40, dtype=torch.int64)
            nodes = Nodes(torch.empty(M, WIDTH), index, torch.empty(3, 40, dtype=torch.bool))
            share = torch.empty(3, 1)
        points = Points.sketched(nodes, VOCAB)
        found = rounds(points, seed_centroids(points, VOCAB, np.arange(3, dtype=np.uint64)), share, 4)
        assert all(each.device.type == "cuda" for each in found)


@pytest.fixture
def unchecked(monkeypatch):
    """Values are not looked at, as on an accelerator; and no tensor tells one."""
    monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)

    def reads(self, *args):
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(Tensor, name, reads)


@pytest.mark.parametrize("options", LIVE.values(), ids=LIVE)
def test_an_eager_step_reads_no_value(codes, unchecked, options):
    """The same as it runs, through autograd's engine."""
    head = GIFLoss(codes, CodeVectors(torch.randn(M, WIDTH).bfloat16(), normalized=True), WIDTH, **options)
    embeddings = torch.randn(BATCH, WIDTH, requires_grad=True)
    stayed = head.stayed
    head(embeddings, torch.arange(BATCH)).backward()
    assert head.stayed is stayed  # the very tensor that a replayed graph writes to


@pytest.mark.fake_cuda
@pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")
def test_operators_of_a_live_step(codes):
    """How many there are; with -s, which. docs/gpu.md tells the number."""
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        head = fake_head(codes, fake)
        embeddings = torch.empty(BATCH, WIDTH, device="cuda", requires_grad=True)
        with Operators() as operators:
            backward(head(embeddings, torch.empty(BATCH, device="cuda", dtype=torch.int64)))
    print(len(operators.names), Counter(operators.names))
    assert len(operators.names) <= OF_A_LIVE_STEP
