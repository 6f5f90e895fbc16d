"""The rendered images: the same for a seed, labelled, and not classified by raw pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_scale.demo.render import CLASSES, CLOTH, PRINT, render, write_folder
from moco_scale.evaluation.knn import weighted_knn


def _bytes(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.jpg"))}


def test_images_depend_on_seed_class_and_number_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", train_per_class=2, val_per_class=1, size=24, processes=1)
    write_folder(tmp_path / "b", train_per_class=3, val_per_class=1, size=24, processes=2)
    write_folder(tmp_path / "c", train_per_class=2, val_per_class=1, size=24, processes=1, seed=1)
    a, b, c = (_bytes(tmp_path / name) for name in "abc")
    assert len(a) == 3 * len(CLASSES) and len(b) == 4 * len(CLASSES)
    assert a == {name: b[name] for name in a}
    assert all(a[name] != c[name] for name in a)
    assert len(set(b.values())) == len(b), "two images are the same"


def test_folder_is_an_image_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", train_per_class=1, val_per_class=1, size=24, processes=1)
    for split in ("train", "val"):
        assert sorted(p.name for p in (tmp_path / "x" / split).iterdir()) == sorted(CLASSES)
    with Image.open(tmp_path / "x" / "val" / "rings" / "00000.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 24))


def test_an_existing_folder_is_not_mixed_with_another_set(tmp_path: Path) -> None:
    write_folder(tmp_path, train_per_class=1, val_per_class=1, size=24, processes=1)
    with pytest.raises(FileExistsError):
        write_folder(tmp_path, train_per_class=1, val_per_class=1, size=24, processes=1)


def _value(image: Image.Image) -> np.ndarray:
    """The V of HSV in 0..1, by which ink and cloth differ."""
    return np.asarray(image, dtype=float).max(axis=-1) / 255.0


MIDDLE = (CLOTH[3] + PRINT[2]) / 2


@pytest.mark.parametrize("name", CLASSES)
def test_a_motif_is_seen_everywhere_in_an_image(name: str) -> None:
    """In each quarter there is ink, and there is cloth."""
    value = _value(render(name, np.random.default_rng(1), 64))
    quarters = [value[i : i + 32, j : j + 32] > MIDDLE for i in (0, 32) for j in (0, 32)]
    assert all(0.05 < quarter.mean() < 0.7 for quarter in quarters)


def test_no_place_of_an_image_has_the_colours_of_another() -> None:
    """Of two crops of one image, colours say as little as of crops of two images."""

    def colours(image: Image.Image, ink: bool) -> np.ndarray:
        """Mean colour [4, 3] of an image's quarters, of 1, of the ink or of the cloth."""
        rgb, of_ink = np.asarray(image, dtype=float) / 255.0, _value(image) > MIDDLE
        quarters = [(slice(i, i + 48), slice(j, j + 48)) for i in (0, 48) for j in (0, 48)]
        return np.stack([rgb[q][of_ink[q] == ink].mean(axis=0) for q in quarters])

    images = [render("discs", np.random.default_rng(i)) for i in range(60)]
    for ink in (True, False):
        quarters = np.stack([colours(image, ink) for image in images])  # [60, 4, 3]
        within = np.abs(quarters[:, 0] - quarters[:, 3]).mean()
        between = np.abs(quarters[:-1, 0] - quarters[1:, 3]).mean()
        assert within > 0.8 * between


def test_images_of_two_classes_differ_in_nothing_but_the_motif() -> None:
    """The same draws give the same places and turns: what is not ink in either is the same."""
    first, second = (
        np.asarray(render(name, np.random.default_rng(2)), dtype=float)
        for name in ("discs", "stars")
    )
    same = (np.abs(first - second) < 1).all(axis=-1)
    assert 0.6 < same.mean() < 0.95


def test_raw_pixels_do_not_give_the_class_away() -> None:
    def draw(split: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [
            np.asarray(render(name, np.random.default_rng([split, label, i]), 24)).reshape(-1)
            for label, name in enumerate(CLASSES)
            for i in range(count)
        ]
        labels = torch.arange(len(CLASSES)).repeat_interleave(count)
        return torch.from_numpy(np.stack(rows)).float(), labels

    (bank, bank_labels), (queries, labels) = draw(0, 40), draw(1, 20)
    mean = bank.mean(dim=0)
    bank, queries = (torch.nn.functional.normalize(x - mean, dim=1) for x in (bank, queries))
    top1 = weighted_knn(bank, bank_labels, queries, labels, len(CLASSES), k=100)["top1"]
    assert top1 < 40.0  # chance is 10; after the demo's training it is near 80
