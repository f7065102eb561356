"""ImageNet-21K on miniatures: synset tars, synset folders, and shards that others made."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Vocabulary

TENCH, GOLDFISH, TEDDY, BLEACHER = "n01440764", "n01443537", "n04399382", "n09859684"


@pytest.fixture
def imagenet(load_recipe):
    return load_recipe("imagenet21k")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path, picture_files):
    """`tars({wnid: number of images})`: n01440764.tar with n01440764_0.JPEG ..."""
    jpeg = picture_files[2]

    def write(counts: dict[str, int]):
        root = tmp_path / "fall11"
        root.mkdir()
        for wnid, count in counts.items():
            with tarfile.open(root / f"{wnid}.tar", "w") as tar:
                for number in range(count):
                    add(tar, f"{wnid}_{number}.JPEG", jpeg(int(wnid[1:]) + number))
        return root

    return write


def test_synset_tars(imagenet, tars, options, read_back, picture_files, capsys):
    root = tars({TENCH: 5, GOLDFISH: 3, BLEACHER: 2})
    choice = options(samples_per_shard=3, verify=True)
    report = imagenet.build(imagenet.Raw(root, choice))
    assert (report.num_samples, report.num_shards) == (8, 3)
    assert (
        "21839 classes have no image, 1 synsets are no class (n09859684" in capsys.readouterr().out
    )
    vocabulary = Vocabulary.load(choice.out / "vocabulary.json")
    assert len(vocabulary) == 21_841
    content = read_back(choice.out)
    image, labels, _ = content[f"{GOLDFISH}_2"]
    assert image == picture_files[2](1443537 + 2)  # bytes untouched
    category = vocabulary.categories[labels[0]]
    assert (category.uid, category.name) == (GOLDFISH, "goldfish")
    assert category.synonyms == ("Carassius auratus",)
    index = Index.open(choice.out)
    per_shard = [{int(label) for label in index.row(row).labels} for row in range(len(index))]
    assert len(set().union(*per_shard[:3])) == 2  # shards mix classes


def test_synset_folders_and_odd_names(imagenet, tmp_path, options, picture_files, read_back):
    write_image = picture_files[0]
    root = tmp_path / "winter21"
    write_image(root / TENCH / f"{TENCH}_10.JPEG")
    write_image(root / GOLDFISH / "my fish.v2.jpg")
    Image.new("RGB", (4, 4)).save(root / GOLDFISH / f"{GOLDFISH}_3.JPEG", "PNG")
    (root / GOLDFISH / f"{GOLDFISH}_4.JPEG").write_bytes(b"<html>")
    report = imagenet.build(imagenet.Raw(root, options(), release="winter21"))
    assert (report.num_samples, report.skipped[0][0]) == (3, f"{GOLDFISH}_4")
    assert len(Vocabulary.load(options().out / "vocabulary.json")) == 2
    row_of = {Index.open(options().out).row(row).key for row in range(3)}
    assert row_of == {f"{TENCH}_10", f"{GOLDFISH}/my%20fish%2Ev2", f"{GOLDFISH}_3"}


def test_subsets(imagenet, tars, tmp_path, options):
    root = tars({TENCH: 5, GOLDFISH: 3, "n03636248": 2, BLEACHER: 1})
    out = iter(range(9))

    def classes(**changes):
        choice = options(out=tmp_path / f"out{next(out)}")
        imagenet.build(imagenet.Raw(root, choice, **changes))
        return Vocabulary.load(choice.out / "vocabulary.json")

    ade = classes(subset="imagenet_124")
    assert len(ade) == 124 and ade.categories[ade.index("n03636248")].name == "lamp"
    assert len(classes(subset="imagenet_585")) == 585
    assert classes(more_than=2).uids == (TENCH, GOLDFISH)
    listed = tmp_path / "wnids.txt"
    listed.write_text(f"{GOLDFISH}\nn03636248 lamp\n")
    assert classes(wnids=listed).uids == (GOLDFISH, "n03636248")
    assert BLEACHER in classes(release="google")


def test_releases_and_the_two_synsets_outside_fall11(imagenet):
    fall11, google = (imagenet.release_vocabulary(name) for name in ("fall11", "google"))
    assert (len(fall11), len(google)) == (21_841, 21_843)
    assert set(google.uids) - set(fall11.uids) == {"n03931044", BLEACHER}
    assert fall11.uids == tuple(sorted(fall11.uids)) and TEDDY not in fall11


def test_listed_subsets_lie_in_the_releases(imagenet, real_data):
    fall11, google = (imagenet.release_vocabulary(name) for name in ("fall11", "google"))
    wnids = json.loads((real_data / "vocab" / "imagenet_11276.json").read_text())
    assert all(wnid in google for wnid in wnids)
    assert [wnid for wnid in wnids if wnid not in fall11] == [BLEACHER]


def test_limit_draws_across_classes(imagenet, tars, options):
    root = tars({TENCH: 30, GOLDFISH: 30})
    report = imagenet.build(imagenet.Raw(root, options(limit=20)))
    counts = Index.open(options().out).class_image_counts(21_841)
    assert report.num_samples == 20 and np.count_nonzero(counts) == 2


def test_no_shard_has_more_megabytes_than_asked_for(imagenet, tmp_path, options, picture_files):
    """Of folders too; sizes that differ are added up, not taken for their mean."""
    root = tmp_path / "in"
    for number in range(12):
        path = root / TENCH / f"{TENCH}_{number}.JPEG"
        picture_files[0](path, number)
        with open(path, "ab") as stream:
            stream.write(bytes(100_000 if number % 3 else 500_000))
    choice = options(megabytes_per_shard=1)
    imagenet.build(imagenet.Raw(root, choice))
    index = Index.open(choice.out)
    parts = np.split(index.numbers("image_size"), index.shard_starts[1:-1])
    assert len(parts) > 1 and all(part.sum() <= 2**20 for part in parts)


def test_bad_input(imagenet, tars, tmp_path, options):
    with pytest.raises(ValueError, match="no folder"):
        imagenet.build(imagenet.Raw(tmp_path / "nowhere", options()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no n01440764.tar"):
        imagenet.build(imagenet.Raw(tmp_path / "empty", options()))
    root = tars({TENCH: 3})
    content = (root / f"{TENCH}.tar").read_bytes()
    (root / f"{TENCH}.tar").write_bytes(content[:900])
    with pytest.raises(ValueError, match=f"{TENCH}.tar is cut short"):
        imagenet.build(imagenet.Raw(root, options()))
    with pytest.raises(ValueError, match=r"none has|the most is|no images"):
        (root / f"{TENCH}.tar").write_bytes(content)
        imagenet.build(imagenet.Raw(root, options(), more_than=3))
    (tmp_path / "list.txt").write_text("n99999999")
    with pytest.raises(ValueError, match=r"n99999999.*no synsets of fall11"):
        imagenet.build(imagenet.Raw(root, options(), wnids=tmp_path / "list.txt"))


@pytest.mark.parametrize("form", ["cls", "json"])
def test_ready_made_shards_are_indexed_where_they_lie(imagenet, tmp_path, picture_files, form):
    """`.cls` holds the class's number in the order of synset ids, `.json` a "label" or so."""
    root = tmp_path / "wds"
    root.mkdir()
    fall11 = imagenet.release_vocabulary("fall11")
    with tarfile.open(root / "imagenet22k-train-0000.tar", "w") as tar:
        for number, wnid in enumerate((TENCH, GOLDFISH)):
            add(tar, f"{wnid}_{number}.jpg", picture_files[2](number))
            label = fall11.index(wnid)
            text = str(label) if form == "cls" else f'{{"label": {label}, "width": 16}}'
            add(tar, f"{wnid}_{number}.{form}", text.encode())
    path = imagenet.build(imagenet.Ready(root))
    index = Index.open(path.parent)
    assert [index.row(row).labels[0] for row in range(2)] == [
        fall11.index(TENCH),
        fall11.index(GOLDFISH),
    ]
