"""Settings of a linear evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moco_scale.optim.schedules import learning_rate

SCHEDULES = ("official", "bl0")
_EPOCHS = 100  # the published length; decays and warm-up keep their place in other lengths


@dataclass(frozen=True)
class LinearConfig:
    """Settings that define a linear evaluation, besides encoder and images.

    Attributes:
        schedule: ``"official"`` decays tenfold after 60 % and 80 % of the epochs; ``"bl0"`` warms
            up for 5 % of them and then follows a cosine at each step.
        epochs: passes over the training images.
        batch_size: global.
        learning_rate: at the peak, for this batch size.
        momentum: of SGD.
        weight_decay: on weights and bias.
        aug: a key of :data:`~moco_scale.data.images.augment.AUGMENTATIONS`, for training.
        cache_features: encode each image's centre crop once and train on that; quick, and not
            the published protocol.
        features: ``"features"`` or ``"projection"``.
        seed: of initial weights, order and crops.
        scheduler: ``"step"`` or ``"cosine"``; "": the schedule's.
        warmup_epochs: of linear warm-up; None: the schedule's.
        decay_epochs: at which ``"step"`` decays; empty: 60 % and 80 %.
        decay_rate: factor of each decay.
        crop_min: smallest share of an image's area that a training crop takes; 0: that of `aug`.
    """

    schedule: str = "official"
    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 30.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    aug: str = "linear"
    cache_features: bool = False
    features: str = "features"
    seed: int = 0
    scheduler: str = ""
    warmup_epochs: float | None = None
    decay_epochs: tuple[int, ...] = ()
    decay_rate: float = 0.1
    crop_min: float = 0.0

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
