"""What the jobs of Three-stage self-training share: its five stages.

stage1, labels1    the network on the labelled images; it labels all images      STORAGE/NAME
stage2, labels2    with consistency and these labels; its teacher labels again   STORAGE/NAME_stage2
stage3             the same with the better labels                               STORAGE/NAME_stage3
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from semi_supervised import SemiOptions, pseudo_labels, self_training, supervised

from memseg_dist.config import RunConfig
from memseg_dist.data.loader import Source
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.stages import Stage, result

FAST_DECAYS = (0.9, 0.95, 0.98, 0.99)
"""Of the teacher in runs of some hundred steps: the paper's 0.999 keeps half of what it held 690
steps ago."""


@dataclass(frozen=True)
class ThreeStageOptions(SemiOptions):
    """Three-stage self-training from few masks."""


def three_stages(
    options: ThreeStageOptions,
    run: RunConfig,
    *,
    first: Source,
    first_steps: int | None = None,
    truth: str | None = None,
) -> dict[str, Stage]:
    """run: of stage 2, whose sources are the labelled images and, last, all images; both get the
    pseudo masks. first: the labelled images as stage 1 and the supervised recipes see them, which
    train for `first_steps` (by default the run's). truth: shards with masks of all images, to score
    the pseudo masks.
    """
    method, everything = run.method, run.sources[-1]
    assert isinstance(method, ThreeStageConfig)
    plain = SegmentConfig(rates=method.rates)
    stage1 = supervised(run, plain, [first])
    if options.recipe == "supervised":
        return {"train": stage1}
    if options.recipe == "self-training":
        offline = replace(run, sources=(first, everything))
        return self_training(options, offline, plain, truth=truth)

    def multi_task(stage: int, labels: str) -> RunConfig:
        sources = tuple(replace(s, pseudo_masks=result(labels)) for s in run.sources)
        return replace(
            run,
            name=f"{run.name}_stage{stage}",
            sources=sources,
            method=replace(method, stage=stage),
        )

    return {
        "stage1": replace(stage1, steps=first_steps or run.steps),
        "labels1": pseudo_labels(options, "stage1", everything, truth=truth),
        "stage2": multi_task(2, "labels1"),
        "labels2": pseudo_labels(options, "stage2", everything, truth=truth),
        "stage3": multi_task(3, "labels2"),
    }
