"""Unpack ILSVRC2012's published archives into one folder per class.

    python -m data.prepare --train-tar ILSVRC2012_img_train.tar --train-dir OUT/train
    python -m data.prepare --val-tar ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz \\
        --val-dir OUT/val

The files are at https://image-net.org/download-images (an account is needed). The tar of training
images contains one tar per class. The validation images are not sorted into classes; the development
kit gives their classes in ``data/ILSVRC2012_validation_ground_truth.txt`` and ``data/meta.mat``.
Instead of the kit, ``--val-classes FILE`` takes one line ``<image file> <class>`` per image.

A class folder appears complete or not at all. To continue after an interruption, run the same
command again. The tool refuses a folder of validation images that were sorted by another list.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from data import DataError
from data.layouts.labels import classes_by_number
from data.samples.listing import is_foreign, is_ignored
from data.tooling import cli
from data.tooling.atomic import new_folder

if TYPE_CHECKING:
    from data.tooling.pool import Pool

_WNID = re.compile(r"n\d{8}")

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip",
               b"\x28\xb5\x2f\xfd": "zstd"}  # fmt: skip


@dataclass(frozen=True)
class ClassTar:
    """One class's tar inside the tar of training images."""

    tar: str
    offset: int
    size: int
    folder: str


@dataclass(frozen=True)
class ClassImages:
    """The validation images of one class, and where each lies in the tar."""

    tar: str
    members: tuple[tuple[str, int, int], ...]  # (file name, offset, size)
    folder: str


def unpack(task: ClassTar | ClassImages) -> int:
    """Write one class folder; return the number of images."""
    with new_folder(task.folder) as unfinished:
        if isinstance(task, ClassTar):
            return _unpack_inner(task, unfinished)
        with open(task.tar, "rb") as tar:
            for name, offset, size in task.members:
                tar.seek(offset)
                _copy(tar, size, os.path.join(unfinished, name))
        return len(task.members)


def _unpack_inner(task: ClassTar, folder: str) -> int:
    class_name = os.path.basename(task.folder)
    member_of_outer = tarfile.TarInfo()
    member_of_outer.offset_data, member_of_outer.size = task.offset, task.size
    try:
        with tarfile.open(task.tar, "r:") as outer:
            part = outer.extractfile(member_of_outer)  # ends with the inner tar
            assert part is not None
            _refuse_compression(part.read(6), f"--train-tar: {task.tar}: the tar of {class_name}")
            part.seek(0)
            with tarfile.open(fileobj=part, mode="r:") as inner:
                count = _copy_members(inner, folder, f"{task.tar}: the tar of {class_name}")
                _refuse_damage(inner)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"--train-tar: {task.tar}: the tar of {class_name} is damaged: {error}; "
            "download it again"
        ) from error
    if count == 0:
        raise DataError(f"--train-tar: {task.tar}: the tar of {class_name} holds no image")
    return count


def _copy_members(inner: tarfile.TarFile, folder: str, where: str) -> int:
    """Write the files of a tar into `folder`; return their number."""
    count = 0
    for member in inner:
        source = None if _is_of_macos(member.name) else inner.extractfile(member)
        if source is None:
            continue
        path = os.path.join(folder, _plain(member.name))
        if os.path.lexists(path):
            raise DataError(f"--train-tar: {where} holds two files named {os.path.basename(path)}")
        _copy(source, member.size, path)
        count += 1
    return count


def _is_of_macos(name: str) -> bool:
    """Whether a member is not an image but what macOS adds to archives."""
    base = os.path.basename(name)
    return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in name.split("/")


def _refuse_compression(start: bytes, where: str) -> None:
    """Raise DataError if these first bytes are those of a compressed file.

    Images are read by their positions in the tar, and a compressed file has none.
    """
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind:
        raise DataError(
            f"{where} is compressed with {kind}; make a plain tar of it first, for example with "
            "gzip -dc OLD > NEW.tar"
        )


def _refuse_damage(tar: tarfile.TarFile) -> None:
    """Raise TarError if the tar has a damaged header, which tarfile takes for its end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def _copy(source: IO[bytes], size: int, path: str) -> None:
    data = source.read(size)
    if len(data) != size:
        raise DataError(f"{path}: the tar ends in the middle of this image; download it again")
    with open(path, "wb") as file:
        file.write(data)


def _plain(name: str, suffix: str = "") -> str:
    """Return a member's file name without `suffix`; refuse names that lead out of the folder."""
    base = os.path.basename(name).removesuffix(suffix)
    if base in ("", ".", ".."):
        raise DataError(f"a tar holds a file named {name!r}")
    return base


def train_tasks(tar: str, folder: str) -> list[ClassTar]:
    """List the classes in the tar of training images."""
    tasks: dict[str, ClassTar] = {}
    for member in _members(tar, "--train-tar"):
        if not member.name.endswith(".tar"):
            raise DataError(
                f"--train-tar: {tar} holds {member.name} instead of one tar per class; "
                "give ILSVRC2012_img_train.tar as published"
            )
        name = _plain(member.name, ".tar")
        if name in tasks:
            raise DataError(f"--train-tar: {tar} holds two tars of class {name}")
        target = os.path.join(folder, name)
        tasks[name] = ClassTar(tar, member.offset_data, member.size, target)
    return list(tasks.values())


def val_tasks(tar: str, folder: str, classes: dict[str, str]) -> list[ClassImages]:
    """List the validation images by class.

    Args:
        tar: Path of the tar of all validation images.
        folder: Folder to write the class folders to.
        classes: Class of each image file.
    """
    by_class, seen = defaultdict(list), set()
    for member in _members(tar, "--val-tar"):
        name = _plain(member.name)
        if name in seen:
            raise DataError(f"--val-tar: {tar} holds two files named {name}")
        seen.add(name)
        if name not in classes:
            raise DataError(
                f"--val-tar: the class of {name} is unknown; give the --devkit or --val-classes "
                "that belongs to this tar"
            )
        by_class[classes[name]].append((name, member.offset_data, member.size))
    if len(seen) != len(classes):
        raise DataError(
            f"--val-tar: {tar} holds {len(seen)} images, but the list of classes has {len(classes)}"
        )
    return [
        ClassImages(tar, tuple(members), os.path.join(folder, name))
        for name, members in sorted(by_class.items())
    ]


def refuse_others(folder: str, tasks: Sequence[ClassImages]) -> None:
    """Raise DataError if class folders in `folder` hold other images than the tasks would write."""
    expected = {
        os.path.basename(task.folder): {name for name, _, _ in task.members} for task in tasks
    }
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if is_ignored(name) or not os.path.isdir(path):
            continue
        there = {image for image in os.listdir(path) if not is_foreign(image)}
        if there and (odd := there ^ expected.get(name, set())):
            raise DataError(
                f"--val-dir: {path} was unpacked with another list, or changed since (see "
                f"{min(odd)}); remove {folder} or name another folder"
            )


def _members(tar: str, flag: str) -> list[tarfile.TarInfo]:
    try:
        with open(tar, "rb") as start:
            _refuse_compression(start.read(6), f"{flag}: {tar}")
        with tarfile.open(tar, "r:") as file:
            members = [
                member for member in file if member.isfile() and not _is_of_macos(member.name)
            ]
            _refuse_damage(file)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{flag}: {tar} cannot be read: {error}; download it again") from error
    if not members:
        raise DataError(f"{flag}: {tar} holds no files")
    if members[-1].offset_data + members[-1].size > os.path.getsize(tar):
        raise DataError(f"{flag}: {tar} ends in the middle of a file; download it again")
    return members


def classes_from_kit(kit: str) -> dict[str, str]:
    """Return the class of each validation image from the development kit.

    The ground truth has one number per image, 1 .. 1000. The numbers do not follow the sorted class
    names; meta.mat gives the class of each number.
    """
    try:
        # Read all of it first, which verifies its checksum. SciPy must not see a damaged meta.mat:
        # it can crash with a segmentation fault or loop forever.
        with gzip.open(kit) as packed:
            unpacked = io.BytesIO(packed.read())
        with tarfile.open(fileobj=unpacked, mode="r:") as file:
            by_name = {os.path.basename(m.name): m for m in file if m.isfile()}
            truth = file.extractfile(by_name["ILSVRC2012_validation_ground_truth.txt"])
            meta = file.extractfile(by_name["meta.mat"])
            assert truth is not None
            assert meta is not None
            numbers = [int(line) for line in truth.read().split()]
            names = classes_by_number(meta)
        return {
            f"ILSVRC2012_val_{number:08d}.JPEG": names[index]
            for number, index in enumerate(numbers, start=1)
        }
    except Exception as error:  # a different file can raise anything
        raise DataError(
            f"--devkit: {kit} is damaged or not the published ILSVRC2012_devkit_t12.tar.gz "
            f"({error}); download it again"
        ) from error


def classes_from_list(path: str) -> dict[str, str]:
    """Return the class of each validation image from lines ``<image file> <class>``."""
    classes = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                words = line.split()
                if len(words) != 2 or not _WNID.fullmatch(words[1]):
                    raise DataError(
                        f"--val-classes: line {number} of {path} must be <image file> <class>, "
                        "for example ILSVRC2012_val_00000001.JPEG n01751748"
                    )
                classes[words[0]] = words[1]
    except OSError as error:
        raise DataError(f"--val-classes: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"--val-classes: {path} is not a text file; give lines of <image file> <class>"
        ) from error
    return classes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Unpack ILSVRC2012's archives into one folder per class.",
        epilog=cli.EXIT_CODES,
    )
    add = parser.add_argument
    add("--train-tar", help="ILSVRC2012_img_train.tar")
    add("--train-dir", help="folder to write the training images to")
    add("--val-tar", help="ILSVRC2012_img_val.tar")
    add("--val-dir", help="folder to write the validation images to")
    add(
        "--devkit",
        help="ILSVRC2012_devkit_t12.tar.gz, which holds the classes of the validation images",
    )
    add("--val-classes", help="instead of --devkit: a file of lines <image file> <class>")
    cli.add_workers(parser)
    options = parser.parse_args(argv)
    if bool(options.train_tar) != bool(options.train_dir):
        parser.error("give both --train-tar and --train-dir, or neither")
    if bool(options.val_tar) != bool(options.val_dir):
        parser.error("give both --val-tar and --val-dir, or neither")
    if not options.train_tar and not options.val_tar:
        parser.error("give --train-tar, --val-tar or both")
    if options.val_tar and bool(options.devkit) == bool(options.val_classes):
        parser.error("--val-tar needs --devkit or --val-classes")
    if not options.val_tar and (options.devkit or options.val_classes):
        parser.error("--devkit and --val-classes have no effect without --val-tar")
    return cli.run("data.prepare", lambda pool: _prepare_both(options, pool), options.workers)


def _prepare_both(options: argparse.Namespace, pool: Pool) -> None:
    from data.tooling.pool import make_folders

    train, val = [], []
    if options.train_tar:
        train = train_tasks(options.train_tar, options.train_dir)
    if options.val_tar:  # checked before the training images, which take hours
        classes = (
            classes_from_kit(options.devkit)
            if options.devkit
            else classes_from_list(options.val_classes)
        )
        val = val_tasks(options.val_tar, options.val_dir, classes)
        refuse_others(options.val_dir, val)
    if train:
        make_folders(options.train_dir, train, unpack, pool)
    if val:
        make_folders(options.val_dir, val, unpack, pool)


if __name__ == "__main__":
    sys.exit(main())
