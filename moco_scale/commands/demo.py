"""A complete small run on images it renders itself: shards, pretraining, evaluation.

The settings were chosen so that a few minutes on two CPU cores show what contrastive learning
does; they are no recipe for anything else.
"""

import argparse
import time

from moco_scale.config.flag_types import not_negative_int, positive_int
from moco_scale.demo import output_folder, pipeline
from moco_scale.demo.render import CLASSES, write_folder
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import tell
from moco_scale.utils.process_pool import core_count

TRAIN_PER_CLASS = 200
VAL_PER_CLASS = 60
SETTINGS = {
    "recipe": "v2",
    "dataset": "images",
    "model": "resnet18",
    "stem": "imagenet",
    "image-size": "32",
    # Jitter, so that colour tells little of an image; the blur of v2 would take motifs this small.
    "aug": "cifar",
    "crop": "0.4",
    "batch-size": "64",
    "base-lr": "0.12",
    "weight-decay": "5e-4",
    "alpha": "0.99",
    "nce-k": "512",
    "nce-t": "0.2",
    "bn-group-size": "32",
    "epochs": "8",
    "num-workers": "1",
    "knn-freq": "2",
    "print-freq": "10",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pipeline.add_arguments(parser, "runs/demo", "what an earlier demo left in it is replaced")
    for flag, default, what in (
        ("--train-per-class", TRAIN_PER_CLASS, "training images rendered"),
        ("--val-per-class", VAL_PER_CLASS, "held-out images rendered"),
    ):
        parser.add_argument(
            flag,
            type=positive_int,
            default=default,
            metavar="N",
            help=f"{what} for each class (default: %(default)s)",
        )
    parser.add_argument(
        "--seed", type=not_negative_int, default=0, help="of the images (default: 0)"
    )


def run(args: argparse.Namespace) -> None:
    """Render, pretrain, evaluate, and print a table. Raises UserError."""
    started = time.monotonic()
    # Everything that can be wrong with the flags, before an earlier demo is deleted.
    training = pipeline.training(args.prog, SETTINGS, args.passthrough)
    batch, rendered = training.config.optim.batch_size, args.train_per_class * len(CLASSES)
    if rendered < batch:
        raise UserError(
            f"--train-per-class {args.train_per_class}: the {rendered} images of "
            f"{len(CLASSES)} classes do not fill one batch of {batch} (--batch-size)"
        )
    processes = pipeline.process_count(args.num_processes, batch)
    output_folder.claim(args.output_dir)
    images = args.output_dir / "images"
    tell(f"== Rendering images into {images}")
    write_folder(
        images,
        train_per_class=args.train_per_class,
        val_per_class=args.val_per_class,
        seed=args.seed,
        processes=core_count(),
    )
    experiment = pipeline.Experiment(
        title="Demo",
        source=lambda: images,
        out=args.output_dir,
        training=training,
        processes=processes,
    )
    pipeline.run(experiment, started=started)
