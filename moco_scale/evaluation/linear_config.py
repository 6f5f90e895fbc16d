"""Settings of a linear evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moco_scale.config.flag_types import whole_number
from moco_scale.config.options import NOT_NEGATIVE, POSITIVE, SHARE, option
from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.optim.schedules import learning_rate

SCHEDULES = ("official", "bl0")
_EPOCHS = 100  # the published length; decays and warm-up keep their place in other lengths


@dataclass(frozen=True)
class LinearConfig:
    """Settings that define a linear evaluation, besides encoder and images.

    Options of ``eval.py``, and what it knows for every protocol:

    Attributes:
        batch_size: global.
        features: ``"features"`` or ``"projection"``.
        seed: of initial weights, order and crops.
    """

    schedule: str = option(
        "official",
        "official: x0.1 after 60% and 80% of the epochs; bl0: warm-up for 5% of them, then a "
        "cosine, step by step",
        choices=SCHEDULES,
    )
    epochs: int = option(100, "passes over train", within=POSITIVE)
    batch_size: int = 256
    learning_rate: float = option(
        30.0,
        "its peak, for this batch, unscaled",
        flag="--lr",
        aliases=("--learning-rate",),
        within=POSITIVE,
    )
    momentum: float = option(0.9, "of SGD", within=NOT_NEGATIVE)
    weight_decay: float = option(0.0, "of the classifier's weights and bias", within=NOT_NEGATIVE)
    aug: str = option("linear", "of training images", choices=tuple(AUGMENTATIONS), type=str.lower)
    cache_features: bool = option(
        False, "encode centre crops once and train on these: quick, not the published protocol"
    )
    features: str = "features"
    seed: int = 0
    scheduler: str = option(
        "",
        "default: --schedule's, as the next two",
        flag="--lr-scheduler",
        choices=("step", "cosine"),
    )
    warmup_epochs: float | None = option(
        None,
        "epochs of linear warm-up",
        flag="--warmup-epoch",
        type=whole_number,
        metavar="INT",
        within=NOT_NEGATIVE,
    )
    decay_epochs: tuple[int, ...] = option((), "of 'step'", flag="--lr-decay-epochs")
    decay_rate: float = option(
        0.1, "factor of each of these", flag="--lr-decay-rate", within=POSITIVE
    )
    crop_min: float = option(
        0.0,
        "smallest share of the area a crop takes (default: --aug's)",
        flag="--crop",
        within=SHARE,
    )

    def defining(self) -> dict[str, Any]:
        """Return plain values that must be the same for an evaluation to be continued."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        # States of earlier versions lack these: they count only where they differ from default.
        newer = LinearConfig()
        for name in ("scheduler", "warmup_epochs", "decay_epochs", "decay_rate", "crop_min"):
            if getattr(self, name) == getattr(newer, name):
                del values[name]
        return values

    @property
    def variant(self) -> str:
        """Name of the protocol: evaluations of different variants can share a folder."""
        words = ["linear", self.schedule]
        words += ["cached"] if self.cache_features else []
        words += ["projection"] if self.features == "projection" else []
        return "-".join(words)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step."""
        bl0 = self.schedule == "bl0"
        warmup = 5 * self.epochs / _EPOCHS if bl0 else 0.0
        decays = self.decay_epochs or [round(self.epochs * at / _EPOCHS) for at in (60, 80)]
        return learning_rate(
            step,
            base=self.learning_rate,
            steps_per_epoch=steps_per_epoch,
            epochs=self.epochs,
            scheduler=self.scheduler or ("cosine" if bl0 else "step"),
            warmup_epochs=warmup if self.warmup_epochs is None else self.warmup_epochs,
            minimum=1e-6,
            decay_epochs=decays,
            decay_rate=self.decay_rate,
        )
