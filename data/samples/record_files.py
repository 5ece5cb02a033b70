"""The files of a set of TFRecords: record files, index files and the manifest.

A folder (``--data-dir`` or ``--records``) holds train/*, validation/*, idx_files/train/* and
idx_files/validation/*, and perhaps manifest.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from data import DataError, FlagError, SetError
from data.samples.listing import first_few, is_foreign
from data.samples.shard_names import missing_shards
from data.tooling.atomic import read_json

SPLITS = ("train", "validation")
INDEX_FOLDER = "idx_files"
MANIFEST = "manifest.json"

IMAGENET_CLASSES = 1000
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000, "validation": 50_000}

# Names of TensorFlow's ImageNet, without an ending: train-00000-of-01024.
_SHARD = re.compile(r".+-\d{5,6}-of-\d{5,6}(\.gz)?")
_NOT_RECORDS = (".idx", ".index", ".json", ".txt")


def shard_files(folder: str, split: str) -> list[tuple[str, str]]:
    """Return (record file, index file) of each shard of a split, sorted by name.

    An index file has the name of its record file, with or without ``.idx`` appended.

    Raises:
        DataError: A folder is missing or empty, or the two sets of names do not match.
    """
    refuse_flat_records(folder)
    fix = f"index them: python -m data.make_tfrecords --from-tfrecords --data-dir {folder}"
    records = _names(os.path.join(folder, split), "put the record files there")
    indices = _names(os.path.join(folder, INDEX_FOLDER, split), fix)
    by_record = {name.removesuffix(".idx"): name for name in indices}
    if set(by_record) != set(records) or len(by_record) != len(indices):
        odd = sorted(set(by_record) ^ set(records)) or indices
        raise DataError(
            f"{folder}: the record files of {split} and their index files do not match, "
            f"for example {odd[0]}; {fix}"
        )
    return [
        (
            os.path.join(folder, split, name),
            os.path.join(folder, INDEX_FOLDER, split, by_record[name]),
        )
        for name in records
    ]


def refuse_flat_records(folder: str) -> None:
    """Raise SetError if record files lie directly in `folder`, not in one folder for each split."""
    if not os.path.isdir(folder) or os.path.isdir(os.path.join(folder, "train")):
        return
    names = [name for name in visible_names(folder) if is_record_file(name)]
    if not names:
        return
    parent, split = os.path.split(os.path.abspath(folder))
    if split in SPLITS:
        raise SetError(f"{folder} holds the record files of one split; give its parent, {parent}")
    # TensorFlow writes train-*, TensorFlow Datasets NAME-train.*.
    raise SetError(
        f"{folder} holds {len(names)} record files ({first_few(names)}) that are not sorted into "
        f"{' and '.join(SPLITS)}; "
        f"give --data {folder} to the training script, or move or link them: mkdir -p NEW/train NEW/validation; "
        f"ln -s {os.path.abspath(folder)}/*train* NEW/train/; "
        f"ln -s {os.path.abspath(folder)}/*val* NEW/validation/; then "
        "python -m data.make_tfrecords --from-tfrecords --data-dir NEW"
    )


def is_record_file(name: str) -> bool:
    """Whether a file of this name holds records: train-00000-of-01024, or tfrecord in its name."""
    tells = "tfrecord" in name.lower() or _SHARD.fullmatch(name) is not None
    return tells and not name.endswith(_NOT_RECORDS)


def refuse_common_folder(data_dir: str, flag: str, images: str) -> None:
    """Raise FlagError if records and images would lie in one folder."""
    records, root = os.path.realpath(data_dir), os.path.realpath(images)
    if os.path.commonpath([records, root]) == root:
        raise FlagError(
            f"--data-dir: {data_dir} is within {flag} {images}; name a folder outside it"
        )
    if root in [os.path.join(records, split) for split in SPLITS]:
        raise FlagError(
            f"--data-dir: the records would go into the images' folder of {flag}; name another "
            "folder"
        )


def _names(folder: str, fix: str) -> list[str]:
    try:
        names = visible_names(folder)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; {fix}") from error
    if not names:
        raise DataError(f"{folder} is empty; {fix}")
    return names


def visible_names(folder: str) -> list[str]:
    """Return the names in a folder, sorted, without hidden ones and folders of tools."""
    return sorted(name for name in os.listdir(folder) if not is_foreign(name))


class Manifest:
    """The manifest of a set of records; without a file, the classes count as ImageNet's.

    Args:
        folder: Folder of the records.

    Raises:
        DataError: There is a manifest, but it gives no number of classes.

    Attributes:
        exists: Whether there is a manifest.
        num_classes: Number of classes.
        class_names: Names of the classes in the order of the labels; empty if they are unknown.
    """

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, MANIFEST)
        self._folder = folder
        self.exists = os.path.exists(self._path)
        content: Any = {"num_classes": IMAGENET_CLASSES}
        if self.exists:
            content = read_json(self._path)
        try:
            self.num_classes = int(content["num_classes"])
            self._splits = content.get("splits", {})
            self._label_base = content.get("label_base")
            names = content.get("classes") or []
            known = isinstance(names, list) and len(names) == self.num_classes
            self.class_names = [str(name) for name in names] if known else []
            for split in SPLITS:
                self.hashes(split)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged() from error

    def label_base(self, given: int | None) -> int | None:
        """Return the label of the first class; None if neither the user nor the manifest gives it.

        Args:
            given: The user's ``--label-base``.

        Raises:
            SetError: They disagree.
        """
        if None not in (given, self._label_base) and given != self._label_base:
            raise SetError(
                f"--label-base {given}, but {self._path} says that labels count from "
                f"{self._label_base}; leave out --label-base"
            )
        return self._label_base if given is None else given

    def hashes(self, split: str) -> str:
        """Return the entries of a split's record files as text; "" without entries."""
        return repr(self._splits.get(split, {}).get("shards", ""))

    def entries(self, split: str) -> dict[str, dict[str, Any]]:
        """Return the entry (name, images, bytes, sha256) of each record file by its name."""
        try:
            shards = self._splits.get(split, {}).get("shards", [])
            return {shard["name"]: shard for shard in shards}
        except (KeyError, TypeError) as error:
            raise self._damaged() from error

    def compare(self, split: str, files: Collection[tuple[str, str]]) -> None:
        """Raise SetError if record files are missing, unexpected or of another size.

        Args:
            split: ``train`` or ``validation``.
            files: (record file, index file) of each shard.
        """
        entries = self.entries(split)
        problems = wrong_files(split, {os.path.basename(path) for path, _ in files}, set(entries))
        for path, _ in files:
            expected = entries.get(os.path.basename(path), {}).get("bytes")
            size = os.path.getsize(path)
            if expected is not None and expected != size:
                problems.append(
                    f"{path} has {size:,} bytes instead of the {expected:,} in {MANIFEST}; "
                    "copy the file again"
                )
        if problems:
            raise SetError(problems[0])

    def _damaged(self) -> DataError:
        return DataError(
            f"{self._path} is damaged or not a manifest of records; write it again with "
            f"python -m data.make_tfrecords --from-tfrecords --data-dir {self._folder}"
        )


def same_records(folder: str) -> bool:
    """Whether the training and validation records are one folder, or share a file."""
    train, val = (os.path.realpath(os.path.join(folder, split)) for split in SPLITS)
    if train == val:
        return True
    manifest = Manifest(folder)
    hashes = [
        {entry.get("sha256") for entry in manifest.entries(split).values()} for split in SPLITS
    ]
    links = [{os.path.realpath(os.path.join(folder, split, name)) for name in
              visible_names(os.path.join(folder, split))} for split in SPLITS]  # fmt: skip
    return bool((hashes[0] & hashes[1]) - {None} or links[0] & links[1])


def record_warnings(folder: str, train_size: int) -> list[str]:
    """Return what looks wrong about a set of records but does not forbid training."""
    warnings = []
    if same_records(folder):
        warnings.append(
            f"train and validation in {folder} hold the same images, so validation says nothing "
            "about new images"
        )
    if not Manifest(folder).exists and train_size != IMAGENET_COUNTS["train"]:
        warnings.append(
            f"{folder} has no {MANIFEST}, so its {train_size:,} training images count as "
            f"ImageNet's {IMAGENET_CLASSES:,} classes; to count them, run python -m "
            f"data.make_tfrecords --from-tfrecords --data-dir {folder}"
        )
    return warnings


def wrong_files(split: str, names: set[str], listed: set[str]) -> list[str]:
    """Return which record files are missing or unexpected.

    Args:
        split: ``train`` or ``validation``.
        names: Names of the record files.
        listed: Names in the manifest; if empty, the numbers in the names decide.
    """
    missing = sorted(listed - names) if listed else missing_shards(names)
    unexpected = sorted(names - listed) if listed else []
    problems = []
    if missing:
        problems.append(
            f"{split}: {first_few(missing)} missing, according to "
            + (MANIFEST if listed else "the files' names")
            + "; copy or make the missing files again"
        )
    if unexpected:
        problems.append(
            f"{split}: {first_few(unexpected)} not in {MANIFEST}; remove it, or write the manifest "
            "again with python -m data.make_tfrecords --from-tfrecords"
        )
    return problems
