"""PseudoSeg: designing pseudo labels for semantic segmentation (Zou et al., ICLR 2021).

A few images have masks, many have image labels or nothing. The network's output on a weak view of
an image, fused with where its classifier looks, teaches its output on a strong view.

    L = L_s + L_u + L_x + L_sa
    L_s   decoder on labelled images against their masks                               (Eq. 1)
    L_u   decoder on the strong view against the pseudo label of the weak one          (Eq. 2)
    L_x   classifier of the pooled features against the image's labels
    L_sa  self-attention Grad-CAM on labelled images against their masks               (Eq. 3)
    pseudo label = sharpen(fuse(decoder, self-attention Grad-CAM))                     (Eq. 4)

Gradients: pseudo labels have none. L_sa trains the attention and its last layer alone, since it
reads maps and activations detached. L_s, L_u and L_x train the backbone.

Where the paper is silent or differs from its official code, the decision, and the flag that gives
the other behaviour (`config.released()` sets those that have one):

 1  r in Eq. 4 is a root of the mean of squares; with the sum that is printed, the softmax is flat.
    It is one number for both sources and the whole slot                            `norm_scope`
 2  the background of the Grad-CAM is 2 - max and made after the attention, not 1 - max before it;
    data without a background class has no such channel                             `background`
 3  keys and queries have 128 channels                                          `attention_dim`
 4  Grad-CAM in closed form: the classifier is linear on the mean of the last map
 5  BatchNorm of the Grad-CAM has no scale and always normalises by its own batch: its logits keep
    a fixed size beside the decoder's, which grow                                   `sgc_affine`
 6  an unlabelled image's classes are those of probability 0.5 or more             `shown_from`
 7  the cut-out box is a share of the crop's side, and counts in L_u alone; in the code it is also
    masked in the attention on the weak view, and its classes leave the image's labels `cutout`
 8  padding takes part in no mean, maximum, attention or r; in the code in all of them but the
    attention
 9  L_u is taken at the decoder's own stride, 4, without enlarging
10  one forward pass of the weak view gives the decoder's logits and the Grad-CAM's, with BatchNorm
    by its batch and with dropout; the code makes a second one in evaluation mode, and a second one
    of the labelled images. Three forward passes for a labelled and an unlabelled slot, not five
11  running statistics are moved by labelled and weak views                   `strong_statistics`
12  L_x is taken on labelled images and on those with image labels; in the code, with image labels,
    on these alone. Image labels are those of the whole image; the code derives them from the mask
    of the crop                                                         `Source.labels_from`
13  L_u rises over the first steps, while the classifier knows nothing                  `warmup`
14  r is taken of logits less their mean over the classes at each position. That mean changes no
    softmax and gets no gradient; Adam lets it drift all the same (measured after 900 steps: a root
    mean square of 8.3, of which 1.9 tell classes apart), and r then flattens the labels `centred`
15  a slot is of one kind of image, and a step has several: each loss is a mean over the slots that
    have it, as if a GPU of the paper held both kinds

Shape letters: B images of the slot, H x W pixels, h x w positions of the decoder's map, h' x w' of
the last map, K classes of the label space, T of them with masks (trained), F of these without the
background, N of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.data.source import Source
from memseg_dist.methods.method import DenseLogits, Method
from memseg_dist.methods.pairs import check_source, to_columns
from memseg_dist.methods.pseudoseg.augment import strong_view
from memseg_dist.methods.pseudoseg.classes import ClassTable
from memseg_dist.methods.pseudoseg.config import PseudoSegConfig
from memseg_dist.methods.pseudoseg.figures import LabelTally
from memseg_dist.methods.pseudoseg.fusion import sharpen, soft_cross_entropy
from memseg_dist.methods.pseudoseg.network import Network
from memseg_dist.nn.batchnorm import leave_out
from memseg_dist.nn.pixel_loss import pixel_cross_entropy
from memseg_dist.nn.resize import at_positions, fill_up, upsample, within_image

if TYPE_CHECKING:
    from memseg_dist.nn.backbone import Backbone


class PseudoSeg(Method):
    """sources: of the run, by name. classes: per source, the sorted label-space ids [N] of its
    vocabulary; masks are IGNORE or hold these. background: a label-space id, or None.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: PseudoSegConfig,
        *,
        sources: Mapping[str, Source],
        classes: Mapping[str, np.ndarray],
        num_classes: int,
        background: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.table = ClassTable(sources, classes, num_classes, background, device)
        attends = config.pseudo_label in ("fused", "activation")
        self.net = Network(
            config,
            backbone.stages,
            num_classes,
            self.table,
            classifies=attends or "labels" in self.table.share,
            attends=attends,
        )
        self.tally = LabelTally(device)

    # ---------------------------------------------------------------- training

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """ValueError for a batch of an unknown source."""
        check_source(batch, self.table.ids)
        if batch.supervision == "masks":
            return self._labelled(batch)
        return self._unlabelled(batch, clock)

    def _labelled(self, batch: Batch) -> dict[str, Tensor]:
        """L_s, L_x and L_sa."""
        table, share, name = self.table, self.table.share["masks"], batch.source
        assert batch.masks is not None
        masks_BHW = fill_up(batch.masks, self.backbone.stride, IGNORE)
        target_BHW = to_columns(masks_BHW, table.column[name])

        def pixel_loss(logits_BNhw: Tensor) -> Tensor:
            return pixel_cross_entropy(logits_BNhw, None, target_BHW, denominator="valid")

        maps = self.backbone(batch.images, batch.valid)
        valid_Bhw = at_positions(batch.valid, maps[-1], self.backbone.stride)
        losses = {"seg": share * pixel_loss(self.net.decode(maps)[:, table.ids[name]])}  # Eq. 1
        if self.net.classifier is not None:
            loss = self._classification(maps[-1], valid_Bhw, batch)
            losses["classification"] = share * loss
        if self.net.attention is not None:
            refined_BThw = self.net.refine(maps, table.named(batch), valid_Bhw)  # Eq. 3
            loss = pixel_loss(refined_BThw[:, table.in_trained[name]])
            losses["activation"] = share * self.config.activation_weight * loss
        return losses

    def _unlabelled(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """L_u, and L_x if the images have labels: a weak and a strong view."""
        table, losses = self.table, {}
        has_labels = batch.supervision == "labels"
        with nullcontext() if has_labels else torch.no_grad():
            maps = self.backbone(batch.images, batch.valid)
        valid_Bhw = at_positions(batch.valid, maps[-1], self.backbone.stride)
        if has_labels:
            loss = self._classification(maps[-1], valid_Bhw, batch)
            losses["classification"] = table.share["labels"] * loss
        with torch.no_grad():
            is_shown_BF = table.named(batch) if has_labels else self.net.shown(maps[-1], valid_Bhw)
            sources = self.net.label_sources(maps, is_shown_BF, batch.valid)
            found_BThw = sources[self.config.pseudo_label]
            target_BThw = sharpen(found_BThw, self.config.temperature)  # Eq. 4
        loss = self._strong_loss(batch, target_BThw, clock)  # Eq. 2
        weight = self.config.unlabelled_weight * self._ramp(clock)
        losses["unlabelled"] = table.share["unlabelled"] * weight * loss
        if not clock.idle:
            self.tally.add(
                is_shown_BF, target_BThw, at_positions(batch.valid, target_BThw, self.stride)
            )
        return losses

    def _classification(self, deep: Tensor, valid_Bhw: Tensor, batch: Batch) -> Tensor:
        """L_x: the mean, over images and the source's foreground classes, of the cross-entropy; a
        blanked image adds 0.
        """
        columns = self.table.in_foreground[batch.source]
        logits_BF = self.net.classify(deep, valid_Bhw, dropout=True)
        is_named_BF = self.table.named(batch)
        counts_B1 = batch.valid.flatten(1).any(dim=1, keepdim=True)
        loss = F.binary_cross_entropy_with_logits(
            logits_BF[:, columns],
            is_named_BF[:, columns].to(logits_BF.dtype),
            weight=counts_B1.to(logits_BF.dtype),
        )
        return self.config.classification_weight * loss

    def _strong_loss(self, batch: Batch, target_BThw: Tensor, clock: Clock) -> Tensor:
        """L_u of Eq. 2, of the decoder on the strong view."""
        config = self.config
        view = strong_view(
            batch.images,
            batch.valid,
            clock.seed_for("strong view"),
            strength=config.jitter,
            brightness=config.jitter_brightness,
            cutout=config.cutout,
        )
        is_seen_BHW = batch.valid & ~view.cut
        with nullcontext() if config.strong_statistics else leave_out(self, "strong view"):
            maps = self.backbone(view.images, is_seen_BHW)
            logits_BThw = self.net.decode(maps)[:, self.net.trained]
        is_seen_Bhw = at_positions(is_seen_BHW, logits_BThw, self.stride)
        teaches_Bhw = is_seen_Bhw & (target_BThw.amax(dim=1) >= config.threshold)
        if config.hard:
            best_B1hw = target_BThw.argmax(dim=1, keepdim=True)
            target_BThw = torch.zeros_like(target_BThw).scatter_(1, best_B1hw, 1.0)
        return soft_cross_entropy(logits_BThw, target_BThw, teaches_Bhw, is_seen_Bhw)

    def _ramp(self, clock: Clock) -> float:
        steps = self.config.warmup * clock.num_steps
        return min(1.0, clock.step / steps) if steps else 1.0

    # ---------------------------------------------------------------- use

    @property
    def stride(self) -> int:
        """The decoder's."""
        return self.net.fine_stride

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> DenseLogits:
        logits = self.net.decode(self.backbone(images))[:, classes]
        return DenseLogits(self._within(logits, images), self.stride)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        maps = self.backbone(images)
        features = self.net.decoder.features(maps[0], maps[-1])
        return F.normalize(self._within(features, images), dim=1)

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, is_shown_BF: Tensor | None = None) -> dict[str, Tensor]:
        """Probabilities [B, T, h, w] by source: decoder, activation, both fused, and that sharpened
        as training does. is_shown: the foreground classes of the images; by default those that the
        classifier sees.
        """
        maps, valid_BHW = self.backbone(images), torch.ones_like(images[:, 0], dtype=torch.bool)
        if is_shown_BF is None:
            valid_Bhw = at_positions(valid_BHW, maps[-1], self.backbone.stride)
            is_shown_BF = self.net.shown(maps[-1], valid_Bhw)
        found = self.net.label_sources(maps, is_shown_BF, valid_BHW)
        if "fused" in found:
            found["sharpened"] = sharpen(found["fused"], self.config.temperature)
        return {name: self._within(map, images) for name, map in found.items()}

    def label_sources(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        columns = self.net.column[classes]
        return {name: map[:, columns] for name, map in self.pseudo_labels(images).items()}

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """The paper's Fig. 2: the class activation, and the class's probability in each source."""
        rows, ids = torch.arange(len(images)), np.array(classes)
        column = torch.from_numpy(self.table.in_trained_K[ids])
        shown = {name: map[rows, column] for name, map in self.pseudo_labels(images).items()}
        if self.net.attention is None:
            return shown
        fine, _, deep = self.backbone(images)
        all_BF = torch.ones(len(images), len(self.net.foreground), device=deep.device)
        cam_BFhw = self.net.activate(deep, all_BF, torch.ones_like(deep[:, 0]))
        cam_BFhw = upsample(cam_BFhw, fine.shape[-2:])
        # column -1, the background's, is zero
        with_none = F.pad(self._within(cam_BFhw, images), (0, 0, 0, 0, 0, 1))
        column = torch.from_numpy(self.table.in_foreground_K[ids])
        return {"class activation": with_none[rows, column]} | shown

    def _within(self, map: Tensor, images: Tensor) -> Tensor:
        return within_image(map, images.shape[-2:], self.stride)

    def summary(self, clock: Clock) -> dict[str, float]:
        return self.tally.read()
