"""Pretrained encoder read from a file; nothing is allocated before it is known to fit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco_scale.config.saved_settings import EncoderSettings, ModelFile
from moco_scale.models.encoder import Encoder, build_encoder
from moco_scale.untrusted.documents import check
from moco_scale.untrusted.pickles import ForeignError, PickleError
from moco_scale.untrusted.tensor_files import StoredTensor, TensorFile, describe
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import failure_reason
from moco_scale.utils.text import printable, printable_path, some_of

_ENCODERS = {"query": "model", "key": "model_ema"}


@dataclass(frozen=True)
class Pretrained:
    """Encoder of a file like ``current.pth``.

    Attributes:
        encoder: on the CPU, in evaluation mode.
        opt: the run's settings of the encoder, by flag name.
        path: the file.
        epoch: of the run.
        step: of the run.
        fingerprint: hex; changes with any of the encoder's weights.
        which: ``"query"`` or ``"key"``.
    """

    encoder: Encoder
    opt: dict[str, Any]
    path: Path
    epoch: int
    step: int
    fingerprint: str
    which: str = "query"

    @property
    def described(self) -> str:
        """Description for people."""
        return f"{self.which} encoder of step {self.step} in {self.path}"


def load_pretrained(path: str | Path, which: str = "query") -> Pretrained:
    """Read an encoder from a file that pretraining wrote; no code in the file is ever run.

    Args:
        path: usually ``OUT/current.pth``.
        which: ``"query"`` or ``"key"`` (the moving average).

    Raises:
        UserError: The file is missing, something else or damaged, or its weights are not finite or
            do not fit the encoder that it describes.
    """
    path = Path(path)
    with read_model_file(path, "--pretrained-model") as file:
        settings, step, epoch = _described(path, file.content, _ENCODERS[which])
        encoder = _encoder(path, settings, file, _ENCODERS[which])
    bad = [n for n, t in encoder.state_dict().items() if not torch.isfinite(t).all()]
    if bad:
        raise UserError(
            f"{printable_path(path)}: {len(bad)} tensors of the {which} encoder are not finite "
            f"(first: {bad[0]}): that run had diverged"
        )
    return Pretrained(
        encoder=encoder.eval(),
        opt=settings.model_dump(),
        path=path,
        epoch=epoch,
        step=step,
        fingerprint=_fingerprint(encoder),
        which=which,
    )


def _described(
    path: Path, content: dict[Any, Any], section: str
) -> tuple[EncoderSettings, int, int]:
    """Read an encoder's settings and the run's step and epoch from a model file."""
    opt, state = content.get("opt"), content.get(section)
    if not isinstance(opt, dict) or not isinstance(state, dict):
        raise UserError(
            f"{printable_path(path)} is not a model of this program: it lacks 'opt' or "
            f"{section!r}; name the current.pth of a run's --output-dir"
        )
    model = check(content, ModelFile, printable_path(path))
    settings = check(opt, EncoderSettings, f"{printable_path(path)}: 'opt'")
    return settings, model.step, model.epoch


def _encoder(path: Path, settings: EncoderSettings, file: TensorFile, section: str) -> Encoder:
    """Build an encoder around the tensors of a file, once their names and shapes are checked."""
    try:
        with torch.device("meta"):  # without memory
            encoder = build_encoder(
                settings.model,
                width=settings.model_width,
                stem=settings.stem,
                head=settings.head,
                dim=settings.dim,
                image_size=settings.image_size,
                patch_size=settings.patch_size,
            )
    except UserError as error:
        raise UserError(f"{printable_path(path)}: {error}") from None
    stored, wanted = file.content[section], encoder.state_dict()
    problems = [f"it lacks {name}" for name in wanted if name not in stored]
    problems += [f"it has {printable(n, 80)}, unknown" for n in stored if n not in wanted]
    for name, tensor in wanted.items():
        given = stored.get(name)
        if name in stored and not _fits(given, tensor):
            shown = given.described if isinstance(given, StoredTensor) else "no tensor"
            problems.append(f"{name} is {shown}, {describe(tensor.dtype, tensor.shape)} expected")
    if problems:
        raise UserError(
            f"{printable_path(path)}: its weights do not fit the {settings.model} that it "
            f"describes: {some_of(problems, between='; ')}"
        )
    try:
        read = file.read_all({name: stored[name] for name in wanted})
    except (OSError, PickleError) as error:
        raise UserError(f"{printable_path(path)} cannot be read: {failure_reason(error)}") from None
    state = {name: tensor.to(wanted[name].dtype) for name, tensor in read.items()}
    encoder.load_state_dict(state, assign=True)
    return encoder


def _fits(stored: Any, tensor: Tensor) -> bool:
    """Check that a stored tensor may become a weight: same shape, floating point or not."""
    return (
        isinstance(stored, StoredTensor)
        and stored.shape == tensor.shape
        and stored.dtype.is_floating_point == tensor.is_floating_point()
    )


def read_model_file(path: Path, what: str) -> TensorFile:
    """Open a file that pretraining wrote; no code in it is ever run.

    Args:
        path: of the file.
        what: its name in messages, such as a flag.

    Returns:
        The file, whose content is a dict; the caller closes it.

    Raises:
        UserError: The file is missing, something else, or damaged.
    """
    shown = printable_path(path)
    try:
        file = TensorFile(path)
        if isinstance(file.content, dict):
            return file
        file.close()
        reason = "it holds no dict"
    except FileNotFoundError:
        raise UserError(f"{what} {shown}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{what} {shown}: {error.strerror or error}") from None
    except ForeignError as error:
        raise UserError(
            f"{what} {shown} holds more than tensors and plain values, and reading it could run "
            f"code: refused ({error}); name the current.pth of a run"
        ) from None
    except PickleError as error:
        reason = str(error)
    raise UserError(
        f"{what} {shown} is damaged or not a file of torch.save: {reason}; "
        "name the current.pth of a run's --output-dir"
    )


def _fingerprint(encoder: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
