"""Classification: its activation maps are those of its logits."""

from __future__ import annotations

import numpy as np
import torch
from methods.contract import MethodContract
from methods.patches import Patches

from memseg_dist.methods.classify import Classify, ClassifyConfig


def test_a_map_is_the_positive_part_of_the_classs_logits_over_their_maximum():
    torch.manual_seed(0)
    method = Classify(
        Patches(6, 8), ClassifyConfig(), num_classes=4, classes={"source": np.arange(4)}
    ).eval()
    with torch.no_grad():
        method.classifier.bias[3] = -100  # nowhere
    images = torch.randint(0, 256, (3, 3, 32, 40), dtype=torch.uint8)
    found = method.maps(images, [2, 0, 3])["activation"]
    logits = method.predict(images, torch.arange(4)).dense()
    for image, class_id in enumerate([2, 0]):
        expected = logits[image, class_id].clamp_min(0)
        assert expected.max() > 0
        torch.testing.assert_close(found[image], expected / expected.max())
    assert found.shape == (3, 4, 5) and not found[2].any()


class TestContract(MethodContract):
    method = ClassifyConfig()
    losses = {"weak": {"classification"}}
