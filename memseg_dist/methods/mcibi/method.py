"""MCIBI: Mining Contextual Information Beyond Image for semantic segmentation (ICCV 2021).

A memory holds one vector per class, a long average over the pixels of the data set. Each pixel
predicts a distribution over the classes, gathers the classes' vectors by it, and its representation
is joined with what it gathered, whatever segmenter it comes from.

    R = B(I);  W = H1(R);  C'_bi = softmax(W) M                                    (Eq. 1, 11, 12)
    C_bi = g_o(softmax(g_q(R) g_k(C'_bi)^T / sqrt(C / 2)) g_v(C'_bi))                 (Eq. 13, 14)
    O = H2(F(R, C_bi, C_wi))                                                           (Eq. 3 - 5)
    L = alpha CE(W) + beta CE(H2(M)) + CE(O)                                          (Eq. 15 - 19)

FCN, PSPNet, DeepLabV3, OCRNet and UPerNet are the same class with `memory="off"`; the controls that
tell what the memory's content is worth have the same graph and other codes: `memory`.

Where the paper is silent or differs from its official code, the decision, and the flag that gives
the other behaviour (`config.paper()` and `config.released()` set those that have one):

 1  R is a 3 x 3 convolution of the backbone's map, to 512 channels                      `dim`
 2  g_q and g_k are two convolutions each                                   `transform_layers`
 3  C_wi is read by a second attention, then fused; the paper joins it        `context_fusion`
 4  a class's first vector is the mean of its pixels in one step. "pixel": one of each slot of that
    step, not of the training set; "cluster": our way, of classes seen early      `first_vector`
 5  momentum starts at 0.9 and has a schedule of its own, bound to no learning rate   `momentum`
 6  representation consistent learning begins with the third epoch        `consistency_epochs`
 7  H2 normalises M by its running statistics; the code by M's own, and moves them by it
                                                                            `consistency_norm`
 8  W is not detached where the final loss reads it                           `detach_weights`
 9  an auxiliary head on the stage before the last, for the baselines too; it is the same for a
    ViT, where the code's enlarge 4 times                                            `aux_heads`
10  pixels without a label count in no mean                                  `seg_denominator`
11  a class without a vector adds nothing to C'_bi and nothing to Eq. 17; the softmax of W is over
    the classes that some source has masks of, not over all of the label space
12  one update for all slots of a step, after its backward pass, of summed statistics: the code
    averages the banks of its GPUs, so that a class on one of eight moves an eighth as fast, and
    overwrites M before the backward pass that still reads it
13  1 - cos + 1e-6 in Eq. 10: a single pixel that equals its vector has a weight
14  BatchNorm normalises within a slot, not over all GPUs: give a slot 8 images, not 2
15  a ViT's stages share its final norm (the code: one each); R is enlarged to UPerNet's map, which
    has the size of the first stage's; OCRNet with memory has no published code

Shape letters: B images of the slot, H x W pixels, h x w positions, C channels of R, K classes of
the label space, N of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.methods.mcibi.memory import FeatureMemory
from memseg_dist.methods.mcibi.network import Network
from memseg_dist.methods.method import DenseLogits, Method, memory_figures
from memseg_dist.methods.pairs import check_source, columns_of, to_columns
from memseg_dist.nn.pixel_loss import pixel_cross_entropy
from memseg_dist.nn.resize import fill_up, within_image

if TYPE_CHECKING:
    from memseg_dist.nn.backbone import Backbone


class MCIBI(Method):
    """classes: per source, the sorted label-space ids [N] of its vocabulary; masks are IGNORE or
    hold these, and any other class counts as IGNORE. epoch_steps: steps of an epoch; None for a
    model that only predicts, which needs no memory: its vectors are weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: MCIBIConfig,
        *,
        classes: Mapping[str, np.ndarray],
        num_classes: int,
        epoch_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        trained = torch.from_numpy(np.unique(np.concatenate([*classes.values()])))
        self.net = Network(config, backbone.stages, num_classes, trained)
        self.classes, self._column = {}, {}
        for name, ids in classes.items():
            self.classes[name] = torch.as_tensor(ids, dtype=torch.int64, device=device)
            column_K = columns_of(ids, num_classes)
            self._column[name] = torch.as_tensor(column_K, device=device)
        self.memory: FeatureMemory | None = None
        if epoch_steps is not None and config.memory == "features":
            self.memory = FeatureMemory(config, num_classes, self.net.dim, device)
            self.consistency_from = config.consistency_from(epoch_steps)

    # ---------------------------------------------------------------- training

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """ValueError for a batch of an unknown source."""
        check_source(batch, self.classes)
        assert batch.masks is not None, "check lets no source without masks come here"
        config, source = self.config, batch.source
        # a crop of 473 pixels becomes 60 whole positions of 8
        masks_BHW = fill_up(batch.masks, self.backbone.stride, IGNORE)
        filled_by = masks_BHW.numel() / batch.masks.numel()
        column_BHW = to_columns(masks_BHW, self._column[source])

        def pixel_loss(logits_BKhw: Tensor) -> Tensor:
            logits_BNhw = logits_BKhw[:, self.classes[source]]
            divide_by = config.seg_denominator
            loss = pixel_cross_entropy(logits_BNhw, None, column_BHW, denominator=divide_by)
            # "all" are the pixels of the crop, without those that it was filled up by
            return loss if divide_by == "valid" else loss * filled_by

        outputs = self.net(self.backbone(batch.images, batch.valid))
        losses = {"seg": pixel_loss(outputs.logits)}  # Eq. 18
        if outputs.distribution is not None:
            loss = pixel_loss(outputs.distribution)
            losses["distribution"] = config.distribution_weight * loss  # Eq. 16
        if outputs.auxiliary:
            total = torch.stack([pixel_loss(logits) for logits in outputs.auxiliary]).sum()
            losses["aux"] = config.aux_weight * total
        if self.memory is not None:
            if config.consistency_weight > 0 and clock.step >= self.consistency_from:
                loss = self.net.consistency_loss()
                losses["consistency"] = config.consistency_weight * loss  # Eq. 15, 17
            is_known_BHW = column_BHW != IGNORE
            target_BHW = torch.where(is_known_BHW, masks_BHW, IGNORE)
            self.memory.propose(outputs.pixels.detach(), target_BHW, clock)  # Eq. 8 - 10
        return losses

    def after_step(self, clock: Clock) -> None:
        if self.memory is not None:
            self.memory.commit(clock)  # Eq. 6, 7
            self.net.codes.copy_(self.memory.rows.rows)
            self.net.is_set.copy_(self.memory.rows.is_set)

    def state(self) -> dict[str, ShardedRows]:
        if self.memory is None:
            return {}
        banks = {"memory": self.memory.rows, "first_pixels": self.memory.first_pixels}
        return {name: bank for name, bank in banks.items() if bank is not None}

    # ---------------------------------------------------------------- use

    @property
    def stride(self) -> int:
        return self.net.stride

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> DenseLogits:
        logits = self.net(self.backbone(images)).logits[:, classes]
        return DenseLogits(self._within(logits, images), self.stride)

    def _within(self, map: Tensor, images: Tensor) -> Tensor:
        return within_image(map, images.shape[-2:], self.stride)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        pixels = self.net(self.backbone(images)).pixels
        return F.normalize(self._within(pixels, images), dim=1)

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """The class's probability in W and in O, and the cosine of R with its vector."""
        outputs = self.net(self.backbone(images))
        rows = torch.arange(len(images), device=images.device)
        class_ids = torch.as_tensor(list(classes), device=images.device)
        shown = {"O": outputs.logits.softmax(dim=1)[rows, class_ids]}
        if outputs.distribution is not None:
            shown["W"] = outputs.distribution.softmax(dim=1)[rows, class_ids]
        if self.config.memory == "features":
            codes = self.net.codes[class_ids, :, None, None]
            shown["cosine with M"] = F.cosine_similarity(outputs.pixels, codes).clamp(0, 1)
        return {name: self._within(map, images) for name, map in shown.items()}

    def class_vectors(self) -> tuple[Tensor, Tensor] | None:
        """M of the classes that have a vector."""
        if self.config.memory != "features":
            return None
        (class_ids,) = self.net.is_set.cpu().nonzero(as_tuple=True)
        return class_ids, self.net.codes.cpu()[class_ids]

    # ---------------------------------------------------------------- figures

    def summary(self, clock: Clock) -> dict[str, float]:
        if self.memory is None:
            return {}
        momentum = {"memory/momentum": self.memory.schedule(clock)}
        return momentum | memory_figures(self.state(), clock.step)

    def charts(self) -> dict[str, Tensor]:
        if self.memory is None:
            return {}
        slots_K = self.memory.rows.updates.double().cpu()
        return {"memory/slots with its pixels per class": slots_K}
