"""Recipes, flags, and what they become together."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from moco_scale.config import resolve as module
from moco_scale.config.command_line import make_parser, parse
from moco_scale.config.recipes import DEFAULT_RECIPE, RECIPES, Recipe
from moco_scale.config.resolve import build
from moco_scale.config.schema import Config, differences
from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.utils.errors import UserError

V1: dict[str, Any] = {
    "dataset": "imagenet",
    "image_size": 224,
    "model": "resnet50",
    "model_width": 1,
    "stem": "imagenet",
    "aug": "v1",
    "crop": 0.2,
    "head": "linear",
    "dim": 128,
    "bn_group_size": 32,
    "nce_k": 65536,
    "nce_t": 0.07,
    "alpha": 0.999,
    "shuffle_bn": "world",
    "symmetric": False,
    "batch_size": 256,
    "base_lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "lr_scheduler": "step",
    "lr_decay_epochs": [120, 160],
    "lr_decay_rate": 0.1,
    "warmup_epoch": 0,
    "epochs": 200,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "v1": V1,
    "v1-b1024": V1
    | {
        "aug": "cj",
        "crop": 0.08,
        "batch_size": 1024,
        "bn_group_size": 128,
        "base_lr": 0.1,
        "lr_scheduler": "cosine",
        "lr_min": 1e-6,
        "warmup_epoch": 5,
        "warmup_multiplier": 100,
    },
    "v2": V1
    | {"aug": "v2", "head": "mlp", "nce_t": 0.2, "lr_scheduler": "cosine-epoch", "lr_min": 0},
    "cifar10": V1
    | {
        "dataset": "cifar10",
        "image_size": 32,
        "model": "resnet18",
        "stem": "cifar",
        "aug": "cifar",
        "crop": 0.08,
        "bn_group_size": 64,  # 8 groups of the batch of 512
        "nce_k": 4096,
        "nce_t": 0.1,
        "alpha": 0.99,
        "batch_size": 512,
        "base_lr": 0.03,  # per 256 images: 0.06 for the batch of 512
        "weight_decay": 5e-4,
        "lr_scheduler": "cosine-epoch-end",
        "lr_min": 0,
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_exactly_the_published_run(name: str) -> None:
    got = build(name, {}).flat()
    published = PUBLISHED[name]
    if "lr_decay_epochs" in published and published["lr_scheduler"] != "step":
        published = {k: v for k, v in published.items() if not k.startswith("lr_decay")}
    assert {k: got[k] for k in published} == published


def test_peak_learning_rates() -> None:
    peaks = {"v1": 0.03, "v1-b1024": 0.4, "v2": 0.03, "cifar10": 0.06}
    assert {name: build(name, {}).learning_rate for name in RECIPES} == pytest.approx(peaks)
    assert build("v1", {"batch_size": 1024}).learning_rate == pytest.approx(0.12)


def test_augmentations_of_the_recipes() -> None:
    v1, v2, cj, cifar = (
        AUGMENTATIONS[PUBLISHED[r]["aug"]] for r in ("v1", "v2", "v1-b1024", "cifar10")
    )
    assert (v1.jitter, v1.jitter_p, v1.gray_p, v1.flip, v1.blur_p) == ((0.4,) * 4, 1, 0.2, 0.5, 0)
    assert (cj.jitter, cj.jitter_p, cj.gray_p, cj.flip, cj.blur_p) == ((0.4,) * 4, 1, 0.2, 0.5, 0)
    assert v1.gray_first and cj.gray_first
    assert (v2.jitter, v2.jitter_p, v2.gray_p) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
    assert (v2.blur_p, v2.blur_sigma, v2.gray_first) == (0.5, (0.1, 2.0), False)
    assert (cifar.jitter, cifar.jitter_p, cifar.gray_p) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
    assert (cifar.blur_p, cifar.gray_first, cifar.flip) == (0, False, 0.5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_is_from_how_it_starts_and_what_it_reached(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.source
    assert any(digit.isdigit() for digit in recipe.published)
    assert name in recipe.command
    flags = shlex.split(recipe.command.partition("train.py")[2])
    assert parse(flags).recipe == name


def test_the_default_is_the_published_run_of_forty_hours() -> None:
    assert DEFAULT_RECIPE == "v1-b1024"
    assert parse([]) == build(DEFAULT_RECIPE, {})


# Names of the public repository, with values as its scripts give them, then the project's own.
FLAGS = {
    "--data-dir": "d",
    "--dataset": "imagenet100",
    "--model": "resnet18",
    "--model-width": "2",
    "--crop": "0.3",
    "--aug": "NULL",
    "--nce-k": "126689",
    "--nce-t": "0.1",
    "--alpha": "0.99",
    "--base-learning-rate": "0.4",
    "--base-lr": "0.4",
    "--lr-scheduler": "step",
    "--warmup-epoch": "3",
    "--lr-decay-rate": "0.2",
    "--weight-decay": "0.001",
    "--momentum": "0.8",
    "--epochs": "240",
    "--num-workers": "3",
    "--print-freq": "7",
    "--save-freq": "5",
    "--resume": "none",
    "--output-dir": "o",
    "--rng-seed": "4",
    "--amp-opt-level": "O1",
    "--recipe": "v2",
    "--batch-size": "512",
    "--engine": "ddp",
    "--precision": "bf16",
    "--bn-group-size": "16",
    "--shuffle-bn": "off",
    "--max-steps": "9",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_users_rely_on_exists_and_does_something(flag: str) -> None:
    text = FLAGS[flag]
    config = parse([flag, text])
    if flag == "--amp-opt-level":
        assert config.run.precision == "fp16"
        return
    name = flag.removeprefix("--").replace("-", "_")
    got = config.flat()["base_lr" if name == "base_learning_rate" else name]
    assert str(got) == (text.lower() if flag == "--aug" else text)
    if flag not in ("--engine", "--data-dir"):  # the first has its default, the second a path's
        assert config != build(DEFAULT_RECIPE, {})


def test_lists_are_separated_by_commas_or_spaces() -> None:
    for argv in (["60,80"], ["60", "80"], ["60,", "80"]):
        assert parse(["--lr-decay-epochs", *argv]).optim.lr_decay_epochs == (60, 80)


def test_launchers_may_add_their_own_flag() -> None:
    assert parse(["--local_rank=3"]) == parse(["--local-rank", "1"]) == parse([])


def test_help_names_every_flag_and_its_older_name() -> None:
    text = make_parser().format_help()
    for flag in [*FLAGS, "--lr-decay-epochs", "--deepspeed"]:
        assert flag in text
    assert "local_rank" not in text


def test_a_flag_goes_before_the_recipe_and_the_recipe_before_the_preset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = RECIPES["cifar10"].settings
    recipe = Recipe("here", "-", "-", settings | {"image_size": 48})
    monkeypatch.setitem(module.RECIPES, "larger", recipe)
    assert build("cifar10", {}).data.image_size == 32  # the data set's
    assert build("larger", {}).data.image_size == 48
    assert build("larger", {"image_size": 40}).data.image_size == 40
    other = build("cifar10", {"dataset": "imagenet", "stem": "cifar"})
    assert (other.data.image_size, other.model.stem) == (224, "cifar")
    assert other.data.data_dir == "data/imagenet"
    assert parse(["--recipe", "v2", "--nce-t", "0.07"]).contrast.nce_t == 0.07
    assert parse(["--nce-t", "0.07", "--recipe", "v2"]).contrast.nce_t == 0.07


def test_a_recipes_group_falls_back_to_one_that_tiles_another_batch() -> None:
    assert build("v1", {"batch_size": 512}).model.bn_group_size == 32
    assert build("v1", {"batch_size": 24}).model.bn_group_size == 24
    assert build("v1", {"batch_size": 40}).model.bn_group_size == 20
    assert parse(["--bn-group-size", "global", "--batch-size", "64"]).model.bn_group_size == 64
    # A group chosen by hand is never changed.
    with pytest.raises(UserError, match="--bn-group-size 32 does not divide --batch-size 40"):
        build("v1", {"batch_size": 40, "bn_group_size": 32})
    # Nobody said --bn-group-size: it is not what is to blame.
    with pytest.raises(UserError, match=r"no BatchNorm group .* divides --batch-size 37; choose"):
        build("v1", {"batch_size": 37})


def test_all_that_does_not_go_together_is_said_at_once() -> None:
    with pytest.raises(UserError) as error:
        parse(["--epochs", "0", "--alpha", "2", "--crop", "5"])
    assert len(str(error.value).splitlines()) == 4
    flags = ["--warmup-epoch", "9", "--epochs", "9", "--fsdp-shard-size", "2"]
    with pytest.raises(UserError) as error:
        parse([*flags, "--engine", "deepspeed"])
    for words in ("--warmup-epoch 9 leaves nothing", "--fsdp-shard-size 2", "needs --deepspeed"):
        assert words in str(error.value)


def test_a_message_says_which_value_was_not_given() -> None:
    config = parse(["--batch-size", "64"])
    assert config.flag("batch_size") == "--batch-size 64"
    assert config.flag("base_lr") == "--base-lr 0.1 (not given)"
    with pytest.raises(
        UserError, match=r"--lr-min 1e-06 \(not given\) is above .*--base-lr 1e-07 "
    ):
        parse(["--base-lr", "1e-7"])


def test_a_recipes_warm_up_shrinks_with_the_run() -> None:
    assert build("v1-b1024", {"epochs": 6}).optim.warmup_epoch == 5
    assert build("v1-b1024", {"epochs": 5}).optim.warmup_epoch == 0
    with pytest.raises(UserError, match="--warmup-epoch 5 leaves nothing of --epochs 5"):
        build("v1-b1024", {"epochs": 5, "warmup_epoch": 5})


def test_precision_follows_the_deepspeed_file_unless_given(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"torch_autocast": {"enabled": true}}')
    assert parse(["--deepspeed", str(path)]).run.precision == "bf16"
    assert parse(["--deepspeed", str(path), "--precision", "fp32"]).run.precision == "fp32"
    assert parse([]).run.precision == "fp32"


def changed(config: Config, section: str, **values: Any) -> Config:
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def test_what_defines_a_run_and_what_only_carries_it_out() -> None:
    config = build("v2", {})
    saved = json.loads(json.dumps(config.defining()))
    same = changed(config, "run", output_dir="x", precision="bf16", engine="deepspeed", max_steps=9)
    same = changed(same, "data", data_dir="elsewhere")
    assert differences(saved, same.defining()) == []
    other = changed(changed(config, "contrast", nce_t=0.3), "optim", rng_seed=5)
    assert differences(saved, other.defining()) == [
        "  --nce-t: 0.2 in the run, 0.3 now",
        "  --rng-seed: 0 in the run, 5 now",
    ]
    for section in ("data", "model", "contrast", "optim"):
        for field in dataclasses.fields(getattr(config, section)):
            assert field.name == "data_dir" or field.name in saved


def test_a_run_that_did_not_know_a_flag_has_its_default() -> None:
    now = build("v2", {"dataset": "images"}).defining()
    before = {name: value for name, value in now.items() if name != "clip_grad"}
    assert differences(before, now) == []
    clipped = build("v2", {"dataset": "images", "clip_grad": 1.0}).defining()
    assert differences(before, clipped) == ["  --clip-grad: 0.0 in the run, 1.0 now"]


def test_the_fields_names_are_aliases_of_older_flags() -> None:
    argv = ["--queue-size", "4096", "--temperature", "0.2", "--ema-momentum", "0.99"]
    contrast = parse(argv).contrast
    assert (contrast.nce_k, contrast.nce_t, contrast.alpha) == (4096, 0.2, 0.99)
