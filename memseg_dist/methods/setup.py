"""What a run knows when it builds its method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from memseg_dist.data.pairs import image_counts, labelled_regions, steps_per_epoch
from memseg_dist.data.source import Source, kept_ids, supervised_ids
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.memory.layouts import Regions
from memseg_dist.nn.backbone import Backbone, BackboneConfig, build_backbone


@dataclass(frozen=True)
class Setup:
    """The data, the backbone and the size of a run, for a method to choose from.

    scored: label-space ids that the validation scores, None without one. num_steps: steps of the
    run. for_training: False for a model that only predicts, which needs neither memories nor data:
    the sources' indexes are not read.
    """

    sources: tuple[Source, ...]
    label_space: LabelSpace
    backbone: BackboneConfig
    scored: np.ndarray | None = None
    num_steps: int = 0
    seed: int = 0
    device: torch.device | str = "cpu"
    for_training: bool = True
    cache_dir: str = ""
    is_bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    activation_checkpointing: bool = False

    def build_backbone(self, stages: Sequence[int] = (-1,)) -> Backbone:
        """The backbone with the maps of these stages; see `nn.backbone.build_backbone`."""
        backbone = build_backbone(
            self.backbone, stages, bf16=self.is_bf16, channels_last=self.channels_last
        )
        backbone.set_activation_checkpointing(self.activation_checkpointing)
        if self.compile:
            backbone.compile()
        return backbone

    @property
    def num_classes(self) -> int:
        """Classes of the label space."""
        return len(self.label_space)

    @property
    def num_slots(self) -> int:
        return sum(source.slots for source in self.sources)

    @cached_property
    def classes(self) -> dict[str, np.ndarray]:
        """Per source the sorted label-space ids of its vocabulary, without those it excludes."""
        return {
            source.name: self.label_space.classes(source.name)[self._is_kept(source)]
            for source in self.sources
        }

    def multiplicity(self, source: Source) -> np.ndarray:
        """How many names of the source's vocabulary share each of its `classes`."""
        return self.label_space.multiplicity(source.name)[self._is_kept(source)]

    @cached_property
    def labelled_regions(self) -> Regions:
        """Every (class, image) pair of the sources, read from their indexes."""
        return labelled_regions(self.sources, self.label_space, self.cache_dir)

    @property
    def labelled_sources(self) -> tuple[Source, ...]:
        """Those with masks."""
        return tuple(source for source in self.sources if source.supervision == "masks")

    @property
    def trained(self) -> np.ndarray:
        """Label-space ids of the classes that sources with masks have and keep, ascending."""
        return supervised_ids(self.sources, self.label_space, "masks")

    def check_masks_show_all_classes(self) -> None:
        """ValueError for a class of the sources with masks that none of them shows, or a class of
        the validation set that they do not have: nothing would teach it.
        """
        uids, trained = np.array(self.label_space.vocabulary.uids, dtype=object), self.trained
        counts = image_counts(self.labelled_sources, self.label_space, self.cache_dir)
        unseen = uids[trained[counts[trained] == 0]]
        if len(unseen):
            names = [source.name for source in self.labelled_sources]
            raise ValueError(
                f"{len(unseen)} of the classes {sorted(unseen)[:8]} are in no mask of the sources "
                f"{names}: exclude them, --sources.0.exclude and --validation.exclude, or add "
                "images that show them (a split drawn with --rule every-class has them all)"
            )
        if self.scored is None:
            return
        unknown = uids[np.setdiff1d(self.scored, trained)]
        if len(unknown):
            raise ValueError(
                f"the validation set has the classes {sorted(unknown)[:8]}, which no source has "
                "masks of; add them to --validation.exclude"
            )

    @cached_property
    def epoch_steps(self) -> int:
        """Steps in which the longest source's epoch is over: each of its images seen, once but for
        repeats.
        """
        return steps_per_epoch(self.sources, self.label_space, self.cache_dir)

    def _is_kept(self, source: Source) -> np.ndarray:
        """Which of the source's classes take part: an excluded one must not even be a negative."""
        kept = kept_ids(source, self.label_space)
        return np.isin(self.label_space.classes(source.name), kept)
