"""What a folder of records already holds, and the manifest that describes it when it is complete."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from typing import Any

from data import DataError, SetError
from data.make_tfrecords.shards import NOTES, Shard, write_note
from data.samples import tfrecord
from data.samples.record_files import INDEX_FOLDER, MANIFEST, SPLITS
from data.tooling.atomic import read_json, sweep, write_json

# What the manifest stores for each record file.
_ENTRY = ("name", "images", "bytes", "sha256")


def settings_path(folder: str) -> str:
    """Return the path of the note of the settings with which records were started."""
    return os.path.join(folder, NOTES, "settings.json")


def read_manifest(folder: str) -> dict[str, Any]:
    """Read the manifest; return {} if it is missing or damaged."""
    manifest = read_json(os.path.join(folder, MANIFEST))
    try:
        entries = [entry for split in SPLITS for entry in manifest["splits"][split]["shards"]]
        complete = all(key in entry for entry in entries for key in _ENTRY)
        return manifest if complete and isinstance(manifest["settings"], dict) else {}
    except (KeyError, TypeError):
        return {}


def refuse_other_settings(folder: str, settings: dict[str, Any]) -> None:
    """Raise DataError if `folder` holds records that were made or started with other settings."""
    started = read_json(settings_path(folder))
    finished = read_manifest(folder).get("settings", {})
    earlier = started if isinstance(started, dict) else finished
    records = any(os.path.exists(os.path.join(folder, split)) for split in SPLITS)
    if not records or settings in (started, finished):
        return
    if not earlier:
        raise DataError(
            f"--data-dir: {folder} holds records but no complete {MANIFEST}; write it with "
            f"--from-tfrecords --data-dir {folder}, or remove the folder, or name another"
        )
    if "from_tfrecords" in earlier:
        difference = "that this tool did not make from folders"
    else:
        difference = "made with " + ", ".join(
            f"other images than those in --{flag.replace('_', '-')} now (their names or sizes)"
            if flag.endswith("_dir")
            else f"--{flag.replace('_', '-')} {earlier.get(flag)}, not {settings[flag]}"
            for flag in settings
            if earlier.get(flag) != settings[flag]
        )
    raise DataError(
        f"--data-dir: {folder} holds complete or unfinished records {difference}; "
        "remove it or name another folder"
    )


def is_complete(folder: str, shards: list[Shard], settings: dict[str, Any]) -> bool:
    """Whether all records and the manifest are there.

    If some files of a finished set are missing or damaged, write notes on the intact ones, so that
    only the others are made again.
    """
    manifest = read_manifest(folder)
    if manifest.get("settings") != settings:
        return False
    entries = {
        (split, entry["name"]): entry
        for split in SPLITS
        for entry in manifest["splits"][split]["shards"]
    }
    intact = [
        shard
        for shard in shards
        if (entry := entries.get((shard.split, shard.name))) and is_intact(shard, entry["bytes"])
    ]
    if len(intact) == len(shards):
        shutil.rmtree(os.path.join(folder, NOTES), ignore_errors=True)
        return True
    os.makedirs(os.path.join(folder, NOTES), exist_ok=True)
    for shard in intact:
        write_note(shard, entries[shard.split, shard.name], shard.labels, {}, {})
    return False


def start(folder: str, settings: dict[str, Any]) -> None:
    """Make the folders, and note the settings so that a later run knows that it may continue."""
    os.makedirs(os.path.join(folder, NOTES), exist_ok=True)
    write_json(settings_path(folder), settings)
    for split in SPLITS:
        records, indices = os.path.join(folder, split), os.path.join(folder, INDEX_FOLDER, split)
        os.makedirs(records, exist_ok=True)
        os.makedirs(indices, exist_ok=True)
        sweep(records)
        sweep(indices)


def is_finished(shard: Shard) -> bool:
    """Whether a note says that the shard is finished, and its files are intact."""
    note = read_json(shard.note)
    if note is None or not is_intact(shard, note["bytes"]):
        return False
    return "modified" not in note or note["modified"] == os.stat(shard.path).st_mtime_ns


def is_intact(shard: Shard, size: int) -> bool:
    """Whether the shard's file has this size and an index file that matches."""
    try:
        if os.path.getsize(shard.path) != size:
            return False
        tfrecord.read_index(shard.index, size)
    except (DataError, OSError):
        return False
    return True


def label_base(notes: list[dict[str, Any]], given: int | None) -> int:
    """Return the label of the first class.

    Args:
        notes: The notes on all shards.
        given: The user's ``--label-base``.

    Raises:
        SetError: The labels cannot count from there.
    """
    labels = {int(label) for note in notes for label in note["labels"]}
    base = max(note.get("first_label", 1) for note in notes) if given is None else given
    first, last = min(labels), max(labels)
    if first < base:
        lowest = next(note for note in notes if str(first) in note["labels"])
        raise SetError(
            f"labels run from {first} to {last}: this set counts from {first} (see "
            f"{lowest['split']}/{lowest['name']}, record at byte {lowest.get('offset_of_lowest', 0)}); "
            "run the same command with --label-base 0"
        )
    if given == 0 < first:
        raise SetError(
            f"--label-base 0, but labels run from {first} to {last}: this set counts from {first}; "
            "leave out --label-base"
        )
    return base


def write_manifest(
    folder: str,
    shards: list[Shard],
    classes: list[str] | None,
    settings: dict[str, Any],
    given_base: int | None = None,
) -> None:
    """Write the manifest from the notes, and remove the notes."""
    notes = [read_json(shard.note) for shard in shards]
    base = label_base(notes, given_base)
    labels = {int(label) for note in notes for label in note["labels"]}
    names = {int(label): name for note in notes for label, name in note["names"].items()}
    num_classes = len(classes) if classes else max(labels) - base + 1
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
            "images_per_class": [counts[str(label + base)] for label in range(num_classes)],
            "shards": [{key: note[key] for key in _ENTRY} for note in mine],
        }
    manifest = {
        "num_classes": num_classes,
        "classes": classes,
        "settings": settings,
        "splits": splits,
    }
    if base != 1:
        manifest["label_base"] = base
    write_json(os.path.join(folder, MANIFEST), manifest)
    shutil.rmtree(os.path.join(folder, NOTES))
