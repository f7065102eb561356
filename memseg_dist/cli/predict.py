"""`memseg predict`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import track
from tyro.conf import Positional

from memseg_dist.cli.model import InferenceFlags, ModelFlags, chosen_classes, open_model
from memseg_dist.data.files import make_folder
from memseg_dist.tools.predict import predict_image, read_image, write_prediction


def predict(
    images: Positional[tuple[str, ...]],
    model: ModelFlags,
    inference: InferenceFlags,
    out: Path,
    classes: str | None = None,
) -> None:
    """Segment pictures: a 16-bit label map, an overlay with a legend and a JSON of areas for each.

    Args:
        images: Picture files or URLs (JPEG, PNG, WebP).
        out: Folder to write to.
        classes: What to look for, comma-separated: names, synonyms or uids. By default every
            class that the model knows.
    """
    if not images:
        raise ValueError("no pictures given: memseg predict IMAGE... --checkpoint DIR --out DIR")
    stems: dict[str, str] = {}
    for image in images:
        other = stems.setdefault(Path(image).stem, image)
        if other != image:
            raise ValueError(
                f"{other} and {image} would be written to the same files; use two folders for --out"
            )
    opened = open_model(model)
    vocabulary = opened.label_space.vocabulary
    settings = inference.resolved(opened)
    class_ids = chosen_classes(vocabulary, classes, "--classes")
    make_folder(out)
    console = Console(stderr=True)
    opened.method.eval()
    for path in track(stems.values(), "segmenting", console=console, total=len(stems)):
        pixels = read_image(path)
        label_map = predict_image(opened.method, pixels, class_ids, settings, opened.device)
        report = write_prediction(out, path, pixels, label_map, vocabulary)
        found = ", ".join(f"{row['name']} {row['share']:.1%}" for row in report["classes"][:5])
        console.print(f"{path}: {found}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"label maps, overlays and JSON are in {out}", markup=False)
