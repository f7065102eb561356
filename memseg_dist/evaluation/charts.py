"""Lists of figures as pictures: a bar each while bars can be told apart, else a histogram.

matplotlib's canvas is used directly: nothing global is set, and no display is needed.
"""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from memseg_dist.evaluation.panels import Pixels

MAX_BARS = 128
NUM_BINS = 64
SIZE = (8.0, 3.0)
"""Inches."""
DPI = 100


def draw_chart(title: str, values: NDArray[np.floating]) -> Pixels:
    """`values` [n] as bars in their order, or beyond MAX_BARS of them as a histogram.

    Returns uint8 [300, 800, 3]. Values that are not finite are left out and counted in the title.
    ValueError if `values` has more than one axis.
    """
    if values.ndim != 1:
        raise ValueError(f"chart '{title}' has values of shape {values.shape}; it must be [n]")
    is_finite = np.isfinite(values)
    num_missing = int((~is_finite).sum())
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{title}  ({num_missing} not finite)" if num_missing else title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.01)
    if len(values) <= MAX_BARS:
        axes.bar(np.flatnonzero(is_finite), values[is_finite], width=0.8)
        axes.set_xlabel("index", fontsize=8)
    else:
        axes.hist(values[is_finite], bins=NUM_BINS)
        axes.set_xlabel("value", fontsize=8)
        axes.set_ylabel(f"how many of {len(values):,}", fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
