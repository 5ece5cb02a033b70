"""What lies in a folder of class folders: classes, images, and what does not count as either.

This is the only place that decides what an image folder holds. The training scripts and all tools
use it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from data.tooling.atomic import is_unfinished

# torchvision's list. Files with other endings are images if their first bytes say so.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Folders that tools create beside the data. Hidden ones (.ipynb_checkpoints) need no entry.
_TOOL_FOLDERS = {
    "__MACOSX",  # macOS archives
    "__pycache__",
    "@eaDir",  # Synology
    "@Recycle",  # QNAP
    "#recycle",
    "#snapshot",
    "~snapshot",  # NetApp
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}

# First bytes of the image formats that PIL reads without plug-ins and that are common.
_MAGIC = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"\0\0\0\x0cjP  \r\n\x87\n",  # JPEG 2000
)
_MAGIC_BYTES = 16

# Listing a folder on a network file system is mostly waiting for replies, which threads overlap.
_SCAN_THREADS = 16


@dataclass
class ClassFolder:
    """What one class folder holds.

    Attributes:
        images: The images relative to the folder, in torchvision's order: folder by folder.
        ignored: Hidden files and folders of tools, relative to the folder.
        dangling: Links without a target whose name does not show that they are images.
        other: Number of files of each ending that are not images.
        recognised: Number of images of each ending that is not in `EXTENSIONS`.
    """

    images: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    recognised: Counter[str] = field(default_factory=Counter)

    @property
    def inner_folders(self) -> list[str]:
        """Names of the folders directly inside that hold images."""
        return sorted({name.split("/")[0] for name in self.images if "/" in name})

    @property
    def only_folders(self) -> bool:
        """Whether all images lie in folders inside the class folder."""
        return bool(self.images) and all("/" in name for name in self.images)


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
        ignored = self.ignored + [
            f"{name}/{entry}"
            for name, folder in zip(self.classes, self.folders, strict=True)
            for entry in folder.ignored
        ]
        recognised = sum((folder.recognised for folder in self.folders), Counter[str]())
        other = sum((folder.other for folder in self.folders), Counter[str]())
        notes = []
        if ignored:
            notes.append(
                f"{self.root}: left out hidden files and folders of tools: {first_few(ignored)}"
            )
        if recognised:
            notes.append(
                f"{self.root}: {recognised.total():,} files with unusual endings are images, and "
                f"are used: {_endings(recognised)}"
            )
        if other:
            notes.append(
                f"{self.root}: left out {other.total():,} files that are not images: {_endings(other)}"
            )
        if self.loose:
            notes.append(f"{self.root}: left out {self.loose:,} images outside the class folders")
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
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        folders = list(pool.map(_list_class, [os.path.join(root, name) for name in classes]))
    return Listing(root, classes, folders, ignored, dangling, loose)


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden, unfinished or made by a tool."""
    return is_foreign(name) or is_unfinished(name)


def is_foreign(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by a tool that is not ours."""
    return name.startswith(".") or name in _TOOL_FOLDERS


def is_dangling(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a visible link whose target does not exist."""
    return entry.is_symlink() and not is_ignored(entry.name) and not os.path.exists(entry.path)


def first_few(names: Sequence[str]) -> str:
    """Return the first few of many names, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "none"


def _endings(counts: Counter[str]) -> str:
    return first_few([f"{ending or 'no ending'} ({n:,})" for ending, n in counts.most_common()])


def _sorted_entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _list_class(root: str) -> ClassFolder:
    found = ClassFolder()
    images: list[tuple[str, str]] = []
    pending = [""]
    while pending:
        inner = pending.pop()
        with os.scandir(os.path.join(root, inner)) as entries:
            images += _look_through(entries, inner, found, pending)
    found.images = [os.path.join(inner, name) for inner, name in sorted(images)]
    found.ignored.sort()
    found.dangling.sort()
    return found


def _look_through(
    entries: Iterable[os.DirEntry[str]], inner: str, found: ClassFolder, pending: list[str]
) -> list[tuple[str, str]]:
    """Return the images of one folder as (folder, name), and add its folders to `pending`."""
    images = []
    for entry in entries:
        name = entry.name
        known = name.lower().endswith(EXTENSIONS)
        if entry.is_dir():
            if is_ignored(name):
                found.ignored.append(os.path.join(inner, name))
            else:
                pending.append(os.path.join(inner, name))
        elif is_ignored(name):
            found.ignored.append(os.path.join(inner, name))
        elif known:
            images.append((inner, name))
        elif is_dangling(entry):
            found.dangling.append(os.path.join(inner, name))
        elif entry.is_file():
            ending = os.path.splitext(name)[1].lower()
            if holds_image(entry.path):
                images.append((inner, name))
                found.recognised[ending] += 1
            else:
                found.other[ending] += 1
    return images


def holds_image(path: str) -> bool:
    """Whether the first bytes of a file are those of an image."""
    try:
        with open(path, "rb") as file:
            start = file.read(_MAGIC_BYTES)
    except OSError:
        return False
    return start.startswith(_MAGIC) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
