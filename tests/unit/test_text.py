"""Lists in messages stay short."""

from moco_scale.utils.text import some_of


def test_a_long_list_says_how_many_more_there_are() -> None:
    assert some_of([]) == ""
    assert some_of(list("abcde")) == "a, b, c, d, e"
    assert some_of(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert some_of(list("abc"), 1, "; ") == "a and 2 more"
