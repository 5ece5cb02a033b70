"""Files that give the classes of the images in a folder without class folders."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO

from data import DataError

# Lists of lines ``<image> <class>``, of which the class is a name or a number from 0 or 1.
VAL = ("val", "validation", "valid")
_LIST_ENDINGS = ("_list.txt", ".txt", "_map.txt", "_labels.txt")

# The folder beside the images in which MMPreTrain's users keep the lists.
_LISTS = "meta"

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KIT = "ILSVRC2012_devkit_t12"
_SYNSETS = "imagenet_2012_validation_synset_labels.txt"
_KAGGLE = "LOC_val_solution.csv"
TINY = "val_annotations.txt"
_TORCHVISION = "meta.bin"

# How far above the images the published files are searched for: Kaggle's lies four folders above.
_LEVELS = 4


@dataclass(frozen=True)
class LabelFile:
    """A file that gives the class of each image.

    Attributes:
        path: The file.
        read: Returns the class of each image by the image's file name without its ending.
    """

    path: str
    read: Callable[[str], dict[str, str]]

    @property
    def name(self) -> str:
        """The file's name."""
        return os.path.basename(self.path)

    def classes(self) -> dict[str, str]:
        """Return the class of each image by the image's file name without its ending.

        Raises:
            DataError: The file cannot be read.
        """
        try:
            found = self.read(self.path)
        except DataError:
            raise
        except Exception as error:  # a different file can raise anything
            raise DataError(f"{self.path} cannot be read ({error}); download it again") from error
        if not found:
            raise DataError(f"{self.path} names no images")
        return found


def find(folder: str) -> LabelFile | None:
    """Find the file for the images in `folder`: in it, beside it, or above it."""
    parent = os.path.abspath(folder)
    above = [folder]
    for _ in range(_LEVELS):
        parent = os.path.dirname(parent)
        above.append(parent)
    for place in above:
        for name, read in _PUBLISHED.items():
            path = os.path.join(place, name)
            if os.path.isfile(path):
                return LabelFile(path, read)
    beside = [*above[:2], os.path.join(above[1], _LISTS)]
    lists = (list_in(place, (*VAL, "labels")) for place in beside)
    return next((LabelFile(path, _read_list) for path in lists if path), None)


def list_in(folder: str, splits: Sequence[str]) -> str | None:
    """Return the list of images of a split in a folder: ``val_list.txt``, ``val.txt``, ..."""
    paths = (os.path.join(folder, split + end) for split in splits for end in _LIST_ENDINGS)
    return next(filter(os.path.isfile, paths), None)


def read_pairs(path: str) -> list[tuple[str, str]]:
    """Return (image, class) of each line ``<image> <class>``; a tab or a comma may stand between.

    Raises:
        DataError: A line has another form, or the file is not a text file.
    """
    pairs = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                words = re.split(r"[\t,]|\s+(?=\S+$)", line.strip(), maxsplit=1)
                if words == [""]:
                    continue
                if len(words) != 2 or not all(word.strip() for word in words):
                    raise DataError(
                        f"{path}, line {number}: {line.strip()!r} must be <image> <class>, for "
                        "example n01440764/n01440764_10026.JPEG 0"
                    )
                pairs.append((words[0].strip(), words[1].strip()))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file of lines <image> <class>") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return pairs


def stem(image: str) -> str:
    """Return the name of an image file without its folder and ending."""
    return os.path.splitext(os.path.basename(image))[0]


def are_numbers(labels: Iterable[str]) -> bool:
    """Whether all classes are given as numbers."""
    return all(label.isdecimal() for label in labels)


def named(numbers: dict[str, str], names: Sequence[str], path: str) -> dict[str, str]:
    """Return the class names for labels that are numbers from 0 or from 1.

    Args:
        numbers: The label of each image.
        names: Names of the classes in the order of the labels.
        path: The file, for error messages.

    Raises:
        DataError: A number is out of range.
    """
    values = {int(label) for label in numbers.values()}
    first = 1 if 0 not in values and len(names) in values else 0
    odd = sorted(value for value in values if not first <= value < first + len(names))
    if odd:
        raise DataError(
            f"{path}: label {odd[0]} is out of range: there are {len(names)} class folders for "
            "training, so labels run from 0 or from 1"
        )
    return {image: names[int(label) - first] for image, label in numbers.items()}


def _read_list(path: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for image, label in read_pairs(path):
        if found.setdefault(stem(image), label) != label:
            raise DataError(f"{path} gives {image} two classes")
    return found


def _read_kaggle(path: str) -> dict[str, str]:
    """Read lines ``ILSVRC2012_val_00000001,n01751748 110 37 320 340 ...``."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}


def _read_tiny(path: str) -> dict[str, str]:
    """Read Tiny-ImageNet's lines ``val_0.JPEG<tab>n03444034<tab>0<tab>32<tab>44<tab>62``."""
    with open(path, encoding="utf-8") as file:
        return {stem(words[0]): words[1] for line in file if len(words := line.split()) > 1}


def _read_synsets(path: str) -> dict[str, str]:
    """Read one class in each line, in the order of the images."""
    with open(path, encoding="utf-8") as file:
        return _in_order(file.read().split())


def _read_ground_truth(path: str) -> dict[str, str]:
    """Read one number in each line; meta.mat beside it gives the class of each number."""
    meta = os.path.join(os.path.dirname(path), "meta.mat")
    if not os.path.isfile(meta):
        raise DataError(
            f"{path} numbers the classes in an order of its own, which meta.mat gives; put the "
            f"meta.mat of {_KIT}.tar.gz beside it"
        )
    with open(path, encoding="utf-8") as numbers, open(meta, "rb") as file:
        classes = classes_by_number(file)
        return _in_order([classes[int(line)] for line in numbers.read().split()])


def _read_kit(path: str) -> dict[str, str]:
    return {stem(image): name for image, name in classes_from_kit(path).items()}


def _read_torchvision(path: str) -> dict[str, str]:
    """Read the file that torchvision.datasets.ImageNet makes of the development kit."""
    import torch

    _, classes = torch.load(path, weights_only=True)
    return _in_order(classes)


def classes_from_kit(kit: str) -> dict[str, str]:
    """Return the class of each validation image from the development kit.

    The ground truth has one number per image, 1 .. 1000. The numbers do not follow the sorted class
    names; meta.mat gives the class of each number.

    Raises:
        DataError: The file cannot be read, or it is not the published one.
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
            f"{kit} is damaged or not the published ILSVRC2012_devkit_t12.tar.gz ({error}); "
            "download it again"
        ) from error


def classes_by_number(meta: IO[bytes]) -> dict[int, str]:
    """Return the class of each number from the development kit's ``meta.mat``."""
    from scipy.io import loadmat

    synsets = loadmat(meta, squeeze_me=True)["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}


def _in_order(classes: Sequence[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{i:08d}": name for i, name in enumerate(classes, start=1)}


# Where the published files are, relative to a folder, in order of preference.
_PUBLISHED: dict[str, Callable[[str], dict[str, str]]] = {
    TINY: _read_tiny,
    _KAGGLE: _read_kaggle,
    _SYNSETS: _read_synsets,
    f"{_KIT}.tar.gz": _read_kit,
    _GROUND_TRUTH: _read_ground_truth,
    f"{_KIT}/data/{_GROUND_TRUTH}": _read_ground_truth,
    f"data/{_GROUND_TRUTH}": _read_ground_truth,
    _TORCHVISION: _read_torchvision,
}

ACCEPTED = (_KAGGLE, _SYNSETS, _GROUND_TRUTH, f"{_KIT}.tar.gz", _TORCHVISION, "val_list.txt")
