"""Pictures of label maps: overlays with a legend, and image | truth | prediction | maps rows.

A class keeps its colour from picture to picture as long as no two classes of one picture collide;
the colours within one picture are always distinct.

Shape letters: H x W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import count

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from memseg_dist.batch import IGNORE

Pixels = NDArray[np.uint8]
LabelMap = NDArray[np.integer]
Names = Mapping[int, str] | Sequence[str]
Color = tuple[int, int, int]
LegendRow = tuple[Color, str]

NUM_STABLE_COLORS = 64
PANEL_HEIGHT = 320
TITLE_HEIGHT = 26
DPI = 100
LEGEND_WIDTH = 230
LEGEND_ROW = 22
MARGIN = 8
PAPER, IGNORED, HATCHED = (255, 255, 255), (205, 205, 205), (150, 150, 150)


def class_colors(class_ids: Collection[int]) -> dict[int, Color]:
    """A colour per class id, all distinct; the smaller id chooses first where two want the same."""
    ids = sorted({int(class_id) for class_id in class_ids} - {IGNORE})
    num_colors = max(NUM_STABLE_COLORS, 1 << (len(ids) - 1).bit_length() if ids else 1)
    colors = palette(num_colors)
    taken: dict[int, int] = {}
    for class_id in ids:
        free = (number % num_colors for number in count(class_id))
        taken[next(position for position in free if position not in taken)] = class_id
    return {class_id: tuple(colors[position].tolist()) for position, class_id in taken.items()}


@lru_cache(maxsize=8)
def palette(num_colors: int) -> Pixels:
    """[num_colors, 3] RGB colours, distinct, those after each other far apart, and none grey."""
    number = np.arange(num_colors)
    hue = number * 0.618034 % 1  # the golden section never comes back to a hue
    value = np.array([1.0, 0.45, 0.75])[number % 3]
    hsv = np.stack([hue, np.where(number % 2, 1.0, 0.8), value], axis=-1)
    return (255 * matplotlib.colors.hsv_to_rgb(hsv)).round().astype(np.uint8)


def colorize(label_map: LabelMap, colors: Mapping[int, Color]) -> Pixels:
    """uint8 [H, W, 3]; IGNORE is hatched grey."""
    row, column = np.indices(label_map.shape)
    result = np.array([IGNORED, HATCHED], dtype=np.uint8)[((row + column) // 6) % 2]
    ids, places = np.unique(label_map, return_inverse=True)
    table = np.array([colors.get(class_id, IGNORED) for class_id in ids.tolist()], dtype=np.uint8)
    places = places.reshape(label_map.shape)  # NumPy 1 makes it flat
    is_painted = np.isin(ids, [*colors])[places]
    result[is_painted] = table[places[is_painted]]
    return result


def overlay(
    image: Pixels, label_map: LabelMap, names: Names, *, alpha: float = 0.55, max_rows: int = 24
) -> Image.Image:
    """`image` uint8 [H, W, 3] with classes painted over it, and a legend, the largest class first.

    names: class id -> name. The legend lists at most `max_rows` classes and counts the rest.
    """
    _check_sizes(image, label_map, "label map")
    colors = class_colors(np.unique(label_map).tolist())
    rows = _legend(label_map, names, colors, max_rows, with_share=True)
    tiles = {"": _blend(image, label_map, colors, alpha)}
    return Image.fromarray(_side_by_side(tiles, rows, top=0, gap=0))


def panel(
    image: Pixels,
    truth: LabelMap | None,
    prediction: LabelMap,
    maps: Mapping[str, NDArray[np.floating]],
    names: Names,
    *,
    prediction_title: str = "prediction",
    height: int = PANEL_HEIGHT,
    max_rows: int = 24,
) -> Pixels:
    """image | truth | prediction | maps, side by side, with titles and one legend for all.

    truth: left out if None. maps: [H, W] in 0..1, by title. Returns uint8 [h, w, 3].
    """
    label_maps = {"truth": truth} if truth is not None else {}
    label_maps[prediction_title] = prediction
    for what, values in (*label_maps.items(), *maps.items()):
        _check_sizes(image, values, what)
    shown = np.concatenate([values.ravel() for values in label_maps.values()])
    colors = class_colors(np.unique(shown).tolist())
    tiles = {"image": image}
    tiles |= {title: _blend(image, values, colors, 0.75) for title, values in label_maps.items()}
    tiles |= {title: heatmap(image, values) for title, values in maps.items()}
    size = (max(1, round(image.shape[1] * height / image.shape[0])), height)
    resized = {
        title: np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        for title, pixels in tiles.items()
    }
    rows = _legend(shown, names, colors, max_rows, with_share=False)
    return _side_by_side(resized, rows, top=TITLE_HEIGHT, gap=MARGIN)


def heatmap(image: Pixels, values: NDArray[np.floating], alpha: float = 0.65) -> Pixels:
    """`values` [H, W] in 0..1, dark to bright, over the grey image: uint8 [H, W, 3]."""
    heat = 255 * matplotlib.colormaps["inferno"](values)[..., :3]
    grey = image.mean(axis=-1, keepdims=True)
    return (alpha * heat + (1 - alpha) * grey).round().astype(np.uint8)


def _side_by_side(
    tiles: Mapping[str, Pixels], legend: Sequence[LegendRow], top: int, gap: int
) -> Pixels:
    """Tiles of one size by title, pixel for pixel, and the legend at the right."""
    tile_height, tile_width = next(iter(tiles.values())).shape[:2]
    height = top + max(tile_height, len(legend) * LEGEND_ROW + MARGIN)
    width = len(tiles) * (tile_width + gap) + LEGEND_WIDTH
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for number, (title, tile) in enumerate(tiles.items()):
        left = number * (tile_width + gap)
        figure.figimage(tile, left, height - top - tile_height)
        text = fit(title, tile_width // 7)
        figure.text(left / width, 1 - 4 / height, text, va="top", fontsize=9)
    patches = [Patch(color=f"#{bytes(color).hex()}", label=text) for color, text in legend]
    corner = (1 - LEGEND_WIDTH / width, 1 - top / height)
    figure.legend(
        handles=patches, loc="upper left", bbox_to_anchor=corner, frameon=False, fontsize=9
    )
    return to_pixels(figure)


def to_pixels(figure: Figure) -> Pixels:
    """uint8 [H, W, 3] of a figure, without a display and without matplotlib's global state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _legend(
    label_map: LabelMap,
    names: Names,
    colors: Mapping[int, Color],
    max_rows: int,
    *,
    with_share: bool,
) -> list[LegendRow]:
    """The largest class first."""
    ids, areas = np.unique(label_map, return_counts=True)
    rows: list[LegendRow] = []
    for area, class_id in sorted(zip((-areas).tolist(), ids.tolist(), strict=True)):
        share = f"  {-100 * area / label_map.size:.1f} %" if with_share else ""
        name = "not labelled" if class_id == IGNORE else names[class_id]
        rows.append((colors.get(class_id, IGNORED), fit(name, 20) + share))
    if len(rows) > max_rows:
        rows = [*rows[: max_rows - 1], (PAPER, f"and {len(rows) - max_rows + 1} more")]
    return rows


def _blend(image: Pixels, label_map: LabelMap, colors: Mapping[int, Color], alpha: float) -> Pixels:
    """Colours over the image, with the borders between classes in full colour."""
    painted = colorize(label_map, colors).astype(float)
    border = np.zeros(label_map.shape, dtype=bool)
    border[:-1] |= label_map[:-1] != label_map[1:]
    border[:, :-1] |= label_map[:, :-1] != label_map[:, 1:]
    weight = np.where(border, 1.0, alpha)[..., None]
    return (weight * painted + (1 - weight) * image).round().astype(np.uint8)


def _check_sizes(image: Pixels, values: NDArray, what: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {image.shape}")
    if values.shape != image.shape[:2]:
        raise ValueError(
            f"{what} has {values.shape} pixels, the image {image.shape[:2]}; resize one of them"
        )


def fit(text: str, length: int) -> str:
    """At most so many letters; "$" would begin a formula."""
    cut = text if len(text) <= length else f"{text[: max(length - 3, 0)]}..."
    return cut.replace("$", r"\$")
