"""Images that do not lie in one folder per class, in the order and with the labels of class folders."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from data import DataError
from data.samples.class_folders import Oddities, notes_about
from data.samples.listing import ClassFolder, first_few, pack
from data.samples.listing_cache import list_folders
from data.samples.tree import FileTree, without


class FlatTree(FileTree):
    """Images in one folder. Their class is known from elsewhere.

    They are numbered class by class, so a run sees the same samples as from class folders.
    """

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        return os.path.join(self.root, self.file(index))


class SuffixTree(FileTree):
    """Images in one folder whose names end with their class: ``<name>_<class>.<ending>``.

    `name` leaves the class out, so the samples are the same as from class folders.
    """

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        stem, ending = os.path.splitext(self.file(index))
        return os.path.join(self.root, f"{stem}_{self.classes[self.label(index)]}{ending}")


def images_in(root: str, flag: str) -> ClassFolder:
    """List the images in a folder that has no class folders.

    Raises:
        DataError: It cannot be listed, or a link in it has no target.
    """
    try:
        (found,) = list_folders(root, ["."])
    except OSError as error:
        raise DataError(f"{flag}: {error.filename} cannot be listed: {error.strerror}") from error
    if found.dangling:
        raise DataError(
            f"{flag}: {root}: {first_few(found.dangling)} is a link whose target does not exist; "
            "restore the target, or remove the link"
        )
    return found


def oddities_of(root: str, found: ClassFolder, notes: Sequence[str] = ()) -> Oddities:
    """Return `notes`, and what was left out of a folder without class folders."""
    return Oddities((*notes, *notes_about(root, [""], [found])))


def by_class(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the names of the images of each class, sorted, from pairs (image, class)."""
    grouped: defaultdict[str, list[str]] = defaultdict(list)
    for image, name in pairs:
        grouped[name].append(image)
    return {name: sorted(images) for name, images in grouped.items()}


def packed_classes(
    classes: Sequence[str], images: Mapping[str, Sequence[str]], excluded: Collection[str]
) -> tuple[list[bytes], list[str]]:
    """Return the packed names of each class without the excluded ones, and what matched no image."""
    unmatched = set(excluded)
    packed = [without(name, pack(images.get(name, ())), excluded, unmatched) for name in classes]
    return packed, sorted(unmatched)
