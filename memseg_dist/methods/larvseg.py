"""LarvSeg: Large-Vocabulary Segmentation with image classification data.

Pixel masks teach some classes, image labels teach all of them. A memory of each class's pixel
features over the whole data set shows where in an image a label belongs; the image-level loss is
then applied there.

    L = L_seg + lambda_cls L_cls + lambda_aux L_aux                                        (Eq. 6)

The paper's baseline (Eq. 1) is the same class with `attention="off"`: no bank, no L_aux.

Where the paper is silent or differs from its official code, the decision, and the flag that gives
the other behaviour:

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
13  attention from the memory, not from the image's own best pixels            `attention`
14  all labels of a step see the memory as of the last commit (the code: label after label)

No loss keeps anything of shape [pixels, classes]: see `losses.cosine`, `losses.weak` and
`losses.segmentation`. The tests compare with the literal computation in `larvseg_reference`.

Shape letters: B images of the slot, H x W pixels of the loss (the crop at half resolution),
L = h w positions of the feature map, D channels, N classes of the source, C of the label space,
R (image, label) pairs of the slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.losses import attentive
from memseg_dist.losses.attentive import BackgroundReduction
from memseg_dist.losses.cosine import class_normalised
from memseg_dist.losses.segmentation import Denominator, pixel_cross_entropy
from memseg_dist.losses.weak import image_cross_entropy, pooled_logits, pooling_weights
from memseg_dist.memory.bank import Bank
from memseg_dist.memory.rows import Stateful
from memseg_dist.memory.table import TableKind
from memseg_dist.methods.method import LinearLogits, Method

LOSS_STRIDE = 2
"""Losses are taken on every second pixel of the crop, as in the official code."""


@dataclass(frozen=True)
class LarvSegConfig:
    """Settings of the method; the defaults are the paper's main experiment."""

    kind: Literal["larvseg"] = "larvseg"
    attention: Literal["cross_image", "single_image", "off"] = "cross_image"
    """Where L_aux looks: by the memory, by the image's own best pixels (Table 5), or no L_aux."""
    cls_weight: float = 0.1
    """lambda_cls."""
    aux_weight: float = 0.1
    """lambda_aux."""
    source_weights: Mapping[str, float] = field(default_factory=dict)
    """Factor on all losses of a source, by its name; 1 where not given."""
    capacity: int = 20
    """M: events that the memory keeps per class."""
    top_k: int = 20
    """K: pixels that make one event."""
    warm_up: int | None = None
    """Events that a class needs before L_aux uses it; None: a full memory, M."""
    memory_scope: Literal["global", "slot"] = "global"
    """One memory for all slots, or one each as in the official code, whose GPUs never exchange."""
    memory_table: TableKind = "sharded"
    memory_dtype: Literal["fp32", "bf16"] = "fp32"
    novel_only: bool = False
    """Keep no memory of classes that have masks."""
    background: BackgroundReduction = "mean"
    peak_threshold: float = 0.35
    """Images with one label: a class is seen if the mean of its 5 highest cosines exceeds this."""
    distance_threshold: float = 2.0
    """... and is background if mse(zscore(S_fg), zscore(S_k)) exceeds this (0..4)."""
    skip_cold_background: bool = True
    pool_by_attention: bool = False
    """Divide the attentive pooling by the sum of the attention, not by the number of positions."""
    temperature: float = 1.0
    """tau of Eq. 5."""
    logit_scale: float | None = None
    """A fixed scale of the plain cosine; None: normalised over the classes, learned scale."""
    seg_denominator: Denominator = "all"
    keep_duplicates: bool = False
    """Give a class that k names share k columns of the softmax, as in the official code."""
    mask_padding: bool = True


class PixelClassifier(Protocol):
    """What the method asks of its classifier; `models.cosine.CosineClassifier` is one."""

    num_classes: int
    dim: int
    gamma: Tensor

    def embed(self, features_BDhw: Tensor) -> Tensor: ...

    def class_weights(self, class_ids_N: Tensor) -> Tensor: ...


class LarvSeg(Method):
    """The segmenter, its three losses and its memory.

    backbone: uint8 images, valid -> [B, D, h, w]. classifier: `models.cosine.CosineClassifier`
    over the label space. classes: per source, the sorted label-space ids [N] of its vocabulary;
    multiplicity: per mask source, how many of its names share each id [N] (absent: one each).
    base_classes: ids with masks, used by `novel_only`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifier: PixelClassifier,
        config: LarvSegConfig,
        *,
        classes: Mapping[str, np.ndarray],
        multiplicity: Mapping[str, np.ndarray] | None = None,
        base_classes: Sequence[int] = (),
        num_slots: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.backbone, self.classifier, self.config = backbone, classifier, config
        num_classes = classifier.num_classes
        self.classes = {
            name: torch.as_tensor(ids, dtype=torch.int64, device=device)
            for name, ids in classes.items()
        }
        self.multiplicity = {
            name: torch.as_tensor(counts, device=device)
            for name, counts in (multiplicity or {}).items()
            if config.keep_duplicates and np.max(counts, initial=1) > 1
        }
        self._column = {name: _columns_of(ids, num_classes) for name, ids in classes.items()}
        self._column_on_device = {
            name: torch.as_tensor(column, device=device) for name, column in self._column.items()
        }
        self._remembered = np.ones(num_classes, dtype=bool)
        if config.novel_only:
            self._remembered[list(base_classes)] = False
        self.warm_up = config.capacity if config.warm_up is None else config.warm_up
        self.num_scopes = num_slots if config.memory_scope == "slot" else 1
        self.memory: Bank | None = None
        if config.attention != "off":
            self.memory = Bank(
                num_classes * self.num_scopes,
                config.capacity,
                classifier.dim,
                table=config.memory_table,
                dtype=torch.bfloat16 if config.memory_dtype == "bf16" else torch.float32,
                device=device,
            )

    # ---------------------------------------------------------------- training

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        if batch.source not in self.classes:
            raise ValueError(f"source '{batch.source}' is not one of {sorted(self.classes)}")
        features = self.backbone(batch.images, batch.valid)
        with torch.autocast(features.device.type, enabled=False):
            low_size = features.shape[-2:]
            x_BLD = self.classifier.embed(features.float())
            weight_ND = self.classifier.class_weights(self.classes[batch.source])
            u_BLD = self._scaled(x_BLD, weight_ND, batch.source)
            factor = self.config.source_weights.get(batch.source, 1.0)
            if batch.supervision == "masks":
                return {"seg": factor * self._seg_loss(batch, u_BLD, weight_ND, low_size)}
            losses = self._weak_losses(batch, clock, x_BLD, u_BLD, weight_ND, low_size)
        return {name: factor * loss for name, loss in losses.items()}

    def _scaled(self, x: Tensor, weight_ND: Tensor, source: str | None = None) -> Tensor:
        """u with logit_pk = u_p . w_k, up to a shift of the pixel that no softmax sees."""
        if self.config.logit_scale is not None:
            return self.config.logit_scale * x
        multiplicity = self.multiplicity.get(source) if source else None
        return class_normalised(x, weight_ND, self.classifier.gamma, multiplicity)

    def _seg_loss(self, batch: Batch, u_BLD: Tensor, weight_ND: Tensor, low_size) -> Tensor:
        """L_seg: cross-entropy of every second pixel over the classes of this source only."""
        assert batch.masks is not None
        ids_BHW = batch.masks[:, ::LOSS_STRIDE, ::LOSS_STRIDE]
        column_C = self._column_on_device[batch.source]
        target_BHW = torch.where(ids_BHW == IGNORE, IGNORE, column_C[ids_BHW.clamp_min(0)])
        u_BDhw = u_BLD.mT.unflatten(2, low_size)
        multiplicity = self.multiplicity.get(batch.source)
        bias_N = None if multiplicity is None else multiplicity.to(u_BLD.dtype).log()
        loss = pixel_cross_entropy(
            u_BDhw,
            weight_ND,
            target_BHW,
            bias_N=bias_N,
            denominator=self.config.seg_denominator,
        )
        if bias_N is None:
            return loss
        # k equal columns: their class has k times the probability, its target one of the k
        constant = (bias_N[target_BHW.clamp_min(0)] * (target_BHW != IGNORE)).sum()
        all_pixels = self.config.seg_denominator == "all"
        count = target_BHW.numel() if all_pixels else (target_BHW != IGNORE).sum().clamp_min(1)
        return loss + constant / count

    def _weak_losses(
        self,
        batch: Batch,
        clock: Clock,
        x_BLD: Tensor,
        u_BLD: Tensor,
        weight_ND: Tensor,
        low_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """L_cls and L_aux (section 3.1, Eq. 5): means over the (image, label) pairs of the slot."""
        pairs = _Pairs.of(batch, self._column[batch.source], u_BLD.device)
        valid_BHW = batch.valid[:, ::LOSS_STRIDE, ::LOSS_STRIDE]
        valid_BL = _valid_positions(batch.valid, low_size)
        if not self.config.mask_padding:
            valid_BHW, valid_BL = torch.ones_like(valid_BHW), torch.ones_like(valid_BL)
        valid_RHW = valid_BHW[pairs.image].to(u_BLD.dtype)
        num_pairs = max(len(pairs.ids), 1)

        everywhere_RL = pooling_weights(
            torch.ones_like(valid_RHW), valid_RHW, low_size, by_attention=False
        )
        logits_RN = pooled_logits(u_BLD, everywhere_RL, pairs.image, weight_ND)
        cls_R = image_cross_entropy(logits_RN, pairs.column, pairs.others)
        losses = {"cls": self.config.cls_weight * cls_R.sum() / num_pairs}
        if self.memory is None:
            return losses

        with torch.no_grad():
            contrast_RL, is_warm_R = self._contrast(batch, clock, pairs, x_BLD, weight_ND, valid_BL)
            attention_RHW = attentive.attention_map(
                contrast_RL, valid_BL[pairs.image], low_size, valid_RHW.shape[1:]
            )
            there_RL = pooling_weights(
                attention_RHW, valid_RHW, low_size, by_attention=self.config.pool_by_attention
            )
        logits_RN = pooled_logits(u_BLD, there_RL, pairs.image, weight_ND)
        aux_R = image_cross_entropy(logits_RN, pairs.column, pairs.others, self.config.temperature)
        losses["aux"] = self.config.aux_weight * (aux_R * is_warm_R).sum() / num_pairs
        return losses

    # ---------------------------------------------------------------- memory and attention

    def _contrast(
        self,
        batch: Batch,
        clock: Clock,
        pairs: _Pairs,
        x_BLD: Tensor,
        weight_ND: Tensor,
        valid_BL: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """S_fg - S_bg [R, L] (Eq. 3, 4), which pairs are warm [R]; proposes the slot's events."""
        assert self.memory is not None
        scope = (clock.slot if self.num_scopes > 1 else 0) * self.classifier.num_classes
        memory_id_R = pairs.class_id + scope
        valid_RL = valid_BL[pairs.image]
        peak_RL = _pair_scores(x_BLD, weight_ND[pairs.column], pairs)
        event_RD = attentive.top_pixel_mean(
            peak_RL, valid_RL, x_BLD, pairs.image, self.config.top_k
        )
        kept = np.flatnonzero(self._remembered[pairs.ids])
        kept_rows = torch.from_numpy(kept).to(x_BLD.device, non_blocking=True)
        self.memory.propose(pairs.ids[kept] + scope, event_RD[kept_rows], clock)

        if self.config.attention == "single_image":
            mean_RD, is_warm_R = event_RD, torch.ones_like(pairs.image, dtype=torch.bool)
        else:
            mean_RD = self.memory.means[memory_id_R]
            is_warm_R = self.memory.counts[memory_id_R] >= self.warm_up
        score_RL = _pair_scores(x_BLD, mean_RD, pairs)
        is_background_RR = pairs.other_label
        if self.config.skip_cold_background:
            is_background_RR = is_background_RR & is_warm_R
        background_RL, count_R = attentive.background_of_other_labels(
            score_RL, is_background_RR, self.config.background
        )
        if len(pairs.single):
            single = pairs.single
            background_RL[single], count_R[single] = self._mined_background(
                pairs, x_BLD, valid_BL, score_RL, weight_ND, self.classes[batch.source] + scope
            )
        return attentive.contrast(score_RL, background_RL, count_R), is_warm_R

    def _mined_background(
        self,
        pairs: _Pairs,
        x_BLD: Tensor,
        valid_BL: Tensor,
        score_RL: Tensor,
        weight_ND: Tensor,
        memory_id_N: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """S_bg of the pairs whose image has no other label, mined in the source's vocabulary."""
        assert self.memory is not None
        image = pairs.image[pairs.single]
        warm_N = self.memory.counts[memory_id_N] >= self.warm_up
        return attentive.mined_background(
            x_BLD[image],
            valid_BL[image],
            score_RL[pairs.single],
            pairs.column[pairs.single],
            weight_ND,
            self.memory.means[memory_id_N],
            warm_N if self.config.skip_cold_background else torch.ones_like(warm_N),
            peak_threshold=self.config.peak_threshold,
            distance_threshold=self.config.distance_threshold,
            reduction=self.config.background,
        )

    def after_step(self, clock: Clock) -> None:
        if self.memory is not None:
            self.memory.commit(clock)

    def state(self) -> dict[str, Stateful]:
        return {} if self.memory is None else {"memory": self.memory}

    def summary(self, clock: Clock) -> dict[str, float]:
        if self.memory is None:
            return {}
        return {f"memory/{name}": value for name, value in self.memory.summary(clock.step).items()}

    def charts(self) -> dict[str, Tensor]:
        if self.memory is None:
            return {}
        rows_C = self.memory.counts.view(self.num_scopes, -1).sum(dim=0)
        return {"memory/rows per class": rows_C.float().cpu()}

    # ---------------------------------------------------------------- use

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        x_BLD = self.classifier.embed(features.float())
        return x_BLD.mT.unflatten(2, features.shape[-2:])

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> LinearLogits:
        x_BDhw = self.embed(images)
        weight_KD = self.classifier.class_weights(classes)
        u_BLD = self._scaled(x_BDhw.flatten(2).mT, weight_KD)
        return LinearLogits(u_BLD.mT.unflatten(2, x_BDhw.shape[-2:]), weight_KD)

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """The attention of Eq. 4 with no background class; a cold class's map is zero."""
        if self.memory is None:
            return {}
        x_BDhw = self.embed(images)
        index = torch.as_tensor(classes, device=images.device)
        score_BL = torch.einsum("bdhw,bd->bhw", x_BDhw, self.memory.means[index]).flatten(1)
        low_size = x_BDhw.shape[-2:]
        map_Bhw = attentive.attention_map(score_BL, torch.ones_like(score_BL, dtype=torch.bool),
                                          low_size, low_size)  # fmt: skip
        return {"attention": map_Bhw * (self.memory.counts[index] > 0)[:, None, None]}


@dataclass(frozen=True)
class _Pairs:
    """The (image, label) pairs of a slot, in batch order, made from host labels alone.

    ids: class ids on the host [R]; image, class_id, column: [R]; other_label [R, R]: s is another
    label of r's image; others: the same as (pair, column) indices; single: pairs that have no
    other label.
    """

    ids: np.ndarray
    image: Tensor
    class_id: Tensor
    column: Tensor
    other_label: Tensor
    single: Tensor
    others: tuple[Tensor, Tensor]

    @staticmethod
    def of(batch: Batch, column_C: np.ndarray, device: torch.device) -> _Pairs:
        counts = [len(labels) for labels in batch.labels]
        ids = np.array([label for labels in batch.labels for label in labels], dtype=np.int64)
        column = column_C[ids]
        if (column < 0).any():
            raise ValueError(
                f"label {ids[column < 0][0]} of a batch of '{batch.source}' is not in the "
                "vocabulary of that source"
            )
        image = np.repeat(np.arange(len(counts)), counts)
        other_label = (image[:, None] == image) & ~np.eye(len(ids), dtype=bool)
        pair, other = np.nonzero(other_label)
        single = np.flatnonzero(np.repeat(counts, counts) == 1)

        def put(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        others = (put(pair), put(column[other]))
        return _Pairs(ids, put(image), put(ids), put(column), put(other_label), put(single), others)


def _pair_scores(x_BLD: Tensor, vector_RD: Tensor, pairs: _Pairs) -> Tensor:
    """[R, L]: products of pair r's vector with the positions of its image."""
    every_image_BRL = torch.einsum("bld,rd->brl", x_BLD, vector_RD)
    return every_image_BRL[pairs.image, torch.arange(len(pairs.ids), device=x_BLD.device)]


def _columns_of(class_ids: np.ndarray, num_classes: int) -> np.ndarray:
    """[C] column of each label-space class in the source's vocabulary, -1 outside it."""
    columns = np.full(num_classes, -1, dtype=np.int64)
    columns[class_ids] = np.arange(len(class_ids))
    return columns


def _valid_positions(valid_BHW: Tensor, low_size: tuple[int, int]) -> Tensor:
    """[B, L]: positions of the feature map at least half of whose pixels are not padding."""
    return F.adaptive_avg_pool2d(valid_BHW.float(), low_size).flatten(1) >= 0.5
