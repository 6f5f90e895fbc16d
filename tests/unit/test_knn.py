"""Weighted kNN against a brute-force vote in numpy, and the monitor on real shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moco_scale.__main__ import main
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.shards.protocols import Shards
from moco_scale.evaluation import features, knn
from moco_scale.evaluation.features import Encode, evaluating, extract
from moco_scale.models.encoder import build_encoder
from moco_scale.utils.errors import UserError

MakeShards = Callable[[Path], Path]
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Writes shards of a folder of images."""

    def make(source: Path) -> Path:
        out = tmp_path / f"shards-of-{source.name}"
        assert main(["shard", "--source", str(source), "--out", str(out)]) == 0
        return out

    return make


@pytest.fixture
def shards_of_images(make_shards: MakeShards, image_folder: Path) -> Path:
    """24 training and 12 validation images of 3 classes."""
    return make_shards(image_folder)


def encoded(encode: Encode, shards: Shards, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Features of 16-pixel images."""
    return extract(
        encode,
        shards,
        image_size=16,
        resize_ratio=1.0,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
        num_workers=0,
    )


def monitor_of(data_dir: Path, k: int = 200) -> knn.KnnMonitor:
    bank, queries = knn.bank_and_queries(knn.open_splits(data_dir))
    return knn.KnnMonitor(bank, queries, 16, 1.0, MEAN, STD, k=k, num_workers=0)


def brute_force(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    num_classes: int,
    k: int,
    temperature: float,
) -> tuple[float, float]:
    """One query, one neighbour at a time, in float64."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    top1 = top5 = 0
    for query, truth in zip(queries, query_labels, strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        votes = dict.fromkeys(range(num_classes), 0.0)
        for place in np.argsort(-similarity)[:k]:
            votes[int(bank_labels[place])] += np.exp(similarity[place] / temperature)
        ranking = sorted(votes, key=lambda c: (-votes[c], c))[:5]
        top1 += ranking[0] == truth
        top5 += truth in ranking
    return 100 * top1 / len(queries), 100 * top5 / len(queries)


def clusters(n: int, seed: int, classes: int = 8) -> tuple[Tensor, Tensor]:
    """Features [n, 16] and labels: noisy, so that some queries are wrong at top-1 and top-5."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, 16))
    labels = random.integers(0, classes, n)
    noise = random.normal(size=(n, 16)) * 2.5
    length = random.uniform(0.1, 10, (n, 1))  # must not matter
    return (
        torch.from_numpy((centres[labels] + noise) * length).float(),
        torch.from_numpy(labels),
    )


@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.1), (7, 0.02), (50, 0.1), (150, 0.1), (200, 0.2)]
)
def test_equals_brute_force(k: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, bank_labels = clusters(150, 1)
    queries, query_labels = clusters(60, 2)
    expected = brute_force(
        bank.double().numpy(),
        bank_labels.numpy(),
        queries.double().numpy(),
        query_labels.numpy(),
        8,
        k,
        temperature,
    )
    assert 20 < expected[0] < 80 and expected[0] < expected[1] < 100, "the case tells nothing"
    arguments = (bank, bank_labels, queries, query_labels, 8)
    got = knn.weighted_knn(*arguments, k=k, temperature=temperature)
    assert (got["top1"], got["top5"]) == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(knn, "_SIMILARITIES_AT_ONCE", 150 * 7)  # 7 queries at a time
    assert knn.weighted_knn(*arguments, k=k, temperature=temperature) == got


def test_nearer_neighbours_outvote_more_of_them() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    query, truth = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    # exp(1/T) against 2 exp(0.6/T): the single near one wins below T = 0.4/ln 2 = 0.577.
    assert knn.weighted_knn(bank, labels, query, truth, 2, k=3, temperature=0.5)["top1"] == 100
    assert knn.weighted_knn(bank, labels, query, truth, 2, k=3, temperature=0.7)["top1"] == 0


def test_tiny_temperature_is_the_nearest_neighbour() -> None:
    bank, bank_labels = clusters(100, 3)
    queries, query_labels = clusters(40, 4)
    arguments = (bank, bank_labels, queries, query_labels, 8)
    cold = knn.weighted_knn(*arguments, k=100, temperature=1e-5)
    assert cold["top1"] == knn.weighted_knn(*arguments, k=1)["top1"]


@pytest.mark.parametrize(
    ("bank_labels", "query_labels", "options", "message"),
    [
        ([0, -1], [0], {}, "1 of the bank have none"),
        ([0, 1], [-1], {}, "have none"),
        ([0, 2], [0], {}, "label 2 but there are 2 classes"),
        ([0, 1], [0], {"k": 0}, "--knn-k 0"),
        ([0, 1], [0], {"temperature": 0.0}, "--knn-t 0"),
    ],
)
def test_refuses(
    bank_labels: list[int], query_labels: list[int], options: dict[str, float], message: str
) -> None:
    bank, queries = torch.eye(2), torch.eye(2)[:1]
    with pytest.raises(UserError, match=message):
        knn.weighted_knn(
            bank,
            torch.tensor(bank_labels),
            queries,
            torch.tensor(query_labels),
            2,
            **options,  # type: ignore[arg-type]
        )


def raw(x: Tensor) -> Tensor:
    return x.flatten(1)


class TestExtraction:
    def test_order_normalisation_and_modes(self, shards_of_images: Path) -> None:
        shards = IndexedShards.open(shards_of_images, "train")
        encoder = build_encoder("resnet18", stem="cifar", dim=8)
        encoder.train()
        first = dict(encoder.named_modules())["backbone.layer1"].eval()  # frozen, and stays so
        before = {n: b.clone() for n, b in encoder.named_buffers()}
        seen: list[bool] = []
        encoder.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        rows, labels = encoded(encoder, shards, batch_size=5)
        assert rows.shape == (len(shards), 8) and rows.dtype == torch.float32
        assert labels.tolist() == shards.labels.tolist()
        assert seen and not any(seen)
        frozen = set(first.modules())
        assert all(m.training == (m not in frozen) for m in encoder.modules())
        for name, buffer in encoder.named_buffers():
            assert torch.equal(buffer, before[name]), f"{name} was updated"
        flat, _ = encoded(raw, shards)
        with evaluating(encoder):
            again = encoder(flat.view(-1, 3, 16, 16))
        assert torch.allclose(rows, again, atol=1e-5), "batches of 5 and one batch differ"
        assert flat.min() >= -2 and flat.max() <= 2  # (0 - 0.5)/0.25 to (1 - 0.5)/0.25

    def test_a_method_of_a_module_is_put_into_evaluation_mode(self) -> None:
        encoder = build_encoder("resnet18", stem="cifar")
        encoder.train()
        with evaluating(encoder.features):
            assert not any(m.training for m in encoder.modules())
        assert all(m.training for m in encoder.modules())

    def test_modes_come_back_after_an_error(self) -> None:
        module = nn.Linear(2, 2)
        with pytest.raises(ZeroDivisionError), evaluating(module):
            raise ZeroDivisionError
        assert module.training


class TestMonitor:
    def test_measures_val_against_train(self, shards_of_images: Path) -> None:
        bank, queries = knn.bank_and_queries(knn.open_splits(shards_of_images))
        assert (bank.split, queries.split) == ("train", "val")
        monitor = monitor_of(shards_of_images, k=5)
        got = monitor.measure_function(raw)
        direct = knn.weighted_knn(
            *encoded(raw, bank),
            *encoded(raw, queries),
            num_classes=3,
            k=5,
        )
        assert got == direct

    def test_features_and_projection(self, shards_of_images: Path) -> None:
        monitor = monitor_of(shards_of_images)
        encoder = build_encoder("resnet18", stem="cifar", dim=8)
        assert isinstance(encoder.head, nn.Linear)
        nn.init.zeros_(encoder.head.weight)  # all images project to the same point
        assert monitor.measure(encoder, "projection")["top1"] == pytest.approx(100 / 3)
        assert encoder.training
        with pytest.raises(UserError, match="choose one of features, projection"):
            monitor.measure(encoder, "logits")

    def test_without_a_val_split_holds_out(
        self, make_shards: MakeShards, image_folder: Path
    ) -> None:
        folder = make_shards(image_folder / "train")
        bank, queries = knn.bank_and_queries(knn.open_splits(folder))
        assert len(queries) == 2 and len(bank) == 22
        assert not {bank.where(i) for i in range(22)} & {queries.where(i) for i in range(2)}
        again = knn.bank_and_queries(knn.open_splits(folder))
        assert [s.fingerprint for s in again] == [bank.fingerprint, queries.fingerprint]

    def test_bounds_are_seeded_choices(self, shards_of_images: Path) -> None:
        bank, queries = knn.bank_and_queries(
            knn.open_splits(shards_of_images), max_bank=10, max_queries=3
        )
        assert (len(bank), len(queries)) == (10, 3)
        again, _ = knn.bank_and_queries(knn.open_splits(shards_of_images), max_bank=10)
        other, _ = knn.bank_and_queries(knn.open_splits(shards_of_images), max_bank=10, seed=5)
        assert again.fingerprint == bank.fingerprint != other.fingerprint

    def test_refuses_unlabelled_images_at_once(
        self, make_shards: MakeShards, image_folder: Path
    ) -> None:
        flat = make_shards(image_folder / "train" / "ash")
        unlabelled = knn.unlabelled_split(knn.open_splits(flat))
        assert unlabelled is not None and unlabelled.split == "train"
        with pytest.raises(UserError, match="needs labels"):
            monitor_of(flat)

    def test_a_split_without_labels_is_named(
        self, shards_of_images: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert knn.unlabelled_split(knn.open_splits(shards_of_images)) is None

        really_open = IndexedShards.open

        def opened(data_dir: str, split: str) -> IndexedShards:
            shards = really_open(data_dir, split)
            if split == "val":
                shards.labels = np.full_like(shards.labels, -1)
            return shards

        monkeypatch.setattr(IndexedShards, "open", opened)
        unlabelled = knn.unlabelled_split(knn.open_splits(shards_of_images))
        assert unlabelled is not None and unlabelled.split == "val"


def test_every_output_that_can_be_chosen_exists() -> None:
    encoder = build_encoder("resnet18", stem="cifar", dim=8).eval()
    x = torch.zeros(1, 3, 16, 16)
    widths = [features.chosen_output(encoder, which)(x).shape[1] for which in features.WHICH]
    assert widths == [512, 8]
