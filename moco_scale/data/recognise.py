"""What a tar on its own seems to be, by the names of its first members."""

from __future__ import annotations

import contextlib
import itertools
import lzma
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from moco_scale.data.sources import is_picture
from moco_scale.data.tar_scan import picture_key

_LOOKED_AT = 64
_LABELS = (".cls", ".json")


class Seems(NamedTuple):
    """What the first members are."""

    pictures: bool
    folders: bool
    """Pictures lie in folders, which may be classes."""
    labelled: str
    """A picture and the member that labels it, as WebDataset has it; "": none."""


def look_into(tar: Path) -> Seems:
    """What a tar, compressed or not, seems to hold; nothing where it is no tar that can be read.

    What lies between the headers is not read unless it is compressed: a member may be a tar itself.
    """
    first: list[tarfile.TarInfo] = []
    with (
        contextlib.suppress(tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError),
        tarfile.open(tar) as archive,
    ):
        for member in itertools.islice(archive, _LOOKED_AT):
            first.append(member)  # one by one: those before a damage count
    names = [member.name.removeprefix("./") for member in first if member.isreg()]
    pictures = {picture_key(name): name for name in names if is_picture(name)}
    labels = {picture_key(name): name for name in names if name.lower().endswith(_LABELS)}
    both = next((key for key in pictures if key in labels), None)
    labelled = "" if both is None else f"{pictures[both]} and {labels[both]}"
    return Seems(bool(pictures), any("/" in name for name in pictures.values()), labelled)
