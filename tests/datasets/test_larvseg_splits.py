"""The split protocols' published counts, and the vocabularies that they are made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.tools.shipped import recipe

split = recipe("larvseg_splits").split
VOCABULARIES = Path(__file__).resolve().parents[2] / "datasets" / "vocabularies"


def load(*names: str) -> dict[str, Vocabulary]:
    return {name: Vocabulary.load(VOCABULARIES / f"{name}.json") for name in names}


@pytest.mark.parametrize(
    ("protocol", "test", "base", "novel", "union"),
    [
        ("table3", "ade20k_150", 58, 92, 251),
        ("head", "ade20k_150", 63, 87, 247),
        ("normalised", "ade20k_150", 63, 87, 247),
        ("table3", "ade20k_847", 92, 755, 914),
        ("head", "ade20k_847", 94, 753, 913),
        ("normalised", "ade20k_847", 98, 749, 909),
    ],
)
def test_published_counts(protocol, test, base, novel, union):
    vocabularies = load("coco_stuff_171", test)
    result = split(protocol, vocabularies, masks=["coco_stuff_171"], test=test)
    assert (len(result.base), len(result.novel), result.num_classes) == (base, novel, union)
    space = LabelSpace.union(vocabularies, result.relabel)
    assert len(space) == union


@pytest.mark.parametrize(
    ("protocol", "distinct", "walls"), [("table3", 159, 7), ("head", 160, 7), ("wordnet", 159, 7)]
)
def test_duplicates_are_merged_before_any_softmax(protocol, distinct, walls):
    """Spec section 2: 171 ids are 160 (raw cut: 159) names, wall 7 times."""
    vocabularies = load("coco_stuff_171", "ade20k_150")
    result = split(protocol, vocabularies, masks=["coco_stuff_171"], test="ade20k_150")
    space = LabelSpace.union(vocabularies, result.relabel)
    assert len(space.classes("coco_stuff_171")) == distinct
    assert space.multiplicity("coco_stuff_171").max() == walls


def test_novel_coverage_of_the_imagenet_subsets():
    """Spec section 5: I124 has 64 of 87 novel and 60 base classes; I585 has 502 of 753 and 83."""
    for subset, test, novel, base in [
        ("imagenet_124", "ade20k_150", 64, 60),
        ("imagenet_585", "ade20k_847", 502, 83),
    ]:
        vocabularies = load("coco_stuff_171", test, subset)
        result = split("head", vocabularies, masks=["coco_stuff_171"], test=test)
        uids = {category.uid for category in result.relabel[subset].values()}
        assert (len(uids & result.novel), len(uids & result.base)) == (novel, base)


def test_wordnet_is_keyed_by_uid_alone():
    coco = Vocabulary((Category("n1", "tv"), Category("coco:wall-brick", "wall-brick")))
    ade = Vocabulary(
        (Category("n1", "television", ("tv",)), Category("n04546855", "wall"), Category("n3", "x"))
    )
    result = split("wordnet", {"coco": coco, "ade": ade}, masks=["coco"], test="ade")
    assert result.base == {"n1", "n04546855"}
    assert result.novel == {"n3"}


def test_wrong_names_are_refused():
    vocabularies = load("coco_stuff_171", "ade20k_150")
    with pytest.raises(ValueError, match=r"table4.*known are"):
        split("table4", vocabularies, masks=["coco_stuff_171"], test="ade20k_150")
    with pytest.raises(ValueError, match="no source 'ade'"):
        split("table3", vocabularies, masks=["coco_stuff_171"], test="ade")


def test_all_vocabularies_make_one_label_space_with_the_whole_of_imagenet():
    """Equal uids share a name everywhere, so no union of the shipped class lists is refused."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-21k-goog")
    lemmas = info.label_descriptions(as_dict=True)
    imagenet = Vocabulary(
        tuple(
            Category(wnid, *(lambda name, *more: (name, more))(*text.split(", ")))
            for wnid, text in lemmas.items()
        )
    )
    names = [path.stem for path in VOCABULARIES.glob("*.json") if not path.stem.endswith("_ids")]
    assert len(names) == 9
    space = LabelSpace.union({**load(*names), "imagenet": imagenet})
    synsets = [uid for uid in space.vocabulary.uids if uid[1:].isdigit()]
    assert set(synsets) - set(lemmas) == {"n04399382"}  # the teddy bear


def test_names_are_the_published_ones(real_data):
    lists = real_data / "vocab"
    published = {"coco_stuff_171": "coco_stuff_171", "ade20k_150": "ade_150", "voc_21": "voc_21"}
    published["cityscapes_19"] = "cityscapes_19"
    for name, file in published.items():
        assert list(load(name)[name].names) == json.loads((lists / f"{file}.json").read_text())
    lip = [name.strip("_").casefold() for name in json.loads((lists / "lip_20.json").read_text())]
    assert [name.replace(" ", "") for name in load("lip_20")["lip_20"].names] == lip
    full = json.loads((lists / "ade_full_847.json").read_text())
    ours = load("ade20k_847")["ade20k_847"]
    assert len(set(ours.names)) == 847
    for category, row in zip(ours.categories, full, strict=True):
        spelled = {part.strip() for part in f"{row['name']}, {row['short']}".split(",")}
        assert spelled <= {category.name, *category.synonyms}, row
    ids = json.loads((VOCABULARIES / "ade20k_847_ids.json").read_text())["object_ids"]
    assert ids == [row["full_id"] for row in full]
    for count in (124, 585):
        subset = load(f"imagenet_{count}")[f"imagenet_{count}"]
        published = json.loads((lists / f"imagenet_{count}.json").read_text())
        assert {item.uid: item.name for item in subset.categories} == {
            wnid: name.replace("-", " ") for wnid, name in published.items()
        }
