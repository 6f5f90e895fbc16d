"""Every engine does the same steps as plain PyTorch in one process, in every precision."""

import math
import runpy
from functools import partial
from typing import Any

import pytest
import torch
from commands import REPOSITORY
from harness import run_ranks
from small_engines import ALPHA, BATCH, DIM, ENCODERS, MOMENTUM, RATE, SIZE, engine_around, named
from torch import Tensor, nn

from moco_scale.distributed import collectives
from moco_scale.engines.base import EngineSettings, clip_
from moco_scale.methods.infonce import Negatives, infonce
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import set_groups
from moco_scale.models.encoder import Encoder
from moco_scale.optim.loss_scale import LossScaling

pytestmark = pytest.mark.timeout(600)

ENGINES = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
SHARDED = ("fsdp", "zero3")
GROUP = 4


def slow_unless(quick: bool) -> list[pytest.MarkDecorator]:
    return [] if quick else [pytest.mark.slow]


def cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def train(
    kind: str,
    steps: int,
    encoder: str = "resnet",
    views: int = 1,
    group: int = GROUP,
    zero: dict[str, Any] | None = None,
    overexposed: int = -1,
    **settings: Any,
) -> dict[str, Any]:
    """Some steps on random images: losses, which steps were made, final state.

    overexposed: a step in which rank 0's images are too bright for fp16's largest number.
    """
    chosen = EngineSettings(MOMENTUM, 1e-4, **settings)
    moco, micro_batches = MoCo(ENCODERS[encoder]()), chosen.micro_batches
    before = cloned(moco.state_dict())
    set_groups(moco, group, BATCH, micro_batches)
    engine = engine_around(kind, moco, chosen, zero)
    generator = torch.Generator().manual_seed(1)
    queue = nn.functional.normalize(torch.randn(40, DIM, generator=generator), dim=1)
    per_rank = BATCH // collectives.world_size()
    mine = slice(collectives.rank() * per_rank, (collectives.rank() + 1) * per_rank)
    result: dict[str, Any] = {"losses": [], "applied": [], "scales": [], "frozen": []}
    last = cloned(engine.model_state()) | cloned(engine.optimizer_state())
    engine.moco.train()
    for step in range(steps):
        images = torch.randn(views + 1, BATCH, 3, SIZE, SIZE, generator=generator)[:, mine]
        if step == overexposed and collectives.rank() == 0:
            images = images * 1e6
        with named(step, mine, views):
            keys = engine.key(images[-1])
        if engine.loss_scale is not None:
            result["scales"].append(engine.loss_scale.value)
        mean = 0.0
        for micro_batch, rows in enumerate(torch.arange(per_rank).chunk(micro_batches)):
            shown = (images[v, rows] for v in range(views))
            with named(step, mine, *range(views)):
                queries = engine.query(*shown, micro_batch=micro_batch)
            losses = [
                infonce(query, keys[rows], Negatives(queue), 0.2).loss.mean() for query in queries
            ]
            loss = torch.stack(losses).sum()
            engine.backward(loss / micro_batches)
            mean += float(loss) / micro_batches
        applied = engine.step(RATE)
        if applied:
            engine.ema(ALPHA)
        if engine.loss_scale is not None:
            now = cloned(engine.model_state()) | cloned(engine.optimizer_state())
            if not applied:
                result["frozen"].append(all(torch.equal(now[n], t) for n, t in last.items()))
            last = now
        result["losses"].append(mean)
        result["applied"].append(applied)
    collectives.average_(list(moco.buffers()))
    result["state"] = cloned(engine.model_state())
    result["momenta"] = cloned(engine.optimizer_state())
    whole = engine.query_encoder(ENCODERS[encoder]).eval()
    result["evaluated"] = whole(torch.ones(2, 3, SIZE, SIZE)).detach()
    result["before"] = before
    return result


def movement(got: dict[str, Any], wanted: dict[str, Any], prefix: str) -> float:
    """Relative error of how the weights moved, all of an encoder's together."""
    error = length = 0.0
    for name, before in wanted["before"].items():
        if name.startswith(prefix) and "running" not in name and "num_batches" not in name:
            moved = wanted["state"][name].double() - before
            error += (got["state"][name].double() - wanted["state"][name]).square().sum().item()
            length += moved.square().sum().item()
    return (error / length) ** 0.5


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    (result,) = run_ranks(train, 1, "ddp", 5)
    return result


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        pytest.param(kind, world, marks=slow_unless(world == 2 or kind in SHARDED))
        for kind in ENGINES
        for world in (1, 2)
    ],
)
def test_fp32_equals_one_process(reference: dict[str, Any], kind: str, world: int) -> None:
    assert_same(run_ranks(train, world, kind, 5), reference)


def assert_same(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """All ranks end alike, where one process ends, to the rounding of fp32."""
    losses = torch.tensor([r["losses"] for r in results], dtype=torch.float64).mean(0)
    assert losses.tolist() == pytest.approx(reference["losses"], rel=1e-4)
    for got in results:
        assert got["state"].keys() == reference["state"].keys()
        assert got["momenta"].keys() == reference["momenta"].keys()
        assert movement(got, reference, "query.") < 1e-3
        assert movement(got, reference, "key.") < 1e-3
        torch.testing.assert_close(got["evaluated"], reference["evaluated"], rtol=1e-3, atol=1e-4)
        for name, wanted in reference["state"].items():
            if "running" in name or "num_batches" in name:
                torch.testing.assert_close(got["state"][name], wanted, rtol=1e-3, atol=1e-5)
    for got in results[1:]:
        assert all(torch.equal(t, got["state"][n]) for n, t in results[0]["state"].items())


# Two views as in the symmetric loss; gradients are a few times longer than what they are cut to.
PARTLY: dict[str, Any] = {"views": 2, "group": 2, "clip_norm": 0.1}


@pytest.fixture(scope="module")
def whole_steps() -> dict[str, Any]:
    (result,) = run_ranks(partial(train, **PARTLY), 1, "ddp", 5)
    (unclipped,) = run_ranks(partial(train, views=2, group=2), 1, "ddp", 5)
    assert movement(unclipped, result, "query.") > 0.1
    return result


@pytest.mark.parametrize("kind", ENGINES)
def test_parts_and_recomputation_change_nothing(whole_steps: dict[str, Any], kind: str) -> None:
    """Two micro-batches per step, activation checkpointing, clipped gradients."""
    ways = partial(train, **PARTLY, micro_batches=2, activation_checkpointing=True)
    assert_same(run_ranks(ways, 2, kind, 5), whole_steps)


@pytest.fixture(scope="module")
def transformer() -> dict[str, Any]:
    (result,) = run_ranks(partial(train, encoder="vit", views=2), 1, "ddp", 5)
    patch = "query.backbone.conv_proj.weight"
    assert torch.equal(result["state"][patch], result["before"][patch])
    assert f"{patch}.momentum_buffer" not in result["momenta"]
    return result


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=slow_unless(k in SHARDED)) for k in ENGINES]
)
def test_a_transformer_with_frozen_patches(transformer: dict[str, Any], kind: str) -> None:
    ways = partial(train, encoder="vit", views=2, activation_checkpointing=True)
    assert_same(run_ranks(ways, 2, kind, 5), transformer)


@pytest.fixture(scope="module")
def convnext() -> dict[str, Any]:
    (result,) = run_ranks(partial(train, encoder="convnext", views=2), 1, "ddp", 5)
    return result


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=slow_unless(k in ("ddp", "fsdp"))) for k in ENGINES]
)
def test_stochastic_depth_belongs_to_images(convnext: dict[str, Any], kind: str) -> None:
    """On two ranks, in two micro-batches, of blocks that are computed again."""
    ways = partial(
        train,
        encoder="convnext",
        views=2,
        micro_batches=2,
        activation_checkpointing=True,
        group=2,
    )
    assert_same(run_ranks(ways, 2, kind, 5), convnext)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", [kind for kind in ENGINES if kind != "zero3"])
def test_compiled_blocks(kind: str, encoder: str) -> None:
    (reference,) = run_ranks(partial(train, encoder=encoder, views=2, group=2), 1, "ddp", 5)
    ways = partial(
        train,
        encoder=encoder,
        views=2,
        group=2,
        compile=True,
        micro_batches=2,
        activation_checkpointing=True,
    )
    assert_same(run_ranks(ways, 2, kind, 5, timeout=500.0), reference)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_sharding_within_groups_of_ranks(precision: str) -> None:
    ways = partial(train, group=2, clip_norm=0.1, precision=precision)
    (reference,) = run_ranks(ways, 1, "fsdp", 5)
    results = run_ranks(partial(ways, shard_size=2), 4, "fsdp", 5)
    if precision == "fp32":
        assert_same(results, reference)
    else:
        losses = torch.tensor([r["losses"] for r in results], dtype=torch.float64).mean(0)
        assert losses.tolist() == pytest.approx(reference["losses"], rel=0.01)


@pytest.mark.parametrize(
    "kind", ["zero1", *(pytest.param(k, marks=pytest.mark.slow) for k in ("zero2", "zero3"))]
)
def test_offloaded_optimizer_state(kind: str) -> None:
    (reference,) = run_ranks(partial(train, views=2, group=2), 1, "ddp", 5)
    ways = partial(train, views=2, group=2, zero={"offload_optimizer": {"device": "cpu"}})
    assert_same(run_ranks(ways, 2, kind, 5), reference)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_offloaded_optimizer_state_in_parts(whole_steps: dict[str, Any], kind: str) -> None:
    ways = partial(train, **PARTLY, micro_batches=2, zero={"offload_optimizer": {"device": "cpu"}})
    assert_same(run_ranks(ways, 2, kind, 5), whole_steps)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", SHARDED)
def test_recomputation_in_half_precision(kind: str, encoder: str) -> None:
    half = partial(train, encoder=encoder, views=2, group=2, precision="bf16")
    plain = run_ranks(half, 2, "ddp", 5)
    recomputed = run_ranks(partial(half, activation_checkpointing=True), 2, kind, 5)
    for got, wanted in zip(recomputed, plain, strict=True):
        assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_gathering_in_half_precision_changes_no_number(encoder: str) -> None:
    """What autocast would round is rounded before it travels: the same losses to the digit."""
    half = partial(train, encoder=encoder, precision="bf16")
    plain, gathered = (run_ranks(half, 2, kind, 3) for kind in ("ddp", "fsdp"))
    for got, wanted in zip(gathered, plain, strict=True):
        assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-6)


def test_clipping_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator) for n in (3, 0, 7)]
    for norm in (0.5, 100.0):
        weights = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        nn.utils.clip_grad_norm_(weights, norm)
        ours = [g.clone() for g in gradients]
        clip_(ours, norm, copies=1)
        for got, weight in zip(ours, weights, strict=True):
            torch.testing.assert_close(got, weight.grad)


@pytest.mark.parametrize("kind", ENGINES)
def test_fp16_leaves_out_what_overflows_and_goes_on(reference: dict[str, Any], kind: str) -> None:
    """A scale far too large: it falls step by step, nothing moves until gradients are finite.

    In the first step even the activations overflow, and statistics with them.
    """
    scaling = LossScaling(initial=2.0**24, window=3)
    ways = partial(
        train, precision="fp16", scaling=scaling, overexposed=0, group=2, micro_batches=2
    )
    results = run_ranks(ways, 2, kind, 9)
    assert not math.isfinite(results[0]["losses"][0])
    for got in results:
        skipped = got["applied"].index(True)
        assert 0 < skipped < 9, got["scales"]
        assert got["frozen"] == [True] * got["applied"].count(False)
        halvings = [2.0 ** (24 - i) for i in range(skipped + 1)]
        assert got["scales"][: skipped + 1] == halvings
        assert got["applied"] == results[0]["applied"]
        assert all(t.dtype == torch.float32 for t in got["momenta"].values())
        assert all(t.isfinite().all() for t in got["state"].values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=slow_unless(kind in (*SHARDED, "zero1"))) for kind in ENGINES],
)
def test_half_precision_differs_by_its_rounding_alone(
    reference: dict[str, Any], kind: str, precision: str
) -> None:
    results = run_ranks(partial(train, precision=precision), 2, kind, 5)
    losses = torch.tensor([r["losses"] for r in results], dtype=torch.float64).mean(0)
    # The bounds are derived there, for as many layers and the same temperature.
    table = runpy.run_path(str(REPOSITORY / "scripts" / "engines.py"))
    assert losses.tolist() == pytest.approx(reference["losses"], abs=table["loss_bound"](precision))
    assert results[0]["applied"] == [True] * 5
    bound = table["movement_bound"](precision)
    for encoder in ("query.", "key."):
        off = movement(results[0], reference, encoder)
        assert off < bound
    # Stored in fp32: a weight that was rounded on its way would be the same after rounding.
    weight = results[0]["state"]["key.backbone.0.weight"]
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    assert not torch.equal(weight, weight.to(half).float())


def average_for_long(kind: str, precision: str) -> float:
    """Relative error of the key's movement against an average in fp64, after 1,000 steps."""
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU())
    moco = MoCo(Encoder(backbone, nn.Linear(8, 4), 8))
    start = {n: t.double() for n, t in cloned(moco.query.state_dict()).items()}
    exact = dict(start)
    engine = engine_around(kind, moco, EngineSettings(MOMENTUM, 1e-4, precision))
    generator = torch.Generator().manual_seed(collectives.rank())
    for _ in range(1000):
        (query,) = engine.query(torch.randn(4, 3, 2, 2, generator=generator))
        engine.key(torch.randn(4, 3, 2, 2, generator=generator))
        engine.backward(query[:, 0].mean() - query[:, 1].square().mean())
        if not engine.step(0.01):
            continue  # fp16, until its scale fits
        engine.ema(0.999)
        state = engine.model_state()
        for name in exact:
            exact[name] = 0.999 * exact[name] + 0.001 * state["query." + name].double()
    key = engine.model_state()
    error = sum(float((key["key." + n].double() - t).square().sum()) for n, t in exact.items())
    length = sum(float((t - start[n]).square().sum()) for n, t in exact.items())
    return float((error / length) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ENGINES)
def test_the_key_encoder_is_an_exact_average(kind: str, precision: str) -> None:
    for error in run_ranks(average_for_long, 2, kind, precision):
        print(f"{kind} {precision}: {error:.1e}")
        assert error < 1e-3
