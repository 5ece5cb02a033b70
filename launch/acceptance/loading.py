"""The loaders on JPEGs of noise, as two parts use them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.sources.imagenet import ImageNet, ImageNetDali
from lars import launcher
from lars.config.plan import Share
from launch.acceptance import images

SIDE = 224


def workers() -> int:
    """Decoding processes of the built-in loader: one CPU remains for training."""
    return max(1, launcher.allotted_cpus() - 1)


def decoder() -> str:
    """What decodes JPEGs in the built-in loader."""
    return "simplejpeg" if importlib.util.find_spec("simplejpeg") else "PIL"


def has_dali() -> bool:
    """Whether DALI is installed."""
    return bool(importlib.util.find_spec("nvidia")) and bool(
        importlib.util.find_spec("nvidia.dali")
    )


def source_of(folder: Path, *, dali: bool, count: int, image_size: int = SIDE) -> Any:
    """A source of `count` images, which are written first."""
    train, val = (
        str(images.write(folder / split, n)) for split, n in (("train", count), ("val", 8))
    )
    if dali:
        return ImageNetDali(reader="folder", train_dir=train, val_dir=val, image_size=image_size)
    return ImageNet(train_dir=train, val_dir=val, image_size=image_size)


@contextmanager
def batches_of(source: Any, batch_size: int) -> Iterator[Iterator[Any]]:
    """Micro-batches without end, within a with block."""
    source.check()
    source.start_workers(workers())
    loader = source.train_loader(
        Share(0, 1, batch_size, batch_size, batch_size, True, 0), workers()
    )
    try:
        yield loader.batches_from(0)
    finally:
        loader.close()
