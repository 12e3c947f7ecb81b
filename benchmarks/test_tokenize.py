"""Identity codes: ours beside recursive k-means by other libraries: time, memory, similarity kept, distinct or not.

`pytest benchmarks/test_tokenize.py --benchmark-json=results.json` for 10,000 identities; `--full` for a million.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import faiss
import numpy as np
import pytest
import torch
from k_means_constrained import KMeansConstrained
from sklearn.cluster import BisectingKMeans
from torch import Tensor

from benchmarks.clusters import clustered
from benchmarks.harness import Reference, record
from benchmarks.heads import VOCAB
from benchmarks.resident import ResidentMemory
from benchmarks.results import Subject
from gif.codes import TokenizeConfig, code_length, tokenize
from gif_kernels.sphere import unit

if TYPE_CHECKING:  # what a run on a GPU imports does without it
    from pytest_benchmark.fixture import BenchmarkFixture

ITERATIONS = 8
REFERENCES = 10
"""Reference products before a run, and after it."""
LARGEST_FLOW = 200_000
"""Rows above which k-means-constrained is left out: the flow network of 150,000 takes 1.3 GiB, and its root 32 s."""


@dataclass(frozen=True)
class Size:
    """How many identities there are, and how wide their vectors."""

    m: int
    d: int

    def __str__(self) -> str:
        return f"m{self.m}-d{self.d}"


NEARLY_FULL = Size(7_600, 128)
"""Nearly as many as there are codes, 20^3, so that plain recursion has no room to spare."""
QUICK = [Size(10_000, 128), NEARLY_FULL]
FULL = [*QUICK, Size(100_000, 512), Size(1_000_000, 512)]

Split = Callable[[np.ndarray], np.ndarray]


def recursive(rows: np.ndarray, length: int, split: Split) -> np.ndarray:
    """Codes (m, l): a loop over nodes; where a node has no more than v rows, or no token is left, rows are numbered.

    Numbers past v wrap around: those identities share a code.
    """
    codes = np.zeros((len(rows), length), np.uint8)
    nodes = [np.arange(len(rows))]
    for depth in range(length):
        children = []
        for node in nodes:
            last = depth == length - 1 or len(node) <= VOCAB
            child = np.arange(len(node)) % VOCAB if last else split(rows[node])
            codes[node, depth] = child
            children += [node[child == token] for token in range(VOCAB)]
        nodes = [node for node in children if len(node)]
    return codes


def faiss_split(rows: np.ndarray) -> np.ndarray:
    clustering = faiss.Kmeans(rows.shape[1], VOCAB, niter=ITERATIONS, spherical=True, seed=0, min_points_per_centroid=1)
    clustering.train(rows)
    return clustering.index.search(rows, 1)[1][:, 0]


def torch_split(rows: np.ndarray) -> np.ndarray:
    """What a user would write: a random start, Lloyd's rounds."""
    table = torch.from_numpy(rows)
    centroids = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:VOCAB]]
    for _ in range(ITERATIONS):
        child = (table @ centroids.T).argmax(1)
        centroids = unit(torch.zeros_like(centroids).index_add_(0, child, table))
    return (table @ centroids.T).argmax(1).numpy()


def bisecting_split(rows: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer distinct rows than clusters
        return BisectingKMeans(VOCAB, max_iter=ITERATIONS, random_state=0).fit_predict(rows)


def constrained_split(rows: np.ndarray) -> np.ndarray:
    """The same capacities as ours, exactly: at most 1.5 n / v rows a child."""
    most = math.ceil(1.5 * len(rows) / VOCAB)
    return KMeansConstrained(VOCAB, size_max=most, n_init=1, max_iter=ITERATIONS, random_state=0, n_jobs=1).fit_predict(
        rows
    )


@dataclass(frozen=True)
class Provider:
    """A way to make codes, to be measured.

    Args:
        name: in reports.
        codes: of rows (m, d), with so many tokens: (m, l).
        distinct: whether no two identities may share a code.
        largest: rows above which it is left out.
    """

    name: str
    codes: Callable[[Tensor, int], np.ndarray]
    distinct: bool = False
    largest: float = math.inf


def _ours(rows: Tensor, length: int) -> np.ndarray:
    """The codes of `tokenize`, which have that length."""
    return tokenize(rows, TokenizeConfig(vocab_size=VOCAB, iterations=ITERATIONS)).codes.numpy()


def _recursive(name: str, split: Split, largest: float = math.inf) -> Provider:
    return Provider(name, lambda rows, length: recursive(rows.numpy(), length, split), largest=largest)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("ours", _ours, distinct=True),
        _recursive("faiss", faiss_split),
        _recursive("torch", torch_split),
        _recursive("bisecting", bisecting_split),
        _recursive("constrained", constrained_split, LARGEST_FLOW),
    )
}


def cosine(rows: Tensor, codes: np.ndarray, depth: int) -> float:
    """Mean cosine of identities to the centroid of those that share ``depth`` tokens."""
    key = codes[:, :depth].astype(np.int64) @ VOCAB ** np.arange(depth)
    _, node = np.unique(key, return_inverse=True)
    sums = torch.zeros(node.max() + 1, rows.shape[1]).index_add_(0, torch.from_numpy(node), rows)
    return float(sums.norm(dim=1).sum()) / len(rows)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = FULL if metafunc.config.getoption("--full") else QUICK
    metafunc.parametrize("size", sizes, ids=str)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_tokenize(benchmark: BenchmarkFixture, size: Size, provider: str) -> None:
    way = PROVIDERS[provider]
    if size.m > way.largest:
        pytest.skip(f"a minimum-cost flow of {size.m * VOCAB:,} arcs in each round; limited to {way.largest:,} rows")
    rows = clustered(size.m, size.d)
    length = code_length(size.m, VOCAB)
    faiss.omp_set_num_threads(torch.get_num_threads())
    reference = Reference()
    for _ in range(REFERENCES):
        reference()
    with ResidentMemory() as memory:
        codes: np.ndarray = benchmark.pedantic(way.codes, args=(rows, length), rounds=1)
    for _ in range(REFERENCES):
        reference()
    distinct = len(np.unique(codes, axis=0))
    assert codes.shape == (size.m, length)
    assert distinct == size.m or not way.distinct
    rounds = length * (ITERATIONS + 1)
    subject = Subject(
        kernel="tokenize",
        provider=way.name,
        mode=f"v{VOCAB}",
        shape=str(size),
        flops=2 * rounds * size.m * VOCAB * size.d,  # of plain Lloyd's rounds, whatever the provider does
        bytes=rounds * rows.nbytes,
        distinct=distinct / size.m,
        cosine=[cosine(rows, codes, depth) for depth in range(1, length)],
    )
    record(
        benchmark,
        subject,
        reference,
        products=np.median(reference.seconds),
        ceilings=np.min(reference.ceiling_seconds),
        copies=np.median(reference.copy_seconds),
        peak_bytes=memory.peak,
    )
