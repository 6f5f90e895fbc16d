"""Output folder that appears under its name only when it is complete."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from moco_scale.data.shards.index_file import INDEX_JSON, PARTIAL
from moco_scale.data.shards.index_place import FOLDER
from moco_scale.utils import locks
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import sync
from moco_scale.utils.own_folders import without_links

LEFT_OUT = "left_out.jsonl"
_REPLACED = ".replaced-"
_OURS = re.compile(
    r"(train|val)-\d{6,}\.tar|(train|val)-index\.npy|index\.json|left_out\.jsonl|"
    + re.escape(FOLDER)
)


class OutputFolder:
    """Context manager around the writing of folder ``out``.

    Inside, ``path`` is a new folder beside ``out`` (its name starts with ``out.partial-``);
    ``finish()`` renames it to ``out``. Leaving without ``finish()`` removes it. A killed process
    leaves it under its partial name, unlocked, and the next run removes it.

    Raises:
        UserError: On entry: ``out`` exists and must not be replaced, another process is writing it,
            or the place is not writable.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = Path(os.path.realpath(out))  # a link keeps pointing to what it points to
        if not self.out.name:
            raise UserError(f"--out {out} is the root of a disk; name a folder that is to be made.")
        self.shown = out
        self.overwrite = overwrite
        self.notes: list[str] = []
        token = secrets.token_hex(4)
        self.path = self.out.with_name(f"{self.out.name}{PARTIAL}{token}")
        self._old = self.out.with_name(f"{self.out.name}{_REPLACED}{token}")
        self._lock = -1
        self._finished = False

    def __enter__(self) -> OutputFolder:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._clean_leftovers()
            self._check_place()
            # A file, since a network's file system (NFS) locks nothing that is not written to; it
            # comes before the folder and goes after it.
            self._lock = without_links(str(_lock_of(self.path)), os.O_RDWR | os.O_CREAT)
            locks.lock(self._lock)
            self.path.mkdir()
        except OSError as error:
            raise UserError(
                f"Cannot write to {self.out.parent}: {error.strerror or error}."
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            shutil.rmtree(self.path, ignore_errors=True)
        _lock_of(self.path).unlink(missing_ok=True)
        os.close(self._lock)

    def finish(self) -> None:
        """Rename the folder to its final name."""
        sync(self.path)
        try:
            if self.overwrite and self.out.is_dir() and any(self.out.iterdir()):
                self.out.rename(self._old)
            self.path.rename(self.out)
        except OSError as error:
            if self._old.exists() and not self.out.exists():
                self._old.rename(self.out)
            raise UserError(
                f"Cannot put the finished shards in place as {self.shown}: "
                f"{error.strerror or error}. Is it a mount point? Then name a folder inside it."
            ) from error
        self._finished = True
        sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def _check_place(self) -> None:
        if os.path.lexists(self.out) and not self.out.is_dir():
            raise UserError(
                f"{self.shown} is no folder; --out names a folder that does not exist yet."
            )
        if not self.out.exists():
            return
        names = sorted(child.name for child in self.out.iterdir())
        if not names:
            return
        if INDEX_JSON not in names:
            raise UserError(
                f"{self.shown} exists and holds other things ({names[0]}{', …' * (len(names) > 1)})"
                "; --out names a folder that does not exist yet."
            )
        if not self.overwrite:
            raise UserError(
                f"{self.shown} already holds shards. Name another folder, or replace them with "
                "--overwrite."
            )
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if foreign:
            raise UserError(
                f"{self.shown} holds shards and also {foreign[0]}, which --overwrite would "
                "delete. Move it away, or name another folder."
            )

    def _clean_leftovers(self) -> None:
        for left in self._siblings(_REPLACED):
            if self.out.exists():
                shutil.rmtree(left)
            else:  # killed between the two renames
                left.rename(self.out)
                self.notes.append(f"restored {self.shown}, which an unfinished run had set aside")
        for left in self._siblings(PARTIAL):
            lock = _lock_of(left)
            if lock.exists():
                with lock.open("r+") as file:
                    if not locks.try_lock(file):
                        raise UserError(
                            f"Another process is writing {self.shown} just now (in {left})."
                        )
            shutil.rmtree(left)
            lock.unlink(missing_ok=True)
            self.notes.append(f"removed {left.name}, left by a run that did not finish")

    def _siblings(self, mark: str) -> list[Path]:
        name = re.compile(re.escape(self.out.name + mark) + r"[0-9a-f]{8}")
        return sorted(p for p in self.out.parent.iterdir() if name.fullmatch(p.name) and p.is_dir())


def _lock_of(folder: Path) -> Path:
    """Return the file that the writer of a partial folder locks."""
    return folder.with_name(f"{folder.name}.lock")
