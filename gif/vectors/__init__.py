"""Code vectors: initialise, spread, judge, store."""

from gif.vectors.closed_form import ClosedForm
from gif.vectors.config import SpreadConfig
from gif.vectors.in_file import spread_file
from gif.vectors.initial import initial_code_vectors
from gif.vectors.quality import VectorQuality, judge_vectors, largest_uniform_cosine, uniform_optimum
from gif.vectors.spread import SpreadReport, spread_code_vectors
from gif.vectors.store import CodeVectors

__all__ = [
    "ClosedForm",
    "CodeVectors",
    "SpreadConfig",
    "SpreadReport",
    "VectorQuality",
    "initial_code_vectors",
    "judge_vectors",
    "largest_uniform_cosine",
    "spread_code_vectors",
    "spread_file",
    "uniform_optimum",
]
