"""Vocabularies and the label space that they share."""

import json

import numpy as np
import pytest

from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary


def vocabulary(*uids: str, origin: str = "") -> Vocabulary:
    return Vocabulary(tuple(Category(uid, f"name of {uid}") for uid in uids), origin)


def test_a_file_comes_back_as_it_went(tmp_path):
    made = Vocabulary((Category("n1", "chair", ("seat", "Stuhl")), Category("n2", "ôtter")))
    made.save(tmp_path / "vocabulary.json")
    read = Vocabulary.load(tmp_path / "vocabulary.json")
    assert read == made
    assert read.names == ("chair", "ôtter")
    assert read.index("n2") == 1
    assert len(read) == 2


def test_an_unknown_uid_names_the_file_and_the_nearest():
    with pytest.raises(KeyError, match=r"here\.json.*'n02085936'.*did you mean 'n02085937'"):
        vocabulary("n02085937", origin="here.json").index("n02085936")


def test_a_uid_given_twice_is_an_error():
    with pytest.raises(ValueError, match=r"uid 'n1' is given twice, as class 0 and as class 2"):
        vocabulary("n1", "n2", "n1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", r"the file is \[\]; it must be an object"),
        ('{"format": 2, "categories": []}', "format is 2; it must be 1, as Vocabulary.save"),
        ('{"format": 1, "categories": null}', "categories is None; it must be a list"),
        ('{"format": 1, "categories": [7]}', "categories.0 is 7; it must be an object"),
        ('{"format": 1, "categories": [{"uid": "n1"}]}', "key 'categories.0.name' is missing"),
        (
            '{"format": 1, "categories": [{"uid": "n1", "name": "a", "colour": 1}]}',
            "unknown key 'categories.0.colour'",
        ),
        ('{"format": 1, "categories": [{"uid": "", "name": "a"}]}', "uid must not be empty"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "vocabulary.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"vocabulary\.json: .*{message}"):
        Vocabulary.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nothing\.json"):
        Vocabulary.load(tmp_path / "nothing.json")


def test_union_is_keyed_by_uid_in_order_of_first_appearance():
    space = LabelSpace.union({"a": vocabulary("x", "y"), "b": vocabulary("z", "y", "w")})
    assert [c.uid for c in space.vocabulary.categories] == ["x", "y", "z", "w"]
    assert space.to_union["a"].tolist() == [0, 1]
    assert space.to_union["b"].tolist() == [2, 1, 3]
    assert space.to_union["b"].dtype == np.int32
    assert space.classes("b").tolist() == [1, 2, 3]


def test_one_background_alone():
    ours, theirs = Category("background", "background"), Category("name:background", "Background")
    sources = {"train": Vocabulary((ours,), "a.json"), "val": Vocabulary((theirs,), "b.json")}
    with pytest.raises(ValueError, match=r"several uids.*'name:background': 'b\.json'.*relabel"):
        LabelSpace.union(sources)
    assert len(LabelSpace.union(sources, {"val": {"name:background": ours}})) == 1


def test_relabelling_merges_classes_and_counts_them():
    raw = vocabulary("wall-brick", "tree", "wall-tile", "wall-wood")
    wall = Category("wall", "wall")
    relabel = {"coco": {uid: wall for uid in raw.uids if uid.startswith("wall")}}
    ade = Vocabulary((Category("wall", "wall"),))
    space = LabelSpace.union({"coco": raw, "ade": ade}, relabel)
    assert space.to_union["coco"].tolist() == [0, 1, 0, 0]
    assert space.to_union["ade"].tolist() == [0]
    assert space.classes("coco").tolist() == [0, 1]
    assert space.multiplicity("coco").tolist() == [3, 1]
    assert len(space) == 2


def test_one_uid_with_two_meanings_names_both_files():
    first = Vocabulary((Category("n1", "crane", ("bird",)),), "birds.json")
    second = Vocabulary((Category("n1", "crane machine"),), "machines.json")
    with pytest.raises(ValueError, match=r"'n1' means 'crane' in .*birds.json but 'crane machine'"):
        LabelSpace.union({"a": first, "b": second})


def test_a_common_synonym_makes_one_class_with_all_names():
    first = Vocabulary((Category("n1", "tv", ("Television-Receiver",)),))
    second = Vocabulary((Category("n1", "television_receiver", ("set",)),))
    merged = LabelSpace.union({"a": first, "b": second}).vocabulary.categories
    assert merged == (Category("n1", "tv", ("Television-Receiver", "television_receiver", "set")),)


def test_relabelling_what_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="'c': known are"):
        LabelSpace.union({"a": vocabulary("x")}, {"c": {}})
    with pytest.raises(ValueError, match="no class with uid 'q'"):
        LabelSpace.union({"a": vocabulary("x")}, {"a": {"q": Category("x", "x")}})


def test_label_space_through_json():
    space = LabelSpace.union({"a": vocabulary("x", "y"), "b": vocabulary("y", "z")})
    assert LabelSpace.from_json(json.loads(json.dumps(space.to_json()))) == space
    with pytest.raises(ValueError, match="source 'c' is not in the label space; known are"):
        space.classes("c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to_union": None}, "to_union is None; it must be an object"),
        ({"to_union": {"a": [0, "1"]}}, "to_union.a.1 is '1'; it must be of type int"),
        ({"to_union": {"a": [0, -1, 9]}}, r"to_union.a is \[-1, 9\]; it must be ids of 2 classes"),
        ({"vocabulary": []}, r"vocabulary is \[\]; it must be an object"),
        ({"version": 1}, "unknown key 'version'"),
    ],
)
def test_an_edited_label_space_says_what_is_wrong(changes, message):
    space = LabelSpace.union({"a": vocabulary("x", "y")})
    with pytest.raises(ValueError, match=rf"run\.json: {message}"):
        LabelSpace.from_json(space.to_json() | changes, "run.json")
