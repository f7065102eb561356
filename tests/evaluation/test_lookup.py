"""Classes are found by uid, name or synonym, and doubt is an error."""

from __future__ import annotations

import pytest

from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.evaluation.lookup import find_classes

VOCABULARY = Vocabulary(
    (
        Category("n1", "crane", ("wading bird",)),
        Category("n2", "crane", ("lifting device",)),
        Category("n3", "traffic light", ("stoplight",)),
        Category("n4", "sofa", ("couch",)),
        Category("n5", "couch", ("daybed",)),
    )
)


def test_any_spelling_finds_the_class():
    wanted = ["n2", "Traffic_Light", "traffic-light ", "stoplight", "daybed"]
    assert find_classes(VOCABULARY, wanted) == [1, 2, 4]


def test_a_name_counts_before_a_synonym():
    assert find_classes(VOCABULARY, ["couch"]) == [4]


def test_doubt_is_an_error_that_lists_the_uids():
    with pytest.raises(ValueError, match=r"'crane' is the name of 2 classes: n1 \(crane\), n2"):
        find_classes(VOCABULARY, ["crane"])


def test_unknown_names_get_neighbours():
    with pytest.raises(ValueError, match=r"'trafic light' is no uid.*nearest: traffic light"):
        find_classes(VOCABULARY, ["trafic light"])
    with pytest.raises(ValueError, match=r"5 known classes$"):
        find_classes(VOCABULARY, ["zzzz"])
