"""Settings that cannot be: refused by name, all at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY

from moco_scale.commands import evaluate_flags
from moco_scale.config.command_line import add_flags, parse
from moco_scale.config.older_flags import EVALUATION, PRETRAINING
from moco_scale.config.resolve import build
from moco_scale.utils.errors import UserError

BAD = [
    "--batch-size 0",
    "--batch-size -8",
    "--epochs 0",
    "--nce-k 0",
    "--nce-t 0.01",
    "--nce-t nan",
    "--nce-t inf",
    "--alpha 1.5",
    "--alpha nan",
    "--momentum -0.1",
    "--crop 0",
    "--crop 1.1",
    "--dim 0",
    "--image-size -1",
    "--print-freq 0",
    "--keep-checkpoints 0",
    "--bn-group-size -2",
    "--bn-group-size 1",
    "--bn-group-size 24",
    "--base-lr -0.1",
    "--base-lr nan",
    "--base-lr inf",
    "--weight-decay -1",
    "--lr-min -0.1",
    "--lr-decay-rate -1",
    "--warmup-epoch -1",
    "--warmup-epoch 200",
    "--warmup-multiplier 0",
    "--num-workers -1",
    "--save-freq -1",
    "--knn-freq -1",
    "--checkpoint-freq -1",
    "--max-steps -1",
    "--rng-seed -1",
    "--engine deepspeed",
    "--shuffle-group -32",
    "--shuffle-group 64",
]


@pytest.mark.parametrize("line", BAD)
def test_a_value_that_cannot_work_is_an_error_with_the_flags_name(line: str) -> None:
    flag, value = line.split()
    with pytest.raises(UserError) as error:
        parse([f"{flag}={value}"])
    assert flag in str(error.value)
    assert value in str(error.value)


@pytest.mark.parametrize(("group", "why"), [(32, "is one BatchNorm group"), (48, "a multiple of")])
def test_a_group_to_shuffle_holds_several_groups_of_batchnorm(group: int, why: str) -> None:
    with pytest.raises(UserError, match=rf"--shuffle-group {group}: .*{why}"):
        parse(["--recipe", "v2", "--shuffle-bn", "node", "--shuffle-group", str(group)])
    flags = ["--recipe", "v2", "--shuffle-bn", "node", "--shuffle-group", "128"]
    assert parse(flags).contrast.shuffle_group == 128


@pytest.mark.parametrize(
    "line",
    [
        "--amp-opt-level O0 --precision fp16",
        "--amp-opt-level O1 --precision fp32",
        "--amp-opt-level O2 --precision bf16",
        "--engine fsdp --deepspeed ds_configs/zero1.json",
        "--engine ddp --deepspeed ds_configs/zero1.json",
    ],
)
def test_two_flags_that_contradict_are_both_named(line: str) -> None:
    first, value, second, other = line.split()
    with pytest.raises(UserError) as error:
        parse([first, value, second, str(REPOSITORY / other) if "/" in other else other])
    assert f"{first} {value}" in str(error.value)
    assert second in str(error.value) and other in str(error.value)


UNREADABLE = [
    "--model resnet51",
    "--model-width 3",
    "--aug v9",
    "--lr-scheduler triangle",
    "--shuffle-bn sometimes",
    "--dataset mnist",
    "--recipe v7",
    "--engine horovod",
    "--precision fp8",
    "--amp-opt-level O4",
    "--batch-size many",
    "--bn-group-size half",
    "--lr-decay-epochs 1,x",
    "--no-such-flag 1",
    "--batch 8",
]


@pytest.mark.parametrize("line", UNREADABLE)
def test_an_unreadable_value_or_unknown_flag_ends_with_status_2(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(line.split())
    assert end.value.code == 2
    assert line.split()[0] in capsys.readouterr().err


def test_a_flag_of_the_official_code_is_answered_with_its_name_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["--moco-k", "16384", "--cos", "--no-such-flag"])
    said = capsys.readouterr().err
    assert "--moco-k is here: --nce-k" in said and "--lr-scheduler cosine-epoch" in said


@pytest.mark.parametrize(
    ("table", "add"),
    [(PRETRAINING, add_flags), (EVALUATION, evaluate_flags.add_arguments)],
)
def test_what_older_flags_are_answered_with_exists(
    table: dict[str, str], add: Callable[[argparse.ArgumentParser], None]
) -> None:
    parser = argparse.ArgumentParser()
    add(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert not table.keys() & flags, "known here, so never answered"
    for answer in table.values():
        for word in answer.replace(",", "").replace(":", "").split():
            assert not word.startswith("--") or word in flags, word


def test_epochs_of_a_decay_are_whole_numbers_from_one_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parse(["--lr-decay-epochs", "30,40", "50"]).optim.lr_decay_epochs == (30, 40, 50)
    for value, said in (("1,x", "invalid whole number"), ("-5", "-5 is not positive")):
        with pytest.raises(SystemExit):
            parse([f"--lr-decay-epochs={value}"])
        assert said in capsys.readouterr().err


def test_a_cosine_ends_below_where_it_begins() -> None:
    with pytest.raises(UserError, match=r"--lr-min 0\.5 is above the learning rate 0\.03"):
        parse(["--recipe", "v2", "--lr-min", "0.5"])
    assert parse(["--recipe", "v1", "--lr-min", "0.5"]).optim.lr_min == 0.5  # steps have no end
    assert parse(["--base-lr", "0"]).learning_rate == 0  # nothing learns; the recipe's end stays


def test_contradictions_name_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"--engine ddp contradicts --deepspeed .*ds\.json"):
        parse(["--engine", "ddp", "--deepspeed", str(path)])
    with pytest.raises(UserError, match="--amp-opt-level O0 means fp32 but --precision is bf16"):
        parse(["--amp-opt-level", "O0", "--precision", "bf16"])


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'v7' is unknown.*v1-b1024"):
        build("v7", {})
