"""Options are fields of dataclasses: their flags, help and checks follow from them."""

import argparse
from dataclasses import dataclass

import pytest

from moco_scale.config.options import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    UNIT,
    Range,
    add_flags,
    at_least,
    given,
    option,
    out_of_range,
    refuse,
)
from moco_scale.utils.errors import UserError


@dataclass(frozen=True)
class Oven:
    heat: float = option(180.0, "in degrees, 100% of it", within=POSITIVE)
    trays: int = option(0, "0: as many as fit", within=POSITIVE, aliases=("--sheets",))
    fan: bool = option(True, "moves the air")
    grill: bool = option(False, "from above", switch=True)
    minutes: tuple[int, ...] = option((10, 5), "of each turn", flag="--turns")
    cake: str = option("", "what is in it", choices=("plum", "poppy"))
    room: str = "kitchen"


def read(*argv: str) -> Oven:
    parser = argparse.ArgumentParser()
    add_flags(parser, Oven)
    return Oven(**given(vars(parser.parse_args(argv)), Oven))


def test_a_flag_gives_its_field_a_value_and_others_have_their_defaults() -> None:
    assert read() == Oven()
    assert read("--heat", "200") == Oven(heat=200.0)
    assert read("--sheets", "2") == read("--trays", "2") == Oven(trays=2)
    assert read("--no-fan", "--grill") == Oven(fan=False, grill=True)
    assert read("--turns", "3,4", "5") == Oven(minutes=(3, 4, 5))
    assert read("--cake", "plum") == Oven(cake="plum")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--trays", "x"), "argument --trays/--sheets: invalid whole number value: 'x'"),
        (("--heat", "hot"), "argument --heat: invalid number value: 'hot'"),
        (("--cake", "pie"), "argument --cake: invalid choice: 'pie'"),
        (("--no-grill",), "unrecognized arguments: --no-grill"),
        (("--room", "x"), "unrecognized arguments: --room"),
    ],
)
def test_what_cannot_be_read_ends_with_the_flags_name(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(*argv)
    assert said in capsys.readouterr().err


def test_help_says_every_default_once_unless_it_is_found_elsewhere() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Oven, unsaid={"fan"})
    text = " ".join(parser.format_help().split())
    for words in (
        "in degrees, 100% of it (default: 180)",
        "0: as many as fit (default: 0)",
        "moves the air --grill from above --turns",
        "of each turn (default: 10,5)",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("numbers", "inside", "outside"),
    [
        (POSITIVE, (1e-9, 5), (0, -1)),
        (NOT_NEGATIVE, (0, 5), (-1e-9,)),
        (UNIT, (0, 0.5, 1), (-0.1, 1.1)),
        (SHARE, (0.1, 1), (0, 1.1)),
        (at_least(2), (2, 3), (1.9,)),
    ],
)
def test_ranges(numbers: Range, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert all(value in numbers for value in inside)
    assert not any(value in numbers for value in outside)


def test_all_numbers_that_cannot_be_are_said_at_once() -> None:
    assert out_of_range(Oven()) == [], "a default is never out of range"
    wrong = out_of_range(Oven(heat=float("nan"), trays=-1), Oven(heat=-5.0))
    assert wrong == [
        "--heat nan: must be a finite number",
        "--trays -1: must be greater than 0",
        "--heat -5.0: must be greater than 0",
    ]
    with pytest.raises(UserError, match=r"^these cannot be:\n  --heat nan.*\n  --trays.*\n"):
        refuse(wrong)
    with pytest.raises(UserError, match=r"^one$"):
        refuse(["one"])
    refuse([])
