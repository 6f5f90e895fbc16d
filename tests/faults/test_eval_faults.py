"""What ``eval.py`` says to bad input, and that it never runs code from a file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import make_shards
from conftest import write_image

from moco_scale.commands.dispatch import carry_out, main
from moco_scale.models.encoder import build_encoder

Evaluate = Callable[..., tuple[int, str]]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Run eval.py's command in this process: status and what it wrote to stderr."""

    def run(*argv: object) -> tuple[int, str]:
        words = [str(word) for word in argv]
        status = carry_out("evaluate", words, "eval.py", "eval.py")
        return status, capsys.readouterr().err

    return run


def content(**changes: Any) -> dict[str, Any]:
    opt = {
        **{"model": "resnet18", "model_width": 1, "stem": "imagenet", "head": "linear"},
        **{"dim": 8, "dataset": "images", "image_size": 32},
    }
    state = build_encoder("resnet18", dim=8).state_dict()
    return {"opt": opt, "model": state, "model_ema": state, "epoch": 1, "step": 2, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval-faults")


@pytest.fixture(scope="module")
def good(folder: Path) -> Path:
    """A file as pretraining writes it; not to be changed."""
    path = folder / "good.pth"
    torch.save(content(), path)
    return path


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copy(good, tmp_path / "current.pth"))


@pytest.fixture(scope="module")
def images(folder: Path) -> Path:
    """An ImageFolder: 3 classes, 8 training and 4 validation images each."""
    for i, (split, name) in enumerate(product(("train", "val"), ("ash", "birch", "cedar"))):
        for j in range(8 if split == "train" else 4):
            write_image(folder / "images" / split / name / f"{j}.jpg", seed=10 * i + j)
    return folder / "images"


@pytest.fixture(scope="module")
def data(folder: Path, images: Path) -> Path:
    """Its shards; not to be changed."""
    return make_shards(images, folder / "shards")


@pytest.fixture
def flags(data: Path, good: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "--data-dir": data,
        "--pretrained-model": good,
        "--output-dir": tmp_path / "out",
        "--num-workers": 0,
        "--batch-size": 8,
        "--epochs": 1,
        "--device": "cpu",
    }


def words(flags: dict[str, object], **changes: object) -> list[object]:
    flags = flags | {"--" + k.replace("_", "-"): v for k, v in changes.items()}
    return [part for pair in flags.items() for part in pair]


def refused(evaluate: Evaluate, argv: list[object], *expected: str) -> None:
    status, text = evaluate(*argv)
    assert status == 2, text
    assert text.count("error:") == 1 and "Traceback" not in text
    for words in expected:
        assert words in text, text


class TestModelFile:
    def refused(
        self, evaluate: Evaluate, flags: dict[str, object], path: Path, *expected: str
    ) -> None:
        refused(evaluate, words(flags, pretrained_model=path), str(path), *expected)

    def test_missing_or_a_folder(
        self, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        self.refused(evaluate, flags, tmp_path / "absent.pth", "there is no such file")
        self.refused(evaluate, flags, tmp_path, "Is a directory")

    @pytest.mark.parametrize("rubbish", [b"", b"hello, world", b"\x80\x04.", b"PK\x03\x04" * 40])
    def test_foreign(
        self, rubbish: bytes, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        path = tmp_path / "foreign.pth"
        path.write_bytes(rubbish)
        self.refused(evaluate, flags, path, "damaged or not a file of torch.save")

    def test_truncated(self, evaluate: Evaluate, flags: dict[str, object], model: Path) -> None:
        model.write_bytes(model.read_bytes()[:-1000])
        self.refused(evaluate, flags, model, "damaged")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_is_not_run(
        self, zipped: bool, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        path, proof = tmp_path / "evil.pth", tmp_path / "was-run"
        torch.save(content(extra=Evil(proof)), path, _use_new_zipfile_serialization=zipped)
        self.refused(evaluate, flags, path, "could run code")
        path.write_bytes(pickle.dumps(Evil(proof)))
        status, _ = evaluate(*words(flags, pretrained_model=path))
        assert status == 2
        assert not proof.exists()

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"opt": None}, "it lacks 'opt' or 'model'"),
            ({"opt": {"model": "resnet18"}}, "'opt': model_width: Field required"),
            ({"model": {"a": torch.zeros(2)}}, "do not fit the resnet18"),
            ({"model": {"a": 3}}, "do not fit the resnet18"),
        ],
    )
    def test_incomplete(
        self,
        changes: dict[str, Any],
        expected: str,
        evaluate: Evaluate,
        flags: dict[str, object],
        tmp_path: Path,
    ) -> None:
        path = tmp_path / "other.pth"
        torch.save(content(**changes), path)
        self.refused(evaluate, flags, path, expected)

    def test_weights_that_are_not_finite(
        self, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        path, broken = tmp_path / "nan.pth", content()
        broken["model"]["head.bias"][3] = torch.nan
        torch.save(broken, path)
        self.refused(evaluate, flags, path, "not finite", "head.bias", "diverged")

    def test_unknown_data_set(
        self, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        path, strange = tmp_path / "strange.pth", content()
        strange["opt"]["dataset"] = "martian"
        torch.save(strange, path)
        for protocol in ("linear", "knn"):
            argv = words(flags, pretrained_model=path, protocol=protocol)
            refused(evaluate, argv, "'martian'", "give --dataset")


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


class TestData:
    def test_folder_of_images(
        self, evaluate: Evaluate, flags: dict[str, object], images: Path
    ) -> None:
        argv = words(flags, data_dir=images)
        refused(evaluate, argv, "python -m moco_scale shard --source")

    def test_missing_val_split(
        self, evaluate: Evaluate, flags: dict[str, object], images: Path, tmp_path: Path
    ) -> None:
        only = tmp_path / "only-train"
        make_shards(images / "train", only)
        refused(evaluate, words(flags, data_dir=only), "no split 'val'")
        status, _ = evaluate(*words(flags, data_dir=only, protocol="knn"))
        assert status == 0
        result = json.loads((tmp_path / "out" / "results.json").read_text())
        assert "a tenth of train held out" in result["description"]

    def test_unlabelled(
        self, evaluate: Evaluate, flags: dict[str, object], images: Path, tmp_path: Path
    ) -> None:
        flat = tmp_path / "flat"
        make_shards(images, flat, "--unlabelled")
        refused(evaluate, words(flags, data_dir=flat, protocol="knn"), "needs labels")
        if (flat / "val-index.npy").exists():
            refused(evaluate, words(flags, data_dir=flat), "needs labels")

    def test_batch_larger_than_the_data(self, evaluate: Evaluate, flags: dict[str, object]) -> None:
        refused(evaluate, words(flags, batch_size=1000), "24 samples", "--batch-size")


class TestOutput:
    def test_a_file(self, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path) -> None:
        taken = tmp_path / "taken"
        taken.write_text("")
        refused(evaluate, words(flags, output_dir=taken), "is a file")
        refused(evaluate, words(flags, output_dir=taken / "below"), "cannot be written")

    @pytest.mark.parametrize("foreign", ["[1, 2]", '{"top1": 3}', "not json"])
    def test_foreign_results_are_kept(
        self, foreign: str, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "results.json").write_text(foreign)
        refused(evaluate, words(flags, protocol="knn"), "results.json")
        assert (out / "results.json").read_text() == foreign

    def test_results_of_other_protocols_stay(
        self, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        path = tmp_path / "out" / "results.json"
        assert evaluate(*words(flags, protocol="knn", knn_k=3))[0] == 0
        first = json.loads(path.read_text())
        assert first["protocol"] == "knn" and 0 <= first["top1"] <= first["top5"] <= 100
        assert evaluate(*words(flags, lr=0.1))[0] == 0
        second = json.loads(path.read_text())
        assert second["protocol"] == "linear" and second["best_epoch"] == 1
        earlier = {k: v for k, v in first.items() if k != "all"}
        assert second["all"]["knn-features-k3"] == earlier
        assert second["all"]["linear-official"]["top1"] == second["top1"]

    def test_every_encoder_and_vote_has_its_own_place(
        self, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        votes: tuple[dict[str, object], ...] = (
            {},
            {"encoder": "key"},
            {"knn_k": 20, "knn_t": 0.07},
        )
        for more in votes:
            assert evaluate(*words(flags, protocol="knn", **more))[0] == 0
        held = json.loads((tmp_path / "out" / "results.json").read_text())["all"]
        assert set(held) == {"knn-features", "knn-features-key", "knn-features-k20-t0.07"}


class TestOlderCommandLines:
    def test_flags_of_2020_mean_what_they_meant(
        self, evaluate: Evaluate, flags: dict[str, object], tmp_path: Path
    ) -> None:
        rest = {k: v for k, v in flags.items() if k != "--batch-size"}
        older: dict[str, object] = {
            "total_batch_size": 8,
            "aug": "NULL",
            "crop": 0.2,
            "amp_opt_level": "O0",
        }
        older |= {"lr_scheduler": "step", "lr_decay_epochs": "1", "lr_decay_rate": 0.2}
        older |= {"model": "resnet18", "model_width": 1, "warmup_epoch": 0, "lr": 0.1}
        status, said = evaluate(*words(rest, **older))
        assert status == 0, said
        settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
        assert settings["batch_size"] == 8 and settings["aug"] == "null"
        assert settings["decay_epochs"] == [1] and settings["crop_min"] == 0.2
        assert settings["precision"] == "fp32" and settings["scheduler"] == "step"

    def test_what_contradicts_the_file_is_refused(
        self, evaluate: Evaluate, flags: dict[str, object]
    ) -> None:
        refused(evaluate, words(flags, model="resnet50"), "holds a resnet18")
        refused(evaluate, words(flags, model_width=4), "holds a 1")
        refused(evaluate, words(flags, amp_opt_level="O1", precision="bf16"), "--amp-opt-level O1")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("batch_size", "x"), ("protocol", "fine-tune"), ("lr_decay_epochs", "x")],
)
def test_flags_that_cannot_be_read(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    required = {"data_dir": tmp_path, "pretrained_model": tmp_path, "output_dir": tmp_path}
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *(str(w) for w in words({}, **required, **{flag: value}))])
    assert stopped.value.code == 2
    assert "--" + flag.replace("_", "-") in capsys.readouterr().err


def test_numbers_that_cannot_be_are_said_at_once(evaluate: Evaluate, tmp_path: Path) -> None:
    required = {"data_dir": tmp_path, "pretrained_model": tmp_path, "output_dir": tmp_path}
    wrong = {"knn_k": 0, "knn_t": 0, "epochs": 0, "lr": "nan", "weight_decay": -1, "crop": 1.5}
    refused(
        evaluate,
        words({}, **required, **wrong),
        "--knn-k 0: must be greater than 0",
        "--knn-t 0.0: must be greater than 0",
        "--epochs 0: must be greater than 0",
        "--lr nan: must be a finite number",
        "--weight-decay -1.0: must not be negative",
        "--crop 1.5: must be a share above 0 and at most 1",
    )
    refused(evaluate, words({}, **required, lr=-1), "error: --lr -1.0: must be greater than 0")
