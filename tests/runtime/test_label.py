"""A label run: the same images out with masks, whatever was known of them; stopped and repeated."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.cli import main
from memseg_dist.config import EngineConfig, RunConfig
from memseg_dist.data.augment import AugmentConfig, resize_image
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source
from memseg_dist.data.shards import Sample, finish, write_shard
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.evaluation.activation import AccumulatedMaps, predicted_maps
from memseg_dist.evaluation.evaluate import evaluation_mode
from memseg_dist.evaluation.fusion import EPS_RULES, FusionConfig, fuse
from memseg_dist.memory.regions import image_id
from memseg_dist.memory.rows import Rows
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.models.backbone import BackboneConfig
from memseg_dist.runtime.api import NullTracker
from memseg_dist.runtime.label import LabelConfig, label
from memseg_dist.train.checkpoint import Checkpoint, save
from memseg_dist.train.engine import TorchEngine

VOCABULARY = Vocabulary(
    tuple(Category(uid, uid) for uid in ("dog", "ghost", "background", "cat", "cow"))
)
DOG, GHOST, BACKGROUND, CAT, COW = range(5)
COLORS = {DOG: (200, 60, 50), BACKGROUND: (60, 120, 70), CAT: (70, 70, 210), COW: (230, 220, 90)}
WRITTEN = ("background", "dog", "cat", "cow")
HEIGHT, WIDTH, GRID = 24, 36, 12
NUM_IMAGES, PER_SHARD = 9, 4


def truth(number: int) -> np.ndarray:
    """Image 4 is all background, which is no label that counts; image 5 has two classes."""
    mask = np.full((HEIGHT, WIDTH), BACKGROUND, np.uint16)
    if number != 4:
        mask[4:14, 3:17] = (DOG, CAT, COW)[number % 3]
    if number == 5:
        mask[12:22, 21:33] = CAT
    return mask


def picture(number: int) -> bytes:
    pixels = np.array([COLORS.get(i, (0, 0, 0)) for i in range(5)])[truth(number)]
    noise = np.random.default_rng(number).integers(-6, 7, pixels.shape)
    file = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "png")
    return file.getvalue()


def key(number: int) -> str:
    return f"set/{number:03d}"


def write_data(root: Path, numbers=range(NUM_IMAGES), with_masks: bool = True) -> Path:
    numbers = list(numbers)
    for shard in range(-(-len(numbers) // PER_SHARD)):
        samples = []
        for number in numbers[shard * PER_SHARD : (shard + 1) * PER_SHARD]:
            mask = truth(number)
            labels = () if with_masks else tuple(int(value) for value in np.unique(mask))
            labels += (GHOST,) if number == 2 else ()
            samples.append(
                Sample(key(number), picture(number), "png", labels, mask if with_masks else None)
            )
        write_shard(root, shard, samples, num_classes=len(VOCABULARY))
    finish(root, VOCABULARY)
    return root


class SavedMaps:
    """What a run leaves of its activation maps: those of the truth, two of them missing."""

    def __init__(self, label_space: LabelSpace) -> None:
        rows = []
        for number in range(NUM_IMAGES):
            for local in np.unique(truth(number)):
                uid = VOCABULARY.uids[local]
                if uid == "background" or number == 6:  # 6: no row at all
                    continue
                where = torch.from_numpy((truth(number) == local).astype(np.float32))
                small = torch.nn.functional.adaptive_avg_pool2d(where[None], GRID)[0]
                levels = (255 * small).round().byte()
                class_id = label_space.vocabulary.index(uid)
                updates = 0 if number == 7 else 3  # 7: a row that was never written
                rows.append((class_id, image_id(key(number)), levels, updates))
        rows.sort(key=lambda row: row[:2])
        self.rows = rows

    def state_dict(self):
        classes, images, maps, updates = zip(*self.rows)
        tensors = {
            "class": torch.tensor(classes),
            "image": torch.tensor(images),
            "maps": torch.stack(maps),
            "updates": torch.tensor(updates, dtype=torch.int32),
        }
        return {name: Rows(tensor, 0, len(tensor)) for name, tensor in tensors.items()}

    def load_state_dict(self, read) -> None:
        raise AssertionError("a label run reads rows, it loads no memory")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of data/ (shards), runs/maps and runs/plain (checkpoints)."""
    root = tmp_path_factory.mktemp("label")
    os.environ["MEMSEG_CACHE"], before = str(root / "cache"), os.environ.get("MEMSEG_CACHE")
    write_data(root / "data")
    augment = AugmentConfig(crop=32, resize=(32, 32))
    config = RunConfig(
        name="maps",
        storage=str(root / "runs"),
        sources=(
            Source("weak", str(root / "data"), "labels", 1, 2, augment,
                   exclude=("background", "ghost")),
        ),
        method=ClassifyConfig(),
        backbone=BackboneConfig("test_vit", image_size=32, drop_path=0.0),
        engine=EngineConfig("torch"),
    )  # fmt: skip
    space = build_label_space(config)
    engine = TorchEngine(build_method(config, space), config, torch.device("cpu"))
    for name, memories in (("maps", {"maps": SavedMaps(space)}), ("plain", {})):
        directory = str(root / "runs" / name / "checkpoints")
        save(directory, 12, engine, memories, replace(config, name=name), space, keep=1)
    yield root
    os.environ.pop("MEMSEG_CACHE")
    if before is not None:
        os.environ["MEMSEG_CACHE"] = before


def config_of(made: Path, out: Path, **changes) -> LabelConfig:
    settings = {"checkpoint": str(made / "runs" / "maps"), "data": str(made / "data"), "out": out}
    return LabelConfig(**(settings | {"workers": 0, "num_pictures": 0} | changes))


def masks_of(root: Path) -> dict[str, np.ndarray]:
    found = {}
    for shard in sorted(root.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".mask.png"):
                    image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                    found[member.name.removesuffix(".mask.png")] = np.array(image)
    return found


def contents_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.tar"))}


class Listener(NullTracker):
    def __init__(self) -> None:
        self.images, self.metrics = {}, {}

    def log_metrics(self, metrics, step) -> None:
        self.metrics |= {**metrics, "step": step}

    def log_image(self, name, image, step) -> None:
        self.images[name] = image


def test_from_accumulated_maps(made, tmp_path, capsys):
    listener = Listener()
    report = label(
        config_of(made, tmp_path / "out", truth=str(made / "data"), num_pictures=5), listener
    )
    source, written = Index.open(made / "data"), Index.open(tmp_path / "out")
    assert written.vocabulary.uids == WRITTEN
    assert written.shard_names == source.shard_names and len(written) == NUM_IMAGES
    masks = masks_of(tmp_path / "out")
    for row in range(NUM_IMAGES):
        assert written.key(row) == source.key(row)
        mask, expected = masks[source.key(row)], truth(row)
        if row in (4, 6, 7):  # without labels, without a map, without an update
            assert (mask == 65535).all()
            continue
        names = np.array([*WRITTEN, "unknown"])[np.minimum(mask, 4)]
        assert (names == np.array(VOCABULARY.uids)[expected]).mean() > 0.93
    assert written.labels(2) == (0, 3) and written.labels(4) == ()
    assert written.labels(5) == (0, 2, 3) and written.labels(7) == (2,)  # labels outlive the mask
    assert (report.num_images, report.num_without_labels) == (9, 1)
    assert (report.num_maps, report.num_missing, report.counts.no_evidence) == (9, 2, 2)
    assert report.counts.without_classes == HEIGHT * WIDTH
    assert report.counts.min_foreground == 2 * HEIGHT * WIDTH
    assert report.left_out == {"ghost": 1}
    assert report.scores.num_images == 9 and report.scores.excluded.miou() > 80
    text = str(report)
    assert "2 were never written" in text and "ghost (1)" in text and "counted as wrong" in text
    assert listener.metrics["label/unknown_percent"] == 100 * report.counts.share_unknown
    assert listener.metrics["step"] == 12
    assert listener.metrics["label/truth_miou_unknown_wrong"] == report.scores.wrong.miou()
    assert len(listener.images) == 5 == len([*(tmp_path / "out" / "panels").glob("*.png")])
    tiles = {name: image.shape[1] for name, image in listener.images.items()}
    assert tiles["labels/04"] < tiles["labels/03"]  # no labels, no map
    assert (tmp_path / "out" / "label_report.txt").read_text() == f"{report}\n"


def test_images_are_untouched_and_masks_join_by_uid(made, tmp_path):
    label(config_of(made, tmp_path / "out"))
    for shard in ("shard-000000.tar", "shard-000002.tar"):
        pairs = []
        for root in (made / "data", tmp_path / "out"):
            with tarfile.open(root / shard) as tar:
                images = [member for member in tar if member.name.count(".") == 1]
                pairs.append({m.name: tar.extractfile(m).read() for m in images
                              if m.name.endswith(".png")})  # fmt: skip
        assert pairs[0] == pairs[1] and pairs[0]
    written = Index.open(tmp_path / "out").vocabulary
    space = LabelSpace.union({"pseudo": written, "val": VOCABULARY})
    assert space.vocabulary.uids == (*WRITTEN, "ghost")


def test_a_stopped_run_goes_on_and_another_is_refused(made, tmp_path):
    config, out = config_of(made, tmp_path / "out"), tmp_path / "out"
    first, before = label(config), contents_of(tmp_path / "out")
    (out / "shard-000001.tar").unlink()
    (out / ".build" / "shard-000001.tar.json").unlink()
    again = label(config)
    assert (first.build.num_resumed, again.build.num_resumed) == (0, 2)
    assert contents_of(out) == before and list(masks_of(out)) == [key(i) for i in range(9)]
    assert again.counts == first.counts and again.num_missing == first.num_missing
    with pytest.raises(ValueError, match="of other input or options"):
        label(replace(config, fusion=EPS_RULES))
    other = label(replace(config, fusion=EPS_RULES, overwrite=True))
    assert other.counts.unknown == HEIGHT * WIDTH  # of the image without labels
    assert other.build.num_resumed == 0


def test_only_the_first_images(made, tmp_path):
    report = label(config_of(made, tmp_path / "out", max_images=5, num_pictures=9))
    assert report.num_images == 5 and report.left_out == {"ghost": 1}
    assert [len(masks_of(tmp_path / "out")), report.num_maps] == [5, 4]
    assert len([*(tmp_path / "out" / "panels").glob("*.png")]) == 5


def test_saliency_takes_the_place_of_the_background(made, tmp_path):
    for number in range(NUM_IMAGES):
        path = tmp_path / "saliency" / f"{key(number)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.where(truth(number) == BACKGROUND, 10, 250).astype(np.uint8)
        Image.fromarray(values).save(path)
    config = config_of(made, tmp_path / "out", saliency=str(tmp_path / "saliency"))
    report = label(config)
    assert report.counts.conflict + report.counts.salient + report.counts.confident > 0
    Image.fromarray(values[:, :-1]).save(path)
    with pytest.raises(ValueError, match=r"35 x 24 pixels but the image is 36 x 24"):
        label(replace(config, out=tmp_path / "other"))
    path.unlink()
    with pytest.raises(ValueError, match=r"has no saliency map"):
        label(replace(config, out=tmp_path / "third"))


def test_from_predicted_maps(made, tmp_path):
    """Written labels equal maps and fusion done here."""
    config = config_of(
        made, tmp_path / "out", maps="predicted", scales=(1.0, 1.5), max_images=3, device="cpu",
        checkpoint=str(made / "runs" / "plain"), fusion=FusionConfig(use_crf=False),
        num_pictures=1,
    )  # fmt: skip
    report = label(config)
    assert report.num_missing == 0 and report.num_maps == 3
    checkpoint = Checkpoint(f"{config.checkpoint}/checkpoints/step-00000012")
    method = build_method(checkpoint.config, checkpoint.label_space)
    method.load_state_dict(checkpoint.weights())
    for number, mask in enumerate(masks_of(tmp_path / "out").values()):
        image = np.asarray(Image.open(io.BytesIO(picture(number))))
        class_id = (DOG, CAT, COW)[number]  # the label space is the source's vocabulary
        maps = predicted_maps(method, torch.from_numpy(image.copy()).permute(2, 0, 1), [class_id],
                              scales=(1.0, 1.5), flip=True).maps  # fmt: skip
        expected = fuse(maps, [1 + number], image, None, config.fusion, background=0).labels
        np.testing.assert_array_equal(mask.astype(np.int64), expected % 65536)


def test_predicted_maps_are_what_they_say(made):
    checkpoint = Checkpoint(str(made / "runs" / "plain" / "checkpoints" / "step-00000012"))
    method = build_method(checkpoint.config, checkpoint.label_space)
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(picture(5))))).permute(2, 0, 1)
    image = torch.nn.functional.pad(image, (0, 28, 0, 8))  # 32 x 64: whole positions at scale 1, 2
    classes = [DOG, CAT, COW]
    total = torch.zeros(3, 32, 64)
    with evaluation_mode(method):
        for scale in (1, 2):
            small = resize_image(image, (32 * scale, 64 * scale))[None]
            for flip in (False, True):
                view = small.flip(-1) if flip else small
                low = method.predict(view, torch.tensor(classes)).dense().relu()
                for position in range(3):
                    low[0, position] /= max(float(low[0, position].max()), 1e-30)
                up = torch.nn.functional.interpolate(low, small.shape[-2:], mode="bilinear")
                up = up.flip(-1) if flip else up
                total += torch.nn.functional.interpolate(up, (32, 64), mode="bilinear")[0]
    expected = total / total.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    maps = predicted_maps(method, image, classes, scales=(1.0, 2.0), flip=True).maps
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert set(maps.max(axis=(1, 2))) <= {0.0, 1.0} and maps.max() == 1


def test_maps_by_class_and_image(made):
    read = Checkpoint(str(made / "runs" / "maps" / "checkpoints" / "step-00000012")).reader("maps")
    for preload in (False, True):
        maps = AccumulatedMaps(read, preload=preload)
        found = maps(key(5), [DOG, CAT, COW, 99])
        assert found.num_missing == 2 and found.maps.shape == (4, GRID, GRID)
        assert found.maps[1].max() > 200 and found.maps[2].max() > 200
        assert not found.maps[[0, 3]].any()
        assert maps("set/nowhere", [DOG]).num_missing == 1 == maps(key(7), [CAT]).num_missing
        assert maps(key(4), []).maps.shape == (0, GRID, GRID)


def test_what_is_refused(made, tmp_path):
    plain = config_of(made, tmp_path / "out", checkpoint=str(made / "runs" / "plain"))
    with pytest.raises(ValueError, match=r"no accumulated maps.*--maps predicted"):
        label(plain)
    with pytest.raises(ValueError, match=r"--checkpoint .*no whole checkpoint there"):
        label(replace(plain, checkpoint=str(tmp_path)))
    foreign = tmp_path / "foreign"
    write_shard(foreign, 0, [Sample("a", picture(0), "png", (0,))], num_classes=1)
    finish(foreign, Vocabulary((Category("zebra", "zebra"),)))
    with pytest.raises(ValueError, match=r"1 classes that the run does not know.*'zebra'"):
        label(config_of(made, tmp_path / "out", data=str(foreign)))
    for changes, message in (
        ({"out": made / "data"}, "another folder than --data"),
        ({"truth": str(tmp_path / "out")}, "another folder than --truth"),
        ({"maps": "drawn"}, "--maps is 'drawn'"),
        ({"scales": ()}, "--scales is"),
        ({"workers": -1}, "--workers is -1"),
        ({"max_images": 0}, "--max-images is 0"),
        ({"background": ""}, "--background is ''"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(made, **({"out": tmp_path / "out"} | changes))


def test_an_unreadable_image_is_left_out_and_counted(made, tmp_path):
    good = picture(0)
    samples = [Sample(key(0), good[:-30], "png", (DOG,)), Sample(key(1), picture(1), "png", (CAT,))]
    write_shard(tmp_path / "data", 0, samples, num_classes=len(VOCABULARY))
    finish(tmp_path / "data", VOCABULARY)
    config = config_of(made, tmp_path / "out", data=str(tmp_path / "data"), num_pictures=2)
    report = label(config)
    assert report.num_images == 1 and [name for name, _ in report.build.skipped] == [key(0)]
    assert "1 could not be read" in str(report)
    assert len([*(tmp_path / "out" / "panels").glob("*.png")]) == 1


def test_the_command(made, tmp_path, capsys):
    out = tmp_path / "out"
    main(["label", "--checkpoint", str(made / "runs" / "maps"), "--data", str(made / "data"),
          "--out", str(out), "--workers", "0", "--no-use-crf", "--confident", "None",
          "--truth", str(made / "data"), "--num-pictures", "1"])  # fmt: skip
    text = capsys.readouterr().out
    assert "9 images labelled" in text and "mIoU" in text and f"{out}/panels" in text
    with pytest.raises(SystemExit, match=r"error: --max-images is -3"):
        main(["label", "--checkpoint", "x", "--data", "y", "--out", str(out),
              "--max-images", "-3"])  # fmt: skip


@pytest.mark.slow
def test_ray_tasks_write_the_same(made, tmp_path):
    label(config_of(made, tmp_path / "here"))
    label(config_of(made, tmp_path / "ray", workers=2))
    assert contents_of(tmp_path / "here") == contents_of(tmp_path / "ray")
