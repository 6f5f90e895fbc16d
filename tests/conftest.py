"""Fixtures that several test folders share."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported, and for the processes that tests start: several ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from hosts import Host

# Jobs in the background of a shell ignore Ctrl-C, those of nohup SIGHUP; what they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def locks_of_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """flock as a network's file system has it: only what can be written is locked for one process
    alone, only what can be read together with others."""
    flock = fcntl.flock

    def as_there(file: Any, operation: int) -> None:
        number = file if isinstance(file, int) else file.fileno()
        mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
        wrong = os.O_RDONLY if operation & fcntl.LOCK_EX else os.O_WRONLY
        if mode == wrong and not operation & fcntl.LOCK_UN:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_there)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout, where train.py and ds_configs are."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images that lies beside some checkouts; skips where it does not."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real images here: ../shared/data beside the checkout is missing")
    return folder


def write_image(path: Path, *, seed: int, width: int = 40, height: int = 32) -> None:
    """Write a smooth random RGB image; the name's suffix chooses the format."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 32 training and 8 validation JPEGs of 2 classes; not to be changed."""
    from commands import make_shards

    root = tmp_path_factory.mktemp("tiny")
    for split, per_class, first in (("train", 16, 0), ("val", 4, 1000)):
        for c, name in enumerate(("ash", "birch")):
            for i in range(per_class):
                path = root / "images" / split / name / f"{i:03d}.jpg"
                write_image(path, seed=first + 100 * c + i)
    return make_shards(root / "images", root / "shards")


@pytest.fixture(scope="session")
def zero1_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run of 2 processes, started as users do: its folder and what it printed."""
    from commands import TINY, ZERO1, launched

    out = tmp_path_factory.mktemp("zero1") / "out"
    status, output = launched(
        "deepspeed", *TINY, *ZERO1, "--data-dir", tiny_shards, "--output-dir", out
    )
    assert status == 0, output
    return out, output


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on this machine, joined by a cable; skips where it cannot make them."""
    from hosts import two_hosts, why_not

    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as pair:
        yield pair


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An ImageFolder of JPEGs: 3 classes, 8 training and 4 validation images each.

    Sizes differ from image to image, all between 32 and 47 pixels a side.
    """
    root = tmp_path / "images"
    seed = 0
    for split, per_class in (("train", 8), ("val", 4)):
        for name in ("ash", "birch", "cedar"):
            for i in range(per_class):
                path = root / split / name / f"{i:03d}.jpg"
                write_image(path, seed=seed, width=40 + seed % 8, height=32 + seed % 5)
                seed += 1
    return root
