"""``--config``: what a run has written is what a run reads; what is wrong is said, all of it."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from moco_scale.__main__ import main
from moco_scale.commands import evaluate_flags
from moco_scale.config.command_line import parse
from moco_scale.config.older_flags import EVALUATION, HintingParser
from moco_scale.untrusted.limits import SETTINGS_FILE
from moco_scale.utils.errors import UserError


def written(folder: Path, content: str | dict[str, Any], ending: str = "json") -> str:
    path = folder / f"settings.{ending}"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def refusal(path: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        parse(["--config", path])
    message = str(refused.value)
    assert message.startswith(f"settings file {path}")
    return message.splitlines()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--recipe", "v2", "--bn-group-size", "global", "--lr-decay-epochs", "3,5", "--symmetric"),
        ("--deepspeed", "zero1", "--precision", "bf16", "--data-dir", "A:0.7,B:0.3", "--nce-k=12"),
    ],
)
def test_a_run_is_made_again_from_the_file_that_it_writes(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    config = parse(flags)
    path = written(tmp_path, config.flat() | {"data_fingerprint": "5f"})
    assert parse(["--config", path]) == config


TOML = """
recipe = "v2"       # as in a command line
nce_k = 4096
base_lr = 1         # a whole number is a number
symmetric = true
lr_decay_epochs = [30, 40]
bn_group_size = "global"
aug = "V1"
"""
YAML = """
recipe: v2
queue_size: 4096    # another name of the flag
base_lr: 1e0
symmetric: yes
lr_decay_epochs: [30, 40]
bn_group_size: global
aug: V1
"""


@pytest.mark.parametrize(("content", "ending"), [(TOML, "toml"), (YAML, "yaml"), (YAML, "YML")])
def test_flags_go_before_a_file_and_a_file_before_the_recipe(
    tmp_path: Path, content: str, ending: str
) -> None:
    path = written(tmp_path, content, ending)
    flags = ["--recipe", "v2", "--nce-k", "4096", "--base-lr", "1", "--symmetric"]
    flags += ["--lr-decay-epochs", "30,40", "--bn-group-size", "global", "--aug", "v1"]
    assert parse(["--config", path]) == parse(flags)
    for more in (["--epochs", "7"], ["--nce-k", "64"], ["--no-symmetric"], ["--recipe", "v1"]):
        assert parse([*more, "--config", path]) == parse([*flags, *more])
        assert parse([f"--config={path}", *more]) == parse([*flags, *more])


def test_all_that_is_wrong_is_said_with_its_key_and_what_to_do(tmp_path: Path) -> None:
    content = {
        **{"batch-size": 64, "nce_kk": 5, "lr": 3, "local_rank": 1, "no_symmetric": True},
        **{"epochs": 1.5, "nce_k": "64", "symmetric": 1, "data_dir": 7, "model": "resnet51"},
        **{"shuffle_bn": False, "lr_decay_epochs": [1, "x"], "dim": {}, "device": None},
        **{"alpha": 1.5, "weight_decay": -1, "print_freq": 0, "base_lr": 10**400},
        **{"bn_group_size": 0, "image_size": 0},  # which flags may say too
    }
    start, *lines = refusal(written(tmp_path, content))
    assert start.endswith(":")
    assert sorted(line.strip() for line in lines) == sorted(
        [
            "batch-size is no name of a setting, such as batch_size",
            "nce_kk is unknown; nce_k is meant?",
            "lr is unknown; it is here: --base-lr, per 256 images of the batch",
            "local_rank is unknown; remove it",
            "no_symmetric is unknown; symmetric is meant?",
            "epochs 1.5: must be a whole number",
            "nce_k '64': must be a whole number",
            "symmetric 1: must be true or false",
            "data_dir 7: must be a text, in quotes",
            next(line.strip() for line in lines if "resnet51" in line),
            "shuffle_bn False: must be one of world, node, off, in quotes",
            "lr_decay_epochs [1, 'x']: each must be a whole number",
            "dim is a dict; settings are true, false, numbers, texts or lists",
            "device has no value; give one, or remove it",
            "base_lr is no number that it can be",
            "alpha 1.5: must lie between 0 and 1",
            "weight_decay -1.0: must not be negative",
            "print_freq 0: must be greater than 0",
        ]
    )
    assert any("resnet51': must be one of resnet18, resnet34" in line for line in lines)


BOMB = "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]"


@pytest.mark.parametrize(
    ("content", "ending", "said"),
    [
        ("{", "json", "is not valid JSON"),
        ('{"epochs": 1, "epochs": 2}', "json", "epochs stands there twice; keep one"),
        ("[1]", "json", "must be settings by name"),
        ("epochs = ", "toml", "is not valid toml"),
        ("epochs = 1\nepochs = 2", "toml", "is not valid toml"),
        ("day = 2020-01-01", "toml", "day is a date"),
        ("run.epochs = 1", "toml", "run is a dict"),
        ("epochs: [", "yaml", "is not valid yaml: line 1"),
        ("epochs: 1\nepochs: 2", "yaml", "epochs stands there twice; keep one"),
        ("- 1", "yaml", "must be settings by name"),
        ("", "yaml", "must be settings by name"),
        ("? [1]\n: 2", "yaml", "is not valid yaml: line 1"),
        (BOMB, "yaml", "line 1: anchors, aliases, tags and directives are not read"),
        ("a: !!python/object/apply:os.system [x]", "yaml", "line 1: anchors, aliases, tags"),
        ("a: 2020-99-99", "yaml", "is not valid yaml"),
        ("a: " + "[" * 1000, "yaml", "more than 256 brackets"),
        ("a: 1\n" + "#" * SETTINGS_FILE, "yaml", "has more than"),
        ("x", "txt", "has to end in one of .json, .toml, .yaml, .yml"),
        ("\0\xff", "yaml", "is not valid yaml"),
        ("\0\xff", "toml", "is not valid toml"),
    ],
)
def test_a_file_that_is_no_settings(tmp_path: Path, content: str, ending: str, said: str) -> None:
    assert said in refusal(written(tmp_path, content, ending))[0]


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refusal(str(tmp_path / "none.toml"))[0]
    with pytest.raises(SystemExit):
        parse(["--config"])
    assert "--config: expected one argument" in capsys.readouterr().err


def test_an_evaluation_reads_one_too(tmp_path: Path) -> None:
    parser = HintingParser(older=EVALUATION, prog="moco-scale evaluate", allow_abbrev=False)
    evaluate_flags.add_arguments(parser)
    needed = 'data_dir = "D"\npretrained_model = "M"\noutput_dir = "O"\n'
    path = written(tmp_path, needed + 'protocol = "knn"\nknn_k = 20\nlr = 3', "toml")
    args: argparse.Namespace = parser.parse_args(["--config", path, "--knn-k", "10"])
    config = evaluate_flags.config_of(args)
    assert (config.data_dir, config.protocol, config.knn.knn_k) == ("D", "knn", 10)
    assert config.linear.learning_rate == 3.0
    path = written(tmp_path, needed + "epochs = 0\nbase_lr = 3", "toml")
    with pytest.raises(UserError) as refused:
        parser.parse_args(["--config", path])
    assert "epochs 0: must be greater than 0" in str(refused.value)
    assert "base_lr is unknown" in str(refused.value)


def test_a_plan_is_made_of_the_file_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, {"model": "resnet18", "nce_k": 0})
    assert main(["plan", "--config", path]) == 2
    assert f"settings file {path}: nce_k 0: must be greater" in capsys.readouterr().err


def test_a_demo_has_settings_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = written(tmp_path, {"epochs": 3})
    assert main(["demo", "--output-dir", str(tmp_path / "out"), "--config", path]) == 2
    assert "--config is for train alone" in capsys.readouterr().err
