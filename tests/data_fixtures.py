"""Small image trees for the tests of the data rooms."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Return smooth colours with some grain, uint8 (height, width, 3).

    Compresses like a photograph.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 4, smooth.shape)
    return (smooth + grain).clip(0, 255).astype(np.uint8)


def write_tree(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """Write `root`/<class>/<number>.jpg with images of many shapes, and return `root`."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(20, 90, 2)
            image = Image.fromarray(photograph(height, width, int(rng.integers(2**31))))
            image.save(root / name / f"{number:03d}.jpg", quality=90)
    return root


def write_archive(path: Path, files: dict[str, object]) -> str:
    """Write pickles into a tar.gz, as CIFAR is published, and return its name."""
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            data = value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def cifar_pixels(count: int, seed: int) -> np.ndarray:
    """Return `count` images as CIFAR has them: (count, 3072), red before green before blue."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10(path: Path, train: list[np.ndarray], test: np.ndarray) -> str:
    """Write a small CIFAR-10 archive with these labels, and return its name."""
    parts = {f"data_batch_{i + 1}": labels for i, labels in enumerate(train)} | {"test_batch": test}
    return write_archive(path, {
        f"cifar-10-batches-py/{name}": {
            b"data": cifar_pixels(len(labels), seed), b"labels": labels.tolist(),
            b"batch_label": name.encode(), b"filenames": [b"x.png"] * len(labels)}
        for seed, (name, labels) in enumerate(parts.items())
    })  # fmt: skip


def small_jpeg(seed: int) -> bytes:
    """Return a JPEG file of 64x64 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(photograph(64, 64, seed)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tiny_imagenet(path: Path, train: dict[str, int], val: list[str]) -> str:
    """Write a small Tiny-ImageNet archive, as it is published, and return its name.

    Args:
        path: Of the archive.
        train: Number of training images of each class; the i-th of class k is small_jpeg(10 k + i).
        val: Class of each validation image; the i-th is small_jpeg(100 + i).
    """
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "\n".join(train))
        for k, (wnid, count) in enumerate(train.items()):
            folder = f"tiny-imagenet-200/train/{wnid}"
            archive.writestr(f"{folder}/{wnid}_boxes.txt", "")
            for i in range(count):
                archive.writestr(f"{folder}/images/{wnid}_{i}.JPEG", small_jpeg(10 * k + i))
        lines = ""
        for i, wnid in enumerate(val):
            archive.writestr(f"tiny-imagenet-200/val/images/val_{i}.JPEG", small_jpeg(100 + i))
            lines += f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n"
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", lines)
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", small_jpeg(7))
    return str(path)
