"""A trained model as a folder for a hub: weights, configuration, thresholds and a card, without a network."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from gif.backbones import fingerprint, image_fit, load_backbone, load_trained_on, model_file, save_backbone
from gif.backbones.config import BackboneConfig
from gif.backbones.files import HUB_CONFIG, HUB_WEIGHTS, TrainedOn
from gif.documents import markdown_table
from gif.errors import InputError
from gif.evaluation.calibration import Calibration, calibration_path, load_calibration
from gif.export import preprocessing
from gif.files import write_text
from gif.ownership import check_folder
from gif.progress import say

CARD = "README.md"
BESIDE = (".gitattributes", ".git", ".cache", "evaluation.json", "roc.png", "det.png", "identification.png")
"""What the hub's tools and `gif evaluate` may have put into the folder."""


def export_to_hub(model: Path, output: Path, *, license: str | None = None) -> None:
    """Write a folder that Hugging Face's hub takes as it is, and `gif.load_model` loads.

    It holds model.safetensors, config.json (the network, and how an image becomes its input), the thresholds that `gif
    evaluate` has stored with the model, and README.md, the card, which says what is known of it. Nothing is sent: that
    is `huggingface_hub.upload_folder(repo_id=..., folder_path=...)`. Of whom it was trained on the folder says nothing.

    Args:
        model: what `gif train` wrote, its folder, or insightface's model.pt.
        output: the folder, which is made.
        license: of the weights, as the hub calls it, such as apache-2.0; named in the card where it is given.

    Raises ValueError for a model that cannot be read, or a folder that holds other things.
    """
    model = model_file(model)
    backbone, config = load_backbone(model)
    mark = fingerprint(backbone)
    thresholds, trained_on = load_calibration(model, mark), load_trained_on(model)
    own = {HUB_WEIGHTS, HUB_CONFIG, CARD, calibration_path(HUB_WEIGHTS).name, *BESIDE}
    if output.is_dir() and (other := sorted({path.name for path in output.iterdir()} - own)):
        raise InputError(f"{output} holds other things ({', '.join(other[:3])}); give a folder of its own")
    check_folder(output)
    save_backbone(output / HUB_WEIGHTS, backbone, config)
    told = {
        "library_name": "gif-recognition",
        "architecture": asdict(config),
        "preprocessing": preprocessing(config, image_fit(model)),
        "fingerprint": mark,
    }
    write_text(output / HUB_CONFIG, json.dumps(told, indent=2))
    if thresholds is not None:
        write_text(output / calibration_path(HUB_WEIGHTS).name, thresholds.to_json())
    weights = sum(values.numel() for values in backbone.parameters())
    write_text(output / CARD, _card(config, weights, thresholds, trained_on, license))
    say(f"wrote {output}, which is ready for a hub: {', '.join(sorted(path.name for path in output.iterdir()))}")


def _card(
    config: BackboneConfig,
    weights: int,
    thresholds: Calibration | None,
    trained_on: TrainedOn | None,
    license: str | None,
) -> str:
    """The card, in Markdown with the front matter that the hub reads."""
    front = ["library_name: gif-recognition", "pipeline_tag: image-feature-extraction"]
    front += [f"license: {license}"] if license else []
    size = f"{config.image_size} x {config.image_size}"
    data = "" if trained_on is None else f" It was trained on {len(trained_on.digests):,} identities."
    lines = [
        "---",
        *front,
        "tags: [image-feature-extraction, recognition]",
        "---",
        f"# {config.name}, {config.embedding_size}-dimensional embeddings",
        "",
        f"A {config.name} of {weights / 1e6:.1f} million weights for images of {size} in "
        f"{'RGB' if config.channels == 3 else 'grey levels'}; embeddings are compared by cosine.{data}",
        "",
        "```python",
        "import gif",
        "",
        'model = gif.load_model("path/of/this/folder")',
        'embeddings = model.embed(["a.jpg", "b.jpg"])',
        'verdict = model.verify("a.jpg", "b.jpg")',
        "```",
        "",
        "## Preprocessing",
        "",
        "An image is turned upright, resized (bilinear, antialiased) to the size above, and normalised to "
        "(x / 255 - 0.5) / 0.5; `config.json` says it in full. Faces are to be aligned as in training.",
        "",
        "## Thresholds",
        "",
    ]
    if thresholds is None:
        lines.append("This model has not been judged: no threshold is known.")
    for name, judged in ({} if thresholds is None else thresholds.sets).items():
        rows = [
            [f"{far:g}", "not known", "", ""]
            if found is None
            else [f"{far:g}", f"{found.threshold:.4f}", f"{found.tar:.4f}", f"{found.false_accepts:,}"]
            for far, found in judged.thresholds.at.items()
        ]
        how = "with the mirrored image's embedding added" if judged.flip else "of the image alone"
        lines += [
            f"On {name} of {judged.data}, embeddings {how}: {judged.thresholds.genuine:,} genuine and "
            f"{judged.thresholds.impostor:,} impostor pairs, EER {judged.thresholds.eer:.4f}.",
            "",
            markdown_table(["FAR", "cosine at least", "TAR", "false accepts"], rows),
        ]
    return "\n".join(lines).rstrip() + "\n"
