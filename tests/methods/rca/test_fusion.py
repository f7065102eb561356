"""Label fusion against a literal reading, pixel by pixel, and each rule by a case made for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memseg_dist.batch import IGNORE
from memseg_dist.methods.rca.fusion import RULES, FusionConfig, fuse
from memseg_dist.nn.densecrf import dense_crf

RCA = FusionConfig()
PLAIN = FusionConfig(use_crf=False, conflict=None, salient=None, confident=None, min_foreground=0)
BACKGROUND, CAT, DOG = 7, 3, 5
SIZE = (24, 30)


def blobs(seed: int, number: int = 2) -> np.ndarray:
    maps = torch.rand(1, number, 5, 6, generator=torch.Generator().manual_seed(seed)) ** 2
    return (255 * maps[0]).round().byte().numpy()


def image(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((size[0] // 3, size[1] // 3, 1), np.uint8))


def saliency_map(seed: int = 0) -> np.ndarray:
    return np.kron(np.random.default_rng(seed).random((4, 5)), np.ones((6, 6))).astype(np.float32)


def slow_fuse(maps, class_ids, picture, saliency, config, background):
    """The rules as the specification lists them, one pixel at a time."""
    height, width = picture.shape[:2]
    scores = []
    for values in maps.astype(np.float32):
        large = F.interpolate(torch.from_numpy(values)[None, None], (height, width),
                              mode="bilinear", align_corners=False)[0, 0].numpy()  # fmt: skip
        low, high = large.min(), large.max()
        scores.append((large - low) / (high - low) if high > low else 0 * large)
    for score in scores:
        for y in range(height):
            for x in range(width):
                if score[y, x] < config.zero_below:
                    score[y, x] = 0
    first = np.zeros((height, width), np.float32)
    for y in range(height):
        for x in range(width):
            if config.background_score is not None:
                first[y, x] = config.background_score
            else:
                first[y, x] = (1 - max(score[y, x] for score in scores)) ** config.background_power
    channels = np.stack([first, *scores])
    if config.use_crf:
        channels = dense_crf(picture, channels, config.crf)
    labels = np.zeros((height, width), np.int64)
    num_foreground = 0
    for y in range(height):
        for x in range(width):
            values = [float(channel[y, x]) for channel in channels]
            if saliency is not None:
                values[0] = float(np.float32(1) - saliency[y, x])
            best = values.index(max(values))
            label = background if best == 0 else class_ids[best - 1]
            is_salient = saliency is not None and saliency[y, x] >= (config.salient or np.inf)
            is_confident = max(values[1:]) > (config.confident or np.inf)
            if (config.conflict and sum(value > config.conflict for value in values) > 1) or (
                label == background and (is_salient or is_confident)
            ):
                label = IGNORE
            labels[y, x] = label
            num_foreground += label not in (IGNORE, background)
    if num_foreground < config.min_foreground * height * width:
        labels[:] = IGNORE
    return labels


CONFIGS = {
    **RULES,
    "no crf": FusionConfig(use_crf=False),
    "loose": FusionConfig(use_crf=False, conflict=0.3, confident=0.2, background_power=0.5),
}


@pytest.mark.parametrize("with_saliency", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_literal_rules(name, with_saliency):
    unknown = 0
    for seed in range(3):
        saliency = saliency_map(seed) if with_saliency else None
        arguments = (blobs(seed), (CAT, DOG), image(seed), saliency, CONFIGS[name])
        labels, counts, _ = fuse(*arguments, background=BACKGROUND)
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, slow_fuse(*arguments, BACKGROUND))
        assert sum(counts.values()) == (labels == IGNORE).sum()
        unknown += sum(counts.values())
    if with_saliency:
        assert (unknown == 0) == (name == "eps")


def ramp(size: tuple[int, int] = SIZE) -> np.ndarray:
    """0 at the left to 1 at the right."""
    return np.tile(np.linspace(0, 1, size[1], dtype=np.float32), (size[0], 1))


def run(maps, ids, config, saliency=None, picture=None):
    picture = image() if picture is None else picture
    return fuse(np.asarray(maps), ids, picture, saliency, config, background=BACKGROUND)


def test_plain_fusion_is_the_argmax():
    labels, counts, _ = run([ramp(), ramp()[:, ::-1] * 0.1], (CAT, DOG), PLAIN)
    assert set(np.unique(labels)) <= {CAT, DOG} and not any(counts.values())
    labels, *_ = run([ramp()], (CAT,), PLAIN)
    expected = np.where((1 - ramp()) ** 4 >= ramp(), BACKGROUND, CAT)
    np.testing.assert_array_equal(labels, expected)


def test_conflict_of_a_class_with_the_background():
    """With saliency the background is 1 - saliency, whatever the maps say."""
    config = replace(PLAIN, conflict=0.9)
    labels, counts, _ = run([ramp()], (CAT,), config, saliency=np.zeros(SIZE, np.float32))
    np.testing.assert_array_equal(labels == IGNORE, ramp() > 0.9)
    assert counts["conflict"] == (ramp() > 0.9).sum() == sum(counts.values())


def test_salient_background():
    saliency = np.full(SIZE, 31 / 255, np.float32)
    saliency[:, :10] = 32 / 255
    labels, counts, _ = run([ramp()], (CAT,), replace(PLAIN, salient=32 / 255), saliency=saliency)
    assert (labels[:, :10] == IGNORE).all() and (labels[:, 10:20] == BACKGROUND).all()
    assert counts["salient"] == 240 == sum(counts.values())


def test_a_confident_class_beneath_the_background():
    config = replace(PLAIN, confident=0.8)
    labels, counts, _ = run([ramp()], (CAT,), config, saliency=np.zeros(SIZE, np.float32))
    is_doubtful = (ramp() > 0.8) & (ramp() < 1)  # at 1 the tie goes to the background: doubtful too
    assert counts["confident"] == (labels == IGNORE).sum() >= is_doubtful.sum() > 0
    assert (labels[is_doubtful] == IGNORE).all() and (labels[ramp() <= 0.8] == BACKGROUND).all()


def test_too_little_foreground():
    spot = np.zeros(SIZE, np.float32)
    spot[3, 4:11] = 1  # 7 of 720 pixels: below 1 %
    config = replace(PLAIN, min_foreground=0.01)
    labels, counts, _ = run([spot], (CAT,), config)
    assert (labels == IGNORE).all() and counts["min_foreground"] == 720
    spot[3, 11] = 1
    labels, counts, _ = run([spot], (CAT,), config)
    assert (labels == CAT).sum() == 8 and sum(counts.values()) == 0


def test_a_pixel_counts_for_its_first_rule():
    config = replace(RCA, use_crf=False, min_foreground=0.5)
    labels, counts, _ = run([ramp()], (CAT,), config, saliency=np.full(SIZE, 0.05, np.float32))
    assert counts["conflict"] > 0 and counts["confident"] > 0 and counts["min_foreground"] > 0
    assert (labels == IGNORE).all() and sum(counts.values()) == 720


def test_scores_below_a_threshold_do_not_count():
    labels, *_ = run([ramp()], (CAT,), replace(PLAIN, zero_below=0.5))
    np.testing.assert_array_equal(labels == CAT, ramp() >= 0.5)


def test_eps_takes_every_pixel_above_its_threshold():
    labels, counts, _ = run([ramp()], (CAT,), RULES["eps"])
    np.testing.assert_array_equal(labels == CAT, ramp() > np.float32(0.2))
    assert sum(counts.values()) == 0


def test_an_image_without_classes_is_unknown():
    labels, counts, _ = run(np.zeros((0, 4, 4), np.uint8), (), RULES["eps"])
    assert (labels == IGNORE).all()
    assert counts == {"without_classes": 720}


def test_a_constant_map_is_no_evidence():
    flat = np.full((2, 5, 6), 200, np.uint8)
    flat[1] = 0
    labels, _, num_without_evidence = run(flat, (CAT, DOG), PLAIN)
    assert (labels == BACKGROUND).all() and num_without_evidence == 2
    labels, counts, _ = run(flat, (CAT, DOG), RCA)
    assert (labels == IGNORE).all() and counts["min_foreground"] == 720
    third = np.full((1, 7, 7), 1 / 3, np.float32)  # interpolation rounds; still no evidence
    assert run(third, (CAT,), PLAIN).num_without_evidence == 1


def test_maps_are_stretched_whatever_their_range():
    maps = blobs(1).astype(np.float32)
    expected = run(maps, (CAT, DOG), RCA).labels
    for other in (maps / 255, maps + 40, maps[:, :, :] * np.array([1, 0.01])[:, None, None]):
        np.testing.assert_array_equal(run(other, (CAT, DOG), RCA).labels, expected)


def test_the_crf_follows_the_edge():
    picture = np.full((*SIZE, 3), 30, np.uint8)
    picture[:, 18:] = 220
    coarse = np.array([[[0, 0, 0.2, 0.9, 1.0]]], np.float32).repeat(4, axis=1)
    labels, *_ = run(coarse, (CAT,), FusionConfig(confident=None), picture=picture)
    assert (labels[:, :17] == BACKGROUND).all() and (labels[:, 19:] == CAT).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="saliency map has 30 x 24 pixels, the image 24 x 30"):
        run([ramp()], (CAT,), RCA, saliency=np.zeros(SIZE[::-1]))
    with pytest.raises(ValueError, match=r"saliency is from 0.0 to 255.0"):
        run([ramp()], (CAT,), RCA, saliency=255 * ramp())
    with pytest.raises(ValueError, match=r"maps \(1, 24, 30\) for 2 classes"):
        run([ramp()], (CAT, DOG), RCA)
    for ids in ((CAT, CAT), (CAT, BACKGROUND), (CAT, IGNORE)):
        with pytest.raises(ValueError, match="must differ"):
            run([ramp(), ramp()], ids, RCA)
    with pytest.raises(ValueError, match="image must be uint8"):
        run([ramp()], (CAT,), RCA, picture=image() / 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"background_score": 0.2}, "give one of them"),
        ({"background_power": None}, "give one of them"),
        ({"background_power": 0.0}, "background_power is 0.0"),
        ({"conflict": 1.5}, "fusion.conflict is 1.5"),
        ({"min_foreground": -0.1}, "fusion.min_foreground is -0.1"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        FusionConfig(**changes)
