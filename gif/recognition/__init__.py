"""What a trained model is for: embeddings of images, one image against another, one against a gallery."""

from gif.recognition.embeddings import Embeddings
from gif.recognition.model import Model, Verdict, load_model
from gif.recognition.search import Match, search

__all__ = ["Embeddings", "Match", "Model", "Verdict", "load_model", "search"]
