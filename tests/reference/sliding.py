"""The slow twin of `evaluation.sliding`: the logits of all classes at full size, as defined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.evaluation.sliding import WHOLE, Inference, Predict, image_windows
from memseg_dist.nn.resize import upsample_positions


def dense_logits(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """[K, H, W]: the mean over the windows, brought to `out_size`."""
    size = (image.shape[-2], image.shape[-1])
    total = torch.zeros(len(classes), *size)
    count = torch.zeros(size)
    for part in image_windows(size, inference):
        crop = image[None, :, part.top : part.bottom, part.left : part.right]
        dense = predict(crop, classes).dense().to("cpu", torch.float32)
        up = upsample_positions(dense[0], part.size)
        total[:, part.top : part.bottom, part.left : part.right] += up
        count[part.top : part.bottom, part.left : part.right] += 1
    average = total / count
    if out_size is not None and out_size != size:
        average = F.interpolate(average[None], out_size, mode="bilinear", align_corners=False)[0]
    return average


def segment_dense(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    return dense_logits(predict, image, classes, inference, out_size).argmax(dim=0)
