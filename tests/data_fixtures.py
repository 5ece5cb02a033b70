"""Small data sets for the tests of `data`, and a share of the samples."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.samples import tfrecord


@dataclass(frozen=True)
class Share:
    """Which samples one rank takes; see `data.Share`."""

    rank: int = 0
    size: int = 1
    batch_size: int = 4
    effective_batch_size: int = 12
    val_batch_size: int = 4
    drop_last: bool = False
    seed: int = 0


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Return smooth colours with some noise, uint8 (height, width, 3).

    The image compresses like a photograph.
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
    """Write pickles to a tar.gz, the format in which CIFAR is published, and return its path."""
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            data = value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def cifar_pixels(count: int, seed: int) -> np.ndarray:
    """Return `count` images in CIFAR's layout: (count, 3072), red before green before blue."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10(path: Path, train: list[np.ndarray], test: np.ndarray) -> str:
    """Write a small CIFAR-10 archive with these labels, and return its path."""
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
    """Write a small Tiny-ImageNet archive in the published format, and return its path.

    Args:
        path: Path of the archive.
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


def idx_file(array: np.ndarray) -> bytes:
    """Return an idx file of unsigned bytes, MNIST's format."""
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, train: list[int], test: list[int], compress: bool = False) -> str:
    """Write the four files of MNIST with these labels, and return the folder's path.

    The pixels are those of `mnist_pixels` with seeds 0 (training) and 1 (test).
    """
    root.mkdir(parents=True, exist_ok=True)
    for seed, (split, labels) in enumerate({"train": train, "t10k": test}.items()):
        files = {
            f"{split}-images-idx3-ubyte": mnist_pixels(len(labels), seed),
            f"{split}-labels-idx1-ubyte": np.array(labels),
        }
        for name, array in files.items():
            content = idx_file(array)
            path = root / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(content) if compress else content)
    return str(root)


def mnist_pixels(count: int, seed: int) -> np.ndarray:
    """Return `count` grey images, (count, 28, 28)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_parquet(
    path: Path,
    images: list[bytes],
    labels: list[int],
    names: list[str] | None = None,
    group: int = 4,
) -> Path:
    """Write a parquet file as Hugging Face's datasets does, and return its path.

    Args:
        path: Path of the file.
        images: Encoded images.
        labels: Label of each image.
        names: Names of the classes, for Hugging Face's metadata; None: without metadata.
        group: Rows of a row group.
    """
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = [{"bytes": image, "path": f"{i}.JPEG"} for i, image in enumerate(images)]
    table = pyarrow.table({"image": pyarrow.array(rows, kind), "label": pyarrow.array(labels)})
    if names is not None:
        label = {"names": names, "_type": "ClassLabel"}
        features = {"features": {"image": {"_type": "Image"}, "label": label}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def write_records(path: Path, images: list[bytes], labels: list[int]) -> Path:
    """Write a record file as TensorFlow Datasets does, without an index, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    examples = [
        {tfrecord.TFDS_IMAGE: image, tfrecord.TFDS_LABEL: label, "file_name": b"%d.JPEG" % number}
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    records = [tfrecord.record(tfrecord.encode_example(example)) for example in examples]
    path.write_bytes(b"".join(records))
    return path


def write_web_dataset(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar of these members in order, as WebDataset does, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_tar_of_samples(path: Path, images: list[bytes], labels: list[int]) -> Path:
    """Write images and labels as one tar of a WebDataset, and return its path."""
    members = {}
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        members[f"{path.stem}_{number}.jpg"] = image
        members[f"{path.stem}_{number}.cls"] = str(label).encode()
    return write_web_dataset(path, members)


def write_as(layout: str, root: Path, train: int = 23, val: int = 11) -> str:
    """Write three classes of small JPEGs as a set of large files, and return its folder.

    Training image i is small_jpeg(i) and validation image i is small_jpeg(100 + i), with label
    i % 3. The training images are in two files.

    Args:
        layout: ``parquet``, ``web_dataset`` or ``tfds``.
        root: Folder to write.
        train: Number of training images.
        val: Number of validation images.
    """
    write, name = {
        "parquet": (write_parquet, "{}-0000{}-of-0000{}.parquet"),
        "web_dataset": (write_tar_of_samples, "imagenet-{}-000{}.tar"),
        "tfds": (write_records, "imagenet2012-{}.tfrecord-0000{}-of-0000{}"),
    }[layout]
    images = [small_jpeg(i) for i in range(train)]
    labels = [i % 3 for i in range(max(train, val))]
    half = train * 2 // 5
    write(root / name.format("train", 0, 2), images[:half], labels[:half])
    write(root / name.format("train", 1, 2), images[half:], labels[half:train])
    write(root / name.format("validation", 0, 1), [small_jpeg(100 + i) for i in range(val)],
          labels[:val])  # fmt: skip
    return str(root)
