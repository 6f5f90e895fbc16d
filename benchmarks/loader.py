"""Reading: images from disk to two crops each, against the ways in which others do it.

    python benchmarks/loader.py [--quick] [--source TAR|DIR] [--images N] [--rounds N]

The images are those of --source, ../shared/data/imagenet-sample.tar where that lies beside the
checkout, otherwise made ones of ImageNet's median size; the output says which. An image is both
views at 224. Every measurement runs in a process of its own, forked off one that has imported and
written everything; rounds alternate between the ways, so that what else the machine does meets all
of them. What is counted is CPU seconds, user and system, of the whole tree of processes, because
other work changes the wall clock more; ratios are medians over the rounds.

official      the MoCo v2 pipeline written anew: ImageFolder, PIL, torchvision transforms (crop,
              jitter, gray, blur, flip, to float, normalised), DataLoader with 1 worker
webdataset    the same transforms behind webdataset's own reader, shuffle(1000), 1 worker
dali          DALI on the CPU: decode and two random crops, 1 thread; only where it is installed
loader        moco_scale's: shards, decode once, two uint8 crops in shared memory, 1 worker; flip,
              colours and blur, which the first two do here, happen on the training device
cached        the loader when --cache has everything decoded: from the second epoch on
decode        simplejpeg alone, in memory that is there: the ceiling of decoding whole images
entropy       JPEG's entropy decoding alone, about: what no decoder on a CPU can do without

Prints a table and, as its last line, one JSON object. Images are per second of CPU:

    end_to_end_vs_official        loader over official
    end_to_end_vs_webdataset, end_to_end_vs_dali    where those were run, else null
    loader_vs_decode              loader over decode: its place below the ceiling
    cached_vs_loader              what --cache gains
    decode_vs_official, entropy_vs_official
    official, webdataset, dali, loader, cached, decode, entropy    medians of these
    cores_per_1000                cores that the loader keeps busy to deliver 1,000 images a second
    scaling_1_to_2_workers        images per second of wall clock with 2 workers over 1, median
    memory_mb_epoch_1, memory_mb_epoch_2    highest of the tree of processes in each of two epochs,
                                  2 workers; shared memory once, mapped shards not (page cache)
    memory_growth                 second over first
    images, count, rounds, batch, cores, torch, torchvision, simplejpeg, pillow
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image, ImageFilter
from torchvision import datasets, transforms

from moco_scale.commands import shard
from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.images.decode import decode_rgb
from moco_scale.data.loading.loader import pretraining_loader
from moco_scale.data.loading.pixel_cache import PixelCache
from moco_scale.data.open import open_shards
from moco_scale.data.sampling.order import BatchPlan

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample.tar"
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The slow ways need fewer images for a time that can be measured.
SHARE = {"official": 0.5, "webdataset": 0.5}


class Cost(NamedTuple):
    images: int
    cpu: float
    wall: float


class Blur:
    """Gaussian, standard deviation uniform in 0.1 to 2, by PIL."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class TwoViews:
    """MoCo v2's augmentation, twice."""

    def __init__(self) -> None:
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([Blur()], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        image = image.convert("RGB")
        return [self.transform(image), self.transform(image)]


class ImageSet:
    """The same images as a folder of classes and as shards."""

    def __init__(self, source: Path | None, scratch: Path, batch: int) -> None:
        self.folder, self.batch = scratch / "images", batch
        if source is None:
            self.what = "made"
            make_images(self.folder / "made", 192)
        elif source.is_dir():
            self.what, self.folder = source.name, source
        else:
            self.what = source.name
            with tarfile.open(source) as tar:
                tar.extractall(self.folder, filter="data")
        parser = argparse.ArgumentParser()
        shard.add_arguments(parser)
        out = scratch / "shards"
        shard.run(parser.parse_args(["--source", str(self.folder), "--out", str(out)]))
        self.out = out
        self.shards = open_shards(str(out), "train")
        everything = [bytes(self.shards.read(i)) for i in range(len(self.shards))]
        self.jpegs = [data for data in everything if simplejpeg.is_jpeg(data)]
        self.cache = PixelCache.open(self.shards, str(scratch / "cache"))
        for i, data in enumerate(everything):
            self.cache.put(i, decode_rgb(data))

    def plan(self) -> BatchPlan:
        return BatchPlan(self.shards.order(seed=0), min(self.batch, len(self.shards)))

    def loader(self, count: int, workers: int, cache: PixelCache | None = None) -> Iterator[int]:
        """Drives our loader; yields the number of images of each batch."""
        plan = self.plan()
        steps = -(-count // plan.global_batch)
        with pretraining_loader(
            self.shards,
            plan,
            AUGMENTATIONS["v2"],
            SIZE,
            num_workers=workers,
            end_step=steps,
            cache=cache,
        ) as loader:
            for batch in loader:
                yield batch.views.shape[1]


def make_images(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 pixels and about 110 KB, ImageNet's median and mean."""
    folder.mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, np.float32) + rng.normal(0, 14, (375, 500, 1))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:05d}.jpg", quality=92)


def official(image_set: ImageSet, count: int) -> Iterator[int]:
    folder = datasets.ImageFolder(str(image_set.folder), TwoViews())
    # Exactly so many images, to the end: what workers have made ahead would not be counted.
    sampler = torch.utils.data.RandomSampler(folder, num_samples=count)
    loader = torch.utils.data.DataLoader(folder, image_set.batch, sampler=sampler, num_workers=1)
    for views, _ in loader:
        yield len(views[0])


def with_webdataset(image_set: ImageSet, count: int) -> Iterator[int]:
    shards = sorted(str(path) for path in image_set.out.glob("*.tar"))
    stream = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).repeat()
    stream = stream.shuffle(1000).decode("pil").to_tuple("jpg;png;jpeg;webp", "cls")
    stream = stream.map_tuple(TwoViews()).with_epoch(count)
    for views, _ in torch.utils.data.DataLoader(stream, image_set.batch, num_workers=1):
        yield len(views[0])


def with_dali(image_set: ImageSet, count: int) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def, types

    # As bytes at hand, so that reading is not held against it.
    rng = random.Random(0)

    def encoded() -> list[Any]:
        return [
            np.frombuffer(rng.choice(image_set.jpegs), np.uint8) for _ in range(image_set.batch)
        ]

    @pipeline_def(batch_size=image_set.batch, num_threads=1, device_id=None)  # type: ignore[misc]
    def pipeline() -> Any:
        decoded = fn.decoders.image(
            fn.external_source(encoded, batch=True), device="cpu", output_type=types.RGB
        )
        return tuple(
            fn.random_resized_crop(decoded, size=SIZE, random_area=[0.2, 1.0]) for _ in range(2)
        )

    built = pipeline()
    built.build()
    for _ in range(-(-count // image_set.batch)):
        views = built.run()
        yield len(views[0])


def bare_decode(image_set: ImageSet, count: int, factor: int = 1) -> Iterator[int]:
    memory = np.empty(1 << 26, np.uint8)
    smallest = {"min_factor": factor, "min_height": 1, "min_width": 1} if factor > 1 else {}
    for i in range(count):
        data = image_set.jpegs[i % len(image_set.jpegs)]
        simplejpeg.decode_jpeg(data, "RGB", buffer=memory, strict=True, **smallest)
        yield 1


WAYS: dict[str, Callable[[ImageSet, int], Iterator[int]]] = {
    "official": official,
    "webdataset": with_webdataset,
    "dali": with_dali,
    "loader": lambda image_set, count: image_set.loader(count, 1),
    "cached": lambda image_set, count: image_set.loader(count, 1, image_set.cache),
    "decode": bare_decode,
    # At an eighth of the size hardly anything is left but entropy decoding.
    "entropy": lambda image_set, count: bare_decode(image_set, count, 8),
}


def in_a_process(work: Callable[[], Any]) -> Any:
    """Run `work` in a fork of this process; return its result. Raises RuntimeError if it fails."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("a measurement failed; its error is above") from None
    finally:
        process.join()


def cost(drive: Callable[[], Iterator[int]]) -> Cost:
    """CPU and wall seconds of driving a way to its end, in a process of its own."""

    def measured() -> Cost:
        start, cpu = time.perf_counter(), time.process_time()
        images = sum(drive())
        wall = time.perf_counter() - start
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended: all
        cpu = time.process_time() - cpu + children.ru_utime + children.ru_stime
        return Cost(images, cpu, wall)

    return Cost(*in_a_process(measured))


def tree_memory() -> float:
    """MB of anonymous and shared memory of this process and those below it, shared parts once."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    tree = {os.getpid()}
    while below := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= below
    total = 0
    for pid in tree:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(
            int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem"))
        )
    return total / 1024


def memory_by_epoch(image_set: ImageSet) -> list[float]:
    """The tree's highest memory in each of two epochs of two workers, in MB."""

    def measured() -> list[float]:
        sizes = []
        plan = image_set.plan()
        epoch = plan.steps_per_epoch * plan.global_batch
        for _ in image_set.loader(2 * epoch, 2):
            sizes.append(tree_memory())
        half = len(sizes) // 2
        return [max(sizes[:half]), max(sizes[half:])]

    return list(in_a_process(measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--source", type=Path, help="a tar or a folder of CLASS/*")
    parser.add_argument("--images", type=int, help="of a measurement (default 512, --quick 192)")
    parser.add_argument("--rounds", type=int, help="of all ways (default 5, --quick 3)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    count = args.images or (192 if args.quick else 512)
    rounds = args.rounds or (3 if args.quick else 5)
    source = args.source or (SAMPLE if SAMPLE.exists() else None)
    torch.set_num_threads(1)
    ways = [way for way in WAYS if way != "dali" or importlib.util.find_spec("nvidia.dali")]
    with tempfile.TemporaryDirectory() as scratch:
        image_set = ImageSet(source, Path(scratch), args.batch)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        scaling = []
        for _ in range(rounds):
            for way in ways:
                share = int(count * SHARE.get(way, 1))
                measured = cost(partial(WAYS[way], image_set, share))
                rates[way].append(measured.images / measured.cpu)
            one, two = (cost(partial(image_set.loader, 2 * count, n)) for n in (1, 2))
            scaling.append(two.images / two.wall / (one.images / one.wall))
        memory = memory_by_epoch(image_set)
        what, sizes = image_set.what, [len(data) for data in image_set.jpegs]

    def ratio(way: str, other: str) -> float | None:
        if way not in rates or other not in rates:
            return None
        pairs = zip(rates[way], rates[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    median = {
        way: round(statistics.median(rates[way]), 1) if way in rates else None for way in WAYS
    }
    result = {
        "end_to_end_vs_official": ratio("loader", "official"),
        "end_to_end_vs_webdataset": ratio("loader", "webdataset"),
        "end_to_end_vs_dali": ratio("loader", "dali"),
        "loader_vs_decode": ratio("loader", "decode"),
        "cached_vs_loader": ratio("cached", "loader"),
        "decode_vs_official": ratio("decode", "official"),
        "entropy_vs_official": ratio("entropy", "official"),
        **{way: median.get(way) for way in WAYS},
        "cores_per_1000": round(1000 / statistics.median(rates["loader"]), 2),
        "scaling_1_to_2_workers": round(statistics.median(scaling), 2),
        "memory_mb_epoch_1": round(memory[0], 1),
        "memory_mb_epoch_2": round(memory[1], 1),
        "memory_growth": round(memory[1] / memory[0], 3),
        "images": what,
        "count": count,
        "rounds": rounds,
        "batch": args.batch,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        **{
            name: importlib.metadata.version(name)
            for name in ("torchvision", "simplejpeg", "pillow")
        },
    }
    print(f"{len(sizes)} JPEGs ({what}), {sum(sizes) / len(sizes) / 1000:.0f} KB on average")
    print(f"{'':<12}{'images/s and core':>20}{'against official':>20}")
    for way in ways:
        print(f"{way:<12}{median[way]:>20}{ratio(way, 'official'):>20}")
    print(
        f"the loader keeps {result['cores_per_1000']} cores busy for 1,000 images/s; 2 workers are "
        f"{result['scaling_1_to_2_workers']} times 1; its memory is {memory[0]:.0f} MB in the "
        f"first epoch, {memory[1]:.0f} MB in the second"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
