"""WebDataset's tar files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data import SetError
from data.layouts import FLAG, Found, Options, found_shards, naming, same_files

if TYPE_CHECKING:
    from data.samples.tars import TarSet

HOLDS = "WebDataset's tars: *train*.tar and *val*.tar, with members KEY.jpg and KEY.cls"

# The published archives of ImageNet, and those of Hugging Face, hold images without labels.
_ARCHIVES = ("ILSVRC2012_", "train_images", "val_images", "test_images")

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def recognise(path: str) -> Found | None:
    """Look for tar files whose names tell their split, or that lie in a folder for each split."""
    return found_shards(
        "web_dataset",
        path,
        "WebDataset's tar files",
        "members .cls or .json",
        lambda name: name.endswith((".tar", *_COMPRESSED)) and not name.startswith(_ARCHIVES),
        takes=("label_base", "index_dir"),
        or_test=True,
    )


def open_split(found: Found, split: str, options: Options) -> TarSet:
    """Open one split, and index its tars if that was not done before."""
    from data.samples.tars import open_tars

    paths: list[str] = getattr(found, split)
    packed = [path for path in paths if path.endswith(_COMPRESSED)]
    if packed:
        raise SetError(
            f"{FLAG}: {os.path.basename(packed[0])} is compressed, so single images cannot be read "
            f"from it; unpack all of them: python -m data.prepare --data {found.path} --out NEW"
        )
    with naming(FLAG):
        return open_tars(
            found.path,
            paths,
            split,
            options.exclude,
            options.num_classes,
            options.label_base,
            options.index_dir,
        )


def warnings(found: Found, train: TarSet, val: TarSet) -> Sequence[str]:
    """Return whether both splits share tars."""
    return same_files(found)
