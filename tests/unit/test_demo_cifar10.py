"""CIFAR-10 from the official archive's layout, made small here, and what is refused."""

import hashlib
import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from moco_scale.commands.cifar10 import prepare
from moco_scale.utils.errors import UserError

NAMES = ("airplane", "automobile", "bird")


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``cifar-10-python.tar.gz``; torchvision is told this archive's checksums."""
    base = tmp_path / "made" / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for attribute, count in (("train_list", 2), ("test_list", 1)):
        rows = []
        for i in range(count):
            name = f"{attribute}_{i}"
            pixels = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
            rows.append([name, write(name, {"data": pixels, "labels": [0, 1, 2, 2, 1, 0]})])
        monkeypatch.setattr(CIFAR10, attribute, rows)
    meta = {"filename": "meta", "key": "label_names"}
    md5 = write("meta", {"label_names": list(NAMES)})
    monkeypatch.setattr(CIFAR10, "meta", {**meta, "md5": md5})
    folder = tmp_path / "official"
    folder.mkdir()
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, CIFAR10.base_folder)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", digest)
    return folder


def _source(official: Path, form: str) -> Path:
    archive = official / CIFAR10.filename
    if form == "archive":
        return archive
    if form == "its folder":
        return official
    with tarfile.open(archive) as tar:
        tar.extractall(official, filter="data")
    archive.unlink()
    return official if form == "folder it unpacks in" else official / CIFAR10.base_folder


@pytest.mark.parametrize("form", ["archive", "its folder", "folder it unpacks in", "unpacked"])
def test_every_form_of_the_archive_becomes_images(
    official: Path, tmp_path: Path, form: str
) -> None:
    raw = pickle.loads((tmp_path / "made" / CIFAR10.base_folder / "train_list_1").read_bytes())
    images = prepare(_source(official, form), tmp_path / "out", tmp_path / "unused")
    for split, count in (("train", 12), ("val", 6)):
        assert len(list((images / split).rglob("*.png"))) == count
        assert sorted(p.name for p in (images / split).iterdir()) == list(NAMES)
    # The third image of the second file is the ninth of all, and its bytes are kept.
    with Image.open(images / "train" / "bird" / "00008.png") as image:
        pixels = np.asarray(image)
    assert (pixels == raw["data"][2].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_a_folder_of_images_is_left_to_the_shard_command(
    image_folder: Path, tmp_path: Path
) -> None:
    assert prepare(image_folder, tmp_path / "out", tmp_path / "unused") == image_folder


def test_another_archive_is_never_unpickled(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(UserError, match="MD5"):
        prepare(official, tmp_path / "out", tmp_path / "unused")


def test_an_unpacked_folder_with_other_content_is_refused(official: Path, tmp_path: Path) -> None:
    source = _source(official, "unpacked")
    (source / "train_list_0").write_bytes(b"something else")
    with pytest.raises(UserError, match="checksums differ"):
        prepare(source, tmp_path / "out", tmp_path / "unused")


def test_no_network_is_said_with_the_way_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(UserError, match="SOURCE="):
        prepare(None, tmp_path / "out", tmp_path / "downloads")
