"""A trained model as its user has it: images in, embeddings out, and whether two show the same identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gif.backbones import BackboneConfig, fingerprint, image_fit, load_backbone, model_file
from gif.data.decoding import Align, BrokenImageError, ImageDecoder
from gif.devices import resolve_device
from gif.errors import InputError
from gif.evaluation.calibration import Calibration, load_calibration
from gif.evaluation.embedding import embed_batch, evaluating
from gif.files import existing_file

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike = str | Path | Image | np.ndarray | Tensor

ONNX = ".onnx"


@dataclass(frozen=True)
class Verdict:
    """Whether two images show the same identity.

    Args:
        cosine: of their embeddings.
        same: whether it is at least the threshold; None where no threshold is known.
        threshold: the cosine that decides.
        basis: where the threshold comes from, in words; why there is none.
    """

    cosine: float
    same: bool | None
    threshold: float | None
    basis: str


@dataclass(frozen=True, eq=False)
class Model:
    """A trained backbone, with what it needs of images and what is known of its cosines. `load_model` makes one.

    Args:
        network: images (B, channels, size, size) in [-1, 1] to embeddings (B, d), in eval mode, on ``device``.
        config: which backbone it is.
        decoder: how an image file becomes what it takes.
        fingerprint: of its weights, which embeddings in files are known by.
        calibration: its thresholds; None where it was not judged.
        flip: whether embeddings have the mirrored image's added.
        device: where it computes.
    """

    network: nn.Module
    config: BackboneConfig
    decoder: ImageDecoder
    fingerprint: str
    calibration: Calibration | None = None
    flip: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @torch.inference_mode()
    def embed(self, images: ImageLike | Sequence[ImageLike], *, batch_size: int = 64) -> Tensor:
        """Unit embeddings (n, d) float32 of images, on the CPU; their cosine is ``a @ b``.

        Args:
            images: one, or a sequence of them: the path of a JPEG, PNG or WebP; an image of Pillow; pixels, 0 to 255,
                in RGB: an array (h, w) or (h, w, 3) uint8, or a tensor (c, h, w) uint8. Each is brought into the size
                and colours of the backbone.
            batch_size: images embedded at once.

        Raises FileNotFoundError, BrokenImageError (a ValueError) for a file that is no image, in which alignment finds
        nothing, or pixels of another shape; TypeError for another dtype.
        """
        several = [images] if isinstance(images, str | Path | np.ndarray | Tensor) else images
        several = several if isinstance(several, Sequence) else [several]
        found = []
        with evaluating(self.network, self.device) as network:
            for begin in range(0, len(several), batch_size):
                pixels = torch.stack([self._pixels(image) for image in several[begin : begin + batch_size]])
                found.append(normalize(embed_batch(network, pixels.to(self.device), flip=self.flip)).cpu())
        return torch.cat(found) if found else torch.empty(0, self.config.embedding_size)

    def cosine(self, one: ImageLike, other: ImageLike) -> float:
        """The cosine of two images' embeddings, in [-1, 1]. Errors are those of `embed`."""
        first, second = self.embed([one, other])
        return float(first.double() @ second.double())

    def verify(
        self,
        one: ImageLike,
        other: ImageLike,
        *,
        far: float | None = None,
        threshold: float | None = None,
        by: str | None = None,
    ) -> Verdict:
        """Whether two images show the same identity: their cosine, against a threshold.

        Args:
            one: as for `embed`.
            other: likewise.
            far: the false-accept rate whose threshold decides, 0.01 to 1e-6; 0.001 where none is given, or 0.01 or the
                equal error rate where the judgement had too few pairs for that.
            threshold: the cosine that decides.
            by: which judgement's thresholds, by name; those of the most impostor pairs where not given.

        Raises what `embed` raises, ValueError for a FAR that the judgement did not resolve, a threshold outside
        [-1, 1], a judgement of another ``flip``.
        """
        decides, basis = self.threshold(far, threshold=threshold, by=by)
        cosine = self.cosine(one, other)
        return Verdict(cosine, None if decides is None else cosine >= decides, decides, basis)

    def threshold(
        self, far: float | None = None, *, threshold: float | None = None, by: str | None = None
    ) -> tuple[float | None, str]:
        """The cosine from which two images count as the same, and what it rests on; None where that is not known.

        Arguments and errors are those of `verify`.
        """
        if threshold is not None:
            if not -1 <= threshold <= 1:
                raise InputError(f"threshold must be a cosine in [-1, 1], got {threshold}")
            return threshold, "as given"
        if self.calibration is None:
            if by is not None:
                raise InputError(
                    f"this model has no thresholds, and so none called {by!r}; make them with gif evaluate"
                )
            return None, "no threshold is known: gif evaluate finds them, and stores them beside the model"
        name = by or self.calibration.best
        judged = self.calibration.named(by)
        if judged.flip != self.flip:
            raise InputError(
                f"the thresholds by {name} are of embeddings {_mirrored(judged.flip)}, and these are "
                f"{_mirrored(self.flip)}; give flip as {judged.flip}, other thresholds, or a cosine"
            )
        far = judged.thresholds.usual_far if far is None else far
        if far is None:
            found = judged.thresholds
            return found.eer_threshold, (
                f"equal error rate, {found.eer:.1%}, on {name} of {judged.data}: {found.impostor:,} impostor pairs are "
                "too few for a false-accept rate"
            )
        basis = f"FAR {far:g} on {name} of {judged.data}: {judged.thresholds.support(far)}"
        return judged.thresholds.require(far).threshold, basis

    def _pixels(self, image: ImageLike) -> Tensor:
        if isinstance(image, str | Path):
            try:
                return self.decoder(existing_file(image).read_bytes())
            except BrokenImageError as error:
                raise BrokenImageError(f"{image} cannot be used: {error}") from error
        if isinstance(image, Tensor):
            image = image.detach().cpu().movedim(0, -1).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
            image = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
        if not isinstance(image, np.ndarray):
            if not hasattr(image, "convert"):
                raise TypeError(
                    f"an image must be a path, an image of Pillow, an array or a tensor, got {type(image).__name__}"
                )
            image = np.asarray(image.convert("RGB"))
        return self.decoder.prepare(image)


def load_model(
    path: str | Path,
    *,
    device: str = "auto",
    flip: bool | None = None,
    align: Align | None = None,
    max_pixels: int | None = None,
) -> Model:
    """A trained model from its file: what `gif train` or `gif export` wrote, or insightface's.

        model = gif.load_model("run/backbone.safetensors")
        embeddings = model.embed(["a.jpg", "b.jpg"])
        verdict = model.verify("a.jpg", "b.jpg", far=1e-4)

    Args:
        path: backbone.safetensors, an .onnx file of `gif export`, a run's folder or one of `gif hub`, or insightface's
            model.pt.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        flip: add the mirrored image's embedding. Where not given: as its thresholds were found; without any, no.
        align: brings what an image shows into its place (`gif.data.decoding.Align`).
        max_pixels: an image whose file declares more is refused; 50 million where not given.

    Raises FileNotFoundError, ValueError where the file is damaged or no model, or its thresholds are another one's.
    """
    path = model_file(path)
    own = resolve_device(device)
    if path.suffix == ONNX:
        from gif.recognition.onnx import load_onnx  # which needs onnxruntime

        loaded = load_onnx(path)
        own = torch.device("cpu")
    else:
        network, config = load_backbone(path)
        decoder = ImageDecoder(config.image_size, config.channels, fit=image_fit(path))
        mark = fingerprint(network)
        loaded = Model(network.to(own), config, decoder, mark, load_calibration(path, mark))
    options: dict[str, Any] = {} if max_pixels is None else {"max_pixels": max_pixels}
    if flip is None:
        flip = loaded.calibration is not None and loaded.calibration.named(None).flip
    return replace(loaded, decoder=replace(loaded.decoder, align=align, **options), flip=flip, device=own)


def _mirrored(flip: bool) -> str:
    return "with the mirrored image's added" if flip else "of the image alone"
