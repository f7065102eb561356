"""Saliency maps beside a data set: paired with their images, and named when they are wrong."""

from dataclasses import replace

import fsspec
import numpy as np
import pytest
import torch
from data.made import NUM_CLASSES, SPACE, VOCABULARY, encoded
from PIL import Image

from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.decode import CorruptSample
from memseg_dist.data.loader import Source, TrainLoader
from memseg_dist.tools.shards import Sample, finish, write_shard

KEYS = ("a/0", "a/1", "b/%2E2", "b/3")
WIDTH, HEIGHT = 40, 30
AUGMENT = AugmentConfig((60, 45), (0.5, 1.2), 40, photometric=False, category_max_ratio=1.0)


@pytest.fixture
def source(tmp_path):
    """Four samples whose masks say in classes 0..3 what their maps say in greys."""
    samples = []
    for number, key in enumerate(KEYS):
        mask = np.random.default_rng(number).integers(0, 4, (HEIGHT, WIDTH)).astype(np.uint16)
        samples.append(Sample(key, encoded(number, WIDTH, HEIGHT), "jpg", (), mask))
        path = tmp_path / "maps" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((mask * 85).astype(np.uint8)).save(path)
    write_shard(tmp_path / "shards", 0, samples, num_classes=NUM_CLASSES)
    finish(tmp_path / "shards", VOCABULARY)
    maps = str(tmp_path / "maps")
    return Source("masks", str(tmp_path / "shards"), "masks", 1, 4, AUGMENT, saliency=maps)


def one_batch(source, **settings):
    ((batch, _),) = next(TrainLoader([source], SPACE, seed=0, **settings).steps(0, 1))
    return batch


@pytest.mark.parametrize("keep_ratio", [True, False])
def test_maps_are_cut_as_the_masks_are(source, keep_ratio):
    source = replace(source, augment=replace(AUGMENT, keep_ratio=keep_ratio))
    batch = one_batch(source)
    assert batch.saliency.dtype == torch.float32
    assert torch.allclose(batch.saliency[batch.valid], batch.masks[batch.valid] / 3)
    assert (batch.saliency[~batch.valid] == -1).all()
    assert not batch.valid.all()
    without = one_batch(replace(source, saliency=None))
    assert without.saliency is None
    assert torch.equal(without.images, batch.images) and without.crop_boxes == batch.crop_boxes


def test_loader_processes_and_devices(source):
    expected = one_batch(source)
    batch = one_batch(source, num_processes=1)
    assert torch.equal(batch.saliency, expected.saliency)
    assert batch.to("cpu").saliency is not None
    assert batch.to("meta").saliency.device.type == "meta"


def test_maps_on_a_url(source):
    filesystem = fsspec.filesystem("memory")
    for key in KEYS:
        with open(f"{source.saliency}/{key}.png", "rb") as stream:
            filesystem.pipe_file(f"/maps/{key}.png", stream.read())
    batch = one_batch(replace(source, saliency="memory://maps"))
    assert torch.equal(batch.saliency, one_batch(source).saliency)
    with pytest.raises(ValueError, match=r"'a/0' has no saliency map memory://empty/a/0\.png"):
        one_batch(replace(source, saliency="memory://empty/"))


def test_a_missing_map_is_named_and_never_skipped(source, tmp_path):
    (tmp_path / "maps" / "b/%2E2.png").unlink()
    for on_corrupt in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"'b/%2E2' has no saliency map .*maps/b/%2E2\.png"):
            one_batch(replace(source, on_corrupt=on_corrupt))
    (tmp_path / "maps" / "a/0.png").unlink()  # the first sample is looked for before training
    with pytest.raises(ValueError, match=r"'a/0' has no saliency map .*per key into .*maps"):
        TrainLoader([source], SPACE, seed=0)


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("L", (30, 40), r"'b/3': it is 30 x 40 pixels but the image is 40 x 30.*in .*maps at"),
        ("P", (40, 30), r"maps/b/3\.png of sample 'b/3': mode is 'P'; store 8-bit grey"),
        ("RGB", (40, 30), "mode is 'RGB'"),
        ("1", (40, 30), "mode is '1'"),
        ("I;16", (40, 30), "mode is 'I;16'"),
    ],
)
def test_a_wrong_map_is_named_or_skipped(source, tmp_path, mode, size, message):
    Image.new(mode, size).save(tmp_path / "maps" / "b/3.png")
    with pytest.raises(CorruptSample, match=message):
        one_batch(source)
    batch = one_batch(replace(source, on_corrupt="skip"))
    place = batch.keys.index("b/3")
    assert batch.skipped == 1
    assert (batch.saliency[place] == -1).all()
    assert (batch.crop_boxes[place].rows, batch.crop_boxes[place].width) == (0, 0)


@pytest.mark.parametrize("keep", [0, 20, -60])
def test_a_damaged_map_is_named(source, tmp_path, keep):
    path = tmp_path / "maps" / "b/3.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptSample, match=r"b/3\.png of sample 'b/3': "):
        one_batch(source)
