"""Image folders to shuffled TFRecords with index files, for DALI and for ``--records``.

    python -m data.make_tfrecords --train-dir T --val-dir V --data-dir OUT
    mpirun -np 9 python -m data.make_tfrecords ...     (rank 0 deals, 8 write)
    python -m data.make_tfrecords --from-tfrecords --data-dir DIR

makes OUT/train/train-00000-of-01024, OUT/validation/validation-00000-of-00040, their index files
under OUT/idx_files, and OUT/manifest.json: classes, counts, and size and SHA-256 of every shard.
The third form reads records that are there already (TensorFlow's ImageNet), verifies every
checksum, and makes the index files and the manifest.

The bytes do not depend on the number of workers. Each shard appears whole or not at all; a run that
was killed goes on where it was, and one whose files were lost since makes those anew. Other flags,
or images whose names or sizes have changed, are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data import DataError, tfrecord, tool
from data.atomic import alone, is_unfinished, read_json, replacing, sweep, write_json
from data.parallel import Pool
from data.records import INDEX_FOLDER, MANIFEST, SPLITS, image_and_label
from data.sampler import cut, permutation
from data.transforms import decode_pil, dimensions, image_kind
from data.tree import FileTree, read_excluded, read_image, scan, why_unreadable

# Notes on finished shards, for a run that goes on; gone once the manifest is written.
NOTES = "unfinished"

# Asking a network file system for sizes is waiting; threads wait side by side.
_THREADS = 16


@dataclass(frozen=True)
class Pixels:
    """What is done to the images on their way.

    Attributes:
        reencode: Turn what is not a plain RGB or grey JPEG, or has corrupt EXIF, into one.
        short_side: Shrink images whose shorter side is longer than this, in pixels; 0: none.
        quality: Of the JPEGs that this writes.
    """

    reencode: bool
    short_side: int
    quality: int


@dataclass(frozen=True)
class Shard:
    """One file to write, or to read."""

    folder: str
    split: str
    name: str
    images: tuple[tuple[str, str, int], ...] = ()  # (path, name, label from 1)
    pixels: Pixels | None = None

    @property
    def path(self) -> str:
        """Path of the record file."""
        return os.path.join(self.folder, self.split, self.name)

    @property
    def index(self) -> str:
        """Path of the index file."""
        return os.path.join(self.folder, INDEX_FOLDER, self.split, self.name + ".idx")

    @property
    def note(self) -> str:
        """Path of the note that says the shard is finished."""
        return os.path.join(self.folder, NOTES, f"{self.split}-{self.name}.json")


def write_shard(shard: Shard) -> dict[str, Any]:
    """Write one shard and its index file; return what the manifest says of it."""
    assert shard.pixels is not None
    sha, index, offset = hashlib.sha256(), [], 0
    with replacing(shard.path) as file:
        for path, name, label in shard.images:
            encoded = read_image(path)
            try:
                encoded = converted(encoded, shard.pixels)
            except DataError as error:
                raise DataError(f"{path} {error}") from error
            example: dict[str, tfrecord.Value] = {
                tfrecord.IMAGE: encoded,
                tfrecord.LABEL: label,
                tfrecord.CLASS_NAME: os.fsencode(name.split("/")[0]),
                "image/filename": os.fsencode(name),
            }
            whole = tfrecord.record(tfrecord.encode_example(example))
            sha.update(whole)
            index.append((offset, len(whole)))
            offset += len(whole)
            file.write(whole)
    return _finish(shard, index, sha.hexdigest(), _labels(shard), {})


def _labels(shard: Shard) -> Counter[int]:
    return Counter(label for _, _, label in shard.images)


def index_shard(shard: Shard) -> dict[str, Any]:
    """Read one shard, verify it and write its index file; return what the manifest says of it."""
    sha, index = hashlib.sha256(), []
    labels: Counter[int] = Counter()
    names: dict[int, str] = {}
    for offset, payload in tfrecord.read_records(shard.path):
        try:
            _, label = image_and_label(payload, num_classes=2**31)
            synset = tfrecord.decode_example(payload).get(tfrecord.CLASS_NAME)
        except DataError as error:
            raise DataError(f"{shard.path}, record at byte {offset}: {error}") from error
        sha.update(tfrecord.record(payload))
        index.append((offset, len(payload) + tfrecord.OVERHEAD))
        labels[label + 1] += 1
        if synset and isinstance(synset[0], bytes):
            names[label + 1] = os.fsdecode(synset[0])
    return _finish(shard, index, sha.hexdigest(), labels, names)


def _finish(
    shard: Shard,
    index: list[tuple[int, int]],
    sha256: str,
    labels: Counter[int],
    names: dict[int, str],
) -> dict[str, Any]:
    with replacing(shard.index) as file:
        file.write(tfrecord.index_text(index).encode())
    size = sum(size for _, size in index)
    entry = {"name": shard.name, "images": len(index), "bytes": size, "sha256": sha256}
    return _write_note(shard, entry, labels, names)


def _write_note(
    shard: Shard, entry: dict[str, Any], labels: Counter[int], names: dict[int, str]
) -> dict[str, Any]:
    """Note that a shard is finished; `entry` is what the manifest says of it."""
    note = entry | {
        "split": shard.split,
        "labels": {str(label): count for label, count in sorted(labels.items())},
        "names": {str(label): name for label, name in sorted(names.items())},
    }
    write_json(shard.note, note)
    return note


def converted(encoded: bytes, pixels: Pixels) -> bytes:
    """Return the image file as it goes into the record: unchanged if nothing is to be done."""
    shrink = pixels.short_side and min(dimensions(encoded)) > pixels.short_side
    if not shrink and not (pixels.reencode and image_kind(encoded)):
        return encoded
    image = Image.fromarray(decode_pil(encoded))
    if shrink:
        scale = pixels.short_side / min(image.size)
        size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=pixels.quality)
    except OSError as error:  # libjpeg's sides end at 65,500 pixels
        raise DataError(
            f"cannot be written as a JPEG of {image.width}x{image.height} pixels ({error}); "
            "leave it out with --exclude"
        ) from error
    return buffer.getvalue()


def planned(
    split: str, root: str, options: argparse.Namespace
) -> tuple[list[Shard], list[str], str]:
    """Return the shards of one split, its classes, and `fingerprint`. Training images are shuffled."""
    folder = "train" if split == "train" else "val"
    excluded = read_excluded(options.exclude, folder)
    tree = scan(root, f"--{folder}-dir", excluded)
    if excluded:
        there = sum(os.path.lexists(os.path.join(root, name)) for name in excluded)
        print(f"{split}: {there} images left out, of {len(excluded)} that --exclude lists")
    order = range(len(tree))
    if split == "train":
        order = permutation(len(tree), options.seed, epoch=0).tolist()
    bounds = cut(len(tree), options.images_per_shard)
    pixels = Pixels(options.reencode, options.short_side, options.quality)
    shards = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        images = tuple((tree.path(i), tree.name(i), tree.label(i) + 1) for i in order[start:stop])
        name = f"{split}-{number:05d}-of-{len(bounds) - 1:05d}"
        shards.append(Shard(options.data_dir, split, name, images, pixels))
    return shards, tree.classes, fingerprint(tree)


def fingerprint(tree: FileTree) -> str:
    """Return a hash of the names and sizes of all images."""

    def of_class(start: int, stop: int) -> str:
        sha = hashlib.sha256()
        for index in range(start, stop):
            path = tree.path(index)
            try:
                size = os.path.getsize(path)
            except OSError as error:
                raise DataError(f"{path} {why_unreadable(path, error)}") from error
            sha.update(repr((tree.name(index), size)).encode(errors="surrogateescape"))
        return sha.hexdigest()

    stops = list(itertools.accumulate(tree.counts))
    with ThreadPoolExecutor(_THREADS) as threads:
        classes = threads.map(of_class, [0, *stops], stops)
        return hashlib.sha256("".join(classes).encode()).hexdigest()


def existing(folder: str) -> list[Shard]:
    """Return the record files that lie under `folder`; hidden files are none."""
    shards = []
    for split in SPLITS:
        try:
            names = sorted(os.listdir(os.path.join(folder, split)))
        except OSError as error:
            raise DataError(f"--data-dir: {folder}/{split}: {error.strerror}") from error
        names = [name for name in names if not name.startswith(".")]
        if not names:
            raise DataError(f"--data-dir: {folder}/{split} holds no record files")
        for name in filter(is_unfinished, names):
            raise DataError(
                f"--data-dir: {folder}/{split}/{name} was left by a run that was killed; start the "
                "same command again, or remove that file"
            )
        missing = tfrecord.missing_shards(names)
        if missing:
            raise DataError(
                f"--data-dir: {folder}/{split} lacks {len(missing)} files that the others' names "
                f"tell, such as {missing[0]}; make or copy them first (or rename the others, if a "
                "part is what you want)"
            )
        shards += [Shard(folder, split, name) for name in names]
        _refuse_odd_indices(os.path.join(folder, INDEX_FOLDER, split), names)
    return shards


def _refuse_odd_indices(folder: str, names: list[str]) -> None:
    """Raise DataError for an index file that would stay beside the new ones, and not fit."""
    if not os.path.isdir(folder):
        return
    kept = {f"{name}.idx" for name in names}
    for name in sorted(os.listdir(folder)):
        if not name.startswith(".") and not is_unfinished(name) and name not in kept:
            raise DataError(
                f"--data-dir: {os.path.join(folder, name)} is not the index file of a record file "
                "(those end in .idx); remove it, for all are made anew"
            )


def make(options: argparse.Namespace, pool: Pool) -> None:
    """Write records of both splits, or index those that are there."""
    if options.from_tfrecords and not os.path.isdir(options.data_dir):
        raise DataError(f"--data-dir: {options.data_dir} is not a folder")
    with alone(options.data_dir):
        _make(options, pool)


def _make(options: argparse.Namespace, pool: Pool) -> None:
    classes: list[str] | None
    settings: dict[str, Any]
    if options.from_tfrecords:
        shards, classes = existing(options.data_dir), None
        settings = {"from_tfrecords": True}
        notes = os.path.join(options.data_dir, NOTES)
        if read_json(os.path.join(notes, "settings.json")) != settings:
            shutil.rmtree(notes, ignore_errors=True)  # they know no class names
    else:
        shards, classes, train_images = planned("train", options.train_dir, options)
        val_shards, val_classes, val_images = planned("validation", options.val_dir, options)
        if classes != val_classes:
            raise DataError("--train-dir and --val-dir must hold the same class folders")
        shards += val_shards
        settings = {name: getattr(options, name) for name in _FLAGS}
        settings |= {"train_dir": train_images, "val_dir": val_images}
        _refuse_others(options.data_dir, settings)
        if _all_there(options.data_dir, shards, settings):
            print(f"{options.data_dir}: the records are there already")
            return
    _begin(options.data_dir, shards, settings)
    left = [shard for shard in shards if not _finished(shard)]
    if len(left) < len(shards):
        print(f"{options.data_dir}: going on with {len(left)} of {len(shards)} files")
    function = index_shard if options.from_tfrecords else write_shard
    for _ in pool.work(function, left, "shards"):
        pass
    _write_manifest(options.data_dir, shards, classes, settings)


# What the bytes depend on, beside the images.
_FLAGS = ("seed", "images_per_shard", "reencode", "short_side", "quality")


# What the manifest says of each record file.
_ENTRY = ("name", "images", "bytes", "sha256")


def _manifest(folder: str) -> dict[str, Any]:
    """Read the manifest; {} if it is missing or damaged."""
    manifest = read_json(os.path.join(folder, MANIFEST))
    try:
        entries = [entry for split in SPLITS for entry in manifest["splits"][split]["shards"]]
        whole = all(key in entry for entry in entries for key in _ENTRY)
        return manifest if whole and isinstance(manifest["settings"], dict) else {}
    except (KeyError, TypeError):
        return {}


def _refuse_others(folder: str, settings: dict[str, Any]) -> None:
    """Raise DataError if `folder` holds records of other settings, or some begun with others."""
    begun, made = read_json(os.path.join(folder, NOTES, "settings.json")), _manifest(folder)
    earlier = begun if isinstance(begun, dict) else made.get("settings", {})
    there = any(os.path.exists(os.path.join(folder, split)) for split in SPLITS)
    if not there or settings in (begun, made.get("settings")):
        return
    if not earlier:
        raise DataError(
            f"--data-dir: {folder} holds records but no whole {MANIFEST}; make it anew with "
            f"--from-tfrecords --data-dir {folder}, or remove the folder or name another"
        )
    if "from_tfrecords" in earlier:
        others = "that this tool did not make from folders"
    else:
        others = "made with " + ", ".join(
            f"other images than those in --{flag.replace('_', '-')} now (their names or sizes)"
            if flag.endswith("_dir")
            else f"--{flag.replace('_', '-')} {earlier.get(flag)}, not {settings[flag]}"
            for flag in settings
            if earlier.get(flag) != settings[flag]
        )
    raise DataError(
        f"--data-dir: {folder} holds records, or some begun, {others}; remove it or name another"
    )


def _all_there(folder: str, shards: list[Shard], settings: dict[str, Any]) -> bool:
    """Say whether nothing is left to do; otherwise note what of a finished set is still whole."""
    manifest = _manifest(folder)
    if manifest.get("settings") != settings:
        return False
    entries = {
        (split, entry["name"]): entry
        for split in SPLITS
        for entry in manifest["splits"][split]["shards"]
    }
    whole = [
        shard
        for shard in shards
        if (entry := entries.get((shard.split, shard.name))) and _is_whole(shard, entry["bytes"])
    ]
    if len(whole) == len(shards):
        shutil.rmtree(os.path.join(folder, NOTES), ignore_errors=True)
        return True
    os.makedirs(os.path.join(folder, NOTES), exist_ok=True)
    for shard in whole:
        _write_note(shard, entries[shard.split, shard.name], _labels(shard), {})
    return False


def _begin(folder: str, shards: list[Shard], settings: dict[str, Any]) -> None:
    """Make the folders, and a note of the settings by which an equal run knows that it goes on."""
    os.makedirs(os.path.join(folder, NOTES), exist_ok=True)
    write_json(os.path.join(folder, NOTES, "settings.json"), settings)
    for split in SPLITS:
        records, indices = os.path.join(folder, split), os.path.join(folder, INDEX_FOLDER, split)
        os.makedirs(records, exist_ok=True)
        os.makedirs(indices, exist_ok=True)
        sweep(records)
        sweep(indices)


def _finished(shard: Shard) -> bool:
    note = read_json(shard.note)
    return note is not None and _is_whole(shard, note["bytes"])


def _is_whole(shard: Shard, size: int) -> bool:
    """Say whether a shard is there, with an index file that fits."""
    try:
        if os.path.getsize(shard.path) != size:
            return False
        tfrecord.read_index(shard.index, size)
    except (DataError, OSError):
        return False
    return True


def _write_manifest(
    folder: str, shards: list[Shard], classes: list[str] | None, settings: dict[str, Any]
) -> None:
    notes = [read_json(shard.note) for shard in shards]
    labels = {int(label) for note in notes for label in note["labels"]}
    names = {int(label): name for note in notes for label, name in note["names"].items()}
    num_classes = len(classes) if classes else max(labels, default=0)
    if classes is None and len(names) == num_classes:
        classes = [names[label] for label in sorted(names)]
    splits = {}
    for split in SPLITS:
        mine = [note for note in notes if note["split"] == split]
        counts: Counter[str] = Counter()
        for note in mine:
            counts.update(note["labels"])
        splits[split] = {
            "images": sum(note["images"] for note in mine),
            "images_per_class": [counts[str(label + 1)] for label in range(num_classes)],
            "shards": [{key: note[key] for key in _ENTRY} for note in mine],
        }
    manifest = {
        "num_classes": num_classes,
        "classes": classes,
        "settings": settings,
        "splits": splits,
    }
    write_json(os.path.join(folder, MANIFEST), manifest)
    shutil.rmtree(os.path.join(folder, NOTES))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.make_tfrecords",
        description="Write image folders as shuffled TFRecords with index files and a manifest, or "
        "verify and index TFRecords that are there.",
        epilog=tool.EXIT_CODES,
    )
    add = parser.add_argument
    add("--data-dir", required=True, help="folder of the records (train, validation, idx_files)")
    add("--train-dir", help="folder of training images, one folder per class")
    add("--val-dir", help="folder of validation images, one folder per class")
    add("--from-tfrecords", action="store_true", help="index the records under --data-dir")
    add(
        "--images-per-shard",
        type=int,
        default=1252,
        help="most images of one file; the default makes 1,024 files of ImageNet's training images "
        "(default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the training images' order (default: %(default)s)")
    add(
        "--reencode",
        action="store_true",
        help="turn what is not a plain RGB or grey JPEG, or has corrupt EXIF, into one",
    )
    add(
        "--short-side",
        type=int,
        default=0,
        help="shrink images to this shorter side, in pixels: faster to read and decode, but other "
        "pixels; the README has figures",
    )
    add(
        "--quality",
        type=int,
        default=90,
        help="of JPEGs that are re-encoded (default: %(default)s)",
    )
    add("--exclude", help="file that lists images to leave out, as python -m data.check writes it")
    tool.add_workers(parser)
    return parser


def _refuse_within(parser: argparse.ArgumentParser, data_dir: str, flag: str, images: str) -> None:
    """End with exit code 2 if records and images would lie in one folder."""
    records, root = os.path.realpath(data_dir), os.path.realpath(images)
    if os.path.commonpath([records, root]) == root:
        parser.error(f"--data-dir: {data_dir} lies in {flag} {images}; name a folder outside")
    if root in [os.path.join(records, split) for split in SPLITS]:
        parser.error(f"--data-dir: the images of {flag} lie where its records go; name another")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.from_tfrecords == bool(options.train_dir or options.val_dir):
        parser.error("give --train-dir and --val-dir, or --from-tfrecords")
    if not options.from_tfrecords and not (options.train_dir and options.val_dir):
        parser.error("--train-dir and --val-dir go together")
    flags = (*_FLAGS, "exclude")
    given = [flag for flag in flags if getattr(options, flag) != parser.get_default(flag)]
    if options.from_tfrecords and given:
        parser.error(f"--{given[0].replace('_', '-')} does nothing with --from-tfrecords")
    if "quality" in given and not (options.reencode or options.short_side):
        parser.error("--quality does nothing without --short-side or --reencode")
    if options.images_per_shard < 1:
        parser.error("--images-per-shard must be 1 at least")
    if options.short_side < 0 or not 1 <= options.quality <= 100:
        parser.error("--short-side must not be negative, --quality lies between 1 and 100")
    tool.refuse_unwritable_folder(parser, "--data-dir", options.data_dir)
    for flag in () if options.from_tfrecords else ("train", "val"):
        _refuse_within(parser, options.data_dir, f"--{flag}-dir", getattr(options, f"{flag}_dir"))
    return tool.run("data.make_tfrecords", lambda pool: make(options, pool), options.workers)


if __name__ == "__main__":
    sys.exit(main())
