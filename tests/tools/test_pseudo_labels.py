"""A label run: the same images out with masks, whatever was known of them; stopped and repeated."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import jpeg
from PIL import Image
from reference.sliding import dense_logits
from train.tiny import save

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.cli import main
from memseg_dist.config import EngineConfig, RunConfig
from memseg_dist.data.augment import AugmentConfig, resize_image
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.evaluation.sliding import Inference
from memseg_dist.memory.layouts import image_id
from memseg_dist.memory.state import Rows
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.methods.labeller import ArgmaxLabeller, Labelled, LabellerConfig
from memseg_dist.methods.method import evaluation_mode
from memseg_dist.methods.rca.activation import AccumulatedMaps, predicted_maps
from memseg_dist.methods.rca.fusion import FusionConfig, fuse
from memseg_dist.methods.rca.labeller import ActivationLabeller
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.stages import LabelConfig
from memseg_dist.tools import build
from memseg_dist.tools.pseudo_labels import label
from memseg_dist.tools.pseudo_labels.classes import LabelClasses
from memseg_dist.tools.pseudo_labels.task import LabelTask
from memseg_dist.tools.shards import Sample, finish, write_shard
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.engine import TorchEngine
from memseg_dist.train.platform import Tracker

VOCABULARY = Vocabulary(
    tuple(Category(uid, uid) for uid in ("dog", "ghost", "background", "cat", "cow"))
)
DOG, GHOST, BACKGROUND, CAT, COW = range(5)
COLORS = {DOG: (200, 60, 50), BACKGROUND: (60, 120, 70), CAT: (70, 70, 210), COW: (230, 220, 90)}
WRITTEN = ("background", "dog", "cat", "cow")
HEIGHT, WIDTH, GRID = 24, 36, 12
NOTHING_UNKNOWN = FusionConfig(
    use_crf=False, conflict=None, salient=None, confident=None, min_foreground=0
)
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
            "rows": torch.stack(maps),
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
    settings = {
        "checkpoint": str(made / "runs" / "maps"), "data": str(made / "data"), "out": str(out),
    }  # fmt: skip
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


class Listener(Tracker):
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
    assert (report.build.num_samples, report.num_without_labels) == (9, 1)
    assert (report.counts["maps"], report.counts["maps_missing"]) == (9, 2)
    assert report.counts["maps_without_evidence"] == 2
    assert report.counts["unknown_without_classes"] == HEIGHT * WIDTH
    assert report.counts["unknown_min_foreground"] == 2 * HEIGHT * WIDTH
    assert report.left_out == {"ghost": 1}
    assert report.scores.num_images == 9 and report.scores.excluded.miou() > 80
    text = str(report)
    assert "maps missing: 2" in text and "ghost (1)" in text and "counted as wrong" in text
    assert listener.metrics["label/unknown_percent"] == 100 * report.share_unknown
    assert listener.metrics["step"] == 12
    assert listener.metrics["label/truth_miou_unknown_wrong"] == report.scores.wrong.miou()
    assert len(listener.images) == 5 == len([*(tmp_path / "out" / "panels").rglob("*.png")])
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
    assert again.counts == first.counts
    with pytest.raises(ValueError, match="of other input or options"):
        label(replace(config, labeller=ActivationLabeller(fusion=NOTHING_UNKNOWN)))
    rules = ActivationLabeller(fusion=NOTHING_UNKNOWN)
    other = label(replace(config, labeller=rules, overwrite=True))
    assert other.counts["unknown"] == HEIGHT * WIDTH  # of the image without labels
    assert other.build.num_resumed == 0


def test_other_images_are_another_run(made, tmp_path):
    data = write_data(tmp_path / "data")
    label(config_of(made, tmp_path / "out", data=str(data)))
    for path in data.iterdir():
        path.unlink()
    write_data(data, [*range(8), 9])
    with pytest.raises(ValueError, match="of other input or options"):
        label(config_of(made, tmp_path / "out", data=str(data)))


def test_the_classes_are_hashed_once_not_for_each_shard(made, tmp_path, monkeypatch):
    seen, plain = [], build._plain
    monkeypatch.setattr(build, "_plain", lambda value: seen.append(type(value)) or plain(value))
    label(config_of(made, tmp_path / "out"))
    assert seen.count(LabelTask) == 3 and LabelClasses not in seen


def test_only_the_first_images(made, tmp_path):
    report = label(config_of(made, tmp_path / "out", max_images=5, num_pictures=9))
    assert report.build.num_samples == 5 and report.left_out == {"ghost": 1}
    assert [len(masks_of(tmp_path / "out")), report.counts["maps"]] == [5, 4]
    assert len([*(tmp_path / "out" / "panels").rglob("*.png")]) == 5


def test_saliency_takes_the_place_of_the_background(made, tmp_path):
    for number in range(NUM_IMAGES):
        path = tmp_path / "saliency" / f"{key(number)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.where(truth(number) == BACKGROUND, 10, 250).astype(np.uint8)
        Image.fromarray(values).save(path)
    config = config_of(
        made, tmp_path / "out", labeller=ActivationLabeller(saliency=str(tmp_path / "saliency"))
    )
    report = label(config)
    rules = ("conflict", "salient", "confident")
    assert sum(report.counts[f"unknown_{rule}"] for rule in rules) > 0
    Image.fromarray(values[:, :-1]).save(path)
    with pytest.raises(ValueError, match=r"35 x 24 pixels but the image is 36 x 24"):
        label(replace(config, out=str(tmp_path / "other")))
    path.unlink()
    with pytest.raises(ValueError, match=r"has no saliency map"):
        label(replace(config, out=str(tmp_path / "third")))


def test_from_predicted_maps(made, tmp_path):
    """Written labels equal maps and fusion done here."""
    without_crf = FusionConfig(use_crf=False)
    config = config_of(
        made, tmp_path / "out", max_images=3, device="cpu",
        labeller=ActivationLabeller(maps="predicted", scales=(1.0, 1.5), fusion=without_crf),
        checkpoint=str(made / "runs" / "plain"), num_pictures=1,
    )  # fmt: skip
    report = label(config)
    assert report.counts["maps_missing"] == 0 and report.counts["maps"] == 3
    checkpoint = Checkpoint(f"{config.checkpoint}/checkpoints/step-00000012")
    method = build_method(checkpoint.config, checkpoint.label_space)
    method.load_state_dict(checkpoint.weights())
    for number, mask in enumerate(masks_of(tmp_path / "out").values()):
        image = np.asarray(Image.open(io.BytesIO(picture(number))))
        class_id = (DOG, CAT, COW)[number]  # the label space is the source's vocabulary
        maps = predicted_maps(method, torch.from_numpy(image.copy()).permute(2, 0, 1), [class_id],
                              scales=(1.0, 1.5), flip=True).maps  # fmt: skip
        expected = fuse(maps, [1 + number], image, None, without_crf, background=0).labels
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
    with pytest.raises(ValueError, match=r"no accumulated maps.*--labeller.maps predicted"):
        label(plain)
    with pytest.raises(ValueError, match=r"no run of RCA; use --labeller.maps predicted"):
        label(replace(plain, labeller=ActivationLabeller(maps="intermediate")))
    with pytest.raises(ValueError, match=r"--checkpoint .*no whole checkpoint there"):
        label(replace(plain, checkpoint=str(tmp_path)))
    other = tmp_path / "other"
    write_shard(other, 0, [Sample("a", picture(0), "png", (0,))], num_classes=1)
    finish(other, Vocabulary((Category("zebra", "zebra"),)))
    with pytest.raises(ValueError, match=r"1 classes that the run does not know.*'zebra'"):
        label(config_of(made, tmp_path / "out", data=str(other)))
    with pytest.raises(ValueError, match=r"truth .*other: . of the . classes"):
        label(config_of(made, tmp_path / "unbegun", truth=str(other)))
    assert not (tmp_path / "unbegun").exists()
    for changes, message in (
        ({"out": str(made / "data")}, "another folder than --data"),
        ({"truth": str(tmp_path / "out")}, "another folder than --truth"),
        ({"workers": -1}, "--workers is -1"),
        ({"max_images": 0}, "--max-images is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(made, **({"out": str(tmp_path / "out")} | changes))
    for changes, message in (
        ({"maps": "drawn"}, r"labeller\.maps is 'drawn'"),
        ({"scales": ()}, r"labeller\.scales is"),
        ({"background": ""}, r"labeller\.background is ''"),
    ):
        with pytest.raises(ValueError, match=message):
            ActivationLabeller(**changes)


def test_an_unreadable_image_is_left_out_and_counted(made, tmp_path):
    cut = jpeg()[:-30]  # of which no checksum tells when it is written
    samples = [Sample(key(0), cut, "jpg", (DOG,)), Sample(key(1), picture(1), "png", (CAT,))]
    write_shard(tmp_path / "data", 0, samples, num_classes=len(VOCABULARY))
    finish(tmp_path / "data", VOCABULARY)
    config = config_of(made, tmp_path / "out", data=str(tmp_path / "data"), num_pictures=2)
    report = label(config)
    assert report.build.num_samples == 1 and [name for name, _ in report.build.skipped] == [key(0)]
    assert "1 could not be read" in str(report)
    assert len([*(tmp_path / "out" / "panels").rglob("*.png")]) == 1


def test_the_command(made, tmp_path, capsys):
    out = tmp_path / "out"
    main(["label", "--checkpoint", str(made / "runs" / "maps"), "--data", str(made / "data"),
          "--out", str(out), "--workers", "0", "--labeller.fusion.no-use-crf",
          "--labeller.fusion.confident", "None",
          "--truth", str(made / "data"), "--num-pictures", "1"])  # fmt: skip
    text = capsys.readouterr().out
    assert "9 images labelled" in text and "mIoU" in text and f"{out}/panels" in text
    main(["label", "--checkpoint", str(made / "runs" / "plain"), "--data", str(made / "data"),
          "--out", str(tmp_path / "hard"), "--workers", "0", "--num-pictures", "1",
          "--labeller.kind", "argmax", "--labeller.threshold", "0.2"])  # fmt: skip
    assert "low_confidence" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main(["label", "--checkpoint", "x", "--data", "y", "--out", "z", "--labeller.kind", "oaa"])
    assert refused.value.code == 2
    with pytest.raises(SystemExit, match=r"error: --max-images is -3"):
        main(["label", "--checkpoint", "x", "--data", "y", "--out", str(out),
              "--max-images", "-3"])  # fmt: skip


def write_unlabelled(root: Path, numbers=range(3)) -> Path:
    samples = [Sample(key(number), picture(number), "png") for number in numbers]
    write_shard(root, 0, samples, num_classes=1)
    finish(root, Vocabulary((Category("anything", "anything"),)))
    return root


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_argmax_of_unlabelled_images(made, tmp_path, threshold):
    """All trained classes compete; what is written equals the softmax of the whole prediction."""
    data = write_unlabelled(tmp_path / "data")
    config = config_of(
        made, tmp_path / "out", data=str(data), checkpoint=str(made / "runs" / "plain"),
        labeller=ArgmaxLabeller(threshold=threshold), device="cpu", num_pictures=1,
    )  # fmt: skip
    report = label(config)
    written = Index.open(tmp_path / "out")
    assert written.vocabulary.uids == ("dog", "cat", "cow")
    checkpoint = Checkpoint(f"{config.checkpoint}/checkpoints/step-00000012")
    method = build_method(checkpoint.config, checkpoint.label_space).eval()
    method.load_state_dict(checkpoint.weights())
    num_unknown = 0
    for number, mask in enumerate(masks_of(tmp_path / "out").values()):
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(picture(number))))).permute(2, 0, 1)
        small = resize_image(image, (512, 768))  # the validation's default fit
        ids = torch.tensor([DOG, CAT, COW])
        with torch.no_grad():
            logits = dense_logits(
                method.predict, small, ids, Inference("slide"), out_size=(HEIGHT, WIDTH)
            )
        confidence, best = logits.softmax(dim=0).max(dim=0)
        is_unknown = mask == 65535
        assert (is_unknown == (confidence < threshold).numpy()).mean() > 0.99
        assert (mask == best.numpy())[~is_unknown].all()
        num_unknown += is_unknown.sum()
    assert report.counts["unknown"] == report.counts["unknown_low_confidence"] == num_unknown
    assert report.num_without_labels == 3
    assert report.share_unknown == 0 if threshold == 0 else report.share_unknown < 1


def test_argmax_keeps_to_the_labels_of_an_image(made, tmp_path):
    plain = str(made / "runs" / "plain")
    labeller = ArgmaxLabeller(threshold=0)
    label(config_of(made, tmp_path / "own", checkpoint=plain, labeller=labeller))
    label(config_of(made, tmp_path / "all", checkpoint=plain,
                    labeller=replace(labeller, restrict_to_labels=False)))  # fmt: skip
    own, every = masks_of(tmp_path / "own"), masks_of(tmp_path / "all")
    assert np.unique(own[key(0)]).tolist() == [0] and np.unique(own[key(1)]).tolist() == [1]
    assert set(np.unique(own[key(5)])) <= {1, 2}
    assert np.array_equal(own[key(4)], every[key(4)])  # no label that counts: all compete
    assert any(not np.array_equal(own[name], every[name]) for name in own)


@dataclass(frozen=True)
class BrightLabeller(LabellerConfig):
    """A user's own: bright pixels are the first trained class, dark ones its background."""

    kind: str = "bright"
    level: int = 100

    @property
    def background_uid(self) -> str:
        return "dark"

    @property
    def runs_network(self) -> bool:
        return False

    def open(self, model):
        dark, first = len(model.label_space), int(model.trained[0])

        def find(picture):
            level = picture.image.float().mean(dim=0).numpy()
            mask = np.where(level > self.level, first, dark)
            mask[0] = -1
            return Labelled(mask, dark, {"rows": 1})

        return find


class LostLabeller(BrightLabeller):
    """It finds a class that no source trained."""

    def open(self, model):
        return lambda picture: Labelled(np.full((HEIGHT, WIDTH), GHOST))


def test_a_labeller_of_ones_own_and_a_class_that_it_may_not_write(made, tmp_path):
    data = str(write_unlabelled(tmp_path / "data"))
    config = config_of(made, tmp_path / "out", data=data, labeller=BrightLabeller())
    report = label(config)
    assert Index.open(tmp_path / "out").vocabulary.uids == ("dark", "dog", "cat", "cow")
    for number, mask in enumerate(masks_of(tmp_path / "out").values()):
        level = np.array(Image.open(io.BytesIO(picture(number))), dtype=float).mean(axis=2)
        assert (mask[0] == 65535).all() and (mask[1:] == (level[1:] > 100)).all()
    assert report.counts["rows"] == 3 and report.counts["unknown"] == 3 * WIDTH
    (tmp_path / "out" / "shard-000000.tar").unlink()
    again = label(config)
    assert again.build.num_resumed == 0 and again.counts == report.counts
    with pytest.raises(ValueError, match="of other input or options"):
        label(replace(config, labeller=BrightLabeller(level=50)))
    with pytest.raises(ValueError, match=r"found the label-space ids \[1\], which are not written"):
        label(replace(config, labeller=LostLabeller(kind="lost"), overwrite=True))


@pytest.mark.slow
def test_ray_tasks_write_the_same(made, tmp_path):
    label(config_of(made, tmp_path / "here"))
    label(config_of(made, tmp_path / "ray", workers=2))
    assert contents_of(tmp_path / "here") == contents_of(tmp_path / "ray")
