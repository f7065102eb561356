"""PseudoSeg's fused pseudo labels as masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from methods.pseudoseg.test_pseudoseg import BACKGROUND, MASKED, SMALL, batch, build

from memseg_dist.batch import IGNORE
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.methods.labeller import Picture
from memseg_dist.methods.method import Method
from memseg_dist.methods.pseudoseg.labeller import FusionLabeller
from memseg_dist.nn.resize import upsample_positions


@dataclass
class Opened:
    """A checkpoint, as a labeller sees it."""

    method: Method
    path: str = "runs/x"
    size: int | None = None

    @property
    def label_space(self) -> LabelSpace:
        names = [Category(f"u{i}", f"class {i}") for i in range(6)]
        return LabelSpace.union({"masks": Vocabulary(tuple(names))})

    def fitted(self, image):
        if self.size is None:
            return image
        return image[:, :: image.shape[1] // self.size, :: image.shape[2] // self.size]


PICTURE = Picture("a", batch("unlabelled").images[0])


def test_masks_are_the_argmax_of_the_enlarged_label():
    method = build(replace(SMALL, shown_from=0.4)).eval()
    found = FusionLabeller().open(Opened(method))(PICTURE)
    label = method.pseudo_labels(PICTURE.image[None])["sharpened"][0]
    confidence, column = upsample_positions(label, (16, 16), method.stride).max(dim=0)
    assert np.array_equal(found.mask, MASKED[column.numpy()])
    middle = float(confidence.median())
    found = FusionLabeller(threshold=middle).open(Opened(method))(PICTURE)
    unknown = (confidence < middle).numpy()
    assert np.array_equal(found.mask == IGNORE, unknown)
    assert found.note == {"unknown_low_confidence": unknown.sum()}
    assert {title.split(":")[0] for title in found.maps} >= {"class activation", "fused"}


def test_labels_of_the_image_take_the_place_of_the_classifier():
    method = build(replace(SMALL, shown_from=1.0)).eval()
    labelled = PICTURE._replace(classes=(0, BACKGROUND, 3))
    sources = {}
    for restrict in (True, False):
        labeller = FusionLabeller(source="activation", restrict_to_labels=restrict)
        sources[restrict] = labeller.open(Opened(method))(labelled).mask
    shown = torch.tensor([[True, True, False]])
    expected = method.pseudo_labels(PICTURE.image[None], shown)["activation"][0]
    column = upsample_positions(expected, (16, 16), method.stride).argmax(dim=0)
    assert np.array_equal(sources[True], MASKED[column.numpy()])
    assert not np.array_equal(sources[True], sources[False])


def test_masks_have_the_size_of_the_stored_image():
    method = build().eval()
    large = Picture("a", PICTURE.image.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))
    assert FusionLabeller().open(Opened(method, size=16))(large).mask.shape == (32, 32)


def test_a_run_without_activations_cannot_be_fused():
    method = build(replace(SMALL, pseudo_label="decoder"))
    with pytest.raises(ValueError, match="runs/x is of no PseudoSeg with class activations"):
        FusionLabeller().check(Opened(method))
