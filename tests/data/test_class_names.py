"""Each source knows the names of its classes in the order of the labels, or says that it does not."""

from __future__ import annotations

import json
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from data.make_tfrecords.__main__ import main as make_tfrecords
from data.sources.base import BaseSource
from data.sources.cifar import Cifar10, Cifar100
from data.sources.digits import Digits
from data.sources.imagenet import ImageNet
from data.sources.mnist import Mnist
from data.sources.noise import Synthetic
from data.sources.tiny_imagenet import TinyImageNet
from data_fixtures import (
    cifar_pixels,
    small_jpeg,
    write_archive,
    write_mnist,
    write_tiny_imagenet,
    write_tree,
)

NAMES = [
    b"airplane",
    b"automobile",
    b"bird",
    b"cat",
    b"deer",
    b"dog",
    b"frog",
    b"horse",
    b"ship",
    b"truck",
]
DIGITS = [str(digit) for digit in range(10)]


def test_folders_and_records(tmp_path):
    roots = [str(write_tree(tmp_path / split, {"wasp": 2, "ant": 2})) for split in ("train", "val")]
    assert ImageNet(*roots).class_names == ["ant", "wasp"]
    out = str(tmp_path / "out")
    flags = ["--train-dir", roots[0], "--val-dir", roots[1], "--data-dir", out, "--workers", "0"]
    assert make_tfrecords(flags) == 0
    assert ImageNet(records=out).class_names == ["ant", "wasp"]
    (tmp_path / "out" / "manifest.json").unlink()
    assert ImageNet(records=out).class_names == []  # they could be any of 1,000
    assert make_tfrecords(["--from-tfrecords", "--data-dir", out, "--workers", "0"]) == 0
    assert ImageNet(records=out).class_names == ["ant", "wasp"]  # from the records
    manifest = tmp_path / "out" / "manifest.json"
    for classes in (None, "ant", ["ant"]):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"classes": classes}))
        assert ImageNet(records=out).class_names == []


@pytest.mark.parametrize("named", [True, False])
def test_cifar(tmp_path, named):
    def batch(key: bytes, labels: list[int]) -> dict[bytes, object]:
        return {b"data": cifar_pixels(len(labels), 1), key: labels}

    files: dict[str, object] = {
        name: batch(b"labels", [3, 9])
        for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6)))
    }
    if named:
        files["batches.meta"] = {b"label_names": NAMES, b"num_vis": 3072}
    source = Cifar10(archive=write_archive(tmp_path / "10.tar.gz", files))
    assert source.class_names == ([name.decode() for name in NAMES] if named else [])
    files = {name: batch(b"fine_labels", [3, 99]) for name in ("train", "test")}
    fine = [b"class %d" % number for number in range(100)]
    if named:
        files["meta"] = {b"fine_label_names": fine, b"coarse_label_names": NAMES}
    source = Cifar100(archive=write_archive(tmp_path / "100.tar.gz", files))
    assert source.class_names == ([name.decode() for name in fine] if named else [])


def test_tiny_imagenet(tmp_path):
    path = write_tiny_imagenet(tmp_path / "t.zip", {"n02": 2, "n01": 1}, ["n01", "n02"])
    assert TinyImageNet(archive=path).class_names == ["n01", "n02"]


def test_what_macos_adds_to_a_zip_is_left_out(tmp_path):
    path = write_tiny_imagenet(tmp_path / "t.zip", {"n02": 2, "n01": 1}, ["n01", "n02"])
    with zipfile.ZipFile(path, "a") as archive:
        for name in archive.namelist():
            folder, base = name.rsplit("/", 1)
            archive.writestr(f"__MACOSX/{folder}/._{base}", b"\0\5\x16\7")
    source = TinyImageNet(archive=path)
    assert (source.class_names, source.train_size, source.val_size) == (["n01", "n02"], 3, 2)


def parquet(path, names: list[str] | None) -> str:
    images = [{"bytes": small_jpeg(number), "path": None} for number in range(2)]
    table = pyarrow.table({"image": images, "label": [0, 1]})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def test_parquet(tmp_path):
    named, unnamed = parquet(tmp_path / "a", ["n01", "n02"]), parquet(tmp_path / "b", None)
    assert TinyImageNet(train_parquet=named, val_parquet=unnamed).class_names == ["n01", "n02"]
    assert TinyImageNet(train_parquet=unnamed, val_parquet=named).class_names == []
    (warning,) = TinyImageNet(train_parquet=named, val_parquet=named).warnings
    assert "are the same file" in warning
    assert TinyImageNet(train_parquet=named, val_parquet=unnamed).warnings == []


def test_digits_mnist_and_noise(tmp_path):
    assert Digits().class_names == DIGITS
    assert Mnist(data_dir=write_mnist(tmp_path, [1, 2], [3])).class_names == DIGITS
    assert Synthetic(num_classes=3, train_size=3, val_size=3).class_names == ["0", "1", "2"]


def test_a_source_without_names_has_none():
    class Unnamed:
        num_classes = 2
        class_names = ()

    class Source(BaseSource):
        def open_samples(self):
            return Unnamed(), Unnamed()

    assert Source().class_names == []
    assert Source().warnings == []
