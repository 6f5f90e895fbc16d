"""Count the FLOPs of a model and of a training step.

fvcore traces the model and counts one multiply-add as one FLOP (a MAC). Hardware FLOPs, which
peak figures of GPUs are given in, are twice that; both are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moco_scale.config.flag_types import positive_int
from moco_scale.models.encoder import HEADS, build_encoder
from moco_scale.models.registry import MODELS, STEMS, WIDTHS
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import tell

# One pass over elements that are already there: no matrix product hides behind these.
_ELEMENTWISE_NAMES = """
abs add addcdiv addcmul avg_pool1d avg_pool2d avg_pool3d bitwise_and bitwise_or broadcast_tensors
clone cos cumsum div elu empty_like erf exp expand_as fill float gelu hardsigmoid hardswish hardtanh
le leaky_relu lerp linalg_vector_norm log log_softmax logical_and logical_not logical_or lt
max_pool1d max_pool2d max_pool3d mean min mish movedim mul ne neg norm ones_like pad pow prelu
reciprocal repeat reshape_as rms_norm rsqrt rsub sigmoid silu sin softmax softplus sqrt square std
sub sum swapaxes tanh tile tril triu unflatten var var_mean view_as where
"""
ELEMENTWISE = frozenset(
    f"aten::{name}{suffix}" for name in _ELEMENTWISE_NAMES.split() for suffix in ("", "_")
)


@dataclass(frozen=True)
class FlopCount:
    """Multiply-adds of one forward pass.

    Attributes:
        total: of the whole module.
        by_operator: the same by kind of operator.
        by_module: the same by the name of each submodule, those inside it included.
        uncounted: operators that may matter and that nobody knows how to count, with the number
            of their calls; element-wise ones are left out.
        table: fvcore's table by module, a function of the depth to show.
    """

    total: int
    by_operator: dict[str, int]
    by_module: dict[str, int]
    uncounted: dict[str, int]
    table: Callable[[int], str]


def count_flops(module: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> FlopCount:
    """Count the multiply-adds of one forward pass in evaluation mode, attention included.

    fvcore alone skips ``scaled_dot_product_attention`` and, where PyTorch takes its fused path,
    whole attention layers with their projections.

    Args:
        module: traced as it is; its mode (training or not) is restored.
        inputs: what its ``forward`` takes; the count is for this batch size.
    """
    analysis_type, table = _fvcore()
    modes = {part: part.training for part in module.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        analysis = analysis_type(module, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        analysis.set_op_handle(
            "aten::scaled_dot_product_attention",
            _attention,
            "aten::_native_multi_head_attention",
            _fused_attention_layer,
        )
        total = int(analysis.total())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part, mode in modes.items():
            part.training = mode
    return FlopCount(
        total=total,
        by_operator={name: int(n) for name, n in analysis.by_operator().most_common()},
        by_module={name: int(n) for name, n in analysis.by_module().items() if name},
        uncounted={
            name: n for name, n in analysis.unsupported_ops().items() if name not in ELEMENTWISE
        },
        table=lambda depth: table(analysis, max_depth=depth, show_param_shapes=False),
    )


def _fvcore() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        # Importing fvcore compiles a function with torch.jit.script, which PyTorch deprecates.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis, flop_count_table
    return FlopCountAnalysis, flop_count_table


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Scores and weighted sum; a causal mask saves nothing here, as in fvcore's other counts."""
    query, key, value = (_shape(v) for v in inputs[:3])
    # [..., heads, queries, depth]; with grouped queries only the query has all the heads.
    return Counter(attention=math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _fused_attention_layer(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """``nn.MultiheadAttention`` as one operator, called by hand: projections and attention."""
    batch, queries, width = _shape(inputs[0])
    keys = _shape(inputs[1])[1]
    return Counter(
        linear=2 * batch * (queries + keys) * width * width,
        attention=2 * batch * queries * keys * width,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``python -m moco_scale flops``."""
    parser.add_argument("--model", default="resnet50", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--model-width", type=int, default=1, help=f"one of {WIDTHS}")
    parser.add_argument("--image-size", type=positive_int, default=224, help="pixels a side")
    parser.add_argument(
        "--patch-size", type=int, default=0, help="in pixels, of a model with patches; 0: its own"
    )
    parser.add_argument("--stem", default="imagenet", help=f"one of {', '.join(STEMS)}")
    parser.add_argument("--head", default="linear", help=f"one of {', '.join(HEADS)}")
    parser.add_argument("--dim", type=positive_int, default=128, help="width of the head's output")
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, help="images of the global batch"
    )
    parser.add_argument(
        "--images-per-epoch", type=positive_int, default=1_281_167, help="ImageNet-1k's by default"
    )
    parser.add_argument(
        "--depth", type=positive_int, default=2, help="levels of modules in the table"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> None:
    """Print the table and the costs.

    Raises:
        UserError: an unknown model, width, stem or head, or sizes that do not fit each other.
    """
    if args.images_per_epoch < args.batch_size:
        raise UserError(
            f"--images-per-epoch {args.images_per_epoch} does not fill one batch "
            f"(--batch-size {args.batch_size})"
        )
    with torch.device("meta"):
        encoder = build_encoder(
            args.model,
            width=args.model_width,
            stem=args.stem,
            head=args.head,
            dim=args.dim,
            image_size=args.image_size,
            patch_size=args.patch_size,
        )
    # Counting needs shapes, not numbers: nobody waits for a billion of them to be drawn.
    encoder = encoder.to_empty(device="cpu")
    try:
        count = count_flops(encoder, torch.zeros(1, 3, args.image_size, args.image_size))
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise UserError(
                f"--image-size {args.image_size}: counting takes one image through "
                f"{args.model}, and this machine has not enough memory for one of that size "
                f"({12 * args.image_size**2 / 1e9:.3g} GB before the first layer)"
            ) from None
        raise UserError(
            f"{args.model} cannot take images of {args.image_size} pixels (--image-size): {error}"
        ) from error
    costs = training_costs(count.total, args.batch_size, args.images_per_epoch)
    if args.json:
        tell(json.dumps(_as_json(args, count, costs)))
    else:
        tell(_as_text(args, count, costs))


def training_costs(forward: int, batch_size: int, images_per_epoch: int) -> dict[str, int]:
    """Multiply-adds of training with MoCo v1 or v2.

    An image costs four forward passes: the query's, twice that for its backward pass, and the
    key's. The symmetric loss, where both views are queries and keys, doubles it.

    Args:
        forward: multiply-adds of one image's forward pass.
        batch_size: images of the global batch.
        images_per_epoch: the last incomplete batch of an epoch is dropped.

    Returns:
        ``forward``, ``image``, ``step``, ``epoch`` and the last three with ``_symmetric``.
    """
    costs = {"forward": forward}
    for suffix, forwards in (("", 4), ("_symmetric", 8)):
        costs[f"image{suffix}"] = forwards * forward
        costs[f"step{suffix}"] = costs[f"image{suffix}"] * batch_size
        costs[f"epoch{suffix}"] = costs[f"step{suffix}"] * (images_per_epoch // batch_size)
    return costs


def _as_json(args: argparse.Namespace, count: FlopCount, costs: dict[str, int]) -> dict[str, Any]:
    return {
        "model": args.model,
        "model_width": args.model_width,
        "image_size": args.image_size,
        "stem": args.stem,
        "head": args.head,
        "dim": args.dim,
        "batch_size": args.batch_size,
        "images_per_epoch": args.images_per_epoch,
        "macs": costs,
        "flops": {name: 2 * macs for name, macs in costs.items()},
        "macs_by_operator": count.by_operator,
        "macs_by_module": count.by_module,
        "uncounted_operators": count.uncounted,
    }


def _as_text(args: argparse.Namespace, count: FlopCount, costs: dict[str, int]) -> str:
    steps = args.images_per_epoch // args.batch_size
    rows = [
        ("forward pass, one image", "forward"),
        ("training step, per image", "image"),
        (f"training step, batch of {args.batch_size}", "step"),
        (f"epoch of {steps} steps", "epoch"),
    ]
    lines = [
        f"{args.model}, width {args.model_width}, {args.stem} stem, {args.head} head to "
        f"{args.dim}, one image of {args.image_size} x {args.image_size}.",
        "In the table (fvcore's) one multiply-add counts as one FLOP.",
        "",
        count.table(args.depth),
        "",
        f"{'':34}{'multiply-adds':>16}{'hardware FLOPs':>16}{'symmetric loss':>16}",
    ]
    for title, name in rows:
        macs = costs[name]
        symmetric = costs.get(f"{name}_symmetric")
        both = _scaled(2 * symmetric) if symmetric else ""
        lines.append(f"{title:34}{_scaled(macs):>16}{_scaled(2 * macs):>16}{both:>16}")
    lines += [
        "",
        "Hardware FLOPs count multiplications and additions: twice the multiply-adds.",
        "A training step of MoCo v1 or v2 is 4 forward passes per image: query forward, twice "
        "that backward, key forward.",
        "The symmetric loss (its hardware FLOPs in the last column) doubles that. The loss and "
        "the optimizer are not included.",
    ]
    if count.uncounted:
        named = ", ".join(f"{name} ({n} calls)" for name, n in count.uncounted.items())
        lines.append(f"NOT COUNTED, so the figures are too low: {named}")
    return "\n".join(lines)


def _scaled(value: float) -> str:
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3f} {unit}"
    return f"{value:.0f}"
