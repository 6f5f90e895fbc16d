"""State of a linear evaluation, saved after each epoch to continue from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from moco_scale.distributed import consensus
from moco_scale.engines.base import MOMENTUM
from moco_scale.untrusted.documents import DocumentError, check
from moco_scale.untrusted.linear_file import LinearFile, Momenta
from moco_scale.untrusted.pickles import PickleError
from moco_scale.untrusted.tensor_files import StoredTensor, TensorFile
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import failure_reason, save_atomically
from moco_scale.utils.log import log
from moco_scale.utils.text import printable


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the state in a file; every rank calls it, rank 0 writes.

    Raises:
        UserError: The file cannot be written; the earlier state is untouched.
    """
    consensus.broadcast_from_main(lambda: _write(path, state))


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        save_atomically(path, state)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {path}: {failure_reason(error)}; make room, then start again"
        ) from None


def load(
    path: Path,
    identity: dict[str, Any],
    described: dict[str, str],
    resume: str,
    classifier: dict[str, Tensor],
) -> dict[str, Any] | None:
    """Read the state in a file on rank 0 for all; None where there is none.

    The state of another, finished evaluation does not count: it is replaced, and this is logged.

    Args:
        path: see :func:`save`.
        identity: values that must equal the state's ``identity``.
        described: readable descriptions of values of `identity` such as digests.
        resume: ``"auto"``, or ``"none"`` to refuse an existing state.
        classifier: state of a classifier of the same shape, in the optimizer's order.

    Returns:
        ``classifier`` and ``history`` as saved; ``momenta``, the optimizer's state by number of
        the parameter.

    Raises:
        UserError: The state belongs to another, unfinished evaluation (each difference is named),
            is damaged, or is refused.
    """
    return consensus.broadcast_from_main(
        lambda: _read(path, identity, described, resume, classifier)
    )


def _read(
    path: Path,
    identity: dict[str, Any],
    described: dict[str, str],
    resume: str,
    classifier: dict[str, Tensor],
) -> dict[str, Any] | None:
    if not path.exists():
        return None
    away = "choose another --output-dir, or move that file away"
    if resume == "none":
        raise UserError(f"--resume none: {path} holds a linear evaluation; {away}")
    try:
        with TensorFile(path) as file:
            held = check(file.content, LinearFile, "it")
            saved, history = file.content["identity"], file.content["history"]
            finished = len(history) >= held.identity.epochs
            different = _differences(saved, held.described, identity, described)
            if not different:
                tensors = _tensors(file, classifier)
                return {"history": history, **tensors}
    except (OSError, PickleError, DocumentError) as error:
        reason = failure_reason(error)
        raise UserError(f"{path} is damaged or something else: {reason}; {away}") from None
    lines = "\n".join(different)
    if not finished:
        raise UserError(
            f"{path} belongs to another, unfinished linear evaluation:\n{lines}\n{away}"
        )
    log.info(f"{path} holds another, finished linear evaluation; this one replaces it:\n{lines}")
    return None


def _differences(
    saved: dict[str, Any],
    meanings: dict[str, str],
    identity: dict[str, Any],
    described: dict[str, str],
) -> list[str]:
    """Describe each value of an evaluation's identity that differs from the file's."""
    return [
        f"  {printable(name)}: {printable(meanings.get(name, repr(saved.get(name))))} there, "
        f"{described.get(name, repr(identity.get(name)))} now"
        for name in sorted(saved.keys() | identity.keys(), key=str)
        if saved.get(name) != identity.get(name)
    ]


def _tensors(file: TensorFile, classifier: dict[str, Tensor]) -> dict[str, Any]:
    """Read weights and momenta once their shapes are known to fit the classifier.

    The optimizer's other settings come from the command line.
    """
    weights = file.content.get("classifier")
    states = check(file.content.get("optimizer"), Momenta, "its optimizer").state
    momenta = {number: state.get(MOMENTUM) for number, state in states.items()}
    if not isinstance(weights, dict) or weights.keys() != classifier.keys():
        raise PickleError("it holds no classifier of this kind")
    if not momenta.keys() <= set(range(len(classifier))):
        raise PickleError("it has momenta of other parameters")
    parameters = list(classifier.values())
    pairs = [(name, stored, classifier[name]) for name, stored in weights.items()]
    pairs += [("momentum", t, parameters[n]) for n, t in momenta.items() if t is not None]
    for name, stored, like in pairs:
        if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (
            like.dtype,
            like.shape,
        ):
            raise PickleError(f"its {name} has not the shape of this evaluation's")
    return {
        "classifier": {name: _finite(file, name, stored) for name, stored in weights.items()},
        "momenta": {
            number: {MOMENTUM: None if t is None else _finite(file, MOMENTUM, t)}
            for number, t in momenta.items()
        },
    }


def _finite(file: TensorFile, name: str, stored: StoredTensor) -> Tensor:
    tensor = file.read(stored)
    if not tensor.isfinite().all():
        raise PickleError(f"its {name} is not finite")
    return tensor
