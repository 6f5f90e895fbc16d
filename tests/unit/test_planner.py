"""Plans: shapes and lifetimes without numbers, hardware files, advice, the command."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_scale.__main__ import main
from moco_scale.commands.flops import count_flops
from moco_scale.config import command_line
from moco_scale.config.resolve import check_shuffle_group
from moco_scale.distributed import collectives
from moco_scale.engines import fsdp
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import set_groups
from moco_scale.models.encoder import build_encoder
from moco_scale.planner import trace
from moco_scale.planner.cluster import PRESETS, read_hardware
from moco_scale.planner.memory import flat_partition, sharding
from moco_scale.planner.plan import Plan, make_plan
from moco_scale.planner.trace import build_model, trace_step
from moco_scale.planner.traffic import Collective
from moco_scale.planner.utilisation import Utilisation, _known_peak
from moco_scale.utils.errors import UserError

SMALL = (
    *("--recipe", "v2", "--dataset", "cifar10", "--model", "resnet18", "--image-size", "16"),
    *("--batch-size", "16", "--bn-group-size", "4", "--nce-k", "64"),
)


def plan_of(*flags: str, nodes: int = 1, gpus: int = 2, hardware: str = "a100") -> Plan:
    config = command_line.parse([*SMALL, *flags])
    return make_plan(config, nodes, gpus, PRESETS[hardware])


def test_flops_are_those_of_fvcore() -> None:
    """The query's forward and twice that backward but for the first layer's input, and the key's.

    A ViT's first layer is not trained: its backward pass has no products either.
    """
    config = command_line.parse(list(SMALL))
    trace = trace_step(config, 1)
    encoder = build_encoder("resnet18", stem="cifar", head="mlp", image_size=16)
    image = torch.zeros(1, 3, 16, 16)
    forward = count_flops(encoder, image)
    # fvcore counts normalisation too; matrix products alone are what both count.
    products = sum(forward.by_operator.get(k, 0) for k in ("conv", "linear"))
    first = 3 * 9 * 64 * 16 * 16
    assert trace.flops == 16 * 2 * (4 * products - first)


def test_memory_is_what_a_real_pass_holds() -> None:
    """Bytes that autograd saves in a real forward pass, each storage once."""
    config = command_line.parse([*SMALL, "--bn-group-size", "8"])
    moco = MoCo(build_encoder("resnet18", stem="cifar", head="mlp", image_size=16))
    set_groups(moco, 8, 16)
    crops = torch.randn(16, 3, 16, 16)
    unknown = (*moco.parameters(), *moco.buffers(), crops)
    known = {t.untyped_storage().data_ptr() for t in unknown}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = moco(crops)
    held = trace_step(config, 1).held
    assert out
    assert sum(saved.values()) <= held <= 1.02 * sum(saved.values())


def test_recomputing_holds_less_and_computes_more() -> None:
    whole = trace_step(command_line.parse(list(SMALL)), 1)
    again = trace_step(command_line.parse([*SMALL, "--activation-checkpointing"]), 1)
    assert again.held < 0.6 * whole.held
    assert 1.15 * whole.flops < again.flops < 1.35 * whole.flops


def test_parts_hold_a_part_and_compute_the_same() -> None:
    whole = trace_step(command_line.parse(list(SMALL)), 1)
    parts = trace_step(command_line.parse([*SMALL, "--accumulation-steps", "2"]), 1)
    assert parts.flops == whole.flops
    assert parts.held == pytest.approx(whole.held / 2, rel=0.02)


@pytest.mark.parametrize("flags", [(), ("--accumulation-steps", "2")])
def test_a_few_groups_stand_for_many(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = command_line.parse([*SMALL, "--batch-size", "32", *flags])
    few = trace_step(config, 1)
    monkeypatch.setattr(trace, "_stand_in", lambda groups: groups)
    all_of_them = trace_step(config, 1)
    names = ("query", "key", "backward")
    assert len(few.query) < len(all_of_them.query)
    for kernels, whole in ((getattr(few, n), getattr(all_of_them, n)) for n in names):
        assert sum(k.times for k in kernels) == sum(k.times for k in whole)
        moved = sum(k.times * k.moved for k in kernels)
        # Each group reads weights and running statistics, which are small.
        assert moved == pytest.approx(sum(k.times * k.moved for k in whole), rel=0.03)
    assert few.flops == all_of_them.flops
    # Statistics of each group, which small images make a large part.
    assert few.held == pytest.approx(all_of_them.held, rel=0.02)
    assert few.peak == pytest.approx(all_of_them.peak, rel=0.02)


def test_a_gpu_holds_the_crops_of_two_steps() -> None:
    """What `Inputs` keeps: of a share of 8, 16 px; uint8 of both views, fp32 of the query's."""
    view = 8 * 3 * 16 * 16
    parts = ("--accumulation-steps", "2")
    assert plan_of().memory["inputs"] == 2 * 2 * view + 3 * 4 * view
    assert plan_of(*parts).memory["inputs"] == plan_of().memory["inputs"]
    assert plan_of("--symmetric").memory["inputs"] == 2 * 2 * view + 6 * 4 * view
    config = command_line.parse([*SMALL, *parts])
    on_cpu = make_plan(config, 1, 2, PRESETS["a100"], on_gpu=False)
    # As for groups that span ranks, beside which nothing is made ahead.
    spanning = plan_of("--bn-group-size", "16")
    assert on_cpu.memory["inputs"] == 2 * view + 4 * view // 2
    assert spanning.memory["inputs"] == 2 * view + 4 * view


@pytest.mark.parametrize("world", [2, 3, 8])
def test_zero_partitions_are_aligned(world: int) -> None:
    config = command_line.parse([*SMALL, "--deepspeed", "ds_configs/zero1.json"])
    moco = build_model(config)
    how = sharding(config, moco, 2)
    how = type(how)(how.engine, world, world, how.configuration)
    numbers = sum(p.numel() for p in moco.trained_parameters().values())
    part = flat_partition(numbers, how)
    assert part * world >= numbers
    assert part % 2 == 0
    assert part * world - numbers < 2 * world


@pytest.mark.parametrize(
    ("kind", "ranks", "spread", "sent", "across"),
    [
        ("all-reduce", 8, 1, 1.75, 0.0),
        ("all-gather", 8, 2, 0.875, 0.875 * 2 / 8),
        ("all-to-all", 8, 2, 0.875, 0.5),
        ("reduce-scatter", 1, 1, 0.0, 0.0),
    ],
)
def test_what_a_ring_sends(kind: str, ranks: int, spread: int, sent: float, across: float) -> None:
    collective = Collective("", kind, 1_000_000, ranks, spread)
    assert collective.sent == pytest.approx(sent * 1e6)
    assert collective.sent_across == pytest.approx(across * 1e6)


def test_sharding_shrinks_the_state_and_one_gpu_sends_nothing() -> None:
    ddp, fsdp = plan_of(gpus=4), plan_of("--engine", "fsdp", gpus=4)
    for kind in ("weights", "key encoder", "optimizer"):
        assert fsdp.memory[kind] == pytest.approx(ddp.memory[kind] / 4, rel=0.02)
    assert plan_of(gpus=1).collectives == []
    assert plan_of(gpus=1).time.exposed == 0


def test_hybrid_sharding_keeps_gathering_inside_nodes() -> None:
    flags = ("--engine", "fsdp", "--fsdp-shard-size", "2")
    plan = plan_of(*flags, nodes=2, gpus=2)
    across = {c.purpose: c.sent_across for c in plan.collectives}
    assert across["query, forward"] == across["gradients"] == 0
    assert across["gradients between copies"] > 0


def test_shuffling_inside_nodes_stays_there() -> None:
    for mode, across in (("world", 0.5), ("node", 0.0)):
        plan = plan_of("--shuffle-bn", mode, nodes=2, gpus=2)
        (crops,) = [c for c in plan.collectives if c.kind == "all-to-all"]
        assert crops.sent_across == across * crops.payload
        assert crops.sent == pytest.approx((0.75 if mode == "world" else 0.5) * crops.payload)
    plans = plan_of("--shuffle-bn", "off", nodes=2, gpus=2)
    assert not [c for c in plans.collectives if c.kind == "all-to-all"]


def test_groups_that_span_ranks_send_statistics() -> None:
    purposes = {c.purpose for c in plan_of("--bn-group-size", "global").collectives}
    assert {"BatchNorm, forward", "BatchNorm, backward"} <= purposes


def test_what_does_not_fit_is_said_with_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"like": "a100", "memory_gib": 0.3, "reserved_gib": 0.01}))
    status = main(["plan", *SMALL, "--nce-k", "1000000", "--gpus", "2", "--hardware", str(small)])
    said = capsys.readouterr().out
    assert status == 1
    assert "DOES NOT FIT" in said
    assert "GiB too much" in said
    assert "--queue sharded" in said


def test_utilisation_where_the_peak_is_known() -> None:
    config = command_line.parse([*SMALL, "--precision", "bf16"])
    assert Utilisation(config, 2, "").of(100.0) is None
    assert Utilisation(config, 2, "GPU of tomorrow").of(100.0) is None
    flops = trace_step(config, 2).flops / 8
    found = Utilisation(config, 2, "NVIDIA A100-SXM4-80GB").of(100.0)
    assert found == pytest.approx(100 * flops / (2 * 312e12))
    again = command_line.parse([*SMALL, "--precision", "bf16", "--activation-checkpointing"])
    assert Utilisation(again, 2, "NVIDIA A100-SXM4-80GB").of(100.0) == pytest.approx(found)


@pytest.mark.parametrize(
    ("name", "fp32", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 67, 989),
        ("NVIDIA H100 PCIe", 51, 756),
        ("NVIDIA H100 NVL", 60, 835),
        ("NVIDIA H200", 67, 989),
        ("NVIDIA H200 NVL", 60, 835),
        ("NVIDIA GH200 480GB", 67, 989),
        ("NVIDIA B200", 75, 2250),
        ("NVIDIA GB200", None, None),
        ("NVIDIA L40S", 91.6, 362),
        ("NVIDIA L40", None, None),
        ("NVIDIA A100-PCIE-40GB", 19.5, 312),
        ("NVIDIA RTX A1000", None, None),
        ("Tesla V100-SXM2-16GB", 15.7, 125),
        ("Tesla V100-PCIE-16GB", None, None),
        ("Tesla V100S-PCIE-32GB", None, None),
        ("", None, None),
    ],
)
def test_the_peak_is_that_of_the_very_device(
    name: str, fp32: float | None, half: float | None
) -> None:
    assert _known_peak(name, "fp32") == fp32
    assert _known_peak(name, "bf16") == half


def test_a_peak_that_the_user_states_goes_first() -> None:
    flops = trace_step(command_line.parse(list(SMALL)), 2).flops / 8
    for name in ("GPU of tomorrow", "NVIDIA A100-SXM4-80GB"):
        config = command_line.parse([*SMALL, "--peak-tflops", "50"])
        assert Utilisation(config, 2, name).of(100.0) == pytest.approx(100 * flops / (2 * 50e12))


def test_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", *SMALL, "--gpus", "2", "--json", "--plot", str(tmp_path / "plan.png")]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"memory_per_gpu_gib", "bytes_per_step", "images_per_second", "days"} <= found.keys()
    assert found["bytes_per_step"] == round(sum(c["sent"] for c in found["collectives"]))
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert main(flags) == 2  # nothing is overwritten
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "message"),
    [("none/plan.png", "there is no folder"), ("plan.xyz", "ends in .png"), ("plan", "ends in")],
)
def test_a_plot_that_cannot_be_written_is_refused_first(
    file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *SMALL, "--gpus", "2", "--plot", str(tmp_path / file)]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out
    assert not list(tmp_path.iterdir())


def test_little_reading_is_not_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--model", "resnet50", "--gpus", "1", "--image-size", "224"]) == 0
    cores = re.search(r"Reading: (\d+\.\d) cores", capsys.readouterr().out)
    assert cores and 0 < float(cores[1]) < 10


@pytest.mark.parametrize(
    ("flags", "world"),
    [
        (("--engine", "fsdp", "--fsdp-shard-size", "3"), 2),
        (("--engine", "fsdp", "--fsdp-shard-size", "16"), 2),
        (("--batch-size", "256", "--bn-group-size", "32", "--accumulation-steps", "2"), 8),
        (("--accumulation-steps", "3"), 2),
        (("--batch-size", "24", "--bn-group-size", "8"), 2),
        (("--batch-size", "8", "--bn-group-size", "8", "--shuffle-bn", "node"), 2),
        (("--model", "vit_small", "--batch-size", "12", "--bn-group-size", "4"), 2),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(
    flags: tuple[str, ...], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same words: those of the rules that a run goes by, here without its processes."""
    config = command_line.parse([*SMALL, *flags])

    def planned() -> None:
        make_plan(config, 1, world, PRESETS["a100"])

    def run() -> None:
        monkeypatch.setattr(collectives, "world_size", lambda: world)
        monkeypatch.setattr(collectives, "neighbours", lambda size: collectives.Subgroup(None, 1))
        parts = config.run.accumulation_steps
        set_groups(build_model(config), config.model.bn_group_size, config.optim.batch_size, parts)
        if config.run.engine == "fsdp":
            fsdp._mesh(torch.device("cpu"), config.run.fsdp_shard_size)
        if config.contrast.shuffle_bn == "node":
            contrast = dataclasses.replace(config.contrast, shuffle_group=config.optim.batch_size)
            check_shuffle_group(dataclasses.replace(config, contrast=contrast))

    said = []
    for attempt in (planned, run):
        try:
            attempt()
        except UserError as error:
            said.append(str(error))
        else:
            said.append("")
    assert said[0] == said[1]
    assert bool(said[0]) == ("vit_small" not in flags)


def test_a_line_for_each_number_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--gpus", "2", "--scale", "1", "4"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2", "16"], ["8", "64"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "3"], "cannot be shared equally"),
        (["--hardware", "b9000"], "known are b200, h200, h100, h100-nvl"),
        (["--hardware", "v100", "--precision", "bf16"], "does not compute in bf16"),
        (["--dataset", "images"], "give --images N"),
        (["--images", "3"], "do not fill one batch"),
        (["--model", "vit_small", "--image-size", "33"], "not a multiple of vit_small's patches"),
        (["--moco-k", "5"], "--moco-k is here: --nce-k"),
        (["--gpus", "8", "--bn-group-size", "16", "--batch-size", "48"], "does not fit 6 images"),
    ],
)
def test_bad_input(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main(["plan", *SMALL, *flags])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_deepspeed_file_is_refused_as_a_start_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"optimizer": {"type": "Adam"}, "zero_optimization": {"stag": 1}}')
    assert main(["plan", *SMALL, "--deepspeed", str(path)]) == 2
    said = capsys.readouterr().err
    assert "its 'optimizer' section contradicts" in said and "zero_optimization.stag 1" in said


def test_a_queue_longer_than_the_set_is_advised_against(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["plan", *SMALL, "--images", "3002", "--nce-k", "65536"])
    assert "hold each of the 3,002 images about 22 times" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--nodes", "--gpus", "--images", "--scale"])
def test_numbers_are_whole_and_from_one_on(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *SMALL, flag, "0"])
    assert end.value.code == 2 and f"{flag}: 0 is not positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must be a JSON object"),
        ('{"memory": 3}', "'memory' is unknown"),
        ('{"memory_gib": -1}', "memory_gib -1"),
        ('{"name": "x"}', "memory_gib, tflops_fp32"),
        ('{"like": "z1"}', "is none of"),
        ('{"half": ["fp8"], "like": "a100"}', "half"),
        ('{"half": [[]], "like": "a100"}', "half"),
        ('{"like": []}', "is none of"),
        ('{"memory_gib": 1e999, "like": "a100"}', "memory_gib inf"),
        ('{"memory_gib": NaN, "like": "a100"}', "not valid JSON"),
        ('{"memory_gib": 1e-300, "like": "a100"}', "memory_gib 1e-300"),
        ('{"memory_gib": ' + "9" * 400 + ', "like": "a100"}', "memory_gib 999"),
        ("[" * 10000, "not valid JSON"),
        ('{"\\u001b[2J": 1}', r"x1b\[2J' is unknown"),
    ],
    ids=range(14),
)
def test_bad_hardware(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_hardware(str(path))
