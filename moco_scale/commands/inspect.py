"""Say what a checkpoint holds, and whether it is whole; or what a folder of shards holds."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from moco_scale.checkpoints import checkpoint
from moco_scale.checkpoints.run_folder import complete_checkpoints
from moco_scale.config.saved_settings import ModelFile
from moco_scale.data.kinds import DataSet
from moco_scale.data.open import data_set
from moco_scale.data.remote.addresses import shown
from moco_scale.data.shards.index_file import INDEX_JSON
from moco_scale.data.shards.mixed_shards import split_mixture
from moco_scale.data.tools.contact_sheet import contact_sheet
from moco_scale.data.tools.summary import print_summary, summarise
from moco_scale.evaluation.pretrained import read_model_file
from moco_scale.untrusted.documents import check
from moco_scale.untrusted.tensor_files import StoredTensor
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import tell
from moco_scale.utils.text import printable, printable_path

PARTS = ("model.query", "model.key", "optimizer", "queue")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a checkpoint, a run's output folder or its current.pth, or a data set on this "
        "machine as --data-dir names it: a folder of shards, a tar, a pattern, or a mixture",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tensors", action="store_true", help="list every tensor and its shape")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="of shards: draw a sheet of images, a PNG"
    )


def run(args: argparse.Namespace) -> int:
    """Print it. Returns 1 where the checkpoint is damaged, else 0. Raises UserError."""
    if not args.path.strip():
        raise UserError("the name of what to inspect is empty")
    if any(part.remote for part in split_mixture(args.path)):
        raise UserError(
            f"inspect reads what lies on this machine, and there is an address in "
            f"{shown(args.path)}; name the folder that was copied there, or fetch a copy"
        )
    data = _data_at(args.path)
    if data is not None:
        return _run_shards(data, args)
    if args.sheet is not None:
        raise UserError(f"--sheet {args.sheet} is for a data set, and {args.path} is none")
    path = Path(args.path)
    if path.is_file():
        return _run_model(path, args)
    found = describe(path)
    if args.json:
        tell(json.dumps(found, indent=1))
    else:
        _print(found, args.tensors)
    return 0 if found["damage"] is None else 1


def _data_at(spec: str) -> DataSet | None:
    """Return the data set that is meant; None: it is none."""
    path = Path(spec)
    if (path / checkpoint.META).is_file() or (path / "checkpoints").is_dir():
        return None
    if path.is_file() and ".tar" not in path.name:
        return None
    data = data_set(spec)
    return data if path.is_file() or data.exists else None


def _run_shards(data: DataSet, args: argparse.Namespace) -> int:
    if args.tensors:
        raise UserError(f"--tensors is for a checkpoint, and {args.path} is a data set")
    found = summarise(data)
    if args.sheet is not None:
        contact_sheet(data.open(next(iter(found["splits"]))), args.sheet)
    if args.json:
        tell(json.dumps(found, indent=1))
    else:
        print_summary(found)
        if args.sheet is not None:
            tell(f"  sheet of images: {args.sheet}")
    return 0


def _run_model(path: Path, args: argparse.Namespace) -> int:
    """A file that eval.py takes."""
    with read_model_file(path, "the file") as file:
        content = file.content
    parts: dict[str, dict[str, Any]] = {
        printable(name): {
            printable(key): list(tensor.shape)
            for key, tensor in state.items()
            if isinstance(tensor, StoredTensor)
        }
        for name, state in content.items()
        if name != "opt" and isinstance(state, dict)
    }
    if "opt" not in content or not parts:
        raise UserError(
            f"{printable_path(path)} is no model of this program; name a run's folder, its "
            "current.pth, or a checkpoint"
        )
    model = check(content, ModelFile, printable_path(path))
    settings = model.opt
    found: dict[str, Any] = {
        "path": str(path),
        **{"step": model.step, "epoch": model.epoch},
        "bytes": path.stat().st_size,
        "config": settings,
        "tensors": parts,
    }
    if args.json:
        tell(json.dumps(found, indent=1))
        return 0
    tell(printable_path(path))
    tell("  a model for eval.py --pretrained-model; what resumes is in checkpoints/ beside it")
    tell(f"  step {found['step']}, epoch {found['epoch']}; {found['bytes'] / 1e6:.1f} MB on disk")
    for name, shapes in parts.items():
        numbers = sum(math.prod(shape) for shape in shapes.values())
        tell(f"    {name:12} {len(shapes):4} tensors {numbers:>12,} numbers")
    _print_settings(settings)
    if args.tensors:
        named = {f"{part}.{key}": s for part, shapes in parts.items() for key, s in shapes.items()}
        _print_tensors(named)
    return 0


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, as plain values.

    Raises:
        UserError: there is no checkpoint, or nothing of it can be read.
    """
    folder = _newest(path)
    damage = None
    try:
        meta = checkpoint.read_meta(folder)
        checkpoint.verify(folder)
        shapes = checkpoint.shapes(folder)
    except UserError as error:
        meta, shapes, damage = checkpoint.readable_meta(folder), {}, str(error)
        if not meta:
            raise
    parts = {}
    for part in PARTS:
        members = [s for name, s in shapes.items() if name.startswith(part + ".")]
        parts[part] = {
            "tensors": len(members),
            "numbers": sum(m["numbers"] for m in members),
            "bytes": sum(m["bytes"] for m in members),
        }
    return {
        "path": str(folder),
        "incomplete": _incomplete(path),
        "damage": damage,
        **{k: meta.get(k) for k in ("step", "epoch", "samples", "processes", "engine", "keep")},
        "bytes": sum(meta.get("files", {}).values()),
        "parts": parts,
        "config": meta.get("config"),
        "tensors": {name: s["shape"] for name, s in shapes.items()},
    }


def _newest(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{printable_path(path)}: there is no such folder")
    if (path / checkpoint.META).is_file():
        return path
    inside = complete_checkpoints(path)
    if not inside:
        partial = _incomplete(path)
        has = f"; {', '.join(partial)} in it: incomplete" if partial else ""
        raise UserError(
            f"{printable_path(path)} is neither a checkpoint (it has no {checkpoint.META}) nor the "
            f"output folder of a run with complete checkpoints{has}, nor a data set (no "
            f"{INDEX_JSON}, and no tar in it or in its sub-folders)"
        )
    return inside[-1]


def _incomplete(run: Path) -> list[str]:
    """Names of a run's checkpoints that lack their last part, which training passes over."""
    steps = (run / "checkpoints").glob(f"{checkpoint.STEP}*")
    return sorted(p.name for p in steps if p.is_dir() and not (p / checkpoint.META).is_file())


def _print(found: dict[str, Any], tensors: bool) -> None:
    for name in found["incomplete"]:
        tell(f"{name} is incomplete (it has no {checkpoint.META}); training passes it over")
    tell(printable_path(found["path"]))
    tell("  complete" if found["damage"] is None else f"  DAMAGED: {found['damage']}")
    tell(
        f"  step {found['step']}, epoch {found['epoch']}, {found['samples']} samples; written by "
        f"{found['processes']} process(es) under {printable(found['engine'])}"
        + ("; kept for good" if found["keep"] else "")
    )
    tell(f"  {found['bytes'] / 1e6:.1f} MB on disk")
    for part, size in found["parts"].items():
        tell(
            f"    {part:12} {size['tensors']:4} tensors {size['numbers']:>12,} numbers "
            f"{size['bytes'] / 1e6:>9.1f} MB"
        )
    _print_settings(found["config"] or {})
    if tensors:
        _print_tensors(found["tensors"])


def _print_settings(config: dict[str, Any]) -> None:
    tell("  settings")
    for key, value in sorted(config.items()):
        tell(f"    --{key.replace('_', '-'):22} {printable(value)}")


def _print_tensors(shapes: dict[str, list[int]]) -> None:
    tell("  tensors")
    for name, shape in sorted(shapes.items()):
        tell(f"    {name:60} {shape}")
