"""Which class is meant, and what is said of one that is not there."""

from __future__ import annotations

import pytest

from engine.class_names import class_label, class_names, find_class
from models import build_model
from util.errors import UserError

DOGS = ["golden retriever", "Labrador retriever", "tabby", "crane", "Egyptian cat", "crane", "7", *"abcdefgh"]


def test_by_name_or_number() -> None:
    assert find_class("golden retriever", DOGS, 15) == 0
    assert find_class(" labrador  Retriever ", DOGS, 15) == 1
    assert find_class("2", DOGS, 15) == find_class(2, DOGS, 15) == 2
    assert find_class("7", DOGS, 15) == 6  # a name that looks like a number is a name
    assert find_class(7, DOGS, 15) == 7
    assert find_class("3", None, 4) == 3
    assert class_label(1, DOGS) == "Labrador retriever"
    assert class_label(1, None) == "class 1"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("retriever", "no class 'retriever'; near it are golden retriever, Labrador retriever"),
        ("tabbi", "no class 'tabbi'; near it are tabby"),
        ("egiptian cat", "near it are Egyptian cat"),
        ("zzzzzzzz", "no class 'zzzzzzzz'; it has golden retriever, Labrador retriever and 13 more"),
        ("", "no class ''"),
        ("-1", "no class '-1'"),
        ("15", "class 15 is out of range; the model has classes 0 to 14"),
        (-1, "class -1 is out of range"),
        ("crane", "'crane' is the name of the classes 3 and 5: give the number"),
    ],
)
def test_unknown_ones_are_named_with_the_nearest(wanted: int | str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_class(wanted, DOGS, 15)


def test_few_or_no_names() -> None:
    with pytest.raises(UserError, match="no class 'x'; it has a, b"):
        find_class("x", ["a", "b"], 2)
    with pytest.raises(UserError, match="its classes have no names: give a number, 0 to 4"):
        find_class("x", None, 5)


def test_classes_without_a_name_of_their_own() -> None:
    config = build_model("lpd_debug", img_size=16, stride=4, class_num=3, vocab_size=12).config
    assert class_names(config, ["a", "b"]) == ["a", "b", "class 2"]
    assert class_names(config, None) is None
