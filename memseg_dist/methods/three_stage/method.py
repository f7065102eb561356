"""Three-stage self-training for semi-supervised semantic segmentation (Ke et al., TIP 2022).

L are the labelled images, U the unlabelled ones, f the segmentation network, f' its teacher, A and
B one random change of images and of the maps that belong to them.

    stage 1      L1 = L_seg                                     plain segmentation: `segment`
                 y^ = argmax f(x) of all images                 its label stage
    stage 2, 3   L  = L_seg + lambda_1 L_con + lambda_2 L_pl                           (Eq. 4, 5)

    L_con = mean over L u U of CE(f(A x), B argmax f'(x))                                 (Eq. 1)
    L_seg = mean over L of CE(f(x), y)                                                    (Eq. 2)
    L_pl  = mean over L u U of CE(g(A x), B y^)                                           (Eq. 3)

Stages 2 and 3 differ in the branch g, which shares all but the last two blocks of f or all but the
last (`network.Branch`), and in whose pseudo masks y^ are: those of the stage before. The branch is
not used once training is over.

Where the paper is silent or differs from its official code, the decision, and the flag that gives
the other behaviour:

 1  heads add all four dilations; the code returns after two                              `rates`
 2  slots of L have A = B = identity; the paper's text has the sizes of the two sub-batches the
    wrong way round: one labelled image, 4 or 9 of L u U                            `Source.slots`
 3  steps and learning rates are the run's; the code trains stage 1 shorter, and pretrained layers
    at a tenth of the rate                                         `optimizer.backbone_lr_scale`
 4  the decay of the teacher has a schedule, by share of the run     `decays`, `decay_until`
 5  L_con's target is the teacher's argmax, whatever its probability                    `target`
 6  the teacher predicts, and makes the next stage's pseudo masks, as it is after the last step,
    not at its best validation                                                    `predict_with`
 7  the branch has C outputs; the code has one more, which no target ever names
 8  pixels of a crop's padding, and those that A brings in from outside, count in no loss and are
    0 after normalisation; the code counts padding
 9  pixels under CutOut's boxes count                                     `keep_cutout_pixels`
10  RandAugment's operations and ranges are the code's; boxes grow with the crop, where the code has
    32 pixels. Geometric operations come first, as one map: what one pushes out, another may bring
    back                      `strong`, `randaugment_ops`, `randaugment_chance`, `cutout_share`
11  BatchNorm of the backbone is frozen; that of the branch's own blocks, which have no pretrained
    statistics, is trained, and their convolutions start as Kaiming's: the code freezes it as an
    identity                                                        `backbone.frozen_batchnorm`
12  no factor 1/2 before all three losses, which the code has on Cityscapes
13  a loss is the mean over the pixels of a slot, then over images: the code's is over the pixels of
    its whole batch. Slots weigh by their images, so what counts is the mix of the sources
14  logits are enlarged without aligning corners

Shape letters: B images of the slot, H x W pixels, h x w positions, M maps, C classes of the label
space, K of the labelled sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import Batch, Clock
from memseg_dist.data.source import Source
from memseg_dist.memory.state import Stateful
from memseg_dist.methods.method import DenseLogits, Method, evaluation_mode
from memseg_dist.methods.pairs import check_source, columns_of, to_columns
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.methods.three_stage.loss import hard_loss, soft_loss, to_target
from memseg_dist.methods.three_stage.network import Branch
from memseg_dist.methods.three_stage.strong import draw_operators
from memseg_dist.methods.three_stage.teacher import Segmenter, Teacher, decay_at
from memseg_dist.nn.deeplab import DeepLabV2Head
from memseg_dist.nn.resize import padded_size, upsample

if TYPE_CHECKING:
    from memseg_dist.nn.backbone import Backbone


class View(NamedTuple):
    """What the student sees of a slot, and what it is to say.

    visible: bool [B, H, W], where the network's input is not 0. counts: bool, the pixels that have
    targets. maps: float [B, m, H, W] by name, changed as the images are.
    """

    images: Tensor
    visible: Tensor
    counts: Tensor
    maps: Mapping[str, Tensor]


class ThreeStage(Method):
    """class_ids: label-space ids [K] that the labelled sources have; targets are IGNORE or hold
    these, and any other class counts as IGNORE. with_teacher: False for a model of the student
    alone.
    """

    class_ids: Tensor
    column: Tensor

    def __init__(
        self,
        backbone: Backbone,
        config: ThreeStageConfig,
        *,
        sources: Sequence[Source],
        class_ids: np.ndarray,
        num_classes: int,
        with_teacher: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        self.head = DeepLabV2Head(backbone.dim, num_classes, config.rates)
        self.branch: Branch | None = None
        if config.pseudo_weight > 0:
            self.branch = Branch(
                config.stage, backbone.stages, num_classes, config.rates, config.branch_dilation
            )
        self.teacher: Teacher | None = None
        if config.teacher == "ema" and with_teacher:
            self.teacher = Teacher(self, device)
        column_C = torch.from_numpy(columns_of(class_ids, num_classes))
        self.register_buffer("class_ids", torch.from_numpy(class_ids), persistent=False)
        self.register_buffer("column", column_C, persistent=False)
        self._share_of_all = image_shares(sources)
        self._share_of_labelled = image_shares([s for s in sources if s.supervision == "masks"])

    # ---------------------------------------------------------------- training

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """ValueError for a batch of an unknown source."""
        check_source(batch, self._share_of_all)
        config = self.config
        maps = {}
        if config.consistency_weight > 0:
            maps["taught"] = self._taught(batch)
        if self.branch is not None:
            maps["pseudo"] = self._pseudo(batch)
        view = self._view(batch, clock, maps)

        features = self.backbone(view.images, view.visible)
        logits_BKhw = self.head(features[-1], self.class_ids)
        share = clock.num_slots * self._share_of_all[batch.source]
        losses = {}
        if batch.masks is not None:  # Eq. 2
            loss = hard_loss(logits_BKhw, to_columns(batch.masks, self.column), self.stride)
            share_of_labelled = clock.num_slots * self._share_of_labelled[batch.source]
            losses["seg"] = share_of_labelled * loss
        if "taught" in view.maps:  # Eq. 1
            if config.target == "hard":
                target_BHW = to_target(view.maps["taught"], view.counts)
                loss = hard_loss(logits_BKhw, target_BHW, self.stride)
            else:
                loss = soft_loss(logits_BKhw, view.maps["taught"], view.counts, self.stride)
            losses["consistency"] = config.consistency_weight * share * loss
        if self.branch is not None:  # Eq. 3
            target_BHW = to_target(view.maps["pseudo"], view.counts)
            loss = hard_loss(self.branch(features, self.class_ids), target_BHW, self.stride)
            losses["pseudo"] = config.pseudo_weight * share * loss
        return losses

    def _taught(self, batch: Batch) -> Tensor:
        """f'(x) as a map [B, 1, H, W] of 1 + column, or probabilities [B, K, H, W]; made image by
        image, so that of hard targets no [B, K, H, W] is ever there.
        """
        net: Segmenter = self if self.teacher is None else self.teacher
        with evaluation_mode(self):
            logits_BKhw = self._logits(net, batch.images, batch.valid, self.class_ids)
            size = batch.valid.shape[1:]
            whole, maps = padded_size(size, self.stride), []
            for low_Khw in logits_BKhw:
                logits_KHW = upsample(low_Khw, whole)[:, : size[0], : size[1]]
                if self.config.target == "hard":
                    maps.append((1 + logits_KHW.argmax(dim=0, keepdim=True)).float())
                else:
                    maps.append(logits_KHW.softmax(dim=0))
            return torch.stack(maps)

    def _pseudo(self, batch: Batch) -> Tensor:
        """y^ as a map [B, 1, H, W] of 1 + column, 0 where unknown."""
        assert batch.pseudo_masks is not None, "check lets no source without them come here"
        return (1 + to_columns(batch.pseudo_masks, self.column))[:, None].float()

    def _view(self, batch: Batch, clock: Clock, maps: Mapping[str, Tensor]) -> View:
        """A of the images, and B of the maps."""
        config, valid_BHW = self.config, batch.valid
        if not config.strong or batch.masks is not None:
            return View(batch.images, valid_BHW, valid_BHW, maps)
        seed = clock.seed_for("strong augmentation")
        operators = draw_operators(config, Random(seed), valid_BHW)
        images = operators.images(batch.images, valid_BHW, self.backbone.mean)
        stacked = torch.cat([valid_BHW[:, None].float(), *maps.values()], dim=1)
        warped = operators.maps(stacked).split([1, *(map.shape[1] for map in maps.values())], dim=1)
        in_frame_BHW = warped[0][:, 0] > 0
        visible_BHW = in_frame_BHW & ~operators.cut_out()
        counts_BHW = in_frame_BHW if config.keep_cutout_pixels else visible_BHW
        return View(images, visible_BHW, counts_BHW, dict(zip(maps, warped[1:], strict=True)))

    def after_step(self, clock: Clock) -> None:
        if self.teacher is not None:
            self.teacher.follow(self, decay_at(clock, self.config))

    def state(self) -> dict[str, Stateful]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    # ---------------------------------------------------------------- use

    @staticmethod
    def _logits(net: Segmenter, images: Tensor, valid: Tensor | None, ids: Tensor) -> Tensor:
        return net.head(net.backbone(images, valid)[-1], ids)

    def _predictor(self) -> Segmenter:
        use_teacher = self.teacher is not None and self.config.predict_with == "teacher"
        return self.teacher if use_teacher else self  # type: ignore[return-value]

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> DenseLogits:
        logits = self._logits(self._predictor(), images, None, classes)
        return DenseLogits(logits, self.stride)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self._predictor().backbone(images)[-1], dim=1)

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """The class's probability among the trained ones; 0 if it is none of them."""
        rows = torch.arange(len(images), device=images.device)
        column_B = self.column[torch.as_tensor(list(classes), device=images.device)]

        def probability(logits_BKhw: Tensor) -> Tensor:
            share_Bhw = logits_BKhw.softmax(dim=1)[rows, column_B.clamp_min(0)]
            return share_Bhw * (column_B >= 0)[:, None, None]

        features = self.backbone(images)
        shown = {"student": self.head(features[-1], self.class_ids)}
        if self.teacher is not None:
            shown["teacher"] = self._logits(self.teacher, images, None, self.class_ids)
        if self.branch is not None:
            shown["branch"] = self.branch(features, self.class_ids)
        return {name: probability(logits) for name, logits in shown.items()}

    # ---------------------------------------------------------------- figures

    def summary(self, clock: Clock) -> dict[str, float]:
        return {} if self.teacher is None else {"teacher/decay": decay_at(clock, self.config)}


def image_shares(sources: Sequence[Source]) -> dict[str, float]:
    """Per source, the share that one of its slots has of all images of a step."""
    total = sum(source.slots * source.batch_per_slot for source in sources)
    return {source.name: source.batch_per_slot / total for source in sources}
