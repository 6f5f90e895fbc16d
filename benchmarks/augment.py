"""Augmentation of a batch on a device against torchvision's, image by image, on PIL images.

    python benchmarks/augment.py [--quick] [--device cpu|cuda] [--compile] [--batch N] [--size S]

For each chain, three or four ways from cropped 8-bit images to normalised float32 tensors, with
the same drawn parameters (drawing them is part of the work):

- grouped: each operation on the samples that drew it, what a run does on a CPU and on a GPU;
- static: every operation on every sample, in kernels whose shapes no draw decides;
- compiled: the same through torch.compile, what ``--compile`` does on a GPU (with ``--compile`` or
  on a GPU; compiling a chain takes a minute);
- pil: torchvision's functional transforms and PIL's filters, one image after the other, on one
  core of the CPU: the official pipelines after their crop.

Of a chain whose views differ, half of the batches are the first view. CPUs use one thread. The ways
alternate, repeat by repeat. That all of them give the same images, within 1.3/255, is checked.

Prints a table of medians and, as its last line, one JSON object. For each CHAIN and WAY:

    CHAIN_WAY                 images per second, an image being one view
    CHAIN_grouped_vs_pil      median of the repeats' ratios, how many times as fast
    CHAIN_static_vs_grouped   likewise
    CHAIN_compiled_vs_grouped likewise, where it was measured
    device, batch, size, repeats, torch
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from moco_scale.data.images.augment import (
    AUGMENTATIONS,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    NO_JITTER,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    Augmentation,
    Params,
    draw_params,
)
from moco_scale.data.images.device_augment import DeviceAugment, StaticAugment

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CHAINS = ("v1", "v2", "v3", "cj", "cifar", "null")
JITTER = {
    BRIGHTNESS: TF.adjust_brightness,
    CONTRAST: TF.adjust_contrast,
    SATURATION: TF.adjust_saturation,
    HUE: TF.adjust_hue,
}

Way = Callable[[int], Tensor]


def make_images(batch: int, size: int) -> list[Image.Image]:
    """Smooth colours with grain."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(batch):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.array(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 8, smooth.shape)
        result.append(Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)))
    return result


def one_by_pil(aug: Augmentation, image: Image.Image, row: Params) -> Tensor:
    """One image as the official pipelines treat it, with its draws given."""
    if row[GRAY] and aug.gray_first:
        image = TF.rgb_to_grayscale(image, 3)
    if row[ORDER] != NO_JITTER:
        for kind in ORDERS[int(row[ORDER])]:
            if aug.jitter[kind]:
                image = JITTER[BRIGHTNESS + kind](image, float(row[BRIGHTNESS + kind]))
    if row[GRAY] and not aug.gray_first:
        image = TF.rgb_to_grayscale(image, 3)
    if row[SIGMA]:
        image = image.filter(ImageFilter.GaussianBlur(float(row[SIGMA])))
    if row[SOLARIZE]:
        image = ImageOps.solarize(image, aug.solarize_from)
    if row[FLIP]:
        image = TF.hflip(image)
    return TF.normalize(TF.to_tensor(image), MEAN, STD)


def ways_of(
    chain: str, images: list[Image.Image], device: torch.device, compiled: bool
) -> dict[str, Way]:
    """By name, functions of the number of the repeat."""
    aug, samples = AUGMENTATIONS[chain], np.arange(len(images))
    crops = torch.stack([TF.pil_to_tensor(image) for image in images]).to(device)
    views = [aug.of(view) for view in range(2)]

    def drawn(repeat: int) -> Params:
        return draw_params(aug, 0, repeat, samples, repeat % 2)

    def batched(forms: list[Any]) -> Way:
        return lambda repeat: forms[repeat % 2](crops, drawn(repeat))

    def by_pil(repeat: int) -> Tensor:
        view = views[repeat % 2]
        rows = zip(images, drawn(repeat), strict=True)
        return torch.stack([one_by_pil(view, image, row) for image, row in rows])

    ways: dict[str, Way] = {
        "grouped": batched([DeviceAugment(view, MEAN, STD) for view in views]),
        "static": batched([StaticAugment(view, MEAN, STD) for view in views]),
    }
    if compiled:
        forms = [StaticAugment(view, MEAN, STD, compiled=True) for view in views]
        ways["compiled"] = batched(forms if aug.per_view else forms[:1] * 2)
    return ways | {"pil": by_pil}


def measure(
    chain: str, images: list[Image.Image], device: torch.device, compiled: bool, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each repeat, by way."""
    ways = ways_of(chain, images, device, compiled)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(2 + repeats):  # two, one for each view, to get ready
        results = {}
        names = list(ways) if repeat % 2 else list(ways)[::-1]
        for name in names:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            results[name] = ways[name](repeat)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
        for name, result in results.items():
            error = (result.cpu() - results["pil"]).abs().mean((0, 2, 3)) * torch.tensor(STD) * 255
            if error.max() > 1.3:
                raise AssertionError(f"{chain}, {name}: {error.max():.2f}/255 from PIL's images")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--batch", type=int, help="images (default: 16 on a CPU, 256 on a GPU)")
    parser.add_argument("--size", type=int, default=224, help="their side in pixels")
    parser.add_argument("--compile", action="store_true", help="the compiled form on a CPU too")
    parser.add_argument("--chains", nargs="+", default=CHAINS, choices=tuple(AUGMENTATIONS))
    parser.add_argument("--repeats", type=int, help="timed repeats (default 20, --quick 4)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    torch.set_num_threads(1)
    repeats = args.repeats or (4 if args.quick else 20)
    images = make_images(args.batch or (256 if on_gpu else 16), args.size)
    print(f"{len(images)} images of {args.size}x{args.size} on {device}; images per second")
    names = ("grouped", "static", "compiled", "pil")
    print(f"{'':8}" + "".join(f"{name:>10}" for name in names) + f"{'grouped/pil':>13}")
    result: dict[str, Any] = {}
    for chain in args.chains:
        times = measure(chain, images, device, on_gpu or args.compile, repeats)
        rates = {name: len(images) / statistics.median(spent) for name, spent in times.items()}
        result |= {f"{chain}_{name}": round(rate, 1) for name, rate in rates.items()}
        for fast, slow in (("grouped", "pil"), ("static", "grouped"), ("compiled", "grouped")):
            if fast in times:
                pairs = zip(times[fast], times[slow], strict=True)
                ratio = statistics.median(b / a for a, b in pairs)
                result[f"{chain}_{fast}_vs_{slow}"] = round(ratio, 3)
        cells = "".join(f"{f'{rates[n]:.0f}' if n in rates else '-':>10}" for n in names)
        print(f"{chain:8}{cells}{result[f'{chain}_grouped_vs_pil']:>13.2f}", flush=True)
    result |= {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "batch": len(images),
        "size": args.size,
        "repeats": repeats,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
