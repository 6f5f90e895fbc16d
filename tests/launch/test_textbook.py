"""Training equals a textbook MoCo, under every engine and on any number of processes.

The textbook gets initial weights and augmented pixels; it works out by itself which samples make
a batch, how they are shuffled and grouped, losses, updates, averages and the queue.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import textbook
import torch
from commands import forked, launched, make_shards
from PIL import Image
from torch import Tensor

from moco_scale.checkpoints import checkpoint
from moco_scale.data.images.augment import AUGMENTATIONS, draw_params
from moco_scale.data.images.device_augment import DeviceAugment
from moco_scale.data.loading.loader import pretraining_loader
from moco_scale.data.sampling.order import BatchPlan, FullPermutation
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.models.encoder import build_encoder

pytestmark = pytest.mark.timeout(900)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED, IMAGES, BATCH, SIZE, DIM = 3, 230, 32, 36, 128
STEPS_PER_EPOCH, EPOCHS, STEPS = 7, 3, 20
# Training is chaotic: rounding grows from step to step, the faster the larger the steps are. This
# rate moves the loss by several times the tolerance, and the weights are compared by how they move.
RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """One recipe, with what makes it small."""

    recipe: str
    head: str
    queue: int  # no multiple of the batch
    settings: textbook.Settings
    steps: int = STEPS
    flags: tuple[object, ...] = ()

    def learning_rate(self, step: int) -> float:
        if self.recipe == "v1":
            return textbook.step_schedule(RATE, step, STEPS_PER_EPOCH, [1, 2])
        return textbook.cosine_schedule(RATE, step, STEPS_PER_EPOCH, EPOCHS)

    def command_line(self) -> list[object]:
        settings = self.settings
        return [
            *("--recipe", self.recipe, "--dataset", "images", "--model", "resnet18"),
            *("--image-size", SIZE, "--dim", DIM, "--nce-k", self.queue),
            *("--nce-t", settings.temperature, "--alpha", settings.key_momentum),
            *("--momentum", settings.sgd_momentum, "--weight-decay", settings.weight_decay),
            *("--batch-size", BATCH, "--bn-group-size", settings.bn_group_size),
            *("--base-lr", RATE * 256 / BATCH, "--epochs", EPOCHS, "--max-steps", self.steps),
            *("--rng-seed", SEED, "--print-freq", 1, "--knn-freq", 0, "--save-freq", 0),
            *("--num-workers", 1, "--device", "cpu", *self.flags),
        ]


# Groups of 8: one per process of 4. Groups of 16: one spans two processes of 4.
V1 = Case(
    *("v1", "linear", 80, textbook.Settings(8, 0.2, 0.9, 0.9, 0.02)),
    flags=("--lr-decay-epochs", 1, 2),
)
V2 = Case("v2", "mlp", 100, textbook.Settings(16, 0.2, 0.99, 0.9, 1e-4))
SYMMETRIC = replace(V1, settings=replace(V1.settings, symmetric=True), steps=4)
SYMMETRIC = replace(SYMMETRIC, flags=(*V1.flags, "--symmetric"))
# A queue longer than an epoch, so that images meet their own keys.
MASKED = replace(
    V1,
    settings=replace(V1.settings, mask_unfilled=True, mask_same_image=True),
    queue=250,
    steps=10,
    flags=(*V1.flags, "--mask-unfilled", "--mask-same-image", "--queue", "sharded"),
)


@dataclass(frozen=True)
class Result:
    """Of each step the loss and the learning rate; weights and queue after the last one."""

    losses: list[float]
    rates: list[float]
    query: dict[str, Tensor]
    key: dict[str, Tensor]
    momenta: dict[str, Tensor]
    queue: Tensor
    pointer: int


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise: its crops differ, which keeps BatchNorm's variances away from zero."""
    root = tmp_path_factory.mktemp("textbook")
    (root / "images").mkdir()
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (64 + i % 5, 64 + i % 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i:03d}.png")
    return make_shards(root / "images", root / "shards")


def initial_weights(case: Case) -> dict[str, Tensor]:
    encoder = build_encoder("resnet18", head=case.head, dim=DIM, seed=SEED)
    return {to_textbook(name): tensor for name, tensor in encoder.state_dict().items()}


def to_textbook(name: str) -> str:
    """torchvision's name of a tensor; the head takes the place of its classifier."""
    return name.removeprefix("backbone.").replace("head.", "fc.")


def batches(case: Case, shards: Path) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Samples and augmented views of each step, as one process of the package makes them."""
    opened = IndexedShards.open(shards, "train")
    aug = AUGMENTATIONS[case.recipe]
    augment = DeviceAugment(aug, MEAN, STD)
    plan = BatchPlan(FullPermutation(IMAGES, SEED), BATCH)
    for batch in pretraining_loader(opened, plan, aug, SIZE, num_workers=0, end_step=case.steps):
        samples = batch.index.numpy()
        yield (
            samples.tolist(),
            [
                augment(batch.views[view], draw_params(aug, SEED, batch.epoch, samples, view))
                for view in range(2)
            ],
        )


@pytest.fixture(scope="module")
def expected(shards: Path) -> Callable[[Case], Result]:
    """What the textbook makes of a case."""

    @functools.cache
    def run(case: Case) -> Result:
        network = textbook.make_network(DIM, case.head, case.settings.bn_group_size)
        network.load_state_dict(initial_weights(case))
        moco = textbook.Textbook(
            network, textbook.initial_queue(case.queue, DIM, SEED), case.settings
        )
        orders = textbook.epoch_batches(IMAGES, BATCH, SEED, case.steps)
        losses = []
        for step, (samples, views) in enumerate(batches(case, shards)):
            assert samples == orders[step]
            shuffles = [
                textbook.permutation(BATCH, SEED, f"shuffle-{stream}", step)
                for stream in range(2 if case.settings.symmetric else 1)
            ]
            losses.append(moco.step_on(samples, views, shuffles, case.learning_rate(step)))
        return Result(
            losses,
            [case.learning_rate(step) for step in range(case.steps)],
            moco.query.state_dict(),
            moco.key.state_dict(),
            {
                name: moco.optimizer.state[parameter]["momentum_buffer"]
                for name, parameter in network.named_parameters()
            },
            moco.queue,
            moco.next_slot,
        )

    return run


@pytest.fixture(scope="module")
def actual(
    shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case, str, int], Result]:
    """What ``train.py`` makes of a case; each (case, start, number of processes) runs once."""

    @functools.cache
    def run(case: Case, start: str, world: int) -> Result:
        out = tmp_path_factory.mktemp("run") / "out"
        launcher, _, engine = start.partition(" ")
        flags = [*case.command_line(), "--data-dir", shards, "--output-dir", out]
        if engine.startswith("zero"):
            flags += ["--deepspeed", f"ds_configs/{engine}.json"]
        elif engine:
            flags += ["--engine", engine]
        if launcher == "forked":
            status, output = forked(*flags, ranks=world)
        else:
            status, output = launched(launcher, *flags, processes=world)
        assert status == 0, output
        return read(out, case.steps)

    return run


def read(out: Path, steps: int) -> Result:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    saved = checkpoint.load(out / "checkpoints" / f"step-{steps:08d}")

    def part(prefix: str, suffix: str = "") -> dict[str, Tensor]:
        return {
            to_textbook(name.removeprefix(prefix).removesuffix(suffix)): tensor
            for name, tensor in saved.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }

    return Result(
        [record["loss"] for record in records],
        [record["lr"] for record in records],
        part("model.query."),
        part("model.key."),
        part("optimizer.query.", ".momentum_buffer"),
        saved["queue.keys"],
        int(saved["queue.pointer"]),
    )


def movement_error(
    actual: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    """Distance to where the expected weights are, relative to how far those have moved."""
    names = [name for name in expected if name in actual and expected[name].is_floating_point()]
    far = sum(float((expected[n] - start[n]).double().square().sum()) for n in names)
    off = sum(float((actual[n] - expected[n]).double().square().sum()) for n in names)
    return (off / far) ** 0.5


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without BatchNorm's buffers."""
    return {n: t for n, t in state.items() if "running_" not in n and "num_batches" not in n}


def report(got: Result, wanted: Result, start: dict[str, Tensor]) -> dict[str, float]:
    """How far a run is from the textbook; all relative but the queue's, whose rows are unit."""
    # Without a negative, the loss is 0.
    errors = [abs(g - w) / max(w, 1e-3) for g, w in zip(got.losses, wanted.losses, strict=True)]
    zeros = {name: torch.zeros_like(t) for name, t in wanted.momenta.items()}
    return {
        "first loss": errors[0],
        "losses": max(errors),
        "query": movement_error(weights(got.query), weights(wanted.query), start),
        "key": movement_error(weights(got.key), weights(wanted.key), start),
        "query statistics": movement_error(got.query, wanted.query, start),
        "key statistics": movement_error(got.key, wanted.key, start),
        "momentum": movement_error(got.momenta, wanted.momenta, zeros),
        "queue": float((got.queue - wanted.queue).abs().max()),
    }


RUNS = [
    (V1, "python", 1),
    (V1, "torchrun", 2),
    (V1, "forked", 4),
    *((V1, "forked zero0", world) for world in (1, 4)),
    (V1, "deepspeed zero0", 2),
    (V1, "deepspeed zero1", 2),
    *((V1, "forked zero1", world) for world in (1, 4)),
    (V1, "forked zero2", 2),
    *((V1, "forked zero3", world) for world in (1, 2, 4)),
    *((V1, "forked fsdp", world) for world in (1, 2, 4)),
    (V2, "forked", 1),
    (V2, "forked zero1", 2),
    (V2, "forked zero1", 4),
    (SYMMETRIC, "forked", 2),
    (MASKED, "forked", 4),
]
QUICK = RUNS[6], RUNS[-2]
"""One of each kind: the others are for `make test-slow`."""
NAMES = {id(V1): "v1", id(V2): "v2", id(SYMMETRIC): "symmetric", id(MASKED): "masked"}


@pytest.mark.parametrize(
    ("case", "start", "world"),
    [
        pytest.param(
            *run,
            id=f"{NAMES[id(run[0])]}-{run[1]}-{run[2]}",
            marks=[] if run in QUICK else pytest.mark.slow,
        )
        for run in RUNS
    ],
)
def test_training_equals_the_textbook(
    case: Case,
    start: str,
    world: int,
    expected: Callable[[Case], Result],
    actual: Callable[[Case, str, int], Result],
) -> None:
    wanted, got = expected(case), actual(case, start, world)
    found = report(got, wanted, initial_weights(case))
    print({name: f"{value:.1e}" for name, value in found.items()})  # shown when something fails
    assert got.rates == pytest.approx(wanted.rates, rel=1e-12)
    assert got.query.keys() == got.key.keys() == wanted.query.keys()
    assert got.momenta.keys() == wanted.momenta.keys()
    assert got.pointer == wanted.pointer
    assert found["first loss"] < 1e-6
    assert found["losses"] < 1e-4
    # Weights are compared by how they moved, in which rounding shows much more.
    assert max(found["query"], found["key"]) < 0.05
    assert found["momentum"] < 0.2
    assert max(found["query statistics"], found["key statistics"]) < 2e-3
    assert found["queue"] < 3e-3
    for state, reference in ((got.query, wanted.query), (got.key, wanted.key)):
        counters = [name for name in state if name.endswith("num_batches_tracked")]
        assert counters and all(torch.equal(state[n], reference[n]) for n in counters)


@pytest.mark.slow
def test_processes_and_engines_agree(
    actual: Callable[[Case, str, int], Result],
) -> None:
    """The queue after 20 steps, whichever way it was filled."""
    runs = [actual(*run) for run in RUNS if run[0] is V1]
    assert len(runs) == 16
    for one, other in itertools.pairwise(runs):
        assert one.pointer == other.pointer == STEPS * BATCH % V1.queue
        assert (one.queue * other.queue).sum(1).min() > 1 - 1e-5
