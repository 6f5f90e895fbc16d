"""ILSVRC2012 as it is downloaded: its archives, and the classes of its validation images.

The official ground truth (``ILSVRC2012_validation_ground_truth.txt``, in the development kit) has
one number a line in the order of the images' names: the ILSVRC2012_ID of the class, from 1 to
1000, which is not the place in the sorted WordNet ids that everybody trains with. The table
``ilsvrc_synsets.txt`` says what it stands for. Other widespread forms of the same facts name the
image and its class in each line.
"""

from __future__ import annotations

import lzma
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from moco_scale.data.images.formats import is_image
from moco_scale.data.shards.tar_bytes import content_of
from moco_scale.data.tools.layout import image_stem
from moco_scale.data.tools.source_tar import decompressed
from moco_scale.untrusted.documents import read_bounded
from moco_scale.untrusted.limits import GROUND_TRUTH
from moco_scale.untrusted.tar_headers import FILE, TarHeaders
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable, text_of

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT_TAR = "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_NUMBER = re.compile(r"[0-9]{1,9}")
_HEADER = "ImageId,PredictionString"
_KIT = 2 * GROUND_TRUTH  # bytes of a development kit: 2.5 MB compressed
_SYNSETS = Path(__file__).with_name("ilsvrc_synsets.txt")

ACCEPTED = (
    f"Accepted are {DEVKIT_TAR} (or the folder it unpacks to, or its {_TRUTH}), "
    "a text with an image's name and its class or class number (from 0, in the sorted order of "
    "the classes) in each line, LOC_val_solution.csv, and a text with one class name a line in "
    "the order of the images' names"
)


def read_ground_truth(path: Path, images: Sequence[str]) -> dict[str, str | int]:
    """The class of each validation image, by file name without suffix (see `image_stem`).

    images: the names of all validation images; forms without names are in their sorted order.
    Returns class names, or numbers in the sorted order of the class names.

    Raises UserError: not readable, or in no form that is known (the message lists them).
    """
    stems = sorted(map(image_stem, images))
    content, name = _load(path)
    lines = [(n, line) for n, line in _lines(content, name) if line]
    if lines and lines[0][1].replace(" ", "") == _HEADER:
        del lines[0]
        lines = [(number, _first_box(line)) for number, line in lines]
    if not lines:
        raise UserError(f"{name} is empty. {ACCEPTED}.")
    if all(len(re.split(r"[\s,;]+", line.strip(" ,;"))) == 1 for _, line in lines):
        return _in_order(name, lines, stems)
    known = set(stems)
    labels: dict[str, str | int] = {}
    for number, line in lines:
        image, label = _named(line, known)
        if not label:
            raise UserError(f"{name}, line {number}: {printable(line)!r} names no class.")
        value = int(label) if _NUMBER.fullmatch(label) else label
        if labels.setdefault(image, value) != value:
            raise UserError(
                f"{name}, line {number}: {printable(image)} has another class than in a line "
                "before."
            )
    return labels


def _lines(content: bytes, name: str) -> Iterable[tuple[int, str]]:
    """(number from 1, line without what surrounds it), whatever ends lines; UTF-8 or -16."""
    try:
        # Names that are no UTF-8 are compared as bytes, as those of files are.
        text = text_of(content, "surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{name} is not a text. {ACCEPTED}.")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return ((number, line.strip()) for number, line in enumerate(lines, start=1))


def _first_box(line: str) -> str:
    """Name and class of a line of LOC_val_solution.csv, without the places of objects."""
    image, _, boxes = line.partition(",")
    return ",".join((image, *boxes.split()[:1]))


def _named(line: str, known: set[str]) -> tuple[str, str]:
    """(image, class) of a line; "" where it names none.

    Separated by a tab, a comma, a semicolon or else a space; names may have spaces, on either side.
    What follows a second tab is of something else, such as the box of an object.
    """
    for separator in ("\t", ",", ";"):
        image, found, label = line.partition(separator)
        if found and (separator != ";" or _stem(image) in known):
            label = label.partition("\t")[0]
            break
    else:
        image, _, label = line.partition(" ")
        if _stem(image) not in known and len(words := line.rsplit(None, 1)) == 2:
            image, label = words
    return _stem(image), label.strip(' \t"')


def _stem(image: str) -> str:
    """An image's stem, whether it is named with its suffix and its folder or not."""
    image = image.strip(' "')
    return image_stem(image if is_image(image) else f"{image}.jpg")


def _in_order(name: str, lines: list[tuple[int, str]], stems: list[str]) -> dict[str, str | int]:
    """Labels given one a line, without the images' names."""
    if len(lines) != len(stems):
        raise UserError(
            f"{name} has {len(lines)} lines, and there are {len(stems)} validation images. "
            "A file that does not name the images must have one line for each."
        )
    odd = [(n, line) for n, line in lines if not _NUMBER.fullmatch(line)]
    if len(odd) == len(lines):
        return dict(zip(stems, (line for _, line in lines), strict=True))
    if odd:
        raise UserError(
            f"{name}, line {odd[0][0]}: {printable(odd[0][1], 60)!r} is no number, and "
            f"{len(lines) - len(odd)} of the {len(lines)} lines are."
        )
    wnids = " ".join(re.findall("^[^#].*", _SYNSETS.read_text(), re.MULTILINE)).split()
    for number, line in lines:
        if not 1 <= int(line) <= len(wnids):
            raise UserError(
                f"{name}, line {number}: {line[:20]} is not an ILSVRC2012 id, which are from 1 to "
                f"{len(wnids)}. {ACCEPTED}."
            )
    return {stem: wnids[int(line) - 1] for stem, (_, line) in zip(stems, lines, strict=True)}


def _load(path: Path) -> tuple[bytes, str]:
    """Read the ground truth. Returns it with a name for messages."""
    try:
        if path.is_dir():
            found = [p for p in (path / _TRUTH, path / "data" / _TRUTH) if p.is_file()]
            if not found:
                raise UserError(f"The folder {path} holds no {_TRUTH}. {ACCEPTED}.")
            path = found[0]
        if not path.exists():
            raise UserError(f"There is no ground-truth file {path}. {ACCEPTED}.")
        if path.name.endswith((".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz")):
            return _from_tar(path)
        return read_bounded(path, GROUND_TRUTH, "the ground truth"), str(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from error


def _from_tar(path: Path) -> tuple[bytes, str]:
    with decompressed(path) as file:
        content = content_of(file)
        for member in TarHeaders(content, str(path), "Fetch it again.", end=_KIT):
            if PurePosixPath(member.name).name == _TRUTH and member.kind == FILE:
                return content(member.offset, member.size), f"{_TRUTH} in {path}"
    raise UserError(f"{path} holds no {_TRUTH}. {ACCEPTED}.")
