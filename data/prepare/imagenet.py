"""ILSVRC2012's published archives become one folder per class."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from data import DataError
from data.prepare.decompress import DAMAGE, decompressed
from data.samples.listing import is_foreign, is_ignored
from data.samples.tar_members import compression_of, is_of_macos, refuse_damage
from data.tooling.atomic import new_folder

_WNID = re.compile(r"n\d{8}")


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
            return unpack_class(part, task.tar, class_name, folder)
    except (tarfile.TarError, *DAMAGE) as error:
        raise _damaged(task.tar, class_name, error) from error


def unpack_class(part: IO[bytes], tar: str, class_name: str, folder: str) -> int:
    """Write the images of one class's tar, compressed or not; return their number."""
    if compression_of(part.read(6)):
        part.seek(0)
        part = io.BytesIO(decompressed(part.read(), f"{tar}: the tar of {class_name}"))
    part.seek(0)
    with tarfile.open(fileobj=part, mode="r:") as inner:
        count = _copy_members(inner, folder, f"{tar}: the tar of {class_name}")
        refuse_damage(inner)
    if count == 0:
        raise DataError(f"--train-tar: {tar}: the tar of {class_name} holds no image")
    return count


def _damaged(tar: str, class_name: str, error: Exception) -> Exception:
    """Return the error for damage in the tar of a class; errors of the disk stay as they are."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return DataError(
        f"--train-tar: {tar}: the tar of {class_name} is damaged: {error}; download it again"
    )


def class_of(member: tarfile.TarInfo, tar: str, found: set[str]) -> str:
    """Return the class of a tar within the tar of training images, and add it to `found`.

    Raises:
        DataError: It is not the tar of a class, or a second one of the same class.
    """
    ending = next((e for e in (".tar", ".tar.gz", ".tgz") if member.name.endswith(e)), None)
    if ending is None:
        raise DataError(
            f"--train-tar: {tar} holds {member.name} instead of one tar per class; give "
            "ILSVRC2012_img_train.tar as published. If the names of the images end in _<class>.JPEG, "
            "unpack them (tar -xf TAR -C DIR/train) and train with --data DIR"
        )
    name = _plain(member.name, ending)
    if name in found:
        raise DataError(f"--train-tar: {tar} holds two tars of class {name}")
    found.add(name)
    return name


def _copy_members(inner: tarfile.TarFile, folder: str, where: str) -> int:
    """Write the files of a tar into `folder`; return their number."""
    count = 0
    for member in inner:
        source = None if is_of_macos(member.name) else inner.extractfile(member)
        if source is None:
            continue
        path = os.path.join(folder, _plain(member.name))
        if os.path.lexists(path):
            raise DataError(f"--train-tar: {where} holds two files named {os.path.basename(path)}")
        _copy(source, member.size, path)
        count += 1
    return count


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
    tasks: list[ClassTar] = []
    found: set[str] = set()
    for member in _members(tar, "--train-tar"):
        target = os.path.join(folder, class_of(member, tar, found))
        tasks.append(ClassTar(tar, member.offset_data, member.size, target))
    return tasks


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
        with tarfile.open(tar, "r:") as file:
            members = [
                member for member in file if member.isfile() and not is_of_macos(member.name)
            ]
            refuse_damage(file)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{flag}: {tar} cannot be read: {error}; download it again") from error
    if not members:
        raise DataError(f"{flag}: {tar} holds no files")
    if members[-1].offset_data + members[-1].size > os.path.getsize(tar):
        raise DataError(f"{flag}: {tar} ends in the middle of a file; download it again")
    return members


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
