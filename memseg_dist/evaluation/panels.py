"""Pictures of label maps: overlays with a legend, and image | truth | prediction | maps rows.

A class keeps its colour from picture to picture as long as no two classes of one picture collide;
the colours within one picture are always distinct.

Shape letters: H x W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from memseg_dist.batch import IGNORE

Pixels = NDArray[np.uint8]
LabelMap = NDArray[np.integer]
Names = Mapping[int, str] | Sequence[str]

NUM_STABLE_COLORS = 64
PANEL_HEIGHT = 320
TITLE_HEIGHT = 26
LEGEND_WIDTH = 230
LEGEND_ROW = 22
MARGIN = 8
INK = (30, 30, 30)
PAPER = (255, 255, 255)
IGNORED = np.array([[205, 205, 205], [150, 150, 150]], dtype=np.uint8)
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], float)


def class_colors(class_ids: Collection[int]) -> dict[int, tuple[int, int, int]]:
    """A colour per class id, all distinct; the smaller id chooses first where two want the same."""
    ids = sorted({int(class_id) for class_id in class_ids} - {IGNORE})
    num_colors = max(NUM_STABLE_COLORS, 1 << (len(ids) - 1).bit_length() if ids else 1)
    colors = palette(num_colors)
    taken: set[int] = set()
    result = {}
    for class_id in ids:
        position = class_id % num_colors
        while position in taken:
            position = (position + 1) % num_colors
        taken.add(position)
        red, green, blue = colors[position].tolist()
        result[class_id] = (red, green, blue)
    return result


@lru_cache(maxsize=8)
def palette(num_colors: int) -> Pixels:
    """[num_colors, 3] RGB colours, each as far as can be from those before it and from grey."""
    levels = np.linspace(0, 255, max(9, int(np.ceil(num_colors ** (1 / 3))) * 2)).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _perceptual(grid)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (chroma > 0.06) & (lab[:, 0] > 0.35) & (lab[:, 0] < 0.93)
    if usable.sum() < num_colors:
        raise ValueError(f"no {num_colors} distinct colours; show fewer classes in one picture")
    grid, lab = grid[usable], lab[usable]
    chosen = [int(chroma[usable].argmax())]
    distance = np.full(len(grid), np.inf)
    for _ in range(num_colors - 1):
        distance = np.minimum(distance, np.square(lab - lab[chosen[-1]]).sum(axis=1))
        chosen.append(int(distance.argmax()))
    return grid[chosen].astype(np.uint8)


def colorize(label_map: LabelMap, colors: Mapping[int, tuple[int, int, int]]) -> Pixels:
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
    painted = _blend(image, label_map, colors, alpha)
    canvas = Image.new("RGB", (image.shape[1] + LEGEND_WIDTH, 1), PAPER)
    areas = _areas(label_map)
    rows = _legend_rows(areas, names, colors, label_map.size, max_rows)
    height = max(image.shape[0], len(rows) * LEGEND_ROW + 2 * MARGIN)
    canvas = canvas.resize((canvas.width, height))
    canvas.paste(Image.fromarray(painted), (0, 0))
    _draw_legend(canvas, rows, (image.shape[1] + MARGIN, MARGIN))
    return canvas


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
) -> Image.Image:
    """image | truth | prediction | maps, side by side, with titles and one legend for all.

    truth: left out if None. maps: [H, W] in 0..1, by title.
    """
    for what, values in (("truth", truth), ("prediction", prediction), *maps.items()):
        if values is not None:
            _check_sizes(image, values, what)
    shown = np.unique(prediction) if truth is None else np.union1d(truth, prediction)
    colors = class_colors(shown.tolist())
    tiles = [("image", image)]
    if truth is not None:
        tiles.append(("truth", _blend(image, truth, colors, 0.75)))
    tiles.append((prediction_title, _blend(image, prediction, colors, 0.75)))
    tiles += [(title, heatmap(image, values)) for title, values in maps.items()]
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    areas = _areas(
        prediction if truth is None else np.concatenate([truth.ravel(), prediction.ravel()])
    )
    total = sum(areas.values())
    rows = _legend_rows(areas, names, colors, total, max_rows, with_share=False)
    full_height = TITLE_HEIGHT + max(height, len(rows) * LEGEND_ROW)
    canvas = Image.new(
        "RGB", (len(tiles) * (width + MARGIN) + LEGEND_WIDTH, full_height + MARGIN), PAPER
    )
    draw = ImageDraw.Draw(canvas)
    for number, (title, pixels) in enumerate(tiles):
        left = number * (width + MARGIN)
        draw.text((left + 2, 5), _fit(title, width - 4), fill=INK, font=_font())
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(tile, (left, TITLE_HEIGHT))
    _draw_legend(canvas, rows, (len(tiles) * (width + MARGIN), TITLE_HEIGHT))
    return canvas


def heatmap(image: Pixels, values: NDArray[np.floating], alpha: float = 0.65) -> Pixels:
    """`values` [H, W] in 0..1, dark to bright, over the grey image: uint8 [H, W, 3]."""
    position = np.clip(values, 0, 1) * (len(HEAT) - 1)
    stops = np.arange(len(HEAT))
    heat = np.stack([np.interp(position, stops, HEAT[:, band]) for band in range(3)], axis=-1)
    grey = image.mean(axis=-1, keepdims=True)
    return (alpha * heat + (1 - alpha) * grey).round().astype(np.uint8)


LegendRow = tuple[tuple[int, int, int] | None, str]


def _legend_rows(
    areas: Mapping[int, int],
    names: Names,
    colors: Mapping[int, tuple[int, int, int]],
    num_pixels: int,
    max_rows: int,
    with_share: bool = True,
) -> list[LegendRow]:
    rows: list[LegendRow] = []
    for class_id, area in sorted(areas.items(), key=lambda entry: (-entry[1], entry[0])):
        share = f"  {100 * area / num_pixels:.1f} %" if with_share else ""
        if class_id == IGNORE:
            rows.append((None, _fit("not labelled", LEGEND_WIDTH - 110) + share))
        else:
            name = _fit(names[class_id], LEGEND_WIDTH - (110 if with_share else 50))
            rows.append((colors[class_id], name + share))
    if len(rows) > max_rows:
        rows = [*rows[: max_rows - 1], ((255, 255, 255), f"and {len(rows) - max_rows + 1} more")]
    return rows


def _draw_legend(canvas: Image.Image, rows: Sequence[LegendRow], corner: tuple[int, int]) -> None:
    draw = ImageDraw.Draw(canvas)
    side = LEGEND_ROW - 6
    for number, (color, text) in enumerate(rows):
        left, top = corner[0], corner[1] + number * LEGEND_ROW
        if color is None:
            swatch = colorize(np.full((side, side), IGNORE), {})
            canvas.paste(Image.fromarray(swatch), (left, top))
        else:
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=color)
        draw.text((left + side + 8, top), text, fill=INK, font=_font())


def _blend(
    image: Pixels, label_map: LabelMap, colors: Mapping[int, tuple[int, int, int]], alpha: float
) -> Pixels:
    """Colours over the image, with the borders between classes in full colour."""
    painted = colorize(label_map, colors).astype(float)
    border = np.zeros(label_map.shape, dtype=bool)
    border[:-1] |= label_map[:-1] != label_map[1:]
    border[:, :-1] |= label_map[:, :-1] != label_map[:, 1:]
    weight = np.where(border, 1.0, alpha)[..., None]
    return (weight * painted + (1 - weight) * image).round().astype(np.uint8)


def _areas(label_map: LabelMap) -> dict[int, int]:
    ids, counts = np.unique(label_map, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _check_sizes(image: Pixels, values: NDArray, what: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {image.shape}")
    if values.shape != image.shape[:2]:
        raise ValueError(
            f"{what} has {values.shape} pixels, the image {image.shape[:2]}; resize one of them"
        )


def _perceptual(rgb: NDArray) -> NDArray:
    """Oklab (Ottosson 2020): distances in it go with the difference that people see."""
    unit = rgb / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
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
