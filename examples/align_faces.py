"""Aligned faces by OpenCV's detector: the hook of gif embed, verify and search, and a folder before training.

    pip install opencv-python-headless
    # once: face_detection_yunet_2023mar.onnx, from the models of opencv_zoo, beside this file or in $YUNET
    gif verify a.jpg b.jpg --model model.safetensors --align examples/align_faces.py:align
    python examples/align_faces.py photographs faces      # a folder an identity, each photograph's largest face

The hook gets the pixels of a whole image, (h, w, 3) uint8 in RGB, and gives those of the face in its place; None where
there is no face. Whatever finds five landmarks will do: `gif.evaluation.align_face` warps them to where arcface's
training sets have them, in 112 x 112.
"""

import os
import sys
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from gif.data.decoding import SUFFIXES, BrokenImageError, decode
from gif.evaluation import align_face

MODEL = Path(os.environ.get("YUNET", Path(__file__).with_name("face_detection_yunet_2023mar.onnx")))
LEAST_SCORE = 0.7
LANDMARKS = slice(
    4, 14
)  # of a row that the detector gives: the image's left eye, right eye, nose, corners of the mouth


@cache
def detector() -> cv2.FaceDetectorYN:
    """OpenCV's, made once in each process."""
    if not MODEL.is_file():
        raise FileNotFoundError(f"no file {MODEL}: it is in github.com/opencv/opencv_zoo; or set YUNET to its path")
    return cv2.FaceDetectorYN.create(str(MODEL), "", (0, 0), LEAST_SCORE)


def align(pixels: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The largest face of an image (h, w, 3) RGB, in 112 x 112; None where there is none."""
    height, width = pixels.shape[:2]
    found = detector()
    found.setInputSize((width, height))
    _, faces = found.detect(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    if faces is None:
        return None
    largest = max(faces, key=lambda face: face[2] * face[3])  # width and height of its box
    landmarks = torch.from_numpy(largest[LANDMARKS].reshape(5, 2).astype(np.float64))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return align_face(image, landmarks).permute(1, 2, 0).numpy()


def align_folder(source: Path, target: Path) -> tuple[int, int]:
    """Write the aligned faces of all images below ``source`` as PNG below ``target``; how many, and how many not."""
    done = failed = 0
    for path in sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES):
        try:
            face = align(decode(path.read_bytes(), "RGB"))
        except BrokenImageError as error:
            print(f"{path}: {error}")
            face = None
        if face is None:
            failed += 1
            continue
        place = (target / path.relative_to(source)).with_suffix(".png")
        place.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place), cv2.cvtColor(face, cv2.COLOR_RGB2BGR))
        done += 1
    return done, failed


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python examples/align_faces.py PHOTOGRAPHS FACES")
    written, left = align_folder(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"aligned {written:,} faces; {left:,} images have none, or are damaged")
