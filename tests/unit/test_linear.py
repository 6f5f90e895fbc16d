"""The linear protocol against a textbook loop in numpy; resuming; what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moco_scale.__main__ import main
from moco_scale.data.sampling.order import BatchPlan, FullPermutation
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.evaluation import linear, linear_state
from moco_scale.evaluation.features import Pixels, extract
from moco_scale.evaluation.linear import LinearConfig, LinearEvaluation
from moco_scale.evaluation.pretrained import Pretrained
from moco_scale.models.encoder import Encoder
from moco_scale.utils.errors import UserError

PIXELS = Pixels(8, 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SMALL = LinearConfig(epochs=4, batch_size=8, learning_rate=0.05)


@pytest.fixture
def shards(tmp_path: Path, image_folder: Path) -> Path:
    """24 training and 12 validation images of 3 classes."""
    out = tmp_path / "shards"
    assert main(["shard", "--source", str(image_folder), "--out", str(out)]) == 0
    return out


def pretrained(seed: int = 0) -> Pretrained:
    """A tiny encoder with BatchNorm: 6 features, 4 projected."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(6)
        nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
        backbone = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        encoder = Encoder(backbone, nn.Linear(6, 4), 6)
    return Pretrained(encoder.eval(), {"dim": 4}, Path("current.pth"), 3, 30, f"seed {seed}")


def evaluation(
    data: Path, folder: Path, config: LinearConfig = SMALL, seed: int = 0, **options: Any
) -> LinearEvaluation:
    train, val = (IndexedShards.open(data, split) for split in ("train", "val"))
    folder.mkdir(exist_ok=True)
    options = {"num_workers": 0, **options}
    return LinearEvaluation(pretrained(seed), train, val, PIXELS, config, folder, **options)


def textbook(data: Path, config: LinearConfig) -> tuple[np.ndarray, np.ndarray, list[list[float]]]:
    """Softmax regression by SGD with momentum, in float64, one formula a line."""
    train, val = (IndexedShards.open(data, split) for split in ("train", "val"))
    features = pretrained().encoder.features
    (x, y), (x_val, y_val) = (
        (f.double().numpy(), labels.numpy())
        for f, labels in (extract(features, s, **vars(PIXELS), num_workers=0) for s in (train, val))
    )
    start = linear._new_classifier(6, 3, config.seed).weight.detach()
    weight, bias = start.double().numpy(), np.zeros(3)
    v_weight, v_bias = np.zeros_like(weight), np.zeros(3)
    plan = BatchPlan(FullPermutation(len(train), config.seed), config.batch_size)
    history = []
    for epoch in range(config.epochs):
        rate = config.learning_rate * (0.1 if epoch >= 0.6 * config.epochs else 1)
        rate *= 0.1 if epoch >= 0.8 * config.epochs else 1
        losses = []
        for step in range(plan.steps_per_epoch):
            rows = plan.batch(epoch * plan.steps_per_epoch + step).index
            scores = x[rows] @ weight.T + bias
            p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            losses.append(-np.log(p[np.arange(len(rows)), y[rows]]).mean())
            delta = (p - np.eye(3)[y[rows]]) / len(rows)
            v_weight = config.momentum * v_weight + delta.T @ x[rows] + config.weight_decay * weight
            v_bias = config.momentum * v_bias + delta.sum(0) + config.weight_decay * bias
            weight, bias = weight - rate * v_weight, bias - rate * v_bias
        top1 = 100 * ((x_val @ weight.T + bias).argmax(1) == y_val).mean()
        history.append([float(np.mean(losses)), float(top1)])
    return weight, bias, history


def test_equals_the_textbook(shards: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        SMALL, epochs=10, cache_features=True, learning_rate=0.5, weight_decay=1e-3
    )
    run = evaluation(shards, tmp_path / "out", config)
    result = run.run()
    weight, bias, history = textbook(shards, config)
    assert torch.allclose(run.classifier.weight.double(), torch.from_numpy(weight), atol=1e-5)
    assert torch.allclose(run.classifier.bias.double(), torch.from_numpy(bias), atol=1e-5)
    for entry, (loss, top1) in zip(result["history"], history, strict=True):
        assert entry["train_loss"] == pytest.approx(loss, rel=1e-5)
        assert entry["top1"] == pytest.approx(top1)
    best = max(top1 for _, top1 in history)
    assert result["top1"] == pytest.approx(best)
    assert result["best_epoch"] == 1 + [t for _, t in history].index(best)
    assert result["last_top1"] == pytest.approx(history[-1][1])
    assert result["top5"] == result["last_top5"] == 100  # three classes


def test_on_random_crops_the_encoder_stays_as_it_is(shards: Path, tmp_path: Path) -> None:
    run = evaluation(shards, tmp_path / "out")
    encoder: Encoder = run.encode.__self__  # type: ignore[attr-defined]
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    result = run.run()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} changed"
    assert len(result["history"]) == 4
    cached = dataclasses.replace(SMALL, cache_features=True)
    other = evaluation(shards, tmp_path / "out", cached).run()
    assert other["history"][0]["train_loss"] != result["history"][0]["train_loss"], "no crops"


def test_every_epoch_has_other_crops(shards: Path, tmp_path: Path) -> None:
    # A rate so small that the losses differ by the crops alone.
    config = dataclasses.replace(SMALL, learning_rate=1e-12, epochs=2)
    losses = [e["train_loss"] for e in evaluation(shards, tmp_path / "o", config).run()["history"]]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
    whole = dataclasses.replace(config, crop_min=0.9)
    larger = [e["train_loss"] for e in evaluation(shards, tmp_path / "w", whole).run()["history"]]
    assert larger[0] != pytest.approx(losses[0], rel=1e-6), "--crop changes nothing"


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("cache", [False, True])
def test_resumes_bit_exactly(
    cache: bool, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, cache_features=cache, schedule="bl0")
    whole = evaluation(shards, tmp_path / "whole", config)
    expected = whole.run()
    save: Callable[..., None] = linear_state.save

    def stop_after_two(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if len(state["history"]) == 2:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(linear_state, "save", stop_after_two)
        with pytest.raises(Interrupted):
            evaluation(shards, tmp_path / "parts", config).run()
    again = evaluation(shards, tmp_path / "parts", config)
    assert again.epoch == 2
    assert again.run() == expected
    assert torch.equal(again.classifier.weight, whole.classifier.weight)
    assert torch.equal(again.classifier.bias, whole.classifier.bias)
    finished = evaluation(shards, tmp_path / "parts", config)
    assert finished.run() == expected, "a finished evaluation only reports"


class TestFolderWithState:
    @pytest.fixture
    def folder(self, shards: Path, tmp_path: Path) -> Path:
        evaluation(shards, tmp_path / "out", dataclasses.replace(SMALL, epochs=1)).run()
        return tmp_path / "out"

    def test_differences_from_one_that_is_under_way_are_listed(
        self, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, save = tmp_path / "out", linear_state.save

        def stop(path: Path, state: dict[str, Any]) -> None:
            save(path, state)
            raise Interrupted

        monkeypatch.setattr(linear_state, "save", stop)
        with pytest.raises(Interrupted):
            evaluation(shards, folder).run()
        other = dataclasses.replace(SMALL, learning_rate=7.0, batch_size=4)
        with pytest.raises(UserError, match="unfinished") as error:
            evaluation(shards, folder, other, seed=1)
        text = str(error.value)
        assert "learning_rate: 0.05 there, 7.0 now" in text
        assert "batch_size: 8 there, 4 now" in text
        assert "encoder: query encoder of step 30 in current.pth there" in text
        assert "momentum" not in text and "--output-dir" in text

    def test_a_finished_one_makes_room_and_says_so(
        self, folder: Path, shards: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = dataclasses.replace(SMALL, epochs=1)
        after = evaluation(shards, folder, config, seed=1)
        assert after.epoch == 0 and "this one replaces it" in capsys.readouterr().err
        after.run()
        assert evaluation(shards, folder, config, seed=1).epoch == 1
        assert "its place" not in capsys.readouterr().err

    def test_of_an_earlier_version_goes_on(self, folder: Path, shards: Path) -> None:
        path = folder / "linear-official.pth"
        state = torch.load(path, weights_only=True)
        del state["described"]
        known = set(state["identity"])
        assert not known & {"scheduler", "decay_epochs", "decay_rate", "warmup_epochs", "crop_min"}
        torch.save(state, path)
        assert evaluation(shards, folder, dataclasses.replace(SMALL, epochs=1)).epoch == 1

    def test_of_the_key_encoder_is_another(self, folder: Path, shards: Path) -> None:
        key = dataclasses.replace(pretrained(), which="key")
        train, val = (IndexedShards.open(shards, split) for split in ("train", "val"))
        run = LinearEvaluation(key, train, val, PIXELS, SMALL, folder, num_workers=0)
        assert run.epoch == 0 and run.state_path.name == "linear-official-key.pth"

    def test_workers_and_precision_may_change(self, folder: Path, shards: Path) -> None:
        config = dataclasses.replace(SMALL, epochs=1)
        run = evaluation(shards, folder, config, num_workers=1, autocast=torch.bfloat16)
        assert run.epoch == 1

    def test_none_refuses(self, folder: Path, shards: Path) -> None:
        with pytest.raises(UserError, match=r"--resume none: .*linear-official\.pth holds"):
            evaluation(shards, folder, dataclasses.replace(SMALL, epochs=1), resume="none")

    @pytest.mark.parametrize("content", [b"", b"rubbish", None])
    def test_damaged(self, content: bytes | None, folder: Path, shards: Path) -> None:
        path = folder / "linear-official.pth"
        path.write_bytes(path.read_bytes()[:-200] if content is None else content)
        with pytest.raises(UserError, match="is damaged or something else"):
            evaluation(shards, folder, dataclasses.replace(SMALL, epochs=1))

    @pytest.mark.parametrize(
        ("place", "value", "expected"),
        [
            (("history",), [], "history"),
            (("history",), "abc", "history"),
            (("history", 0, "top1"), float("nan"), "top1"),
            (("history", 0, "top1"), 101.0, "top1"),
            (("history", 0), {}, "train_loss"),
            (("identity",), None, "identity"),
            (("identity", "epochs"), "1", "epochs"),
            (("identity", "epochs"), 0, "epochs"),
            (("classifier",), {"weight": torch.ones(2)}, "no classifier"),
            (("classifier", "bias"), torch.ones(7), "its bias has not the shape"),
            (("classifier", "bias"), 3, "its bias has not the shape"),
            (("classifier", "bias"), torch.full((3,), torch.nan), "its bias is not finite"),
            (("optimizer", "state", 0, "momentum_buffer"), torch.ones(2), "its momentum has not"),
            (("optimizer", "state", 2), {}, "momenta of other parameters"),
            (("optimizer", "state"), [1], "state"),
            (("optimizer",), None, "optimizer"),
        ],
    )
    def test_odd_values_are_named(
        self, place: tuple[Any, ...], value: Any, expected: str, folder: Path, shards: Path
    ) -> None:
        path = folder / "linear-official.pth"
        state = torch.load(path, weights_only=True)
        inside = state
        for name in place[:-1]:
            inside = inside[name]
        inside[place[-1]] = value
        torch.save(state, path)
        with pytest.raises(UserError, match="is damaged or something else") as error:
            evaluation(shards, folder, dataclasses.replace(SMALL, epochs=1))
        assert expected in str(error.value) and "\n" not in str(error.value)

    def test_the_optimizers_settings_are_the_command_lines(
        self, folder: Path, shards: Path
    ) -> None:
        path = folder / "linear-official.pth"
        state = torch.load(path, weights_only=True)
        (group,) = state["optimizer"]["param_groups"]
        group |= {"momentum": 1e9, "maximize": True, "params": [1, 0], "lr": "abc"}
        torch.save(state, path)
        run = evaluation(shards, folder, dataclasses.replace(SMALL, epochs=1))
        (now,) = run.optimizer.param_groups
        assert (now["momentum"], now["maximize"]) == (SMALL.momentum, False) and run.epoch == 1

    @pytest.mark.parametrize(
        "error",
        [OSError(28, "No space left on device"), RuntimeError("[enforce fail] unexpected pos 64")],
    )
    def test_a_failed_save_keeps_the_last_state(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """Whether the system says so or torch, which says something else."""
        before = (folder / "linear-official.pth").read_bytes()

        def full(*_: Any) -> None:
            raise error

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="No space left"):
            linear_state.save(folder / "linear-official.pth", {})
        assert (folder / "linear-official.pth").read_bytes() == before
        assert {p.name for p in folder.iterdir()} == {
            "linear-official.pth",
            ".linear-official.lock",
        }


HOLD = """
import sys
from pathlib import Path
from moco_scale.distributed.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.claim()
print("held", flush=True)
sys.stdin.read()
"""


def test_two_of_a_kind_do_not_write_one_folder(shards: Path, tmp_path: Path) -> None:
    lock = tmp_path / ".linear-official.lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"--output-dir {tmp_path} is being written by another"):
            evaluation(shards, tmp_path)
        other.kill()
    evaluation(shards, tmp_path)


def test_schedules() -> None:
    official, bl0 = LinearConfig(), LinearConfig(schedule="bl0")
    rates = [official.rate(step, 10) for step in (0, 599, 600, 799, 800, 999)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert bl0.rate(0, 10) == pytest.approx(0.3)  # lr / 100
    assert bl0.rate(25, 10) == pytest.approx((30 + 0.3) / 2)
    assert bl0.rate(50, 10) == pytest.approx(30)
    assert bl0.rate(525, 10) == pytest.approx(15, rel=1e-6)
    assert bl0.rate(1000, 10) == pytest.approx(1e-6)
    own = LinearConfig(decay_epochs=(30, 60), decay_rate=0.2, warmup_epochs=10)
    assert [own.rate(s, 1) for s in (0, 10, 30, 60)] == pytest.approx([0.3, 30, 6, 1.2])
    assert LinearConfig(scheduler="cosine").rate(50, 1) == pytest.approx(15, rel=1e-6)
    assert LinearConfig(schedule="bl0", scheduler="step").rate(99, 1) == pytest.approx(0.3)
    short = LinearConfig(epochs=10)
    assert [short.rate(s, 1) for s in (5, 6, 8)] == pytest.approx([30, 3, 0.3])


def test_initial_classifier_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = linear._new_classifier(2048, 100, 0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(first.weight, linear._new_classifier(2048, 100, 0).weight)
    assert not torch.equal(first.weight, linear._new_classifier(2048, 100, 1).weight)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(first.weight.mean().item()) < 1e-4 and not first.bias.any()


def test_projection_has_the_width_of_the_head(shards: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, features="projection", epochs=1)
    run = evaluation(shards, tmp_path / "out", config)
    assert run.classifier.in_features == 4
    run.run()
    assert run.state_path.name == "linear-official-projection.pth"


def test_divergence_is_named(shards: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, learning_rate=1e38)
    with pytest.raises(UserError, match="use a smaller --lr than 1e"):
        evaluation(shards, tmp_path / "out", config).run()


def test_too_few_images_for_a_batch(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="24 samples do not fill one global batch of 256"):
        evaluation(shards, tmp_path / "out", LinearConfig())


def test_labels_are_needed(shards: Path) -> None:
    train, val = (IndexedShards.open(shards, split) for split in ("train", "val"))
    assert linear._count_classes(train, val) == 3
    val.labels = val.labels.copy()
    val.labels[4] = -1
    with pytest.raises(UserError, match=r"1 of the 12 val images .* have none"):
        linear._count_classes(train, val)


def test_val_classes_must_be_known_from_train(shards: Path) -> None:
    train, val = (IndexedShards.open(shards, split) for split in ("train", "val"))
    train = train.subset(np.flatnonzero(train.labels != 1))
    with pytest.raises(UserError, match=r"1 classes of the val images .*birch"):
        linear._count_classes(train, val)
