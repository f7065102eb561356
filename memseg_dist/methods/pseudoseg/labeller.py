"""PseudoSeg's fused pseudo labels, written as masks: what it teaches images without masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.checks import Share, check_numbers
from memseg_dist.methods.labeller import Label, Labelled, LabellerConfig, LabellingModel, Picture
from memseg_dist.methods.method import evaluation_mode
from memseg_dist.methods.pseudoseg.method import PseudoSeg
from memseg_dist.nn.resize import upsample_positions


@dataclass(frozen=True)
class FusionLabeller(LabellerConfig):
    """PseudoSeg's fused label, at the size of the image; for a run of PseudoSeg."""

    kind: Literal["fusion"] = "fusion"
    source: Literal["sharpened", "decoder", "activation"] = "sharpened"
    """The fused and sharpened label, or one of the two that it is fused from."""
    threshold: Share = 0.0
    """Unknown: pixels whose largest probability is below this."""
    restrict_to_labels: bool = True
    """The activation is of the image's own labels, where it has some; else of the classes that the
    classifier sees."""

    def __post_init__(self) -> None:
        check_numbers(self, "labeller.")

    def check(self, model: LabellingModel) -> None:
        method = model.method
        if not isinstance(method, PseudoSeg) or method.net.attention is None:
            raise ValueError(
                f"--labeller.kind fusion: {model.path} is of no PseudoSeg with class activations; "
                "use --labeller.kind argmax"
            )

    def open(self, model: LabellingModel) -> Label:
        method = model.method
        assert isinstance(method, PseudoSeg)
        device = next(method.parameters()).device
        trained_T = method.table.trained.numpy()

        def label(picture: Picture) -> Labelled:
            size = (picture.image.shape[-2], picture.image.shape[-1])
            small = model.fitted(picture.image)[None].to(device)
            with evaluation_mode(method):
                found = method.pseudo_labels(small, _shown(method, picture, self))
                label_THW = _enlarged(found[self.source][0], small, size, method.stride)
                confidence, column = label_THW.max(dim=0)
                best = int(trained_T[_largest(column, len(trained_T))])
                maps = {name: map[0] for name, map in method.maps(small, [best]).items()}
            is_unknown = (confidence < self.threshold).cpu().numpy()
            mask = np.where(is_unknown, IGNORE, trained_T[column.cpu().numpy()])
            shown = model.label_space.vocabulary.names[best]
            drawn = {f"{name}: {shown}": map.cpu().numpy() for name, map in maps.items()}
            return Labelled(
                mask, note={"unknown_low_confidence": int(is_unknown.sum())}, maps=drawn
            )

        return label


def _shown(method: PseudoSeg, picture: Picture, options: FusionLabeller) -> Tensor | None:
    """bool [1, F] of the image's labels; None: ask the classifier."""
    columns = method.table.in_foreground_K[np.array(picture.classes, dtype=np.int64)]
    columns = columns[columns >= 0]
    if not options.restrict_to_labels or len(columns) == 0:
        return None
    is_shown_BF = np.zeros((1, len(method.table.foreground)), dtype=bool)
    is_shown_BF[0, columns] = True
    return torch.from_numpy(is_shown_BF).to(method.net.foreground.device)


def _enlarged(map_Thw: Tensor, images: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """[T, H, W] for a picture of `size` that was looked at as `images` [1, 3, Y, X]."""
    fitted = upsample_positions(map_Thw, images.shape[-2:], stride)
    return F.interpolate(fitted[None], size, mode="bilinear", align_corners=False)[0]


def _largest(column: Tensor, num_classes: int) -> int:
    """The most frequent value of `column` [H, W]."""
    return int(torch.bincount(column.flatten(), minlength=num_classes).argmax())
