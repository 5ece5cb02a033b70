"""A folder of class folders: its classes, their images, and what is unusual about it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data.samples.listing import EXTENSIONS, ClassFolder, first_few, is_dangling, is_ignored
from data.samples.listing_cache import list_folders


@dataclass(frozen=True)
class Oddities:
    """What is unusual about a folder of class folders.

    Attributes:
        notes: What was left out, and which images have unusual endings.
        broken_links: Links without a target that could be class folders or folders of images.
        implausible: Why these can hardly be class folders, with the likely path; None if they can.
    """

    notes: tuple[str, ...] = ()
    broken_links: tuple[str, ...] = ()
    implausible: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a folder of class folders holds.

    Attributes:
        root: The folder.
        classes: Names of the class folders, sorted.
        folders: What each of them holds.
        ignored: Hidden folders and folders of tools directly under the root.
        dangling: Links without a target directly under the root.
        loose: Number of images directly under the root.
    """

    root: str
    classes: list[str]
    folders: list[ClassFolder]
    ignored: list[str]
    dangling: list[str]
    loose: int

    def oddities(self) -> Oddities:
        """Return what is unusual about the folder."""
        return Oddities(tuple(self._notes()), tuple(self._broken_links()), self._implausible())

    def _broken_links(self) -> list[str]:
        inner = [
            f"{name}/{link}"
            for name, folder in zip(self.classes, self.folders, strict=True)
            for link in folder.dangling
        ]
        return self.dangling + inner

    def _implausible(self) -> str | None:
        nested = [folder.only_folders for folder in self.folders]
        likely = f"{self.root}/{self.classes[0]}"
        if len(self.classes) == 1:
            fix = (
                f"its folders look like the classes, so give {likely}"
                if nested[0] and len(self.folders[0].inner_folders) > 1
                else "a network needs at least two classes"
            )
            return f"{self.root} holds a single class folder, {self.classes[0]}; {fix}"
        inner = {name for folder in self.folders for name in folder.inner_folders}
        # Tiny-ImageNet has one folder `images` in each class folder, which is fine.
        if all(nested) and len(inner) > 1:
            return (
                f"the class folders of {self.root} ({first_few(self.classes)}) hold only folders, "
                f"and these look like the classes; give one folder of classes, such as {likely}, or "
                "remove one level of folders"
            )
        return None

    def _notes(self) -> list[str]:
        notes = notes_about(self.root, self.classes, self.folders, self.ignored)
        if self.loose:
            notes.append(f"{self.root}: left out {self.loose:,} images outside the class folders")
        return notes


def notes_about(
    root: str, names: Sequence[str], folders: Sequence[ClassFolder], ignored: Sequence[str] = ()
) -> list[str]:
    """Return what was left out of folders, and which images have unusual endings.

    Args:
        root: The folder that holds them.
        names: Their names; empty for `root` itself.
        folders: What they hold.
        ignored: What was left out of `root`.
    """
    left_out = [*ignored] + [
        os.path.join(name, entry)
        for name, folder in zip(names, folders, strict=True)
        for entry in folder.ignored
    ]
    recognised = sum((folder.recognised for folder in folders), Counter[str]())
    other = sum((folder.other for folder in folders), Counter[str]())
    notes = []
    if left_out:
        notes.append(f"{root}: left out hidden files and folders of tools: {first_few(left_out)}")
    if recognised:
        notes.append(
            f"{root}: {recognised.total():,} files with unusual endings are images, and "
            f"are used: {_endings(recognised)}"
        )
    if other:
        notes.append(
            f"{root}: left out {other.total():,} files that are not images: {_endings(other)}"
        )
    return notes


def list_folder(root: str) -> Listing:
    """List a folder of class folders.

    Raises:
        OSError: An entry cannot be listed (a link that points to itself, for example).
    """
    classes: list[str] = []
    ignored: list[str] = []
    dangling: list[str] = []
    loose = 0
    for entry in _sorted_entries(root):
        if entry.is_dir():
            (ignored if is_ignored(entry.name) else classes).append(entry.name)
        elif is_dangling(entry):
            dangling.append(entry.name)
        else:
            loose += entry.name.lower().endswith(EXTENSIONS) and not is_ignored(entry.name)
    return Listing(root, classes, list_folders(root, classes), ignored, dangling, loose)


def class_names(root: str) -> list[str]:
    """Return the names of the class folders in a folder, sorted."""
    return [
        entry.name
        for entry in _sorted_entries(root)
        if not is_ignored(entry.name) and entry.is_dir()
    ]


def _endings(counts: Counter[str]) -> str:
    return first_few([f"{ending or 'no ending'} ({n:,})" for ending, n in counts.most_common()])


def _sorted_entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
