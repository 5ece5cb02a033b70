"""Records by number: the first read of a record finds any damage and names file and offset."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings

import pytest

from data import DataError
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.samples import tfrecord
from data.samples.record_files import shard_files
from data.samples.records import RecordSet
from data.sources.imagenet import ImageNet
from data_fixtures import write_tree


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    write_tree(root / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(root / "val", {"ant": 6, "bee": 5}, seed=2)
    flags = ["--train-dir", str(root / "train"), "--val-dir", str(root / "val"), "--workers", "0"]
    out = str(root / "out")
    assert make_tfrecords([*flags, "--data-dir", out, "--images-per-shard", "5"]) == 0
    return root / "out"


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def record_set(folder, **options) -> RecordSet:
    return RecordSet(shard_files(str(folder), "train"), 2, **options)


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_any_order_and_any_piece_give_the_same_records(made, block):
    plain, pieces = record_set(made), record_set(made, block=block)
    for index in [0, 1, 2, 22, 21, 20, 5, 4, 6, 7, 8, 3, 3, 0]:
        assert pieces.encoded(index) == plain.encoded(index)


def test_the_fingerprint_depends_on_the_records_and_not_on_paths(made, copy, tmp_path):
    (tmp_path / "bad.txt").write_text("train/train-00000-of-00005#1\n")
    here = ImageNet(records=str(made)).fingerprint
    assert ImageNet(records=str(copy)).fingerprint == here
    left_out = ImageNet(records=str(copy), exclude=str(tmp_path / "bad.txt")).fingerprint
    manifest = copy / "manifest.json"
    content = json.loads(manifest.read_text())
    content["splits"]["train"]["shards"][2]["sha256"] = "f" * 64  # for example another label
    manifest.write_text(json.dumps(content))
    assert len({here, left_out, ImageNet(records=str(copy)).fingerprint}) == 3


def test_flags_that_would_be_ignored_are_refused(made):
    with pytest.raises(
        DataError, match="--shuffle-window 4 has no effect without --data or --records"
    ):
        ImageNet(shuffle_window=4).check()
    for name in ("train_dir", "val_dir"):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(DataError, match=f"{flag} T has no effect with --records"):
            ImageNet(records=str(made), **{name: "T"}).check()


def test_record_files_that_cannot_be_opened_are_named(copy):
    shard = copy / "validation" / "validation-00001-of-00003"
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(DataError, match=f"--records: {shard} cannot be read: Too many levels"):
        ImageNet(records=str(copy)).check()


def test_pieces_are_read_in_one_go(made, monkeypatch):
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args[1:]) or pread(*args))
    pieces = record_set(made, block=4)
    for index in range(len(pieces)):
        pieces.encoded(index)
    # 23 records lie in files of 4, 5, 4, 5 and 5. A piece ends with its block or with its file.
    assert len(reads) == 9
    monkeypatch.undo()
    assert sum(size for size, _ in reads) == sum(
        os.path.getsize(path) for path, _ in shard_files(str(made), "train")
    )


def open_files(folder) -> int:
    targets = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum(target.startswith(str(folder)) for target in targets)


def test_few_files_are_open_at_a_time(made, monkeypatch):
    monkeypatch.setattr("data.samples.open_files._OPEN_FILES", 2)
    samples = record_set(made)
    for index in [0, 22, 9, 4, 0, 22, 9]:
        samples.encoded(index)
    assert open_files(made) == 2
    del samples
    assert open_files(made) == 0


def test_files_are_closed_after_python_has_cleared_its_modules(made, monkeypatch):
    """An object that lives until Python ends may find the names of its module cleared."""
    samples = record_set(made)
    samples.encoded(0)
    monkeypatch.setattr("data.samples.open_files.os", None)
    with warnings.catch_warnings(action="error"):
        del samples
    assert open_files(made) == 0


def test_a_flipped_bit_is_found_by_the_first_read_only(copy):
    samples = record_set(copy)
    good = samples.encoded(6)
    path = copy / "train" / samples.name(6).split("#")[0]
    index = int(samples.name(6).split("#")[1])
    offset = tfrecord.read_index(shard_files(str(copy), "train")[1][1], path.stat().st_size)[index]
    data = bytearray(path.read_bytes())
    data[offset[0] + offset[1] // 2] ^= 1
    path.write_bytes(data)
    again = samples.encoded(6)  # it was read and verified before
    assert again != good
    with pytest.raises(DataError, match=rf"{path}#{index} at byte {offset[0]}: the checksum"):
        record_set(copy).encoded(6)
    # A record that one process has verified counts as verified in all processes of the rank.
    sent = pickle.loads(pickle.dumps(samples))
    assert sent.encoded(6) == again


def test_labels_out_of_range_are_refused(made):
    samples = RecordSet(shard_files(str(made), "train"), num_classes=1)
    with pytest.raises(DataError, match=r"label 2 is not in 1 \.\. 1"):
        [samples.encoded(index) for index in range(len(samples))]


def refusal(folder) -> str:
    with pytest.raises(DataError) as caught:
        ImageNet(records=str(folder)).check()
    return str(caught.value)


def test_index_files_must_match(copy):
    index = copy / "idx_files" / "train" / "train-00001-of-00005.idx"
    text = index.read_text()
    index.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert "does not match its record file" in refusal(copy)
    index.unlink()
    assert "do not match, for example train-00001-of-00005; index them" in refusal(copy)
    index.write_text(text)
    (index.parent / "stray.idx").write_text(text)
    assert "for example stray" in refusal(copy)


@pytest.mark.parametrize("part", ["train", "validation", "idx_files/train", "idx_files/validation"])
def test_missing_and_empty_folders_are_named(copy, part):
    shutil.rmtree(copy / part)
    assert refusal(copy).startswith(f"--records: {copy}/{part}: No such file")
    (copy / part).mkdir()
    assert refusal(copy).startswith(f"--records: {copy}/{part} is empty")


def test_index_files_without_an_ending_and_no_manifest(copy):
    (copy / "manifest.json").unlink()
    for path in (copy / "idx_files").rglob("*.idx"):
        path.rename(path.with_suffix(""))
    source = ImageNet(records=str(copy))
    source.check()
    assert (source.num_classes, source.train_size, source.val_size) == (1000, 23, 11)


@pytest.mark.parametrize("content", ['{"num', "{}", "[]", '{"num_classes": 2, "splits": []}'])
def test_a_damaged_manifest_does_not_count_as_imagenets(copy, content):
    (copy / "manifest.json").write_text(content)
    assert "manifest.json is damaged or not a manifest" in refusal(copy)


def test_excluded_records_are_left_out(made, tmp_path):
    names = [record_set(made).name(index) for index in (3, 17)]
    (tmp_path / "bad.txt").write_text("".join(f"train/{name}\n" for name in names))
    source = ImageNet(records=str(made), exclude=str(tmp_path / "bad.txt"))
    assert source.train_size == 21
    samples = record_set(made, excluded=names)
    assert [samples.name(i) for i in range(21)] == [
        record_set(made).name(i) for i in range(23) if i not in (3, 17)
    ]
    names = [f"train/{record_set(made).name(i)}\n" for i in range(23)]
    (tmp_path / "bad.txt").write_text("".join(names))
    with pytest.raises(DataError, match=r"^--exclude: .* leaves out every image of train"):
        source.open_samples()


def test_a_window_must_be_positive(made):
    with pytest.raises(DataError, match="--shuffle-window 0"):
        ImageNet(records=str(made), shuffle_window=0).check()
