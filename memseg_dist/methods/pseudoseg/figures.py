"""What a run tells of its pseudo labels at log time."""

from __future__ import annotations

import torch
from torch import Tensor

from memseg_dist import dist


class LabelTally:
    """Sums over the slots since they were last read, on the device."""

    def __init__(self, device: torch.device | str) -> None:
        # double: whole numbers, and sums of floats, that are the same in any order
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, is_shown_BF: Tensor, label_BThw: Tensor, valid_Bhw: Tensor) -> None:
        """is_shown: the foreground classes of images without masks; label: their pseudo label. An
        image that is valid nowhere, a blanked one, is none.
        """
        is_image_B = valid_Bhw.flatten(1).any(dim=1)
        confidence = (label_BThw.amax(dim=1) * valid_Bhw).sum()
        self._sums += torch.stack(
            [
                is_image_B.sum(),
                (is_image_B & is_shown_BF.any(dim=1)).sum(),
                valid_Bhw.sum(),
                confidence,
            ]
        )

    def read(self) -> dict[str, float]:
        """How sure the pseudo labels are, and the share of the images that show no class as far as
        their labels or the classifier say; {} without images. Starts afresh. Collective.
        """
        images, shown, positions, confidence = dist.all_reduce_sum(self._sums.clone()).tolist()
        self._sums.zero_()
        if not images:
            return {}
        return {
            "pseudo_label/confidence": confidence / max(positions, 1),
            "pseudo_label/images_without_class": 1 - shown / images,
        }
