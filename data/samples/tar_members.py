"""The files in a tar archive, where they lie, and whether the archive is complete."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from data import SetError

# Where the name and the size of a member lie in its header.
_NAME_BYTES = 100
_SIZE_FIELD = slice(124, 136)

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip",
              b"\x28\xb5\x2f\xfd": "zstd"}  # fmt: skip


def compression_of(start: bytes) -> str | None:
    """Return the name of the compression that a file's first bytes show; None if there is none."""
    return next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)


def is_of_macos(name: str) -> bool:
    """Whether a member is not data but what macOS adds to archives."""
    base = os.path.basename(name)
    return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in name.split("/")


def refuse_damage(tar: tarfile.TarFile) -> None:
    """Raise TarError if the tar has a damaged header, which tarfile takes for its end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def refuse_missing_end(tar: tarfile.TarFile, size: int) -> None:
    """Raise TarError if the tar of `size` bytes ends in a member, or without its end mark."""
    if tar.offset + tarfile.BLOCKSIZE > size:
        raise tarfile.ReadError("its end is missing")


def refuse_other_member(header: bytes, name: bytes, size: int) -> None:
    """Raise SetError if the header before a member is not that of a file with this name and size.

    The tar was then replaced after its index was made, by one with the same size and time.

    Args:
        header: The block before the member, and perhaps more.
        name: Name of the member. A header holds the end or the beginning of a long name, and a
            name that is not ASCII in another form.
        size: Bytes of the member.
    """
    held = header[:_NAME_BYTES].rstrip(b"\0")
    same_name = held and (name.endswith(held) or name.startswith(held) or not name.isascii())
    try:
        same_size = tarfile.nti(header[_SIZE_FIELD]) == size  # type: ignore[attr-defined]
    except tarfile.TarError:
        same_size = False
    if not (same_name and same_size):
        raise SetError(
            "another file lies here than the index says, so the tar was replaced; remove the index "
            "(index-*-tars.npz), or give another --index-dir"
        )


def plain_files(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the files in a tar, without what macOS adds; at the end, verify that it is complete.

    Raises:
        TarError: The tar is damaged, or shorter than it should be.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # millions of them would stay in memory
            if member.isfile() and not is_of_macos(member.name):
                yield member
        refuse_damage(tar)
        refuse_missing_end(tar, size)
