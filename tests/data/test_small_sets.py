"""CIFAR, Tiny-ImageNet and MNIST from small files in the published formats."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.samples.arrays import ArraySamples, EncodedFiles
from data.sources.cifar import Cifar, Cifar10, Cifar100
from data.sources.mnist import Mnist
from data.sources.tiny_imagenet import TinyImageNet
from data_fixtures import (
    Share,
    cifar_pixels,
    idx_file,
    mnist_pixels,
    small_jpeg,
    write_archive,
    write_cifar10,
    write_mnist,
    write_tiny_imagenet,
)


def val(source):
    loader = source.val_loader(Share(), workers=0)
    return [(image, int(label)) for batch in loader for image, label in zip(*batch, strict=True)]


def refusal(source) -> str:
    with pytest.raises(DataError) as caught:
        source.check()
    return str(caught.value)


def outcome(source) -> str:
    """Return the refusal, if there is one."""
    try:
        source.check()
    except DataError as error:
        return str(error)
    return ""


@pytest.fixture
def cifar10(tmp_path):
    train = np.array_split(np.arange(12) % 10, 5)
    return Cifar(archive=write_cifar10(tmp_path / "cifar-10.tar.gz", train, np.array([7, 0, 3])))


def test_cifar10_images_and_labels(cifar10):
    cifar10.check()
    assert (cifar10.num_classes, cifar10.train_size, cifar10.val_size) == (10, 12, 3)
    assert [round(x / 255, 4) for x in cifar10.mean] == [0.4914, 0.4822, 0.4465]
    found = val(cifar10)
    assert [label for _, label in found] == [7, 0, 3]
    expected = cifar_pixels(3, seed=5).reshape(3, 3, 32, 32)
    assert all(np.array_equal(image, e) for (image, _), e in zip(found, expected, strict=True))
    plain = replace(cifar10, padding=0, flip=False)
    loader = plain.train_loader(Share(batch_size=12), workers=0)
    images, labels = next(iter(loader.epoch(0)))
    batches = [cifar_pixels(count, seed) for seed, count in enumerate((3, 3, 2, 2, 2))]
    expected = np.concatenate(batches).reshape(-1, 3, 32, 32)
    order = [np.flatnonzero((expected == image.numpy()).all((1, 2, 3)))[0] for image in images]
    assert sorted(order) == list(range(12))
    assert labels.tolist() == [i % 10 for i in order]


def test_cifar100_has_fine_labels(tmp_path):
    def part(labels, seed):
        return {b"data": cifar_pixels(len(labels), seed), b"fine_labels": labels,
                b"coarse_labels": [0] * len(labels)}  # fmt: skip

    files = {"cifar-100-python/train": part([5, 99, 17], 0), "cifar-100-python/test": part([42], 1),
             "cifar-100-python/meta": {b"fine_label_names": []}}  # fmt: skip
    source = Cifar(archive=write_archive(tmp_path / "a.tar.gz", files), imagenet_statistics=True)
    source.check()
    assert (source.num_classes, source.train_size) == (100, 3)
    assert [label for _, label in val(source)] == [42]
    assert source.mean[0] == 0.485 * 255


def test_two_views(cifar10):
    share = Share(batch_size=5, effective_batch_size=10)
    loader = replace(cifar10, views=2).train_loader(share, workers=0)
    shapes = [tuple(images.shape) for images, _ in loader.epoch(0)]
    assert shapes == [(5, 2, 3, 32, 32), (5, 2, 3, 32, 32), (2, 2, 3, 32, 32)]


def test_validation_has_the_same_two_views_every_time(cifar10):
    loader = replace(cifar10, views=2).val_loader(Share(val_batch_size=2), workers=0)
    once, again = ([images for images, _ in loader] for _ in range(2))
    assert once[0].shape == (2, 2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0][:, 0], once[0][:, 1])


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil",)


@pytest.mark.parametrize("evil", [Evil(), {b"data": Evil()}, os.getcwd, np.load])
def test_pickles_that_ask_for_functions_are_refused(tmp_path, evil):
    archive = write_archive(tmp_path / "a.tar.gz", {"x/test_batch": evil, "x/data_batch_1": {}})
    assert "which no CIFAR archive contains" in refusal(Cifar(archive=archive))


def test_damaged_cifar_archives_are_refused(tmp_path, cifar10):
    assert "https://www.cs.toronto.edu" in refusal(Cifar(archive=str(tmp_path / "nowhere")))
    (tmp_path / "half").write_bytes(Path(cifar10.archive).read_bytes()[:2000])
    assert "cannot be read" in refusal(Cifar(archive=str(tmp_path / "half")))
    flipped = bytearray(Path(cifar10.archive).read_bytes())
    flipped[-7] ^= 1  # a byte of the checksum
    (tmp_path / "flipped").write_bytes(flipped)
    assert "cannot be read" in refusal(Cifar(archive=str(tmp_path / "flipped")))
    good = {b"data": cifar_pixels(1, 0), b"labels": [1]}
    files: dict[str, object] = {f"x/data_batch_{i}": good for i in range(1, 6)}
    for bad, expected in (
        ({b"data": cifar_pixels(1, 0), b"labels": [10]}, "a label is not in 0 .. 9"),
        ({b"data": cifar_pixels(2, 0), b"labels": [1]}, "do not match"),
        (pickle.dumps({b"data": 1})[:-3], "cannot be read"),
        ([], "is damaged"),
        ({b"data": None, b"labels": None}, "is damaged"),
    ):
        archive = write_archive(tmp_path / "a.tar.gz", files | {"x/test_batch": bad})
        message = refusal(Cifar(archive=archive))
        assert message.startswith(f"--archive: {archive}")
        assert expected in message
        assert "https://www.cs.toronto.edu" in message
    del files["x/data_batch_3"], files["x/data_batch_5"]
    archive = write_archive(tmp_path / "b.tar.gz", files | {"x/test_batch": good})
    assert "lacks data_batch_3, data_batch_5; download it again" in refusal(Cifar(archive=archive))
    archive = write_archive(tmp_path / "d.tar.gz", {"readme": b"hello"})
    assert "neither CIFAR-10 nor CIFAR-100" in refusal(Cifar(archive=archive))


def test_a_source_of_one_cifar_refuses_the_other(cifar10):
    assert Cifar10(archive=cifar10.archive).num_classes == 10
    message = refusal(Cifar100(archive=cifar10.archive))
    assert message.startswith(f"--archive: {cifar10.archive} holds CIFAR-10, not CIFAR-100; ")
    assert "cifar-100-python.tar.gz" in message
    assert "cifar-100-python.tar.gz" in refusal(Cifar100())


@pytest.mark.parametrize(
    ("change", "flag"), [({"padding": -1}, "--padding"), ({"padding": 33}, "--padding"),
                         ({"rotation": 181}, "--rotation"),
                         ({"views": 2, "padding": 2}, "--padding 2 has no effect with --views 2"),
                         ({"views": 2, "flip": False}, "--no-flip has no effect"),
                         ({"views": 2, "rotation": 9.0}, "--rotation 9.0 has no effect")],
)  # fmt: skip
def test_impossible_transforms_are_refused(cifar10, change, flag):
    assert refusal(replace(cifar10, **change)).startswith(flag)


WNIDS = ["n02124075", "n01443537", "n04067472"]


@pytest.fixture
def tiny_zip(tmp_path):
    val = [WNIDS[k] for k in (2, 0, 1, 2, 2)]
    return write_tiny_imagenet(tmp_path / "tiny-imagenet-200.zip", dict.fromkeys(WNIDS, 4), val)


def test_tiny_imagenet_from_the_zip(tiny_zip):
    source = TinyImageNet(archive=tiny_zip)
    source.check()
    assert (source.num_classes, source.train_size, source.val_size) == (3, 12, 5)
    found = val(source)
    # Classes in sorted order: n01443537, n02124075, n04067472.
    assert [label for _, label in found] == [2, 1, 0, 2, 2]
    for i, (image, _) in enumerate(found):
        expected = np.asarray(Image.open(io.BytesIO(small_jpeg(100 + i)))).transpose(2, 0, 1)
        assert np.array_equal(image, expected)


def test_fingerprints_depend_on_the_order_of_labels_and_files(tmp_path, tiny_zip):
    def tiny(labels: tuple[int, ...], name: str) -> str:
        path = tmp_path / name
        write_tiny_imagenet(path, dict.fromkeys(WNIDS, 4), [WNIDS[k] for k in labels])
        return TinyImageNet(archive=str(path)).fingerprint

    here = TinyImageNet(archive=tiny_zip).fingerprint
    assert tiny((2, 0, 1, 2, 2), "moved.zip") == here
    train, val = tiny((0, 2, 1, 2, 2), "relabelled.zip").split("-")
    assert here.split("-") == [train, here.split("-")[1]]
    assert val != here.split("-")[1]
    images = np.zeros((3, 1, 1, 3), np.uint8)
    seen = {
        ArraySamples(images, np.array(labels), 3).fingerprint for labels in [(0, 1, 2), (0, 2, 1)]
    }
    assert len(seen) == 2
    one, other = (
        EncodedFiles([("a", b"1" * n), ("b", b"2")], np.array([0, 1]), 2).fingerprint
        for n in (1, 2)
    )
    assert one != other


def test_tiny_imagenet_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need it")
    from pyarrow import parquet

    paths = {}
    for split, labels in (("train", [1, 0, 2, 2]), ("val", [0, 1])):
        images = [{"bytes": small_jpeg(i), "path": None} for i in range(len(labels))]
        table = pyarrow.table({"image": images, "label": labels})
        paths[f"{split}_parquet"] = str(tmp_path / f"{split}.parquet")
        parquet.write_table(table, paths[f"{split}_parquet"])
    source = TinyImageNet(**paths)
    source.check()
    assert (source.num_classes, source.train_size) == (3, 4)
    assert [label for _, label in val(source)] == [0, 1]
    assert "give both --train-parquet and --val-parquet" in refusal(
        replace(source, val_parquet=None)
    )
    assert refusal(replace(source, archive="x.zip")).startswith("--archive x.zip has no effect")
    broken = replace(source, val_parquet=str(tmp_path / "nowhere"))
    assert refusal(broken).startswith("--val-parquet")
    (tmp_path / "junk").write_bytes(b"junk")
    assert "cannot be read" in refusal(replace(source, train_parquet=str(tmp_path / "junk")))
    for number, (image, label) in enumerate(
        [([b"x"], [0]), ([{"bytes": b"x"}], ["ant"]), ([], [])]
    ):
        path = str(tmp_path / f"{number}.parquet")
        parquet.write_table(pyarrow.table({"image": image, "label": label}), path)
        message = refusal(replace(source, train_parquet=path))
        assert message.startswith(f"--train-parquet: {path} cannot be read")


def test_damaged_tiny_imagenet_archives_are_refused(tmp_path, tiny_zip):
    assert "http://cs231n" in refusal(TinyImageNet(archive=str(tmp_path / "nowhere.zip")))
    with zipfile.ZipFile(tiny_zip) as old, zipfile.ZipFile(tmp_path / "z.zip", "w", 8) as packed:
        for name in old.namelist():
            packed.writestr(name, old.read(name))  # deflated, as in the published archive
    original = (tmp_path / "z.zip").read_bytes()
    outcomes = []
    for number in range(60):  # a byte of one of the files, or of the table of contents
        damaged = bytearray(original)
        damaged[len(original) * number // 60 + 40] ^= 0x55
        (tmp_path / "damaged.zip").write_bytes(damaged)
        outcomes.append(outcome(TinyImageNet(archive=str(tmp_path / "damaged.zip"))))
    found = [
        message for message in outcomes if message
    ]  # the other bytes belong to a time or a test image
    assert len(found) > 40
    start = f"--archive: {tmp_path / 'damaged.zip'} cannot be read"
    assert all(message.startswith(start) for message in found)
    for lines in (b"val_0.JPEG", b"\xff", b"other.JPEG\tn01443537\n"):
        with zipfile.ZipFile(tiny_zip) as old, zipfile.ZipFile(tmp_path / "b.zip", "w") as new:
            for name in old.namelist():
                new.writestr(name, lines if name.endswith("annotations.txt") else old.read(name))
        assert "download it from http://cs231n" in refusal(
            TinyImageNet(archive=str(tmp_path / "b.zip"))
        )
    (tmp_path / "half.zip").write_bytes(original[:900])
    assert "cannot be read" in refusal(TinyImageNet(archive=str(tmp_path / "half.zip")))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    assert "no training" in refusal(TinyImageNet(archive=str(tmp_path / "other.zip")))


TRAIN_LABELS, TEST_LABELS = [5, 0, 4, 1, 9, 2, 1], [7, 2, 1]


@pytest.mark.parametrize("compress", [True, False])
def test_mnist_images_and_labels(tmp_path, compress):
    source = Mnist(data_dir=write_mnist(tmp_path, TRAIN_LABELS, TEST_LABELS, compress))
    source.check()
    assert (source.num_classes, source.train_size, source.val_size) == (10, 7, 3)
    assert source.image_size == 28
    found = val(source)
    assert [label for _, label in found] == TEST_LABELS
    for (image, _), grey in zip(found, mnist_pixels(3, seed=1), strict=True):
        assert image.shape == (3, 28, 28)
        assert all(np.array_equal(channel, grey) for channel in image)
    plain = replace(source, padding=0)  # digits are not mirrored unless the user asks for it
    ((images, labels),) = plain.train_loader(Share(batch_size=7), workers=0).epoch(0)
    expected = mnist_pixels(7, seed=0)
    order = [np.flatnonzero((expected == image[0].numpy()).all((1, 2)))[0] for image in images]
    assert sorted(order) == list(range(7))
    assert labels.tolist() == [TRAIN_LABELS[i] for i in order]


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], "holds 5487 bytes of data instead of 5488"),
        ("train-images-idx3-ubyte", lambda b: b + b"0", "holds 5489 bytes of data instead of 5488"),
        ("train-images-idx3-ubyte", lambda b: b[:9], "does not begin as an idx file"),
        ("train-images-idx3-ubyte", lambda b: b"\1" + b[1:], "does not begin as an idx file"),
        ("train-images-idx3-ubyte", lambda b: b"", "does not begin as an idx file"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:2] + b"\x0d" + b[3:], "does not begin as an idx"),
        ("t10k-labels-idx1-ubyte", lambda b: idx_file(mnist_pixels(3, 0)), "does not begin as an"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "a label is not in 0 .. 9"),
        ("t10k-labels-idx1-ubyte", lambda b: idx_file(np.array([1, 2])), "holds 2 labels, but"),
        (
            "t10k-images-idx3-ubyte",
            lambda b: idx_file(np.zeros((3, 8, 8))),
            "8x8 pixels, not 28x28",
        ),
        ("t10k-images-idx3-ubyte", lambda b: idx_file(np.zeros((0, 28, 28))), "holds no images"),
    ],
)
def test_damaged_mnist_files_are_refused_by_name(tmp_path, name, change, problem, compress):
    folder = write_mnist(tmp_path / "mnist", TRAIN_LABELS, TEST_LABELS)
    path = tmp_path / "mnist" / name
    content = change(path.read_bytes())
    path.unlink()
    if compress:
        path = path.with_name(f"{name}.gz")
        content = gzip.compress(content)
    path.write_bytes(content)
    message = refusal(Mnist(data_dir=folder))
    assert message.startswith(f"--data-dir: {path} ")
    assert problem in message
    assert message.endswith("download the four files again, as MNIST or Fashion-MNIST is published")


@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b[:-20], lambda b: b"<html>" + b])
def test_damaged_gzip_files_of_mnist_are_refused(tmp_path, damage):
    folder = write_mnist(tmp_path, TRAIN_LABELS, TEST_LABELS, compress=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(Mnist(data_dir=folder)).startswith(f"--data-dir: {path} cannot be read")
    original = gzip.compress(idx_file(mnist_pixels(3, 1) // 64))  # noise would not be compressed
    for position in range(0, len(original), 7):  # a damaged byte anywhere
        path.write_bytes(
            original[:position] + bytes([original[position] ^ 0x55]) + original[position + 1 :]
        )
        message = outcome(Mnist(data_dir=folder))
        assert not message or message.startswith(f"--data-dir: {path} ")


def test_a_missing_file_of_mnist_is_named(tmp_path):
    folder = write_mnist(tmp_path, TRAIN_LABELS, TEST_LABELS)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    message = refusal(Mnist(data_dir=folder))
    assert f"{folder}/train-labels-idx1-ubyte does not exist, with or without .gz" in message
    assert refusal(Mnist()).startswith("--data-dir: mnist/train-images-idx3-ubyte does not exist")
