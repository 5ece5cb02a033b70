"""What lies in a folder of images: images, and what does not count as one.

This is the only place that decides what a folder holds. The training scripts and all tools use it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
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

# (inode, time of the last change of the content, time of the last change of any kind, size).
Stamp = tuple[int, int, int, int]


@dataclass
class ClassFolder:
    """What one class folder holds.

    Attributes:
        packed: Names of the images relative to the folder, in torchvision's order (folder by
            folder), each followed by a zero byte.
        ignored: Hidden files and folders of tools, relative to the folder.
        dangling: Links without a target whose name does not show that they are images.
        other: Number of files of each ending that are not images.
        recognised: Number of images of each ending that is not in `EXTENSIONS`.
        stamps: Everything that decided about the list: the folder, all folders in it, and all files
            whose name does not show what they are. A path relative to the folder, and its stamp
            before it was read.
        listed: When the listing began, in seconds since 1970.
    """

    packed: bytes = b""
    ignored: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    recognised: Counter[str] = field(default_factory=Counter)
    stamps: list[tuple[str, Stamp | None]] = field(default_factory=list)
    listed: float = field(default_factory=time.time)

    @property
    def images(self) -> list[str]:
        """Names of the images."""
        return unpack(self.packed)

    @property
    def inner_folders(self) -> list[str]:
        """Names of the folders directly inside that hold images."""
        if b"/" not in self.packed:
            return []
        return sorted({name.split("/")[0] for name in self.images if "/" in name})

    @property
    def only_folders(self) -> bool:
        """Whether all images lie in folders inside the class folder."""
        return b"/" in self.packed and all("/" in name for name in self.images)


def pack(names: Iterable[str]) -> bytes:
    """Return names in one piece: each of them followed by a zero byte, which no name contains."""
    return os.fsencode("".join(f"{name}\0" for name in names))


def unpack(packed: bytes) -> list[str]:
    """Return the names of `pack`."""
    return [os.fsdecode(name) for name in packed.split(b"\0")[:-1]]


def stamp(path: str) -> Stamp | None:
    """Return what changes if a folder gets or loses an entry, or if a file changes; None if missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


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


def list_images(root: str) -> ClassFolder:
    """List the images in a folder and in the folders inside it.

    Raises:
        OSError: A folder cannot be listed (a link that points to itself, for example).
    """
    found = ClassFolder()
    images: dict[str, list[str]] = {}
    pending = [""]
    while pending:
        inner = pending.pop()
        folder = os.path.join(root, inner)
        found.stamps.append((inner, stamp(folder)))
        with os.scandir(folder) as entries:
            images[inner] = _look_through(entries, inner, found, pending)
    found.packed = b"".join(
        pack(f"{inner}/{name}" if inner else name for name in sorted(images[inner]))
        for inner in sorted(images)
    )
    found.ignored.sort()
    found.dangling.sort()
    return found


def _look_through(
    entries: Iterable[os.DirEntry[str]], inner: str, found: ClassFolder, pending: list[str]
) -> list[str]:
    """Return the names of the images of one folder, and add its folders to `pending`."""
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
            images.append(name)
        else:
            found.stamps.append((os.path.join(inner, name), stamp(entry.path)))
            if _is_image_by_content(entry, inner, found):
                images.append(name)
    return images


def _is_image_by_content(entry: os.DirEntry[str], inner: str, found: ClassFolder) -> bool:
    """Look into an entry whose name does not show what it is, and count it."""
    ending = os.path.splitext(entry.name)[1].lower()
    if is_dangling(entry):
        found.dangling.append(os.path.join(inner, entry.name))
    elif entry.is_file():
        if holds_image(entry.path):
            found.recognised[ending] += 1
            return True
        found.other[ending] += 1
    return False


def holds_image(path: str) -> bool:
    """Whether the first bytes of a file are those of an image."""
    try:
        with open(path, "rb") as file:
            start = file.read(_MAGIC_BYTES)
    except OSError:
        return False
    return start.startswith(_MAGIC) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
