"""Code vectors: initialise, spread, judge, store."""

from gif.vectors.initial import initial_code_vectors
from gif.vectors.quality import VectorQuality, judge_vectors, uniform_optimum
from gif.vectors.spread import SpreadReport, spread_code_vectors
from gif.vectors.store import CodeVectors

__all__ = [
    "CodeVectors",
    "SpreadReport",
    "VectorQuality",
    "initial_code_vectors",
    "judge_vectors",
    "spread_code_vectors",
    "uniform_optimum",
]
