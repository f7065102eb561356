"""The settings of Three-stage self-training, and what it can be trained with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from memseg_dist.checks import (
    NotNegative,
    NotNegativeInt,
    PositiveInt,
    Share,
    check_numbers,
    require,
)
from memseg_dist.methods.method import Method, MethodConfig

if TYPE_CHECKING:
    from memseg_dist.methods.setup import Setup


@dataclass(frozen=True)
class ThreeStageConfig(MethodConfig):
    """Settings of stages 2 and 3; the defaults are the decisions that `method` lists.

    Stage 1 is the method "segment". The rows of the paper's Table V: stages 2 and 3 by `stage`; -CR
    by consistency_weight 0; -T2 by pseudo_weight 0; -SA by strong off; without EMA by teacher
    "student"; stage 3 with the branch of stage 2 is `stage` 2 with the pseudo masks of stage 2.
    """

    kind: Literal["three_stage"] = "three_stage"
    stage: Literal[2, 3] = 2
    """The branch that learns the pseudo masks shares all but the last two blocks of the network
    (stage 2), or all but the last (stage 3)."""
    consistency_weight: NotNegative = 0.5
    """lambda_1 of Eq. 4 and 5; 0: no consistency loss."""
    pseudo_weight: NotNegative = 0.5
    """lambda_2 of Eq. 4 and 5; 0: no branch, and no pseudo masks are needed."""
    rates: tuple[int, ...] = (6, 12, 18, 24)
    """Dilations of the heads; the code's network uses 6 and 12 alone."""
    branch_dilation: PositiveInt | None = None
    """Dilation of the branch's own blocks in stage 2; default: 32 over the stride of the maps, as
    a dilated ResNet's last stage has."""
    teacher: Literal["ema", "student"] = "ema"
    """Who gives the target of the consistency loss: the moving average of the student, or the
    student itself as it is."""
    decays: tuple[float, ...] = (0.99, 0.995, 0.9975, 0.999)
    """Share of the teacher that a step keeps, in each part of the run."""
    decay_until: tuple[float, ...] = (1 / 3, 2 / 3, 5 / 6)
    """Where all parts but the last end, as shares of the run."""
    target: Literal["hard", "soft"] = "hard"
    """The teacher's most probable class, or its probabilities; these cost memory for every class
    of every pixel."""
    strong: bool = True
    """Change the unlabelled images by A, and their targets by B."""
    randaugment_ops: NotNegativeInt = 3
    """Operations of RandAugment that are drawn per image."""
    randaugment_chance: Share = 0.5
    """That a drawn one is applied."""
    cutout_boxes: NotNegativeInt = 3
    """Squares per image that the student does not see."""
    cutout_share: Share = 0.1
    """Side of a box as a share of the crop's shorter side."""
    keep_cutout_pixels: bool = True
    """The student has to say what is under the boxes; off: these pixels count in no loss."""
    predict_with: Literal["teacher", "student"] = "teacher"
    """Which network is validated and labels; without a moving average it is the student."""

    def __post_init__(self) -> None:
        check_numbers(self, "method.")
        decays, until = self.decays, self.decay_until
        is_fine = bool(decays) and all(0 <= decay <= 1 for decay in decays)
        require(is_fine, "method.decays", decays, "one share or more, each from 0 to 1")
        is_rising = all(low < high for low, high in pairwise((0.0, *until, 1.0)))
        require(
            is_rising and len(until) == len(decays) - 1,
            "method.decay_until",
            until,
            f"{len(decays) - 1} rising shares between 0 and 1, one less than method.decays",
        )

    def build(self, setup: Setup) -> Method:
        """ValueError for a backbone without two stages."""
        from memseg_dist.methods.three_stage.method import ThreeStage

        return ThreeStage(
            setup.build_backbone((-2, -1)),
            self,
            sources=setup.sources,
            class_ids=setup.trained,
            num_classes=setup.num_classes,
            with_teacher=setup.for_training or self.predict_with == "teacher",
            device=setup.device,
        )

    def check(self, setup: Setup) -> None:
        for source in setup.sources:
            if source.supervision == "labels":
                raise ValueError(
                    f"source {source.name!r} has supervision 'labels'; Three-stage learns from "
                    "masks and from images alone: use 'masks' or 'none'"
                )
            if self.pseudo_weight > 0 and source.pseudo_masks is None:
                raise ValueError(
                    f"source {source.name!r} has no pseudo_masks: stage {self.stage} learns from "
                    f"those that the network of stage {self.stage - 1} makes for all images, "
                    "labelled ones too. Run that stage and its label stage first and give their "
                    "folder, or set method.pseudo_weight to 0"
                )
        labelled = setup.labelled_sources
        names = [source.name for source in setup.sources]
        if not labelled:
            raise ValueError(
                f"no labelled image: none of the sources {names} has supervision 'masks'"
            )
        if len(labelled) == len(names):
            raise ValueError(
                f"no unlabelled image: all of the sources {names} have supervision 'masks'; add "
                "one of all images with supervision 'none', or train with the method 'segment'"
            )
        self._check_same_classes(setup)
        setup.check_masks_show_all_classes()

    def _check_same_classes(self, setup: Setup) -> None:
        """ValueError for masks that know different classes."""
        uids = np.array(setup.label_space.vocabulary.uids, dtype=object)
        first, *others = setup.labelled_sources
        for source in others:
            different = np.setxor1d(setup.classes[first.name], setup.classes[source.name])
            if len(different):
                raise ValueError(
                    f"the labelled sources {first.name!r} and {source.name!r} have different "
                    f"classes, {sorted(uids[different])[:8]}: what one does not name, it may still "
                    "show. Give them the same vocabulary"
                )
