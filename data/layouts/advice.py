"""What to do with a path that no layout fits."""

from __future__ import annotations

import os

from data.layouts.class_folders import kind_of, recognise
from data.samples.listing import EXTENSIONS, first_few, is_ignored

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_KIT = "ILSVRC2012_devkit_t12.tar.gz"

# Inner folders that are looked at.
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
    inner = [os.path.join(path, name) for name in names[:_LOOKED_AT]]
    fits = [folder for folder in inner if os.path.isdir(folder) and recognise(folder)]
    return f"give {fits[0]}, which holds images" if fits else ""


def _about_file(path: str) -> str:
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
