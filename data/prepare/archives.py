"""The course of unpacking ILSVRC2012's archives, compressed or not."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator

from data import DataError
from data.layouts import naming
from data.layouts.labels import classes_from_kit
from data.prepare.decompress import DAMAGE, READABLE, File, decompress, kind_of, open_packed
from data.prepare.imagenet import (
    ClassImages,
    ClassTar,
    class_of,
    classes_from_list,
    refuse_others,
    train_tasks,
    unpack,
    unpack_class,
    val_tasks,
)
from data.samples.tar_members import is_of_macos
from data.tooling.atomic import locked, new_folder, sweep
from data.tooling.pool import Pool, make_folders


def prepare(options: argparse.Namespace, pool: Pool) -> None:
    """Unpack the archives that the flags name."""
    with contextlib.ExitStack() as stack:
        train: list[ClassTar] = []
        val: list[ClassImages] = []
        stream = bool(options.train_tar) and _is_packed(options.train_tar, "--train-tar")
        if options.train_tar and not stream:
            train = train_tasks(options.train_tar, options.train_dir)
        if options.val_tar:  # checked before the training images, which take hours
            val_tar = stack.enter_context(_plain_tar(options.val_tar, options.val_dir))
            with naming("--devkit"):
                classes = (
                    classes_from_kit(options.devkit)
                    if options.devkit
                    else classes_from_list(options.val_classes)
                )
            val = val_tasks(val_tar, options.val_dir, classes)
            refuse_others(options.val_dir, val)
        if stream:
            unpack_stream(options.train_tar, options.train_dir)
        if train:
            make_folders(options.train_dir, train, unpack, pool)
        if val:
            make_folders(options.val_dir, val, unpack, pool)


def _is_packed(tar: str, flag: str) -> bool:
    try:
        kind = kind_of(tar)
    except OSError as error:
        raise DataError(f"{flag}: {tar} cannot be read: {error}; download it again") from error
    if kind and kind not in READABLE:
        raise DataError(f"{flag}: {tar} is compressed with {kind}; make a plain tar of it first")
    return kind is not None


@contextlib.contextmanager
def _plain_tar(tar: str, folder: str) -> Iterator[str]:
    """Yield the path of a plain tar: `tar`, or a temporary copy beside `folder` if it is compressed."""
    if not _is_packed(tar, "--val-tar"):
        yield tar
        return
    beside = os.path.dirname(os.path.abspath(folder))
    os.makedirs(beside, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="val-tar-", dir=beside) as place:
        plain = os.path.join(place, "val.tar")
        with naming("--val-tar"):
            decompress(File(tar, plain))
        yield plain


def unpack_stream(tar: str, folder: str) -> None:
    """Write the class folders of a compressed tar of training images, in one pass.

    A class takes some 150 MB of memory. Classes that are there already are passed over.

    Raises:
        DataError: The tar is damaged, or not the published one.
    """
    written = images = 0
    found: set[str] = set()
    with locked(folder):
        sweep(folder)
        try:
            with open_packed(tar) as stream, tarfile.open(fileobj=stream, mode="r|") as outer:
                for member in outer:
                    if not member.isfile() or is_of_macos(member.name):
                        continue
                    name = class_of(member, tar, found)
                    target = os.path.join(folder, name)
                    if os.path.isdir(target) and os.listdir(target):
                        continue
                    part = outer.extractfile(member)
                    assert part is not None
                    with new_folder(target) as unfinished:
                        content = io.BytesIO(part.read())
                        images += unpack_class(content, tar, name, unfinished)
                    written += 1
                while stream.read(1 << 20):  # the checksum is at the end
                    pass
        except (tarfile.TarError, *DAMAGE) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"--train-tar: {tar} is damaged: {error}; download it again") from error
    if not found:
        raise DataError(f"--train-tar: {tar} holds no files")
    print(f"{folder}: {len(found)} classes, {written} of them written now ({images:,} images)")
