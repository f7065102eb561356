"""`memseg predict`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track
from torch import Tensor
from tyro.conf import Positional

from memseg_dist.cli.model import InferenceFlags, ModelFlags, chosen_classes, open_model
from memseg_dist.data.files import make_folder
from memseg_dist.tools.predict import (
    find_pictures,
    fitted_batches,
    predict_images,
    read_image,
    write_prediction,
)

SHOWN = 3
"""Files that were left out: so many are named."""


def predict(
    images: Positional[tuple[str, ...]],
    model: ModelFlags,
    inference: InferenceFlags,
    out: Path,
    classes: str | None = None,
    batch: int = 1,
) -> None:
    """Segment pictures and folders of pictures.

    Of each: a 16-bit label map, an overlay with a legend and a JSON of areas.

    Args:
        images: Picture files (JPEG, PNG, WebP), folders, URLs or patterns in quotes:
            "photos/**/*.jpg".
        out: Folder to write to; the pictures of a folder keep their sub-folders.
        classes: What to look for, comma-separated: names, synonyms or uids. By default every
            class that the model knows.
        batch: Pictures in a row, of one size, that go through the network together.
    """
    if not images:
        raise ValueError("no pictures given: memseg predict IMAGE... --checkpoint DIR --out DIR")
    if batch < 1:
        raise ValueError(f"--batch {batch}: must be 1 or more")
    paths, other = find_pictures(images)
    opened = open_model(model)
    vocabulary = opened.label_space.vocabulary
    settings = inference.resolved(opened)
    class_ids = chosen_classes(vocabulary, classes, "--classes")
    make_folder(out)
    console = Console(stderr=True)
    unreadable: list[str] = []

    def pictures() -> Iterator[tuple[str, Tensor]]:
        for name, path in track(paths.items(), "segmenting", console=console, total=len(paths)):
            try:
                yield name, read_image(path)
            except ValueError as error:
                unreadable.append(str(error))

    opened.method.eval()
    for group in fitted_batches(pictures(), settings, batch):
        names, pixels, fitted = zip(*group)
        sizes = [(image.shape[-2], image.shape[-1]) for image in pixels]
        found = predict_images(opened.method, fitted, class_ids, settings, sizes, opened.device)
        for name, image, label_map in zip(names, pixels, found, strict=True):
            report = write_prediction(out, name, paths[name], image, label_map, vocabulary)
            shown = ", ".join(f"{row['name']} {row['share']:.1%}" for row in report["classes"][:5])
            text = f"{report['image']}: {shown}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if other:
        some = ", ".join(f"{item.key} ({item.reason})" for item in other[:SHOWN])
        text = f"{len(other)} files left out: {some}{', ...' if len(other) > SHOWN else ''}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(unreadable) < len(paths):
        where = f"label maps, overlays and JSON are in {out}"
        console.print(where, markup=False, highlight=False, soft_wrap=True)
    if unreadable:
        raise ValueError("; ".join(unreadable))
