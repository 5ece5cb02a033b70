"""Parquet files, WebDataset's tars and TFRecords without index files, through ``--data``."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data import DataError, FlagError, SetError
from data.check.__main__ import main as check
from data.loader.order import permutation
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.prepare.__main__ import main as prepare
from data.samples import index_store, parquet, tars, tfrecord
from data.samples.shard_names import find_shards, refuse_incomplete, split_of
from data.sources.imagenet import ImageNet, ImageNetDali
from data_fixtures import (
    Share,
    small_jpeg,
    write_as,
    write_parquet,
    write_records,
    write_tar_of_samples,
    write_web_dataset,
)

LAYOUTS = ("parquet", "web_dataset", "tfds")
JPEG = small_jpeg(7)


def source(root, **options) -> ImageNet:
    made = ImageNet(data=str(root), image_size=24, **options)
    made.check()
    return made


def error_of(root, kind=SetError, **options) -> str:
    with pytest.raises(DataError) as caught:
        source(root, **options)
    assert type(caught.value) is kind
    assert str(caught.value).startswith("--data")
    return str(caught.value)


def train_files(root) -> list[Path]:
    return sorted(p for p in Path(root).iterdir() if "train" in p.name and "index" not in p.name)


@pytest.fixture(params=LAYOUTS)
def root(request, tmp_path) -> Path:
    return Path(write_as(request.param, tmp_path / "set"))


def test_images_labels_and_identity(root, tmp_path):
    made = source(root)
    train, val = made.samples
    assert [train.encoded(i) for i in range(23)] == [(small_jpeg(i), i % 3) for i in range(23)]
    assert [val.encoded(i) for i in range(11)] == [(small_jpeg(100 + i), i % 3) for i in range(11)]
    assert train.num_classes == val.num_classes == 3
    copied = shutil.copytree(root, tmp_path / "copy")
    assert source(copied).fingerprint == made.fingerprint
    assert "23 images for training, 11 images for validation, 3 classes" in made.description
    assert made.for_validation().fingerprint.endswith(made.fingerprint.split("-")[1])
    for path in train_files(root):
        path.unlink()
    assert ImageNet(data=str(root)).for_validation().val_size == 11
    assert "no images for train" in error_of(root, DataError)


def test_excluded_images(root, tmp_path):
    name = source(root).samples[0].name(12)
    (tmp_path / "list").write_text(f"train/{name}\ntrain/nowhere#3\n")
    train, _ = source(root, exclude=str(tmp_path / "list")).samples
    assert train.unmatched == ["nowhere#3"]
    assert [train.encoded(i)[0] for i in range(22)] == [small_jpeg(i) for i in range(23) if i != 12]
    assert train.fingerprint != source(root).samples[0].fingerprint
    samples, _ = source(root).samples
    names = [f"train/{samples.name(i)}\n" for i in range(len(samples))]
    (tmp_path / "list").write_text("".join(names))
    with pytest.raises(DataError, match=r"^--exclude: .* leaves out every image of train"):
        source(root, exclude=str(tmp_path / "list"))


def test_incomplete_sets_are_refused(root):
    first, second = train_files(root)
    content = second.read_bytes()
    if "-of-" in first.name:  # without a total, a set may begin with any number
        first.rename(root / "kept")
        assert f"{first.name} missing, according to the files' names" in error_of(root)
        (root / "kept").rename(first)
    for damaged, expected in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (content[: len(content) // 2], str(second)),
        (gzip.compress(content), "compressed" if second.suffix != ".parquet" else str(second)),
        (b"x" * 2000, str(second)),
    ):
        second.write_bytes(damaged)
        message = error_of(root, on_bad_image="skip")
        assert expected in message
        assert "download" in message or "decompress" in message or "unpack" in message


def test_files_that_cannot_be_read_or_belong_to_another_set_are_refused(root):
    first, second = train_files(root)
    other = root / f"other-{first.name}"
    shutil.copy(first, other)
    assert "files of several sets" in error_of(root)
    other.unlink()
    second.rename(root / "kept")
    second.symlink_to("nowhere")
    assert "is a link to nowhere, which does not exist" in error_of(root)
    second.unlink()
    second.mkdir()
    assert f"{second} cannot be read" in error_of(root)
    second.rmdir()
    (root / "kept").rename(second)
    for path in root.glob("*validation*"):
        path.unlink()
    assert "no images for val" in error_of(root, DataError)
    assert not list(root.glob("index*"))  # it is not made for a set that cannot be used


def test_a_file_that_shrinks_during_the_job_stops_it(root):
    samples, _ = source(root).samples
    for path in train_files(root):
        os.truncate(path, 600)
    with pytest.raises(SetError, match=str(train_files(root)[1])):
        samples.encoded(22)


def test_a_damaged_image_is_one_bad_image(tmp_path):
    images = [small_jpeg(i) for i in range(8)]
    images[2] = images[2][:300]
    for write, ending in ((write_parquet, "parquet"), (write_tar_of_samples, "tar")):
        root = tmp_path / ending
        for split in ("train", "val"):
            write(root / f"{split}.{ending}", images, [0, 1] * 4)
        with pytest.raises(DataError, match=r"train\.\w+#.*2") as caught:
            list(source(root).train_loader(Share(), 0).epoch(0))
        assert not isinstance(caught.value, SetError)
        loader = source(root, on_bad_image="skip").train_loader(Share(), 0)
        assert sum(len(labels) for _, labels in loader.epoch(0)) == 7
        bad = tmp_path / f"{ending}.txt"
        assert check(["--data", str(root), "--list", str(bad), "--workers", "0"]) == 3
        samples = source(root, exclude=str(bad)).samples
        assert [len(each) for each in samples] == [7, 7]
        assert not any(each.unmatched for each in samples)


def test_split_and_completeness_by_name(tmp_path):
    assert split_of("imagenet1k-train-0000.tar") == split_of("training") == "train"
    assert split_of("ILSVRC2012_img_val.tar") == split_of("valid_01") == "validation"
    assert split_of("constrained.tar") is split_of("evaluation.tar") is None
    for name in ("a-train-1.tar", "a-train-2.tar", "train-00000-of-00002", "train-00001-of-00002"):
        (tmp_path / name).write_bytes(b"x" * 2000)
    tar = [str(tmp_path / f"a-train-{i}.tar") for i in (1, 2)]
    refuse_incomplete(tar)  # a set may count from 1
    wnids = [tmp_path / f"n{number:08d}.tar" for number in (1440764, 1443537)]
    for path in wnids:
        path.write_bytes(b"x" * 2000)
    refuse_incomplete([str(path) for path in wnids])  # these numbers do not count files
    (tmp_path / "a-train-5.tar").write_bytes(b"x" * 2000)
    with pytest.raises(SetError, match=r"a-train-3.tar, a-train-4.tar missing"):
        refuse_incomplete([*tar, str(tmp_path / "a-train-5.tar")])
    (tmp_path / "train-00000-of-00003").write_bytes(b"x" * 2000)
    found = find_shards(str(tmp_path), lambda name: "-of-" in name)["train"]
    with pytest.raises(SetError, match="several sets"):
        refuse_incomplete(found)


def test_names_that_end_with_a_hash(tmp_path):
    """Such are the names of zh-plus/tiny-imagenet on the Hugging Face Hub."""
    write_parquet(
        tmp_path / "data/train-00000-of-00001-1359597a978bc4fa.parquet", [JPEG] * 4, [0, 1] * 2
    )
    val = tmp_path / "data/valid-00000-of-00001-70d52db3c749a935.parquet"
    write_parquet(val, [JPEG] * 2, [0, 1])
    assert [len(samples) for samples in source(tmp_path).samples] == [4, 2]
    val.rename(val.with_name("valid-00000-of-00002-70d52db3c749a935.parquet"))
    assert "valid-00001-of-00002.parquet missing" in error_of(tmp_path)


def test_two_folders_of_a_split_are_refused(tmp_path):
    for folder in ("train", "train_old", "val"):
        write_tar_of_samples(tmp_path / folder / "0.tar", [JPEG] * 2, [0, 1])
    assert f"{tmp_path}/train and {tmp_path}/train_old hold files of the same" in error_of(tmp_path)


def test_blocks_of_unequal_sizes_are_shuffled_whole():
    starts = np.array([0, 4, 5, 12])
    order = permutation(15, 3, 1, starts)
    assert sorted(order.tolist()) == list(range(15))
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    assert {int(order[i]) for i in (0, *breaks)} <= set(starts.tolist())
    assert permutation(15, 3, 1, np.arange(0, 15, 4)).tolist() == permutation(15, 3, 1, 4).tolist()
    assert order.tolist() != permutation(15, 3, 2, starts).tolist()


def test_each_row_group_is_read_once_an_epoch(tmp_path, monkeypatch):
    made = source(write_as("parquet", tmp_path))
    reads = []
    read = parquet.ParquetSet._read_group
    monkeypatch.setattr(
        parquet.ParquetSet, "_read_group", lambda self, g: (reads.append(g), read(self, g))[1]
    )
    loader = made.train_loader(Share(batch_size=4, effective_batch_size=8), 0)
    assert sum(len(labels) for _, labels in loader.epoch(3)) == 23
    assert sorted(reads) == list(range(7))
    assert reads != sorted(reads)


@pytest.mark.parametrize(
    ("labels", "names", "options", "expected"),
    [
        (
            [1, 2, 3, 1],
            None,
            {},
            "labels run from 1 to 3: this set counts from 1; give --label-base 1",
        ),
        ([0, 1, 2, 1], None, {"label_base": 1}, "this set counts from 0; leave out --label-base"),
        ([-1] * 4, None, {}, "all labels are -1"),
        ([0, 1, 5, 1], ["a", "b"], {}, "labels run from 0 to 5, but there are 2 classes"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(tmp_path, labels, names, options, expected):
    for split in ("train", "validation"):
        write_parquet(tmp_path / "p" / f"{split}.parquet", [JPEG] * 4, labels, names)
    assert expected in error_of(tmp_path / "p", on_bad_image="skip", **options)
    if names is None:
        for split in ("train", "val"):
            write_tar_of_samples(tmp_path / "t" / f"{split}.tar", [JPEG] * 4, labels)
        assert expected in error_of(tmp_path / "t", **options)


def test_validation_counts_as_training_does_where_it_lacks_the_first_class(tmp_path, monkeypatch):
    images = [small_jpeg(i) for i in range(6)]
    for write, ending in ((write_parquet, "parquet"), (write_tar_of_samples, "tar"),
                          (write_records, "tfrecord")):  # fmt: skip
        root = tmp_path / ending
        write(root / f"train.{ending}", images, [0, 1, 2] * 2)
        write(root / f"val.{ending}", images[:2], [1, 2])
        assert [source(root).samples[1].encoded(i)[1] for i in range(2)] == [1, 2]
    root = tmp_path / "imagenet"  # image/class/label, which usually counts from 1
    root.mkdir()
    for split, labels in (("train", (0, 1, 2)), ("val", (1, 2))):
        examples = [{tfrecord.IMAGE: images[0], tfrecord.LABEL: label} for label in labels]
        records = [tfrecord.record(tfrecord.encode_example(example)) for example in examples]
        (root / f"{split}.tfrecord").write_bytes(b"".join(records))
    assert [source(root).samples[1].encoded(i)[1] for i in range(2)] == [1, 2]
    out = str(tmp_path / "out")
    monkeypatch.setattr("data.prepare.speed._SECONDS", 0.05)
    assert prepare(["--data", str(root), "--out", out, "--workers", "0"]) == 0
    assert [source(out).samples[1].encoded(i)[1] for i in range(2)] == [1, 2]


def test_what_a_label_base_reads(tmp_path):
    for split in ("train", "val"):
        write_parquet(tmp_path / "p" / f"{split}.parquet", [JPEG] * 3, [1, 2, 3])
        write_tar_of_samples(tmp_path / "t" / f"{split}.tar", [JPEG] * 3, [1, 2, 3])
    for kind in "pt":
        train, _ = source(tmp_path / kind, label_base=1).samples
        assert [train.encoded(i)[1] for i in range(3)] == [0, 1, 2]


def test_other_columns_of_parquet_files_are_refused(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    for columns, expected in (
        ({"img": [b"x"], "label": [0]}, "the columns img (binary), label (int64)"),
        ({"image": [b"x"], "label": ["cat"]}, "label must be an integer"),
        ({"image": ["x.jpg"], "label": [0]}, "image must be bytes"),
        ({"image": [b"x"], "label": [None]}, "label must be an integer"),
        ({"image": pyarrow.array([b"x"], pyarrow.binary()),
          "label": pyarrow.array([None], pyarrow.int64())}, "1 rows have no label"),
    ):  # fmt: skip
        write_table(pyarrow.table(columns), tmp_path / "train.parquet")
        shutil.copy(tmp_path / "train.parquet", tmp_path / "val.parquet")
        assert expected in error_of(tmp_path)


def test_plain_bytes_sorted_rows_and_large_row_groups(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow.parquet import write_table

    labels = sorted([0, 1, 2] * 5)
    for split in ("train", "val"):
        write_table(
            pyarrow.table({"image": [JPEG] * 15, "label": labels}), tmp_path / f"{split}.parquet"
        )
    monkeypatch.setattr("data.layouts.parquet._LARGE_GROUP", 100)
    made = source(tmp_path)
    assert made.samples[0].encoded(14) == (JPEG, 2)
    large, one_sided = made.warnings
    assert "keeps one in memory; convert the files: python -m data.prepare --data" in large
    assert "sorted by class" in one_sided


def test_a_check_of_tars_of_which_only_some_name_their_classes(tmp_path, capsys):
    """It also shows that validation counts as training does."""
    images = [small_jpeg(i) for i in range(4)]
    members = {}
    for label, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
        members |= {f"{wnid}_{label}.jpg": images[label], f"{wnid}_{label}.cls": b"%d" % label}
    write_web_dataset(tmp_path / "train.tar", members)
    write_tar_of_samples(tmp_path / "val.tar", images[:2], [1, 2])
    assert source(tmp_path).class_names == ["n01440764", "n01443537", "n01484850"]
    assert check(["--data", str(tmp_path), "--workers", "0"]) == 3
    report = capsys.readouterr().out
    assert "val: 1 of 3 classes have no image: label 0" in report
    assert "different classes" not in report


def test_names_of_classes(tmp_path):
    members = {}
    for i in range(6):
        wnid = f"n0000000{i % 3}"
        members[f"train/{wnid}_{i}.JPEG"] = JPEG
        members[f"train/{wnid}_{i}.json"] = json.dumps({"label": i % 3}).encode()
    write_web_dataset(tmp_path / "w" / "train" / "0.tar", members)
    write_web_dataset(tmp_path / "w" / "test" / "0.tar", members)
    assert source(tmp_path / "w").class_names == ["n00000000", "n00000001", "n00000002"]
    (tmp_path / "w" / "classnames.txt").write_text("ant\nbee\ncat\n")
    assert source(tmp_path / "w").class_names == ["ant", "bee", "cat"]
    for split in ("train", "validation"):
        write_parquet(tmp_path / "p" / f"{split}.parquet", [JPEG] * 2, [0, 1], ["ant", "bee"])
    assert source(tmp_path / "p").class_names == ["ant", "bee"]
    version = tmp_path / "imagenet2012" / "5.1.0"
    write_as("tfds", version)
    (version / "dataset_info.json").write_text("{}")
    (version / "label.labels.txt").write_text("ant\nbee\ncat\n")
    assert source(tmp_path / "imagenet2012").class_names == ["ant", "bee", "cat"]


def test_flat_records_of_imagenet(tmp_path):
    """TensorFlow's script writes train-* and validation-* to one folder, with labels from 1."""
    for split in ("train", "validation"):
        examples = [
            {tfrecord.IMAGE: small_jpeg(i), tfrecord.LABEL: i % 3 + 1, "image/filename": b"x" * 9000,
             tfrecord.CLASS_NAME: b"n%d" % (i % 3), "image/height": 64}
            for i in range(6)
        ]  # fmt: skip
        records = [tfrecord.record(tfrecord.encode_example(example)) for example in examples]
        (tmp_path / f"{split}-00000-of-00001").write_bytes(b"".join(records))
    made = source(tmp_path, shuffle_window=2)
    assert made.class_names == ["n0", "n1", "n2"]
    assert [made.samples[0].encoded(i) for i in range(6)] == [
        (small_jpeg(i), i % 3) for i in range(6)
    ]
    assert sum(len(labels) for _, labels in made.train_loader(Share(), 0).epoch(0)) == 6
    gap = {tfrecord.IMAGE: JPEG, tfrecord.LABEL: 5, tfrecord.CLASS_NAME: b"n4"}
    records.append(tfrecord.record(tfrecord.encode_example(gap)))
    (tmp_path / "train-00000-of-00001").write_bytes(b"".join(records))
    made = source(tmp_path)  # no image has label 4
    assert (made.num_classes, made.class_names) == (5, [])
    damaged = bytearray((tmp_path / "train-00000-of-00001").read_bytes())
    damaged[len(records[0]) + 3] ^= 1
    (tmp_path / "train-00000-of-00001").write_bytes(damaged)
    assert f"record at byte {len(records[0])}: the checksum" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"a.jpg": JPEG}, "sample a has no label"),
        ({"a.cls": b"0"}, "sample a has no image"),
        ({"a.jpg": JPEG, "a.cls": b"tench"}, "a.cls holds 'tench'; labels must be integers"),
        ({"a.jpg": JPEG, "a.json": b"[1]"}, "a.json holds '[1]'; labels must be integers"),
        ({"a.jpg": JPEG, "a.json": b"[" * 9999}, "[[['; labels must be integers"),
        ({"a.jpg": JPEG, "a.json": b'{"label": 1.5}'}, "1.5}'; labels must be integers"),
        ({"a.jpg": JPEG, "a.json": b'{"label": 1e999}'}, "1e999}'; labels must be integers"),
        ({"a.jpg": JPEG, "a.cls": b"9" * 30}, "9'; labels must be integers"),
        ({"a.jpg": JPEG, "a.cls": b"-5"}, "from -5 to -5, but the first class has label 0"),
        ({"a.jpg": JPEG, "a.cls": b"0", "a.json": b'{"label": 1}'}, "has two labels, 0 and 1"),
        ({"a.jpg": JPEG, "a.cls": b"0", "a.png": JPEG}, "sample a has two images"),
        ({"README": b"x"}, "holds no images"),
    ],
)
def test_samples_that_are_not_complete_are_refused(tmp_path, members, expected):
    for split in ("train", "val"):
        write_web_dataset(tmp_path / f"{split}.tar", members)
    assert expected in error_of(tmp_path, on_bad_image="skip")


def test_members_that_do_not_count(tmp_path):
    members = {"a.b.jpg": JPEG, "a.cls": b" 1\n", "._a.jpg": b"x", "a.txt": b"x", "README.md": b"x",
               "d/a.png": JPEG, "d/a.cls": b"0", "d/a.json": b'{"width": 3}'}  # fmt: skip
    for split in ("train", "val"):
        write_web_dataset(tmp_path / f"{split}.tar", members)
    train, _ = source(tmp_path).samples
    assert [(train.name(i), train.encoded(i)[1]) for i in range(len(train))] == [
        ("train.tar#a.b.jpg", 1), ("train.tar#d/a.png", 0)]  # fmt: skip


def test_a_tar_without_its_end_is_refused(tmp_path):
    for split in ("train", "val"):
        write_tar_of_samples(tmp_path / f"{split}.tar", [JPEG, JPEG], [0, 1])
    path = tmp_path / "train.tar"
    content = path.read_bytes().rstrip(b"\0")
    size = -(-len(content) // 512) * 512
    path.write_bytes(content.ljust(size, b"\0"))
    assert "its end is missing" in error_of(tmp_path)


def test_an_index_is_made_once_and_again_when_files_change(tmp_path, monkeypatch, capsys):
    made = []
    original = tars.index_tar
    monkeypatch.setattr(tars, "index_tar", lambda path: (made.append(path), original(path))[1])
    root = Path(write_as("web_dataset", tmp_path / "set"))
    first = source(root).fingerprint
    assert len(made) == 3
    assert "making an index of 2 files, once" in capsys.readouterr().err
    assert source(root).fingerprint == first
    assert len(made) == 3
    index = root / "index-train-tars.npz"
    index.write_bytes(index.read_bytes()[:-100])  # damaged
    (root / f"{index.name}.unfinished.123").touch()  # left by a process that was killed
    assert source(root).fingerprint == first
    assert len(made) == 5
    os.utime(train_files(root)[0])
    assert source(root).fingerprint == first
    assert len(made) == 7
    assert not [p for p in root.iterdir() if "unfinished" in p.name]


def test_an_index_with_a_damaged_byte_counts_as_absent(tmp_path):
    root = Path(write_as("web_dataset", tmp_path))
    source(root)
    place = root / "index-train-tars.npz"
    identity = index_store._identity([str(path) for path in train_files(root)])
    expected = index_store._load(str(place), identity)
    content = place.read_bytes()
    for position in range(len(content) - 900, len(content)):  # the directory of the archive
        damaged = bytearray(content)
        damaged[position] ^= 1
        place.write_bytes(damaged)
        found = index_store._load(str(place), identity)
        assert found is None or all(np.array_equal(found[k], v) for k, v in expected.items())


def test_a_tar_that_was_replaced_by_one_of_the_same_size_and_time(tmp_path):
    root = Path(write_as("web_dataset", tmp_path / "set"))
    source(root)
    first, _ = train_files(root)
    content, times = first.read_bytes(), os.stat(first)
    first.write_bytes(content.replace(b"imagenet-train-0000_2.", b"imagenet-train-0000_X."))
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    samples, _ = source(root).samples
    assert samples.encoded(1)[0] == small_jpeg(1)
    with pytest.raises(
        SetError, match=r"_2.jpg at byte .* so the tar was replaced; remove the ind"
    ):
        samples.encoded(2)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_that_a_header_holds_in_another_form(tmp_path, kind):
    names = ["n" * 120, "ü", "n" * 60 + "/" + "m" * 90][kind == tarfile.USTAR_FORMAT :]
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w", format=kind) as tar:
            for number, name in enumerate(names):
                for ending, content in ((".jpg", small_jpeg(number)), (".cls", b"%d" % number)):
                    member = tarfile.TarInfo(name + ending)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    samples, _ = source(tmp_path).samples
    read = [samples.encoded(number) for number in range(len(names))]
    assert read == [(small_jpeg(number), number) for number in range(len(names))]


def test_where_an_index_is_kept(tmp_path, monkeypatch):
    root = write_as("web_dataset", tmp_path / "set")
    source(root, index_dir=str(tmp_path / "mine"))
    assert len(os.listdir(tmp_path / "mine")) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    can_write = index_store._can_write
    monkeypatch.setattr(
        index_store, "_can_write", lambda folder: folder != root and can_write(folder)
    )
    source(root)
    assert len(os.listdir(tmp_path / "cache" / "lars-imagenet" / "indexes")) == 2
    assert not [name for name in os.listdir(root) if name.startswith("index")]
    monkeypatch.setattr(index_store, "_can_write", lambda folder: False)
    source(root)  # it is already there
    shutil.rmtree(tmp_path / "cache")
    assert "name a folder for it with --index-dir" in error_of(root)


def test_flags_without_effect_are_refused(tmp_path):
    root = write_as("parquet", tmp_path / "set")
    for options in ({"index_dir": "x"}, {"shuffle_window": 5}):
        with pytest.raises(FlagError, match="has no effect on parquet files"):
            source(root, **options)
    with pytest.raises(FlagError, match="--index-dir x has no effect without --data"):
        ImageNet("a", "b", index_dir="x").check()


@pytest.mark.parametrize("layout", ["parquet", "web_dataset"])
def test_dali_reads_the_same_samples(tmp_path, layout):
    pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    root = write_as(layout, tmp_path)
    loaders = [
        kind(data=root, image_size=24).train_loader(Share(), 2) for kind in (ImageNet, ImageNetDali)
    ]
    labels = [[label for _, batch in each.epoch(1) for label in batch.tolist()] for each in loaders]
    assert labels[0] == labels[1]
    for loader in loaders:
        loader.close()


def test_a_conversion_keeps_images_and_labels(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.prepare.speed._SECONDS", 0.05)
    out = tmp_path / "out"
    assert prepare(["--data", str(root), "--workers", "0"]) == 0
    assert "To convert: python -m data.prepare" in capsys.readouterr().out
    command = ["--data", str(root), "--out", str(out), "--images-per-shard", "6", "--workers", "0"]
    assert prepare(command) == 0
    assert "A conversion to TFRecords needs" in capsys.readouterr().out
    train, val = ImageNet(data=str(out)).samples
    assert [train.encoded(i) for i in range(23)] == [(small_jpeg(i), i % 3) for i in range(23)]
    assert len(val) == 11
    assert check(["--data", str(out), "--workers", "0"]) == 0
    written = {path: path.stat().st_mtime_ns for path in (out / "train").iterdir()}
    (out / "train" / "train-00001-of-00004").unlink()
    (out / "manifest.json").unlink()
    assert prepare(command) == 3  # nothing says what these records are
    shutil.rmtree(out)
    assert prepare(command) == 0
    assert prepare(command) == 0
    assert "already there" in capsys.readouterr().out
    assert len(written) == 4


def test_compressed_sets_are_unpacked(tmp_path, capsys):
    for write, ending in ((write_tar_of_samples, ".tar"), (write_records, ".tfrecord")):
        root, out = tmp_path / ending, tmp_path / f"out{ending}"
        for split in ("train", "val"):
            path = write(root / f"{split}{ending}", [JPEG, JPEG], [0, 1])
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        assert "compressed" in error_of(root)
        assert prepare(["--data", str(root), "--workers", "0"]) == 0
        assert "To unpack them" in capsys.readouterr().out
        assert prepare(["--data", str(root), "--out", str(out), "--workers", "0"]) == 0
        assert len(source(out).samples[0]) == 2
        Path(f"{root}/train{ending}.gz").write_bytes(b"\x1f\x8b damaged")
        shutil.rmtree(out)
        assert prepare(["--data", str(root), "--out", str(out), "--workers", "0"]) == 3
        assert "is damaged" in capsys.readouterr().err


def test_large_files_are_refused_as_images_for_records_before_an_index_is_made(root, capsys):
    command = ["--data", str(root), "--data-dir", f"{root}-records", "--workers", "0"]
    assert make_tfrecords(command) == 2
    assert f"python -m data.prepare --data {root} --out {root}-records" in capsys.readouterr().err
    assert not list(root.glob("index*"))


def test_wrong_flags_of_prepare(tmp_path, capsys, monkeypatch):
    root = write_as("web_dataset", tmp_path / "set")
    for flags, expected in (
        (["--data", root, "--val-tar", "x"], "--val-tar has no effect with --data"),
        (
            ["--out", "x", "--train-tar", "x", "--train-dir", "y"],
            "--out has no effect without --data",
        ),
        (["--data", root, "--out", f"{root}/inside"], "is within --data"),
        (["--data", root, "--images-per-shard", "0"], "--images-per-shard must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            prepare(flags)
        assert expected in capsys.readouterr().err
    monkeypatch.setattr("data.prepare.speed._SECONDS", 0.05)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2, 1, 1))
    assert prepare(["--data", root, "--out", str(tmp_path / "out"), "--workers", "0"]) == 3
    assert "--out: " in capsys.readouterr().err
