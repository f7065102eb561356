"""LarvSeg: Large-Vocabulary Segmentation with image classification data.

Pixel masks teach some classes, image labels teach all of them. A memory of each class's pixel
features over the whole data set shows where in an image a label belongs; the image-level loss is
then applied there.

    L = L_seg + lambda_cls L_cls + lambda_aux L_aux                                        (Eq. 6)

The paper's baseline (Eq. 1) is the same class with `attention="off"`: no memory, no L_aux.

Where the paper is silent or differs from its code, the decision, and the flag of the other one:

 1  logit: cosine normalised over the classes of the pixel, learned scale      `logit_scale`
 2  Eq. 5's temperature is 1                                                   `temperature`
 3  pooling: mean of z A over the positions, not divided by sum A              `pool_by_attention`
 4  norm() in Eq. 4: z-score over positions, before enlarging and sigmoid
 5  S_bg: mean over the other labels, or over mined classes                    `background`
 6  memory of all classes of the weak sources                                  `novel_only`
 7  memory of M event means, which equals M x K pixels exactly                 `capacity`, `top_k`
 8  one memory for all slots                                                   `memory_scope`
 9  L_seg divides by all pixels, ignored ones included                         `seg_denominator`
10  classes that share a name are one column of the softmax                    `keep_duplicates`
11  padding takes no part in pooling, top-K and z-score                        `mask_padding`
12  a cold class (fewer than `warm_up` events) is no background               `skip_cold_background`
13  Table 5's single-image design: the mean of z over the pixels whose cosine   `attention`
    exceeds the image's mean by a standard deviation
14  all labels of a step see the memory as of the last commit (the code: label after label)

No loss keeps anything of shape [pixels, classes]: see `classifier` and `losses`. The tests compare
with the literal computation in tests/reference/larvseg.py.

Shape letters: B images of the slot, H x W pixels of the loss (the crop at half resolution),
L = h w positions of the feature map, D channels, N classes of the source, C of the label space,
R (image, label) pairs of the slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from memseg_dist.batch import IGNORE, Batch, Clock, onto_device
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.methods.larvseg import attention
from memseg_dist.methods.larvseg.classifier import CosineClassifier, class_normalised
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.methods.larvseg.losses import (
    LOSS_STRIDE,
    SlotFeatures,
    image_cross_entropy,
    pooled_logits,
    pooling_weights,
    segmentation_loss,
)
from memseg_dist.methods.larvseg.memory import PixelMemory
from memseg_dist.methods.method import LinearLogits, Method, memory_figures
from memseg_dist.methods.pairs import LabelPairs, check_source, columns_of, to_columns
from memseg_dist.nn.resize import fill_up, valid_positions


class LarvSeg(Method):
    """The segmenter, its three losses and its memory.

    classes: per source, the sorted label-space ids [N] of its vocabulary; multiplicity: per mask
    source, how many of its names share each id [N] (absent: one each). base_classes: ids with
    masks, used by `novel_only`. with_memory: False for a model that only predicts.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifier: CosineClassifier,
        config: LarvSegConfig,
        *,
        classes: Mapping[str, np.ndarray],
        multiplicity: Mapping[str, np.ndarray] | None = None,
        base_classes: Sequence[int] = (),
        num_slots: int = 1,
        with_memory: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.backbone, self.classifier, self.config = backbone, classifier, config
        self.classes, self.multiplicity = {}, {}
        self._columns, self._column_on_device = {}, {}
        for name, ids in classes.items():
            self._columns[name] = columns_of(ids, classifier.num_classes)
            (self._column_on_device[name],) = onto_device(device, self._columns[name])
            self.classes[name] = torch.as_tensor(ids, dtype=torch.int64, device=device)
        for name, counts in (multiplicity or {}).items():
            if config.keep_duplicates and np.max(counts, initial=1) > 1:
                self.multiplicity[name] = torch.as_tensor(counts, device=device)
        self.memory: PixelMemory | None = None
        if config.attention == "cross_image" and with_memory:
            self.memory = PixelMemory(
                config,
                classifier.num_classes,
                classifier.dim,
                forgotten=base_classes if config.novel_only else (),
                num_slots=num_slots,
                device=device,
            )

    # ---------------------------------------------------------------- training

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        check_source(batch, self.classes)
        (features,) = self.backbone(batch.images, batch.valid)
        x_BLD = self.classifier.embed(features)
        weight_ND = self.classifier.class_weights(self.classes[batch.source])
        u_BLD = self._scaled(x_BLD, weight_ND, batch.source)
        low_size = (features.shape[-2], features.shape[-1])
        slot = SlotFeatures(batch, clock, low_size, x_BLD, u_BLD, weight_ND)
        is_masked = batch.supervision == "masks"
        losses = {"seg": self._seg_loss(slot)} if is_masked else self._weak_losses(slot)
        return {name: self._factor(batch.source, name) * loss for name, loss in losses.items()}

    def _factor(self, source: str, loss: str) -> float:
        weights = self.config.source_weights
        return weights.get(source, 1.0) * weights.get(f"{source}/{loss}", 1.0)

    def _scaled(self, x: Tensor, weight_ND: Tensor, source: str = "") -> Tensor:
        """u with logit_pk = u_p . w_k, up to a shift of the pixel that no softmax sees."""
        if self.config.logit_scale is not None:
            return self.config.logit_scale * x
        return class_normalised(x, weight_ND, self.classifier.gamma, self.multiplicity.get(source))

    def _seg_loss(self, slot: SlotFeatures) -> Tensor:
        """L_seg: cross-entropy of every second pixel over the classes of this source only."""
        batch = slot.batch
        assert batch.masks is not None
        ids_BHW = self._loss_grid(batch.masks, IGNORE)
        divide_by = self.config.seg_denominator
        loss = segmentation_loss(
            slot.u_BLD.mT.unflatten(2, slot.low_size),
            slot.weight_ND,
            to_columns(ids_BHW, self._column_on_device[batch.source]),
            multiplicity_N=self.multiplicity.get(batch.source),
            denominator=divide_by,
        )
        # "all" are the pixels of the crop, without those that it was filled up by
        of_crop_BHW = batch.masks[:, ::LOSS_STRIDE, ::LOSS_STRIDE]
        return loss * (ids_BHW.numel() / of_crop_BHW.numel() if divide_by == "all" else 1)

    def _loss_grid(self, pixels_BHW: Tensor, fill: int | bool) -> Tensor:
        """Every second pixel of the crop, filled up to whole positions of the feature map."""
        return fill_up(pixels_BHW, self.stride, fill)[:, ::LOSS_STRIDE, ::LOSS_STRIDE]

    def _weak_losses(self, slot: SlotFeatures) -> dict[str, Tensor]:
        """L_cls and L_aux (section 3.1, Eq. 5): means over the (image, label) pairs of the slot."""
        batch, config = slot.batch, self.config
        pairs = LabelPairs.of(batch, self._columns[batch.source], slot.u_BLD.device)
        others = attention.OtherLabels.of(pairs, slot.u_BLD.device)
        valid_BHW = self._loss_grid(batch.valid, False)
        valid_BL = valid_positions(batch.valid, self.stride)
        if not config.mask_padding:
            valid_BHW, valid_BL = torch.ones_like(valid_BHW), torch.ones_like(valid_BL)
        valid_RHW = valid_BHW[pairs.image].to(slot.u_BLD.dtype)
        num_pairs = max(len(pairs), 1)

        def image_loss(weights_RL: Tensor, temperature: float = 1.0) -> Tensor:
            logits_RN = pooled_logits(slot.u_BLD, weights_RL, pairs.image, slot.weight_ND)
            return image_cross_entropy(logits_RN, pairs.column, others.columns, temperature)

        everywhere_RL = pooling_weights(
            torch.ones_like(valid_RHW), valid_RHW, slot.low_size, by_attention=False
        )
        losses = {"cls": config.cls_weight * image_loss(everywhere_RL).sum() / num_pairs}
        if config.attention == "off" or self._factor(batch.source, "aux") == 0:
            return losses
        with torch.no_grad():
            score_RL = attention.pair_scores(slot.x_BLD, slot.weight_ND[pairs.column], pairs.image)
            if self.memory is None:  # Table 5
                attention_RHW = attention.high_scores(score_RL, valid_RHW, slot.low_size)
                by_attention, counts_R = True, torch.ones_like(pairs.image)
            else:
                contrast_RL, counts_R = self._contrast(slot, pairs, others, valid_BL, score_RL)
                attention_RHW = attention.attention_map(  # Eq. 4
                    contrast_RL, valid_BL[pairs.image], slot.low_size, valid_RHW.shape[1:]
                )
                by_attention = config.pool_by_attention
            there_RL = pooling_weights(
                attention_RHW, valid_RHW, slot.low_size, by_attention=by_attention
            )
        aux_R = image_loss(there_RL, config.temperature)  # Eq. 5
        return losses | {"aux": config.aux_weight * (aux_R * counts_R).sum() / num_pairs}

    def _contrast(
        self,
        slot: SlotFeatures,
        pairs: LabelPairs,
        others: attention.OtherLabels,
        valid_BL: Tensor,
        peak_RL: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """S_fg - S_bg [R, L] (Eq. 3, 4), which pairs are warm [R]; proposes the slot's events.

        peak: the classifier's cosines, whose top K make an event.
        """
        assert self.memory is not None
        config, x_BLD, valid_RL = self.config, slot.x_BLD, valid_BL[pairs.image]
        event_RD = attention.top_pixel_mean(peak_RL, valid_RL, x_BLD, pairs.image, config.top_k)
        self.memory.propose(pairs, event_RD, valid_RL.any(dim=1), slot.clock)
        mean_RD, is_warm_R = self.memory.look_up(pairs.class_id, slot.clock)
        score_RL = attention.pair_scores(x_BLD, mean_RD, pairs.image)
        is_background_RR = others.is_other
        if config.skip_cold_background:
            is_background_RR = is_background_RR & is_warm_R
        background_RL, count_R = attention.background_of_other_labels(
            score_RL, is_background_RR, config.background
        )
        if len(others.single):
            mean_ND, is_warm_N = self.memory.look_up(self.classes[slot.batch.source], slot.clock)
            image = pairs.image[others.single]
            background_RL[others.single], count_R[others.single] = attention.mined_background(
                x_BLD[image],
                valid_BL[image],
                score_RL[others.single],
                pairs.column[others.single],
                slot.weight_ND,
                mean_ND,
                is_warm_N if config.skip_cold_background else torch.ones_like(is_warm_N),
                peak_threshold=config.peak_threshold,
                distance_threshold=config.distance_threshold,
                reduction=config.background,
            )
        return attention.contrast(score_RL, background_RL, count_R), is_warm_R

    def after_step(self, clock: Clock) -> None:
        if self.memory is not None:
            self.memory.rows.commit(clock)

    def state(self) -> dict[str, ShardedRows]:
        return {} if self.memory is None else {"memory": self.memory.rows}

    # ---------------------------------------------------------------- use

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        (features,) = self.backbone(images)
        return self.classifier.embed(features).mT.unflatten(2, features.shape[-2:])

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> LinearLogits:
        x_BDhw = self.embed(images)
        weight_KD = self.classifier.class_weights(classes)
        u_BLD = self._scaled(x_BDhw.flatten(2).mT, weight_KD)
        u_BDhw = u_BLD.mT.unflatten(2, x_BDhw.shape[-2:])
        return LinearLogits(u_BDhw, weight_KD, stride=self.stride)

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """The attention of Eq. 4 with no background class; a cold class's map is zero."""
        if self.memory is None:
            return {}
        x_BDhw = self.embed(images)
        index = torch.as_tensor(classes, device=images.device)
        score_BL = torch.einsum("bdhw,bd->bhw", x_BDhw, self.memory.read.means[index]).flatten(1)
        size, everywhere_BL = x_BDhw.shape[-2:], torch.ones_like(score_BL, dtype=torch.bool)
        map_Bhw = attention.attention_map(score_BL, everywhere_BL, size, size)
        return {"attention": map_Bhw * (self.memory.read.counts[index] > 0)[:, None, None]}

    def summary(self, clock: Clock) -> dict[str, float]:
        return memory_figures(self.state(), clock.step)

    def charts(self) -> dict[str, Tensor]:
        return {} if self.memory is None else {"memory/rows per class": self.memory.sizes()}

    def class_vectors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.memory is None else self.memory.set_means()
