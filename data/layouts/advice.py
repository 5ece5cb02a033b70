"""What to do with a path that no layout fits."""

from __future__ import annotations

import os

from data import DataError
from data.layouts import MODULES, layout
from data.layouts.class_folders import kind_of
from data.samples.listing import EXTENSIONS, first_few, is_ignored

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_KIT = "ILSVRC2012_devkit_t12.tar.gz"

# Levels of inner folders, and folders in each of them, that are looked at.
_LEVELS = 4
_LOOKED_AT = 20


def advice(path: str) -> str:
    """Return what to do, as a part of a sentence; empty if there is nothing to advise."""
    if not os.path.isdir(path):
        return _about_file(path)
    names = [entry for entry in sorted(os.listdir(path)) if not is_ignored(entry)]
    if _TRAIN_TAR in names or _VAL_TAR in names:
        return f"unpack the archives first: {_prepare(path, names)}"
    archives = [name for name in names if name.lower().endswith((".tar.gz", ".tgz", ".zip"))]
    if archives:
        return f"unpack the archives first ({first_few(archives)}) into {path}/train and {path}/val"
    if kind_of(path) == "classes" and _holds_images(os.path.join(path, names[0])):
        parent = os.path.dirname(os.path.abspath(path))
        return (
            f"its folders look like the classes of one split; give a folder that holds both splits "
            f"as train and val, for example {parent}"
        )
    if any(name.endswith((".arrow", "dataset_dict.json")) for name in names):
        return (
            "this is the format of datasets' save_to_disk; write each split as a parquet file: "
            "datasets.load_from_disk(PATH)['train'].to_parquet('DIR/train.parquet'), and so on"
        )
    inner = _first_fit(path)
    return f"give {inner}, which holds images" if inner else ""


def _first_fit(path: str) -> str | None:
    """Return a folder below `path` that has a known layout, or None.

    The cache of the Hugging Face Hub holds the files in ``snapshots/<revision>``, and that of
    TensorFlow Datasets holds a folder for each set.
    """
    level = [path]
    for _ in range(_LEVELS):
        level = [folder for above in level for folder in _folders_in(above)][:_LOOKED_AT]
        for folder in level:
            if _fits(folder):
                return folder
    return None


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.path for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return sorted(path for path in found if not is_ignored(os.path.basename(path)))[:_LOOKED_AT]


def _fits(folder: str) -> bool:
    """Whether a layout recognises a folder; if it refuses it, the user does not mean that folder."""
    try:
        return any(layout(name).recognise(folder) is not None for name in MODULES)
    except (DataError, OSError):
        return False


def _about_file(path: str) -> str:
    folder = os.path.dirname(path) or "."
    if _fits(folder):
        return f"give the folder that holds it: {folder}"
    if path.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz")):
        small = "python experiments/train_small.py --dataset tiny-imagenet --archive"
        tiny = f" (or, for Tiny-ImageNet, run {small} {path})"
        return f"unpack it, and give the folder{tiny if path.lower().endswith('.zip') else ''}"
    return "give the folder that holds it"


def _prepare(path: str, names: list[str]) -> str:
    """Return the command that unpacks the published archives."""
    flags = []
    if _TRAIN_TAR in names:
        flags.append(f"--train-tar {path}/{_TRAIN_TAR} --train-dir {path}/train")
    if _VAL_TAR in names:
        flags.append(f"--val-tar {path}/{_VAL_TAR} --val-dir {path}/val --devkit {path}/{_KIT}")
    return f"python -m data.prepare {' '.join(flags)}"


def _holds_images(folder: str) -> bool:
    try:
        return any(name.lower().endswith(EXTENSIONS) for name in os.listdir(folder))
    except OSError:
        return False
