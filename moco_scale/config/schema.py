"""Configuration: one tree of frozen dataclasses."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, fields
from typing import Any

from moco_scale.config.options import NOT_NEGATIVE, POSITIVE, SHARE, UNIT, at_least, option
from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.loading.bad_samples import POLICIES
from moco_scale.data.remote.shard_source import CACHE_GB, GIVE_UP_SECONDS, ShardSource
from moco_scale.data.sampling.windows import REMOTE_WINDOW
from moco_scale.methods.infonce import MIN_TEMPERATURE
from moco_scale.methods.key_queue import DTYPES, KINDS
from moco_scale.methods.shuffle_bn import MODES
from moco_scale.models.encoder import HEADS
from moco_scale.models.registry import MODELS, STEMS, WIDTHS
from moco_scale.optim.schedules import SCHEDULES
from moco_scale.utils.log import LEVELS
from moco_scale.utils.text import printable

ENGINES = ("ddp", "fsdp", "deepspeed")
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class DatasetPreset:
    """Properties of a data set, whatever the recipe.

    Attributes:
        mean: of each channel of pixels in [0, 1].
        std: likewise.
        image_size: side of a crop in pixels.
        resize_ratio: evaluation resizes the short side to this times the crop, then crops.
        stem: of the ResNet.
        images: training images of the published set; None when it varies.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize_ratio: float
    stem: str
    images: int | None = None


DATASETS: dict[str, DatasetPreset] = {
    "imagenet": DatasetPreset(*IMAGENET_STATISTICS, 224, 256 / 224, "imagenet", 1281167),
    "imagenet100": DatasetPreset(*IMAGENET_STATISTICS, 224, 256 / 224, "imagenet"),
    "images": DatasetPreset(*IMAGENET_STATISTICS, 224, 256 / 224, "imagenet"),
    "cifar10": DatasetPreset(
        (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 32, 1.0, "cifar", 50000
    ),
}


def _group_size(text: str) -> int:
    return 0 if text == "global" else int(text)


# What argparse calls the type in its message.
_group_size.__name__ = "number, or 'global':"


@dataclass(frozen=True)
class DataConfig:
    """Data and crops."""

    dataset: str = option("imagenet", "preset of statistics and sizes", choices=tuple(DATASETS))
    data_dir: str = option(
        "",
        "folder of shards, a tar, a pattern such as DIR/train-{000..127}.tar, an https://, s3:// "
        "or gs:// address of a folder, or several with weights: A:0.7,B:0.3 (default: "
        "data/DATASET)",
    )
    samples_per_epoch: int = option(
        0,
        "images of an epoch; the next one continues from there; 0: all images, once",
        within=NOT_NEGATIVE,
    )
    shuffle_window: int = option(
        0,
        "shards that are mixed and needed at a time; 0: all "
        f"(default: {REMOTE_WINDOW} for an address, else 0)",
        within=NOT_NEGATIVE,
    )
    image_size: int = option(
        0, "side of a crop in pixels (default: the data set's)", within=POSITIVE
    )
    aug: str = option("v1", "augmentation", choices=tuple(AUGMENTATIONS), type=str.lower)
    crop: float = option(0.2, "smallest share of an image's area in a random crop", within=SHARE)


@dataclass(frozen=True)
class ModelConfig:
    """Model and BatchNorm groups."""

    model: str = option(
        "resnet50", f"backbone: {', '.join(MODELS)}", choices=MODELS, metavar="NAME"
    )
    model_width: int = option(1, "factor of a ResNet's channel counts", choices=WIDTHS)
    stem: str = option("", "a ResNet's first layers (default: the data set's)", choices=STEMS)
    patch_size: int = option(
        0, "side of a ViT's patches in pixels (default: the model's)", within=NOT_NEGATIVE
    )
    train_patch_embedding: bool = option(
        False, "train a ViT's patch embedding, which MoCo v3 freezes"
    )
    head: str = option("linear", "projection: linear (v1) or mlp (v2)", choices=HEADS)
    dim: int = option(128, "width of the projected feature", within=POSITIVE)
    bn_group_size: int = option(
        32,
        "consecutive samples of the global batch that share BatchNorm statistics, or 'global'",
        type=_group_size,
        metavar="N|global",
        within=NOT_NEGATIVE,
    )


@dataclass(frozen=True)
class ContrastConfig:
    """Contrastive task."""

    nce_k: int = option(65536, "keys in the queue (K)", aliases=("--queue-size",), within=POSITIVE)
    nce_t: float = option(
        0.07,
        "temperature of the loss (T)",
        aliases=("--temperature",),
        within=at_least(MIN_TEMPERATURE),
    )
    queue_dtype: str = option("fp32", "type of the queue's keys", choices=tuple(DTYPES))
    mask_unfilled: bool = option(False, "exclude queue slots without a real key from the negatives")
    mask_same_image: bool = option(
        False, "exclude keys of a query's own image from the negatives (for small data sets)"
    )
    alpha: float = option(
        0.999, "momentum of the key encoder (m)", aliases=("--ema-momentum",), within=UNIT
    )
    shuffle_bn: str = option(
        "world",
        "exchange of key crops: between all processes, within a node, or off",
        choices=MODES,
    )
    shuffle_group: int = option(
        0,
        "of --shuffle-bn node: samples of the global batch that are shuffled together "
        "(default: those of one node at the run's start)",
        within=NOT_NEGATIVE,
    )
    symmetric: bool = option(False, "use each view as query and as key, and add both losses")


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation and its length."""

    batch_size: int = option(
        256, "GLOBAL batch: images per step over all processes", within=POSITIVE
    )
    base_lr: float = option(
        0.03,
        "learning rate per 256 images of the batch",
        aliases=("--base-learning-rate",),
        within=NOT_NEGATIVE,
    )
    momentum: float = option(0.9, "momentum of SGD", within=UNIT)
    weight_decay: float = option(
        1e-4, "weight decay of every parameter, as in the published code", within=NOT_NEGATIVE
    )
    clip_grad: float = option(
        0.0,
        "clip gradients to this norm (default: the DeepSpeed file's, else 0: off)",
        within=NOT_NEGATIVE,
    )
    lr_scheduler: str = option(
        "step", "learning-rate schedule, see docs/recipes.md", choices=SCHEDULES
    )
    warmup_epoch: int = option(0, "epochs of linear warm-up", within=NOT_NEGATIVE)
    warmup_multiplier: float = option(
        100.0, "linear warm-up starts at the learning rate divided by this", within=POSITIVE
    )
    lr_decay_epochs: tuple[int, ...] = option(
        (120, 160), "epochs at which the schedule 'step' decays, separated by commas or spaces"
    )
    lr_decay_rate: float = option(0.1, "factor of each decay", within=NOT_NEGATIVE)
    lr_min: float = option(0.0, "final learning rate of a cosine", within=NOT_NEGATIVE)
    epochs: int = option(200, "passes over the training images", within=POSITIVE)
    rng_seed: int = option(
        0, "seed of weights, order, crops, colours and shuffles", within=NOT_NEGATIVE
    )


@dataclass(frozen=True)
class RunConfig:
    """Execution of the run: may change whenever it is resumed."""

    output_dir: str = option("output", "folder for everything the run writes", metavar="DIR")
    resume: str = option("auto", "auto, none, or a checkpoint folder", metavar="auto|none|PATH")
    engine: str = option(
        "", "training engine (default: deepspeed with --deepspeed, else ddp)", choices=ENGINES
    )
    deepspeed: str = option(
        "",
        "DeepSpeed configuration: a file, or zero0 to zero3 of this package (docs/engines.md)",
        metavar="FILE",
    )
    precision: str = option(
        "",
        "precision of the encoders (default: the DeepSpeed file's, else fp32)",
        choices=("fp32", "bf16", "fp16"),
    )
    accumulation_steps: int = option(
        0,
        "micro-batches per step, with the same result (default: the DeepSpeed file's, else 1)",
        within=POSITIVE,
    )
    activation_checkpointing: bool = option(
        False, "compute each block again in the backward pass: less memory, a third more time"
    )
    compile: bool = option(False, "compile each block with torch.compile")
    queue: str = option(
        "replicated", "whole queue on every process, or a shard of it", choices=KINDS
    )
    fsdp_shard_size: int = option(
        0,
        "of --engine fsdp: neighbouring processes that share one copy; 0: all",
        within=NOT_NEGATIVE,
    )
    device: str = option("auto", "device to compute on", choices=("auto", "cuda", "cpu"))
    num_workers: int = option(4, "reader processes of each training process", within=NOT_NEGATIVE)
    bad_samples: str = option(
        "error",
        "an image that cannot be decoded ends the run (error), or is replaced by another, "
        "and both are listed in OUT/bad_samples.jsonl (skip)",
        choices=POLICIES,
    )
    max_bad_share: float = option(
        0.01,
        "of --bad-samples skip: largest share of bad images",
        within=SHARE.advising("for no bad image at all, --bad-samples error"),
    )
    shard_cache: str = option(
        "",
        "local folder for fetched shards (default: in ~/.cache)",
        metavar="DIR",
    )
    shard_cache_size: float = option(CACHE_GB, "size of that folder in GB", within=POSITIVE)
    shard_timeout: float = option(
        GIVE_UP_SECONDS,
        "seconds without new bytes after which a shard is given up",
        within=POSITIVE,
    )
    decode: str = option(
        "cpu", "device that decodes training images, see docs/data.md", choices=("cpu", "gpu")
    )
    cache: str = option(
        "", "keep decoded training images in memory or in a local folder", metavar="ram|DIR"
    )
    print_freq: int = option(10, "steps between log lines", within=POSITIVE)
    log_level: str = option("info", "least importance of messages to show", choices=LEVELS)
    knn_freq: int = option(10, "epochs between kNN evaluations; 0: never", within=NOT_NEGATIVE)
    save_freq: int = option(
        10, "epochs between checkpoints that are kept for good; 0: none", within=NOT_NEGATIVE
    )
    checkpoint_freq: int = option(
        0,
        "steps between checkpoints, besides those after every epoch; 0: no others",
        within=NOT_NEGATIVE,
    )
    keep_checkpoints: int = option(
        2, "newest checkpoints to keep, besides those kept for good", within=POSITIVE
    )
    async_save: bool = option(True, "write checkpoints in the background")
    max_nonfinite: int = option(3, "stop after so many non-finite steps in a row", within=POSITIVE)
    peak_tflops: float = option(
        0.0,
        "peak of a device at this precision, to log its utilisation (MFU); 0: the GPU's, if known",
        within=NOT_NEGATIVE,
    )
    max_time: float = option(
        0.0,
        "hours after which the run saves and exits with status 75; 0: no limit",
        within=NOT_NEGATIVE,
    )
    hang_timeout: float = option(
        600.0,
        "seconds without progress after which the run ends and names the missing rank; "
        "start, compilation, evaluation and saving may take 30 minutes, or three times "
        "this; 0: never",
        within=NOT_NEGATIVE,
    )
    sync_check_freq: int = option(
        1000,
        "steps between checks that all ranks are in the same state, besides those before "
        "checkpoints; 0: never",
        within=NOT_NEGATIVE,
    )
    max_steps: int = option(
        0, "stop after this step of the whole run; 0: run to the end", within=NOT_NEGATIVE
    )
    preflight: bool = option(
        False,
        "check everything before the first step, with machines and network; report, and "
        "leave nothing behind",
    )


@dataclass(frozen=True)
class Config:
    """Complete configuration of a run.

    Attributes:
        given: fields whose values were given by hand; the others are the recipe's or follow.
    """

    recipe: str
    data: DataConfig
    model: ModelConfig
    contrast: ContrastConfig
    optim: OptimConfig
    run: RunConfig
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    @property
    def preset(self) -> DatasetPreset:
        """Preset of the data set."""
        return DATASETS[self.data.dataset]

    @property
    def learning_rate(self) -> float:
        """Peak learning rate, scaled to the batch."""
        return self.optim.base_lr * self.optim.batch_size / 256

    @property
    def source(self) -> ShardSource:
        """Data set with the settings of remote ones."""
        run = self.run
        return ShardSource(
            self.data.data_dir,
            cache_dir=run.shard_cache,
            cache_size=run.shard_cache_size,
            give_up=run.shard_timeout,
        )

    def flag(self, name: str) -> str:
        """Return a field's flag and value for messages, marked where it was not given."""
        section = next(getattr(self, s) for s, cls in SECTIONS.items() if name in _names(cls))
        value = getattr(section, name)
        said = f"{value:g}" if isinstance(value, float) else str(value)
        whose = "" if name in self.given else " (not given)"
        return f"--{name.replace('_', '-')} {said}{whose}"

    def defining(self) -> dict[str, Any]:
        """Return values that must be the same on resume, by flag name, without the data's place."""
        flat = self.flat()
        execution = {f.name for f in fields(RunConfig)}
        return {k: v for k, v in flat.items() if k not in execution | {"data_dir", "recipe"}}

    def flat(self) -> dict[str, Any]:
        """Return every value by flag name (underscores), as plain values for JSON."""
        flat: dict[str, Any] = {"recipe": self.recipe}
        for section in SECTIONS:
            flat |= dataclasses.asdict(getattr(self, section))
        flat["data_dir"] = str(self.source)  # without a password
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "contrast": ContrastConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}


def _names(section: type) -> set[str]:
    return {field.name for field in fields(section)}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe each value that differs between two runs' :meth:`Config.defining`."""
    # Through JSON, so that tuples and lists, 1 and 1.0 compare as they will after a reload.
    now = json.loads(json.dumps(now))
    # What a run of an earlier version does not say was not there to be chosen.
    defaults = {f.name: f.default for section in SECTIONS.values() for f in fields(section)}
    saved = {name: defaults.get(name) for name in now.keys() - saved.keys()} | saved
    return [
        f"  --{key.replace('_', '-')}: {printable(repr(saved.get(key)))} in the run, "
        f"{now.get(key)!r} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
