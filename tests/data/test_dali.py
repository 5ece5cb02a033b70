"""DALI and our own loader give the same images, order and boxes, and nearly the same pixels."""

from __future__ import annotations

import builtins
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data import DataError
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.samples.records import RecordSet
from data.sources.imagenet import ImageNet, ImageNetDali
from data_fixtures import Share, write_tree

pytest.importorskip("nvidia.dali", reason="DALI is an extra")

SIDE = 48


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("dali")
    write_tree(root / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(root / "val", {"ant": 6, "bee": 5}, seed=2)
    odd = root / "train" / "bee" / "000.jpg"
    Image.open(odd).save(odd, "PNG")
    odd = root / "train" / "bee" / "001.jpg"
    Image.open(odd).convert("L").save(odd)
    turned = Image.Exif()
    turned[0x0112] = 6  # asks for a rotation by a right angle, which torchvision ignores
    for odd in (root / "train" / "bee" / "002.jpg", root / "val" / "bee" / "002.jpg"):
        Image.open(odd).save(odd, exif=turned)
    flags = ["--train-dir", str(root / "train"), "--val-dir", str(root / "val"), "--workers", "0"]
    assert make_tfrecords([*flags, "--data-dir", str(root / "records")]) == 0
    return root


@pytest.fixture(params=["tfrecord", "folder"])
def pair(request, trees):
    """Return DALI's source and ours over the same images."""
    folders = {"train_dir": str(trees / "train"), "val_dir": str(trees / "val")}
    records = str(trees / "records")
    if request.param == "folder":
        ours, theirs = ImageNet(**folders), ImageNetDali(**folders, reader="folder")
    else:
        ours, theirs = ImageNet(records=records), ImageNetDali(data_dir=records)
    return replace(theirs, image_size=SIDE), replace(ours, image_size=SIDE)


def train(source, workers=0, **options):
    return source.train_loader(Share(seed=3, **options), workers)


def compare(theirs, ours) -> tuple[float, int]:
    """Return the mean and the largest difference in grey levels, after checking the labels."""
    total = count = greatest = 0
    for (images, labels), (other_images, other_labels) in zip(theirs, ours, strict=True):
        assert labels.equal(other_labels)
        difference = (images.int() - other_images.int()).abs()
        total += int(difference.sum())
        count += difference.numel()
        greatest = max(greatest, int(difference.max()))
    return total / count, greatest


def test_training_images_equal_ours_except_for_rounding(pair):
    mean, _ = compare(train(pair[0], workers=2).epoch(1), train(pair[1]).epoch(1))
    assert mean < 0.4  # of 255; measured 0.2. A different box or flip gives 20 or more.


def test_validation_images_equal_ours_except_for_rounding(pair):
    theirs, ours = (s.val_loader(Share(), workers=1) for s in pair)
    mean, _ = compare(theirs, ours)
    assert mean <= 0.6


def test_antialias_can_be_switched_off(pair):
    small = replace(pair[0], image_size=12), replace(pair[1], image_size=12)
    with_it, ours = (s.val_loader(Share(), workers=0) for s in small)
    without = replace(small[0], antialias=False)
    without = without.val_loader(Share(), workers=0)
    assert compare(with_it, ours)[0] < 0.5
    assert compare(without, ours)[0] > 2


def test_an_unfinished_epoch_does_not_disturb_the_next_one(pair):
    expected = [images for images, _ in train(pair[0]).epoch(2)]
    loader = train(pair[0], workers=2)
    for _ in range(2):
        next(loader.epoch(0))
        got = [images for images, _ in loader.epoch(2)]
        assert all(a.equal(b) for a, b in zip(got, expected, strict=True))
    loader.close()


def test_each_reading_thread_has_its_own_open_files(trees, monkeypatch):
    threads: dict[int, set[int]] = {}
    encoded = RecordSet.encoded

    def spy(self, index):
        threads.setdefault(id(self), set()).add(threading.get_ident())
        time.sleep(0.002)  # so that a single thread cannot do all the work
        return encoded(self, index)

    monkeypatch.setattr(RecordSet, "encoded", spy)
    loader = train(ImageNetDali(data_dir=str(trees / "records"), image_size=SIDE), workers=3)
    list(loader.epoch(0))
    assert len(threads) == 3
    assert all(len(users) == 1 for users in threads.values())


@pytest.fixture
def damaged(tmp_path):
    """Truncated images, each of which stops DALI, and one without a header."""
    write_tree(tmp_path / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(tmp_path / "val", {"ant": 6, "bee": 5}, seed=2)
    for path in ("train/bee/004.jpg", "train/ant/005.jpg", "val/ant/001.jpg"):
        data = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(data[: len(data) // 2])
    (tmp_path / "train/bee/011.jpg").write_bytes(b"no header")
    return ImageNetDali(
        str(tmp_path / "train"), str(tmp_path / "val"), image_size=16, reader="folder"
    )


def test_a_bad_image_stops_the_run_and_is_named(damaged):
    with pytest.raises(DataError, match=r"train/(ant|bee)/0(04|05|11)\.jpg cannot be decoded"):
        list(train(damaged).epoch(0))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bad_images_are_skipped_with_equal_steps(damaged, size):
    loaders = [
        train(replace(damaged, on_bad_image="skip"), rank=rank, size=size) for rank in range(size)
    ]
    for epoch in (0, 1):
        lengths = [[len(labels) for _, labels in each.epoch(epoch)] for each in loaders]
        assert {len(each) for each in lengths} == {-(-3 // size) + -(-3 // size)}
        assert sum(map(sum, lengths)) == 20
    bad = {text.split(" ")[0][-11:] for each in loaders for text in each.bad_images}
    assert bad == {"bee/004.jpg", "ant/005.jpg", "bee/011.jpg"}


def test_bad_images_are_replaced(damaged):
    loader = train(replace(damaged, on_bad_image="replace"))
    labels = [label for _, batch in loader.epoch(0) for label in batch.tolist()]
    assert (labels.count(0), labels.count(1)) == (9, 14)
    assert len(loader.bad_images) == 3


def test_bad_validation_images_are_left_out(damaged):
    val = replace(damaged, on_bad_image="replace").val_loader(Share(), workers=0)
    assert sum(len(labels) for _, labels in val) == 10
    assert len(val.bad_images) == 1


@pytest.fixture
def odd(tmp_path):
    """Files named .jpg that PIL can read, but that DALI cannot read or reads differently."""
    write_tree(tmp_path / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(tmp_path / "val", {"ant": 6, "bee": 5}, seed=2)
    for path in ("train/bee/003.jpg", "train/ant/007.jpg", "val/bee/001.jpg"):
        Image.open(tmp_path / path).save(tmp_path / path, "GIF")
    Image.open(tmp_path / "train/ant/002.jpg").convert("CMYK").save(tmp_path / "train/ant/002.jpg")
    return ImageNetDali(
        str(tmp_path / "train"), str(tmp_path / "val"), image_size=SIDE, reader="folder"
    )


def images_of(source, cls=ImageNetDali, **options):
    source = cls(source.train_dir, source.val_dir, image_size=SIDE, **options)
    val = source.val_loader(Share(), workers=1)
    return [*train(source).epoch(1), *val]


@pytest.mark.parametrize("known_beforehand", [True, False])
def test_images_that_only_pil_can_read_are_decoded_by_pil(odd, known_beforehand, monkeypatch):
    from data.loader import dali
    from data.pixels import decode

    if not known_beforehand:  # then DALI stops at the image, in the middle of an epoch
        monkeypatch.setattr(dali, "jpeg_size", decode.dimensions)
        (cmyk,) = Path(odd.train_dir).glob("ant/002.jpg")
        Image.open(cmyk).convert("RGB").save(cmyk)
    theirs, ours = images_of(odd, reader="folder"), images_of(odd, ImageNet)
    assert compare(theirs, ours)[0] < 0.6


def test_damage_below_the_crop_is_found_in_every_epoch(tmp_path):
    root = write_tree(tmp_path / "train", {"ant": 4})
    bad = root / "ant" / "002.jpg"
    bad.write_bytes(bad.read_bytes()[:-8])  # the last row of blocks
    source = ImageNetDali(
        str(root), str(root), image_size=8, crop_area=(0.08, 0.1), reader="folder"
    )
    for epoch in range(3):
        with pytest.raises(DataError, match=r"ant/002\.jpg cannot be decoded"):
            list(train(source).epoch(epoch))


def test_without_dali_the_error_names_the_fix(monkeypatch, damaged):
    def fail(name, *args, **kwargs):
        if name.startswith("nvidia"):
            raise ImportError("No module named 'nvidia'")
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(DataError, match=r"setup\.sh --dali.*train_imagenet\.py"):
        damaged.check()


@pytest.mark.parametrize(
    ("given", "flag"),
    [({"reader": "folder", "data_dir": "D"}, "--data-dir D has no effect with --reader folder"),
     ({"train_dir": "T"}, "--train-dir T has no effect with --reader tfrecord"),
     ({"val_dir": "V"}, "--val-dir V has no effect with --reader tfrecord")],
)  # fmt: skip
def test_flags_of_the_other_reader_are_refused(given, flag):
    with pytest.raises(DataError, match=flag):
        ImageNetDali(**given).check()


@pytest.mark.parametrize("reader", ["folder", "tfrecord"])
def test_replacing_obeys_the_limit_when_a_file_system_goes_away(trees, reader, monkeypatch):
    if reader == "folder":
        source = ImageNetDali(str(trees / "train"), str(trees / "val"), reader=reader)
    else:
        source = ImageNetDali(data_dir=str(trees / "records"))
    loader = train(replace(source, on_bad_image="replace", max_bad_images=3))
    monkeypatch.setattr(type(loader._samples), "encoded", gone)
    with pytest.raises(DataError, match=r"more than --max-bad-images 3 .*The last: it is gone"):
        list(loader.epoch(0))


def gone(samples, index):
    raise DataError("it is gone")


def test_missing_records_are_refused(tmp_path):
    with pytest.raises(DataError, match=f"--data-dir: {tmp_path}/train: No such file"):
        ImageNetDali(data_dir=str(tmp_path)).check()
