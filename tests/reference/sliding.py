"""The slow twin of `evaluation.sliding`: the logits of all classes at full size, as defined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.data.augment import resize_image
from memseg_dist.evaluation.sliding import WHOLE, Inference, Predict, image_windows
from memseg_dist.nn.resize import upsample_positions


def dense_logits(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """[K, H, W]: the mean over the windows, brought to `out_size`, then the mean over the views."""
    return dense_views(predict, image, classes, inference, out_size).mean(dim=0)


def dense_scores(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """[K, H, W]: what the classes are compared by."""
    views = dense_views(predict, image, classes, inference, out_size)
    if inference.average == "probabilities":
        views = views.softmax(dim=1)
    return views.mean(dim=0)


def dense_views(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """[V, K, H, W]: the logits of each scale and mirror image. Both classes of a pair that is to be
    swapped are in `classes`.
    """
    height, width = image.shape[-2:]
    out_size = out_size or (height, width)
    order = list(range(len(classes)))
    for one, other in inference.swap:
        left, right = classes.tolist().index(one), classes.tolist().index(other)
        order[left], order[right] = right, left
    views = []
    for scale in inference.scales:
        size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        scaled = resize_image(image, size)
        views.append(_enlarged(predict, scaled, classes, inference, out_size))
        if inference.flip:
            mirrored = _enlarged(predict, scaled.flip(-1), classes, inference, out_size)
            views.append(mirrored.flip(-1)[order])
    return torch.stack(views)


def _enlarged(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference,
    out_size: tuple[int, int],
) -> Tensor:
    size = (image.shape[-2], image.shape[-1])
    total = torch.zeros(len(classes), *size)
    count = torch.zeros(size)
    for part in image_windows(size, inference):
        crop = image[None, :, part.top : part.bottom, part.left : part.right]
        found = predict(crop, classes)
        dense = found.dense().to("cpu", torch.float32)
        up = upsample_positions(dense[0], part.size, found.stride)
        total[:, part.top : part.bottom, part.left : part.right] += up
        count[part.top : part.bottom, part.left : part.right] += 1
    average = total / count
    if out_size != size:
        average = F.interpolate(average[None], out_size, mode="bilinear", align_corners=False)[0]
    return average


def segment_dense(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    return dense_scores(predict, image, classes, inference, out_size).argmax(dim=0)
