"""RCA's pseudo labels: class activation maps (CAM) of an image's classes, fused to one mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.checks import check_scales, require
from memseg_dist.data.files import absolute, is_url
from memseg_dist.data.saliency import check_has_saliency, read_saliency
from memseg_dist.data.vocabulary import BACKGROUND
from memseg_dist.methods.labeller import (
    Label,
    Labelled,
    LabellerConfig,
    LabellingModel,
    Picture,
)
from memseg_dist.methods.rca.activation import AccumulatedMaps, Activation, predicted_maps
from memseg_dist.methods.rca.fusion import FusionConfig, fuse

MEMORY = "maps"
"""The memory that holds a run's accumulated maps (OAA)."""


@dataclass(frozen=True)
class ActivationLabeller(LabellerConfig):
    """Activation maps of the image's classes, fused with the background (and saliency)."""

    kind: Literal["activation"] = "activation"
    maps: Literal["accumulated", "predicted", "intermediate"] = "accumulated"
    """accumulated: the maps that the run kept of its training images; predicted: class activation
    maps of the final weights, for any run and any images; intermediate: those of RCA's P."""
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Of predicted maps: the sizes of the image, relative to its own."""
    flip: bool = True
    """Of predicted maps: whether the mirrored image is looked at as well."""
    saliency: str | None = None
    """Folder or URL of saliency maps <key>.png (8-bit grey, 255 = salient)."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    background: str = BACKGROUND
    """Uid of the class that everything else belongs to; the first of the classes written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if self.saliency is not None:  # tasks run in other working directories
            object.__setattr__(self, "saliency", absolute(self.saliency))
        known = ("accumulated", "predicted", "intermediate")
        require(self.maps in known, "labeller.maps", self.maps, f"one of {known}")
        check_scales(self.scales, "labeller.scales")
        if not self.background:
            raise ValueError("labeller.background is ''; give the uid of the background class")

    def check_data(self, key: str) -> None:
        if self.saliency is not None:
            check_has_saliency(self.saliency, key)

    def check(self, model: LabellingModel) -> None:
        if self.maps == "accumulated" and not model.check_memory(MEMORY):
            raise ValueError(
                f"{model.path} holds no accumulated maps; use --labeller.maps predicted, or a run "
                "that keeps maps"
            )

    def classes(self, trained: NDArray[np.int64], of_data: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.intersect1d(trained, of_data)

    @property
    def background_uid(self) -> str:
        return self.background

    @property
    def runs_network(self) -> bool:
        return self.maps != "accumulated"

    def open(self, model: LabellingModel) -> Label:
        known = model.label_space.vocabulary
        # An id of its own where no source has a background class.
        background = known.index(self.background) if self.background in known else len(known)
        if self.maps == "accumulated":
            kept = AccumulatedMaps(model.memory(MEMORY), preload=is_url(model.path))
        activations = None
        if self.maps == "intermediate":
            activations = getattr(model.method, "intermediate_activations", None)
            if activations is None:
                raise ValueError(f"{model.path} is no run of RCA; use --labeller.maps predicted")

        def activation_of(picture: Picture) -> Activation:
            if self.maps == "accumulated":
                return kept(picture.key, picture.classes)
            return predicted_maps(
                model.method, picture.image, picture.classes, scales=self.scales, flip=self.flip,
                activations=activations,
            )  # fmt: skip

        def label(picture: Picture) -> Labelled:
            activation = activation_of(picture)
            image = picture.image.permute(1, 2, 0).contiguous().numpy()
            saliency = self._saliency(picture)
            fused = fuse(
                activation.maps, picture.classes, image, saliency, self.fusion,
                background=background,
            )  # fmt: skip
            note = {
                **{f"unknown_{rule}": pixels for rule, pixels in fused.unknown.items()},
                "maps": len(picture.classes),
                "maps_missing": activation.num_missing,
                "maps_without_evidence": fused.num_without_evidence,
            }
            shown = strongest(activation.maps, [known.names[i] for i in picture.classes])
            return Labelled(fused.labels, background, note, shown)

        return label

    def _saliency(self, picture: Picture) -> NDArray[np.floating] | None:
        if self.saliency is None:
            return None
        size = (picture.image.shape[1], picture.image.shape[2])
        levels: Tensor = read_saliency(self.saliency, picture.key, size)
        return (levels.float() / 255).numpy()


def strongest(maps: NDArray[np.generic], names: Sequence[str]) -> dict[str, NDArray[np.floating]]:
    """The map with the highest peak (then mean) in 0..1, by its title; {} without maps."""
    if not names:
        return {}
    values = maps.astype(np.float32)
    number = max(range(len(names)), key=lambda i: (values[i].max(), values[i].mean()))
    return {f"map: {names[number]}": values[number] / (values[number].max() or 1)}
