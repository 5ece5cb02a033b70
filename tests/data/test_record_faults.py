"""Faults of a whole set of records stop everything, and no policy for single images hides them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib

import pytest

from data import DataError, SetError
from data.check.__main__ import main as check
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.samples import tfrecord
from data.sources.imagenet import ImageNet, ImageNetDali
from data_fixtures import Share, write_tree

CLASSES = {"ant": 9, "bee": 14, "cow": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    write_tree(root / "train", CLASSES, seed=1)
    write_tree(root / "val", dict.fromkeys(CLASSES, 3), seed=2)
    flags = ["--train-dir", str(root / "train"), "--val-dir", str(root / "val"), "--workers", "0"]
    out = str(root / "out")
    assert make_tfrecords([*flags, "--data-dir", out, "--images-per-shard", "5"]) == 0
    return root / "out"


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def rewrite(folder, change) -> None:
    """Write all records again with `change` applied to their features, and their index files."""
    for path in [*(folder / "train").iterdir(), *(folder / "validation").iterdir()]:
        records, rows, offset = [], [], 0
        for _, payload in tfrecord.read_records(str(path)):
            features = {k: v[0] for k, v in tfrecord.decode_example(payload).items()}
            record = tfrecord.record(tfrecord.encode_example(change(features)))
            records.append(record)
            rows.append((offset, len(record)))
            offset += len(record)
        path.write_bytes(b"".join(records))
        index = folder / "idx_files" / path.parent.name / f"{path.name}.idx"
        index.write_text(tfrecord.index_text(rows))


def from_zero(features):
    return features | {tfrecord.LABEL: features[tfrecord.LABEL] - 1}


def as_tfds(features):
    return {
        "image": features[tfrecord.IMAGE],
        "label": features[tfrecord.LABEL] - 1,
        "file_name": b"x.JPEG",
    }


def index(folder, *flags) -> int:
    return make_tfrecords(["--from-tfrecords", "--data-dir", str(folder), "--workers", "0", *flags])


def refusal(folder, **options) -> str:
    with pytest.raises(DataError) as caught:
        ImageNet(records=str(folder), **options).check()
    return str(caught.value)


def labels(folder, **options) -> list[int]:
    source = ImageNet(records=str(folder), image_size=16, **options)
    source.check()
    loader = source.train_loader(Share(effective_batch_size=4), workers=0)
    return sorted(label for _, batch in loader.epoch(0) for label in batch.tolist())


RIGHT = [label for label, count in enumerate(CLASSES.values()) for _ in range(count)]


def test_an_empty_shard_is_refused_everywhere(copy, capsys):
    shard = copy / "train" / "train-00001-of-00006"
    shard.write_bytes(b"")
    assert f"{shard.name}.idx does not match its record file of 0 bytes" in refusal(copy)
    assert check(["--data-dir", str(copy), "--workers", "0"]) == 3
    assert f"train/{shard.name}: empty file" in capsys.readouterr().out
    assert index(copy) == 3
    assert f"{shard} is empty: it holds no records" in capsys.readouterr().err
    (copy / "idx_files" / "train" / f"{shard.name}.idx").write_text("")
    assert f"{shard} is empty: it holds no records" in refusal(copy)
    (copy / "manifest.json").unlink()
    assert f"{shard} is empty: it holds no records" in refusal(copy)


def test_a_shard_that_is_shorter_than_the_manifest_says_is_refused(copy):
    shard = copy / "train" / "train-00001-of-00006"
    row_file = copy / "idx_files" / "train" / f"{shard.name}.idx"
    rows = tfrecord.read_index(str(row_file), shard.stat().st_size)[:-1]
    shard.write_bytes(shard.read_bytes()[: rows[-1].sum()])
    row_file.write_text(tfrecord.index_text(rows.tolist()))
    assert "in manifest.json; copy the file again" in refusal(copy)
    assert str(shard) in refusal(copy)


@pytest.mark.parametrize("by", ["manifest.json", "the files' names"])
def test_missing_shards_are_refused_in_training(copy, by):
    if by != "manifest.json":
        (copy / "manifest.json").unlink()
    name = "train-00002-of-00006"
    (copy / "train" / name).unlink()
    (copy / "idx_files" / "train" / f"{name}.idx").unlink()
    assert f"train: {name} missing, according to {by}" in refusal(copy)


def test_unexpected_shards_are_refused_in_training(copy):
    for folder, end in ((copy / "train", ""), (copy / "idx_files" / "train", ".idx")):
        shutil.copy(folder / f"train-00002-of-00006{end}", folder / f"extra{end}")
    assert "train: extra not in manifest.json; remove it" in refusal(copy)


@pytest.mark.parametrize("policy", ["error", "skip", "replace"])
def test_labels_from_zero_are_never_left_out_as_bad_images(copy, policy):
    rewrite(copy, from_zero)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({"num_classes": manifest["num_classes"]}))
    with pytest.raises(SetError, match=r"label 0 is not in 1 \.\. 3; this set counts from 0"):
        labels(copy, on_bad_image=policy)
    assert labels(copy, on_bad_image=policy, label_base=0) == RIGHT
    shutil.rmtree(copy / "idx_files")
    assert index(copy, "--label-base", "0") == 0
    assert labels(copy) == RIGHT


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_worker_keeps_its_kind(copy, workers):
    rewrite(copy, from_zero)
    (copy / "manifest.json").write_text('{"num_classes": 3}')
    source = ImageNet(records=str(copy), image_size=16, on_bad_image="skip")
    with pytest.raises(SetError):
        list(source.train_loader(Share(effective_batch_size=4), workers).epoch(0))


def test_the_tools_recognise_labels_from_zero(copy, tmp_path, capsys):
    rewrite(copy, from_zero)
    assert index(copy) == 3
    errors = capsys.readouterr().err
    assert "labels run from 0 to 2: this set counts from 0 (see train/train-0000" in errors
    assert "run the same command with --label-base 0" in errors
    bad = tmp_path / "bad.txt"
    (copy / "manifest.json").write_text('{"num_classes": 3}')
    assert check(["--data-dir", str(copy), "--list", str(bad), "--workers", "0"]) == 3
    assert bad.read_text() == "# none\n"
    assert "wrong label" in capsys.readouterr().out
    assert index(copy, "--label-base", "0") == 0
    manifest = json.loads((copy / "manifest.json").read_text())
    assert (manifest["num_classes"], manifest["label_base"]) == (3, 0)
    assert manifest["classes"] == list(CLASSES)
    assert manifest["splits"]["train"]["images_per_class"] == list(CLASSES.values())
    assert check(["--data-dir", str(copy), "--workers", "0"]) == 0
    assert labels(copy) == RIGHT


def test_a_label_base_that_the_labels_contradict_is_refused(copy, capsys):
    assert index(copy, "--label-base", "0") == 3
    assert "--label-base 0, but labels run from 1 to 3" in capsys.readouterr().err
    (copy / "manifest.json").write_text('{"num_classes": 3}')
    with pytest.raises(
        SetError, match=r"label 3 is not in 0 \.\. 2; this set seems to count from 1"
    ):
        labels(copy, label_base=0, on_bad_image="skip")
    rewrite(copy, from_zero)
    assert index(copy, "--label-base", "0") == 0
    assert "--label-base 1, but" in refusal(copy, label_base=1)
    assert labels(copy, label_base=0) == RIGHT


def test_the_label_base_is_part_of_the_fingerprint(copy):
    (copy / "manifest.json").write_text('{"num_classes": 3}')
    seen = {ImageNet(records=str(copy), label_base=base).fingerprint for base in (None, 0, 1)}
    assert len(seen) == 2


def test_more_classes_than_the_manifest_says_stop_the_run(copy):
    (copy / "manifest.json").write_text('{"num_classes": 2}')
    with pytest.raises(SetError, match=r"label 3 is not in 1 \.\. 2; the set has more classes"):
        labels(copy, on_bad_image="skip")


@pytest.mark.parametrize("feature", [tfrecord.IMAGE, tfrecord.LABEL])
def test_a_missing_feature_is_found_before_training(copy, feature):
    rewrite(copy, lambda features: {k: v for k, v in features.items() if k != feature})
    (copy / "manifest.json").unlink()
    message = refusal(copy, on_bad_image="skip")
    assert (
        "a record must hold one image/encoded and one image/class/label; this one holds" in message
    )
    assert "image/filename" in message


def test_records_of_tensorflow_datasets_are_read(copy, capsys):
    rewrite(copy, as_tfds)
    shutil.rmtree(copy / "idx_files")
    assert index(copy) == 0
    manifest = json.loads((copy / "manifest.json").read_text())
    assert (manifest["num_classes"], manifest["label_base"]) == (3, 0)
    assert labels(copy) == RIGHT
    assert check(["--data-dir", str(copy), "--workers", "0"]) == 0
    (copy / "manifest.json").unlink()
    assert labels(copy) == RIGHT


def test_dali_reads_the_same_labels(copy):
    pytest.importorskip("nvidia.dali")
    rewrite(copy, as_tfds)
    (copy / "manifest.json").write_text('{"num_classes": 3}')
    source = ImageNetDali(data_dir=str(copy), image_size=16)
    source.check()
    loader = source.train_loader(Share(effective_batch_size=4), workers=1)
    assert sorted(x for _, batch in loader.epoch(0) for x in batch.tolist()) == RIGHT
    loader.close()


@pytest.mark.parametrize(
    ("pack", "kind"), [(gzip.compress, "gzip"), (zlib.compress, "zlib")]
)  # fmt: skip
def test_compressed_records_are_named(copy, capsys, pack, kind):
    shutil.rmtree(copy / "idx_files")
    (copy / "manifest.json").unlink()
    for path in (copy / "train").iterdir():
        path.write_bytes(pack(path.read_bytes()))
    assert index(copy) == 3
    errors = capsys.readouterr().err
    assert f"is compressed with {kind}" in errors
    assert "decompress all of them" in errors
    check(["--data-dir", str(copy), "--workers", "0"])
    assert f"is compressed with {kind}" in capsys.readouterr().out


def test_records_flat_in_one_folder_are_named(copy, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in [*(copy / "train").iterdir(), *(copy / "validation").iterdir()]:
        path.rename(flat / f"imagenet2012-{path.name.replace('-0', '.tfrecord-0', 1)}")
    message = refusal(flat)
    assert f"{flat} holds 8 record files" in message
    assert index(flat) == 3
    assert "ln -s" in capsys.readouterr().err
    assert check(["--data-dir", str(flat), "--workers", "0"]) == 3
    commands = message[message.index("mkdir -p NEW") : message.index("; then python")]
    assert os.system(f"cd {tmp_path} && {commands}") == 0
    assert index(tmp_path / "NEW") == 0
    assert labels(tmp_path / "NEW") == RIGHT


def test_the_folder_of_one_split_is_named(copy):
    assert f"holds the record files of one split; give its parent, {copy}" in refusal(
        copy / "train"
    )


def test_folders_of_tools_beside_record_files_are_ignored(copy):
    for folder in ("train", "idx_files/train", "validation", "idx_files/validation"):
        (copy / folder / "@eaDir").mkdir()
        (copy / folder / ".DS_Store").touch()
    assert labels(copy) == RIGHT
    assert index(copy) == 0


def test_a_single_class_is_refused(copy):
    (copy / "manifest.json").write_text('{"num_classes": 1}')
    assert "a network needs at least two classes" in refusal(copy)


def test_records_without_a_manifest_give_a_warning(copy):
    assert ImageNet(records=str(copy)).warnings == []
    (copy / "manifest.json").unlink()
    (warning,) = ImageNet(records=str(copy)).warnings
    assert (
        "no manifest.json, so its 27 training images count as ImageNet's 1,000 classes" in warning
    )


def test_validation_on_the_training_records_is_reported(copy, capsys):
    for part in ("validation", "idx_files/validation"):
        shutil.rmtree(copy / part)
        (copy / part).symlink_to(copy / part.replace("validation", "train"))
    (copy / "manifest.json").unlink()
    warnings = ImageNet(records=str(copy)).warnings
    assert warnings[0].startswith(f"train and validation in {copy} hold the same images")


def test_an_index_with_wrong_boundaries_stops_the_run_under_any_policy(copy):
    name = "train-00000-of-00006"
    path = copy / "idx_files" / "train" / f"{name}.idx"
    rows = tfrecord.read_index(str(path), (copy / "train" / name).stat().st_size)
    rows[0, 1] -= 7
    rows[1] += (-7, 7)
    path.write_text(tfrecord.index_text(rows.tolist()))
    message = refusal(copy, on_bad_image="skip")
    assert f"{name}#0 at byte 0: a record claims to hold" in message


@pytest.mark.parametrize("window", [1, 4])
def test_a_file_that_became_shorter_stops_the_run_under_any_policy(copy, window):
    source = ImageNet(records=str(copy), image_size=16, on_bad_image="skip", shuffle_window=window)
    source.check()
    loader = source.train_loader(Share(effective_batch_size=4), workers=0)
    path = copy / "train" / "train-00003-of-00006"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SetError, match=f"{path}#. at byte .*shorter than its index file says"):
        list(loader.epoch(0))


def test_a_single_damaged_record_is_still_left_out(copy):
    shard = copy / "train" / "train-00000-of-00006"
    data = bytearray(shard.read_bytes())
    data[500] ^= 1  # in the first record of the set
    shard.write_bytes(data)
    assert len(labels(copy, on_bad_image="skip")) == 26
