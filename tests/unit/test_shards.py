"""Writing shards: every image once, with its label, in an order that only the seed decides."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import write_image
from PIL import Image

from moco_scale.__main__ import main
from moco_scale.data.images.decode import decode_rgb
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.tools.layout import SourceImage
from moco_scale.data.tools.writer import random_order


def shard(source: Path, out: Path, *options: str) -> Path:
    """Run the command, which must succeed; 1 worker unless the options say otherwise."""
    arguments = ["shard", "--source", str(source), "--out", str(out), "--workers", "1", *options]
    assert main(arguments) == 0
    return out


def contents(shards: IndexedShards) -> dict[bytes, str]:
    """Bytes of each image -> its class."""
    found = {
        bytes(shards.read(i)): shards.classes[label] if label >= 0 else "none"
        for i, label in enumerate(shards.labels.tolist())
    }
    assert len(found) == len(shards)  # the images of these tests all differ
    return found


def on_disk(folder: Path) -> dict[bytes, str]:
    """The same of an ImageFolder."""
    return {p.read_bytes(): p.relative_to(folder).parts[0] for p in folder.rglob("*.jpg")}


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {path.name: path.read_bytes() for path in found}


def pack(folder: Path, tar: Path, name: str) -> Path:
    with tarfile.open(tar, "w:gz" if tar.suffix == ".gz" else "w") as archive:
        archive.add(folder, name)
    return tar


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def test_every_image_is_written_once_unchanged_with_its_class(
    image_folder: Path, tmp_path: Path
) -> None:
    out = shard(image_folder, tmp_path / "out", "--shard-size", "5")
    for split in ("train", "val"):
        shards = IndexedShards.open(out, split)
        assert shards.classes == ["ash", "birch", "cedar"]
        assert contents(shards) == on_disk(image_folder / split)
    names = {path.name for path in out.iterdir()}
    train = {f"train-{i:06d}.tar" for i in range(5)}
    val = {f"val-{i:06d}.tar" for i in range(3)}
    index = {"train-index.npy", "val-index.npy", "index.json", ".moco_scale-index"}
    assert names == train | val | index
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_workers_do_not_change_a_byte(image_folder: Path, tmp_path: Path) -> None:
    one = shard(image_folder, tmp_path / "one", "--shard-size", "3", "--verify")
    many = shard(image_folder, tmp_path / "many", "--shard-size", "3", "--verify", "--workers", "3")
    assert files(one) == files(many)


def test_a_folder_and_tars_of_it_give_the_same_shards(image_folder: Path, tmp_path: Path) -> None:
    expected = shard(image_folder, tmp_path / "folder")
    for tar in ("images.tar", "images.tar.gz"):
        packed = pack(image_folder, tmp_path / tar, "some/where/images")
        out = shard(packed, tmp_path / f"{tar}-out")
        for pattern in ("*.tar", "*.npy"):
            assert files(out, pattern) == files(expected, pattern)
        assert len(files(out)) == len(files(expected))  # nothing unpacked is left in it


def test_a_tar_that_was_replaced_is_read_anew(image_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        tar = pack(image_folder / split, tmp_path / "images.tar", "x")
        out = shard(tar, tmp_path / split)
        assert contents(IndexedShards.open(out)) == on_disk(image_folder / split)
        tar.unlink()


def test_the_seed_decides_the_order(image_folder: Path, tmp_path: Path) -> None:
    def order(name: str, *options: str) -> list[bytes]:
        shards = IndexedShards.open(shard(image_folder, tmp_path / name, *options))
        return [bytes(shards.read(i)) for i in range(len(shards))]

    zero, again, one = order("a"), order("b", "--seed", "0"), order("c", "--seed", "1")
    assert zero == again
    assert zero != one
    assert sorted(zero) == sorted(one)
    by_name = [p.read_bytes() for p in sorted((image_folder / "train").rglob("*.jpg"))]
    assert zero != by_name


def test_the_order_is_uniform() -> None:
    images = [SourceImage(f"{i // 100:02d}/{i:04d}.jpg", "", 0, 1, i // 100) for i in range(2000)]
    deviations, repeats = [], []
    for seed in range(20):
        labels = np.array([p.label for p in random_order(images, seed, "train")])
        first_half = np.bincount(labels[:1000], minlength=20)
        deviations.append((first_half - 50.0) ** 2)
        repeats.append((labels[1:] == labels[:-1]).mean())
    # hypergeometric variance: 2000 images, 1000 drawn, 100 of each class
    assert np.mean(deviations) == pytest.approx(25 * 1900 / 1999, rel=0.2)
    assert np.mean(repeats) == pytest.approx(99 / 1999, abs=0.005)


def test_a_plain_webdataset_pipeline_reads_the_shards(image_folder: Path, tmp_path: Path) -> None:
    out = shard(image_folder, tmp_path / "out", "--shard-size", "10")
    shards = IndexedShards.open(out)
    urls = [str(path) for path in sorted(out.glob("train-*.tar"))]
    stream = webdataset.WebDataset(urls, shardshuffle=False)
    read = list(stream.decode("pil").to_tuple("jpg", "cls"))
    assert [label for _, label in read] == shards.labels.tolist()
    for i, (image, _) in enumerate(read):
        np.testing.assert_array_equal(np.asarray(image), decode_rgb(shards.read(i)))


def test_the_index_is_what_tarfile_finds(image_folder: Path, tmp_path: Path) -> None:
    out = shard(image_folder, tmp_path / "out", "--shard-size", "7")
    rows = np.load(out / "train-index.npy")
    expected = []
    for number, path in enumerate(sorted(out.glob("train-*.tar"))):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        for label, image in zip(members[::2], members[1::2], strict=True):
            assert label.name == image.name.replace(".jpg", ".cls")
            assert (image.mtime, image.uid, image.gid, image.uname) == (0, 0, 0, "")
            expected.append((number, image.offset_data, image.size))
    assert [row[:3] for row in rows.tolist()] == expected


@pytest.mark.parametrize(
    ("size", "counts"),
    [("1000", [24]), ("10", [8, 8, 8]), ("23", [12, 12]), ("24", [24]), ("1kB", None)],
)
def test_shards_are_even(
    image_folder: Path, tmp_path: Path, size: str, counts: list[int] | None
) -> None:
    out = shard(image_folder, tmp_path / "out", "--shard-size", size)
    entry = json.loads((out / "index.json").read_text())["splits"]["train"]
    if counts is None:
        total = sum(p.stat().st_size for p in (image_folder / "train").rglob("*.jpg"))
        assert len(entry["shards"]) == min(24, -(-total // 1000))
    else:
        assert [s["samples"] for s in entry["shards"]] == counts


def test_per_class_takes_the_first_by_name_of_the_training_images(
    image_folder: Path, tmp_path: Path
) -> None:
    out = shard(image_folder, tmp_path / "out", "--per-class", "2")
    kept = {
        data: name
        for data, name in on_disk(image_folder / "train").items()
        if any((image_folder / "train" / name / f"00{i}.jpg").read_bytes() == data for i in (0, 1))
    }
    assert len(kept) == 6
    assert contents(IndexedShards.open(out)) == kept
    assert len(IndexedShards.open(out, "val")) == 12


def test_class_folders_without_splits_are_training_images(
    image_folder: Path, tmp_path: Path
) -> None:
    out = shard(image_folder / "train", tmp_path / "out")
    assert contents(IndexedShards.open(out)) == on_disk(image_folder / "train")
    assert list(json.loads((out / "index.json").read_text())["splits"]) == ["train"]


def test_validation_images_from_a_source_of_their_own(image_folder: Path, tmp_path: Path) -> None:
    val = pack(image_folder / "val", tmp_path / "v.tar", "v")
    out = shard(image_folder / "train", tmp_path / "out", "--val-source", str(val))
    assert contents(IndexedShards.open(out, "val")) == on_disk(image_folder / "val")


def test_train_only(image_folder: Path, tmp_path: Path) -> None:
    out = shard(image_folder, tmp_path / "out", "--train-only")
    assert not list(out.glob("val*"))


def test_a_flat_folder_is_unlabelled(image_folder: Path, tmp_path: Path) -> None:
    out = shard(image_folder / "train" / "ash", tmp_path / "out")
    shards = IndexedShards.open(out)
    assert shards.classes == []
    assert shards.labels.tolist() == [-1] * 8
    assert set(contents(shards)) == set(on_disk(image_folder / "train" / "ash"))


def test_unlabelled_takes_images_from_any_depth(image_folder: Path, tmp_path: Path) -> None:
    top = image_folder / "train"
    write_image(top / "loose.jpg", seed=99)
    write_image(top / "ash" / "deep" / "deeper" / "x.jpg", seed=98)
    shards = IndexedShards.open(shard(top, tmp_path / "out", "--unlabelled"))
    assert set(shards.labels.tolist()) == {-1}
    assert set(contents(shards)) == set(on_disk(top))


def test_hidden_files_and_other_files_are_no_images(image_folder: Path, tmp_path: Path) -> None:
    expected = on_disk(image_folder / "train")
    for name in ("._000.jpg", ".thumbnails/000.jpg", "notes.txt"):
        path = image_folder / "train" / "ash" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\xff\xd8 not an image")
    (image_folder / "train" / "__MACOSX").mkdir()
    (image_folder / "train" / "__MACOSX" / "x.jpg").write_bytes(b"x")
    out = shard(image_folder, tmp_path / "out", "--verify")
    assert contents(IndexedShards.open(out)) == expected


def test_linked_class_folders_are_followed_and_circles_are_not(
    image_folder: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "oak").symlink_to(image_folder / "train" / "ash")
    (linked / "yew").symlink_to(image_folder / "train" / "birch")
    (image_folder / "train" / "ash" / "circle").symlink_to(linked)
    shards = IndexedShards.open(shard(linked, tmp_path / "out"))
    assert shards.classes == ["oak", "yew"]
    assert np.bincount(shards.labels).tolist() == [8, 8]


def test_suffixes(tmp_path: Path) -> None:
    names = ("a.JPEG", "b.jpg", "c.png", "d.PNG", "e.webp", "f.jpeg", "g.bmp")
    for seed, name in enumerate(names):
        write_image(tmp_path / "in" / name, seed=seed)
    out = shard(tmp_path / "in", tmp_path / "out", "--verify")
    with tarfile.open(out / "train-000000.tar") as tar:
        suffixes = sorted(n.partition(".")[2] for n in tar.getnames() if not n.endswith("cls"))
    assert suffixes == sorted(["jpg", "jpg", "jpg", "png", "png", "webp", "bmp"])


def test_reencoding_shrinks_larger_images_only(tmp_path: Path) -> None:
    for name, size in {"wide.png": (96, 64), "high.jpg": (50, 200), "small.png": (40, 31)}.items():
        write_image(tmp_path / "in" / name, seed=1, width=size[0], height=size[1])
    out = shard(tmp_path / "in", tmp_path / "out", "--short-side", "32", "--quality", "95")
    shards = IndexedShards.open(out)
    read = [bytes(shards.read(i)) for i in range(3)]
    assert (tmp_path / "in" / "small.png").read_bytes() in read
    shapes = {decode_rgb(data).shape[:2] for data in read}
    assert shapes == {(32, 48), (128, 32), (31, 40)}
    wide = next(data for data in read if decode_rgb(data).shape[:2] == (32, 48))
    assert wide.startswith(b"\xff\xd8")
    source = Image.open(tmp_path / "in" / "wide.png").resize((48, 32), Image.Resampling.BOX)
    assert np.abs(decode_rgb(wide).astype(float) - np.asarray(source, float)).mean() < 3


def test_reencoding_turns_images_upright(tmp_path: Path) -> None:
    """What is written anew has no EXIF; bytes that are kept keep theirs."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    gradient = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    gradient.save(tmp_path / "in" / "shrunk.jpg", exif=exif)
    gradient.resize((30, 20)).save(tmp_path / "in" / "kept.jpg", exif=exif)
    shards = IndexedShards.open(shard(tmp_path / "in", tmp_path / "out", "--short-side", "40"))
    images = {decode_rgb(data).shape[:2]: data for data in (shards.read(i) for i in range(2))}
    assert images.keys() == {(60, 40), (30, 20)}
    shrunk = decode_rgb(images[60, 40]).astype(float)
    assert Image.open(io.BytesIO(images[60, 40])).getexif().get(0x0112, 1) == 1
    assert shrunk[:, 0].mean() > shrunk[:, -1].mean() + 100  # dark top, turned to the right


def test_verify_leaves_out_what_cannot_be_decoded_and_lists_it(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = on_disk(image_folder / "train")
    ash = image_folder / "train" / "ash"
    (ash / "empty.jpg").write_bytes(b"")
    (ash / "text.jpg").write_bytes(b"this is no image")
    whole = (ash / "000.jpg").read_bytes()
    (ash / "half.jpg").write_bytes(whole[: len(whole) // 2])
    out = shard(image_folder, tmp_path / "out", "--verify", "--shard-size", "4")
    assert contents(IndexedShards.open(out)) == good
    lines = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert {(line["split"], line["name"]) for line in lines} == {
        ("train", f"ash/{name}.jpg") for name in ("empty", "text", "half")
    }
    assert all(line["reason"] for line in lines)
    shown = capsys.readouterr().out
    assert "left out 3 images" in shown and "left_out.jsonl" in shown
    assert "1 x empty file (as train: ash/empty.jpg)" in shown


def test_without_verify_empty_files_are_left_out_all_the_same(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = on_disk(image_folder / "train")
    (image_folder / "train" / "birch" / "zero.jpg").touch()
    out = shard(image_folder, tmp_path / "out")
    assert contents(IndexedShards.open(out)) == good
    assert "left out 1 image;" in capsys.readouterr().out


def test_a_shard_of_which_nothing_is_left_leaves_no_gap(tmp_path: Path) -> None:
    for i in range(6):
        write_image(tmp_path / "in" / f"{i}.jpg", seed=i)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"bad")
    out = shard(tmp_path / "in", tmp_path / "out", "--verify", "--shard-size", "1")
    assert [p.name for p in sorted(out.glob("*.tar"))] == [f"train-{i:06d}.tar" for i in range(6)]
    assert len(contents(IndexedShards.open(out))) == 6


def test_long_names_in_a_tar(tmp_path: Path) -> None:
    name = "klass-" + "ä" * 100
    with tarfile.open(tmp_path / "long.tar", "w") as archive:
        for i in range(3):
            add(archive, f"./top/{name}/{'x' * 150}-{i}.jpg", jpeg(i))
        add(archive, "./top/b/1.jpg", jpeg(7))
    shards = IndexedShards.open(shard(tmp_path / "long.tar", tmp_path / "out"))
    assert shards.classes == ["b", name]
    assert sorted(shards.labels.tolist()) == [0, 1, 1, 1]


WNIDS = ["n02096294", "n02100735", "n02110185", "n02119789"]  # with the ids 4, 2, 3, 1
# the class of validation image 1, 2, … as an ILSVRC2012_ID
IDS = [1, 2, 3, 4, 1, 1, 4, 2]
CLASSES = [{1: 3, 2: 1, 3: 2, 4: 0}[i] for i in IDS]


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    """A folder with archives laid out as ILSVRC2012's own."""
    folder = tmp_path / "ilsvrc"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
        for c, wnid in reversed(list(enumerate(WNIDS))):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for i in range(3):
                    add(inner, f"{wnid}_{i}.JPEG", jpeg(10 * c + i))
            add(train, f"{wnid}.tar", stream.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as val:
        for i in reversed(range(len(IDS))):
            add(val, f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(100 + i))
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        truth = "".join(f"{i}\n" for i in IDS).encode()
        data = "ILSVRC2012_devkit_t12/data"
        add(kit, f"{data}/ILSVRC2012_validation_ground_truth.txt", truth)
    return folder


def val_labels(out: Path) -> list[int]:
    """Labels of validation image 1, 2, …"""
    shards = IndexedShards.open(out, "val")
    by_bytes = {bytes(shards.read(i)): int(shards.labels[i]) for i in range(len(shards))}
    return [by_bytes[jpeg(100 + i)] for i in range(len(IDS))]


def test_ilsvrc_as_downloaded(ilsvrc: Path, tmp_path: Path) -> None:
    out = shard(ilsvrc, tmp_path / "out", "--shard-size", "5")
    train = IndexedShards.open(out)
    assert train.classes == WNIDS
    assert contents(train) == {
        jpeg(10 * c + i): wnid for c, wnid in enumerate(WNIDS) for i in range(3)
    }
    assert val_labels(out) == CLASSES


@pytest.mark.parametrize("form", ["kit", "unpacked", "caffe", "names", "csv", "in_order"])
def test_ground_truth_forms(ilsvrc: Path, tmp_path: Path, form: str) -> None:
    truth = tmp_path / "truth.txt"
    stems = [f"ILSVRC2012_val_{i + 1:08d}" for i in range(len(IDS))]
    rows = list(zip(stems, CLASSES, strict=True))[::-1]
    if form == "kit":
        truth = ilsvrc / "ILSVRC2012_devkit_t12.tar.gz"
    elif form == "unpacked":
        with tarfile.open(ilsvrc / "ILSVRC2012_devkit_t12.tar.gz") as kit:
            kit.extractall(tmp_path, filter="data")
        truth = tmp_path / "ILSVRC2012_devkit_t12"
    elif form == "caffe":
        truth.write_text("".join(f"{stem}.JPEG {label}\n" for stem, label in rows))
    elif form == "names":
        truth.write_text("".join(f"{stem}.JPEG\t{WNIDS[label]}\n" for stem, label in rows))
    elif form == "csv":
        lines = [f"{stem},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8 \n" for stem, label in rows]
        truth.write_text("ImageId,PredictionString\n" + "".join(lines))
    else:
        truth.write_text("".join(f"{WNIDS[label]}\n" for label in CLASSES))
    out = shard(
        ilsvrc / "ILSVRC2012_img_train.tar",
        tmp_path / "out",
        "--val-source",
        str(ilsvrc / "ILSVRC2012_img_val.tar"),
        "--val-ground-truth",
        str(truth),
    )
    assert val_labels(out) == CLASSES


def test_the_real_imagenet_sample(shared_data: Path, tmp_path: Path) -> None:
    out = shard(shared_data / "imagenet-sample.tar", tmp_path / "out", "--shard-size", "16MB")
    shards = IndexedShards.open(out)
    assert len(shards) == len(shards.classes) == 500
    assert sorted(shards.labels.tolist()) == list(range(500))
    assert shards.classes == sorted(shards.classes) and shards.classes[0] == "n01440764"
    with tarfile.open(shared_data / "imagenet-sample.tar") as tar:
        expected = {
            tar.extractfile(m).read(): m.name.split("/")[2]  # type: ignore[union-attr]
            for m in tar
            if m.isreg()
        }
    assert contents(shards) == expected
