"""Pictures of label maps: overlays with a legend, and image | truth | prediction | maps rows.

A class keeps its colour from picture to picture as long as no two classes of one picture collide;
the colours within one picture are always distinct.

Shape letters: H x W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from memseg_dist.batch import IGNORE

Pixels = NDArray[np.uint8]
LabelMap = NDArray[np.integer]
Names = Mapping[int, str] | Sequence[str]
Color = tuple[int, int, int]
LegendRow = tuple[Color | None, str]

NUM_STABLE_COLORS = 64
PANEL_HEIGHT = 320
TITLE_HEIGHT = 26
LEGEND_WIDTH = 230
LEGEND_ROW = 22
MARGIN = 8
INK, PAPER = (30, 30, 30), (255, 255, 255)
IGNORED = np.array([[205, 205, 205], [150, 150, 150]], dtype=np.uint8)


def class_colors(class_ids: Collection[int]) -> dict[int, Color]:
    """A colour per class id, all distinct; the smaller id chooses first where two want the same."""
    ids = sorted({int(class_id) for class_id in class_ids} - {IGNORE})
    num_colors = max(NUM_STABLE_COLORS, 1 << (len(ids) - 1).bit_length() if ids else 1)
    colors = palette(num_colors)
    taken: dict[int, int] = {}
    for class_id in ids:
        position = class_id % num_colors
        while position in taken:
            position = (position + 1) % num_colors
        taken[position] = class_id
    return {class_id: tuple(colors[position].tolist()) for position, class_id in taken.items()}


@lru_cache(maxsize=8)
def palette(num_colors: int) -> Pixels:
    """[num_colors, 3] RGB colours, each as far as can be from those before it, and none grey."""
    levels = np.linspace(0, 255, max(9, int(np.ceil(num_colors ** (1 / 3))) * 2)).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    grid = grid[(np.ptp(grid, axis=1) > 60) & (grid.mean(axis=1) > 60)]
    if len(grid) < num_colors:
        raise ValueError(f"no {num_colors} distinct colours; show fewer classes in one picture")
    chosen = [int(np.ptp(grid, axis=1).argmax())]
    distance = np.full(len(grid), np.inf)
    for _ in range(num_colors - 1):
        distance = np.minimum(distance, np.square(grid - grid[chosen[-1]]).sum(axis=1))
        chosen.append(int(distance.argmax()))
    return grid[chosen].astype(np.uint8)


def colorize(label_map: LabelMap, colors: Mapping[int, Color]) -> Pixels:
    """uint8 [H, W, 3]; IGNORE is hatched grey."""
    row, column = np.indices(label_map.shape)
    result = IGNORED[((row + column) // 6) % 2]
    for class_id, color in colors.items():
        result[label_map == class_id] = color
    return result


def overlay(
    image: Pixels, label_map: LabelMap, names: Names, *, alpha: float = 0.55, max_rows: int = 24
) -> Image.Image:
    """`image` uint8 [H, W, 3] with classes painted over it, and a legend, the largest class first.

    names: class id -> name. The legend lists at most `max_rows` classes and counts the rest.
    """
    _check_sizes(image, label_map, "label map")
    colors = class_colors(np.unique(label_map).tolist())
    painted = Image.fromarray(_blend(image, label_map, colors, alpha))
    rows = _legend(label_map, names, colors, max_rows, with_share=True)
    return _side_by_side([("", painted)], rows, top=0, gap=0)


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
    resized = [
        (title, Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        for title, pixels in tiles.items()
    ]
    rows = _legend(shown, names, colors, max_rows, with_share=False)
    return np.asarray(_side_by_side(resized, rows, top=TITLE_HEIGHT, gap=MARGIN))


def heatmap(image: Pixels, values: NDArray[np.floating], alpha: float = 0.65) -> Pixels:
    """`values` [H, W] in 0..1, dark to bright, over the grey image: uint8 [H, W, 3]."""
    heat = 255 * matplotlib.colormaps["inferno"](values)[..., :3]
    grey = image.mean(axis=-1, keepdims=True)
    return (alpha * heat + (1 - alpha) * grey).round().astype(np.uint8)


def _side_by_side(
    tiles: Sequence[tuple[str, Image.Image]], legend: Sequence[LegendRow], top: int, gap: int
) -> Image.Image:
    width, height = tiles[0][1].size
    height = top + max(height, len(legend) * LEGEND_ROW + MARGIN)
    canvas = Image.new("RGB", (len(tiles) * (width + gap) + LEGEND_WIDTH, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, (title, tile) in enumerate(tiles):
        left = number * (width + gap)
        draw.text((left + 2, 5), _fit(title, width - 4), fill=INK, font=_font())
        canvas.paste(tile, (left, top))
    left, side = len(tiles) * (width + gap) + MARGIN, LEGEND_ROW - 6
    for number, (color, text) in enumerate(legend):
        y = max(top, MARGIN) + number * LEGEND_ROW
        if color is None:
            swatch = colorize(np.full((side, side), IGNORE), {})
            canvas.paste(Image.fromarray(swatch), (left, y))
        else:
            draw.rectangle((left, y, left + side - 1, y + side - 1), fill=color)
        draw.text((left + side + 8, y), text, fill=INK, font=_font())
    return canvas


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
        rows.append((colors.get(class_id), _fit(name, LEGEND_WIDTH - 110) + share))
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


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=14)


def _fit(text: str, width: int) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
