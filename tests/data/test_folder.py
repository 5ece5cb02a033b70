"""Image folders: torchvision's numbering, and an error with a fix for each broken layout."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torchvision

from data import DataError
from data.pixels import decode as decoding
from data.samples.tree import scan
from data.sources.folder import ImageFolders
from data_fixtures import Share, write_tree


@pytest.fixture
def source(tmp_path):
    write_tree(tmp_path / "train", {"ant": 3, "bee": 2, "cat": 1})
    write_tree(tmp_path / "val", {"ant": 1, "bee": 1, "cat": 2})
    return ImageFolders(str(tmp_path / "train"), str(tmp_path / "val"), image_size=16)


def refusal(source: ImageFolders) -> str:
    with pytest.raises(DataError) as caught:
        source.check()
    return str(caught.value)


def test_numbering_and_labels_are_torchvisions(tmp_path):
    root = tmp_path / "tree"
    write_tree(root, {"b": 2, "a": 3, "B": 1, "ö ü": 2})
    write_tree(root / "a", {"nested": 2, "album.jpg": 1})
    for name in ("10.JPEG", "9.png", "Z.jpeg", "notes.txt", "thumbs.db"):
        (root / "b" / name).write_bytes(b"")
    (root / "loose.txt").write_bytes(b"")
    (root / "linked").symlink_to(root / "a")
    ours, theirs = scan(str(root), "--train-dir"), torchvision.datasets.ImageFolder(str(root))
    assert ours.classes == theirs.classes
    paths = [os.path.join(root, ours.path(i)) for i in range(len(ours))]
    assert paths == [path for path, _ in theirs.samples]
    assert [ours.label(i) for i in range(len(ours))] == theirs.targets
    assert ours.counts == np.bincount(theirs.targets).tolist()


def test_the_fingerprint_depends_on_names_and_labels_and_not_on_paths(source, tmp_path):
    def fingerprint(**options) -> str:
        return ImageFolders(f"{tmp_path}/moved", source.val_dir, **options).fingerprint

    shutil.copytree(source.train_dir, tmp_path / "moved")
    assert fingerprint() == source.fingerprint
    bee, listed = tmp_path / "moved" / "bee", tmp_path / "bad.txt"
    listed.write_text("train/bee/000.jpg")
    seen = {source.fingerprint, fingerprint(exclude=str(listed))}
    (bee / "000.jpg").rename(bee / "003.jpg")
    (bee / "001.jpg").rename(bee / "004.jpg")
    seen.add(fingerprint())
    (bee / "003.jpg").rename(tmp_path / "moved" / "ant" / "003.jpg")
    seen.add(fingerprint())
    bee.rename(bee.with_name("bug"))  # a source refuses classes that validation does not have
    renamed = scan(f"{tmp_path}/moved", "--train-dir").fingerprint
    seen.add(f"{renamed}-{source.fingerprint.split('-')[1]}")
    assert len(seen) == 5
    assert len({each.split("-")[1] for each in seen}) == 1  # that of the validation images


def test_the_table_of_names_is_compact(tmp_path):
    # Each worker gets a few tens of bytes per file at most, however long the root's path is.
    tree = scan(str(write_tree(tmp_path / ("long" * 30), {"n01440764": 40})), "--train-dir")
    assert len(pickle.dumps(tree)) < 4000 + 40 * 30


def test_good_folders_are_accepted(source):
    source.check()
    assert (source.num_classes, source.train_size, source.val_size) == (3, 6, 4)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_folder_is_refused(source, split, tmp_path):
    broken = replace(source, **{f"{split}_dir": str(tmp_path / "nowhere")})
    assert refusal(broken).startswith(f"--{split}-dir: {tmp_path}/nowhere is not a folder")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flat_folder_is_refused(source, split, tmp_path):
    for image in (tmp_path / "val").glob("*/*.jpg"):
        image.rename(tmp_path / "val" / f"{image.parent.name}{image.name}")
    for name in ("ant", "bee", "cat"):
        (tmp_path / "val" / name).rmdir()
    message = refusal(replace(source, **{f"{split}_dir": str(tmp_path / "val")}))
    assert f"--{split}-dir" in message
    assert "4 images but no class folders" in message
    assert "one folder per class" in message


def test_an_empty_folder_is_refused(source, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(replace(source, val_dir=str(tmp_path / "empty")))
    assert message.startswith("--val-dir")
    assert "no class folders" in message


def test_an_empty_class_is_refused(source, tmp_path):
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "readme.txt").write_text("no image")
    message = refusal(source)
    assert message.startswith("--train-dir")
    assert "dog" in message


def test_classes_that_differ_are_refused(source, tmp_path):
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    message = refusal(source)
    assert "--train-dir" in message
    assert "--val-dir" in message
    assert "Only in train: cat; only in val: cow" in message


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"image_size": 0}, "--image-size"),
        ({"val_resize": 8}, "--val-resize"),
        ({"val_resize": 0}, "--val-resize 0"),
        ({"crop_area": (0.5, 0.2)}, "--crop-area"),
        ({"crop_area": (0.0, 1.0)}, "--crop-area"),
        ({"crop_area": (0.5, 1.5)}, "--crop-area"),
        ({"crop_aspect": (2.0, 1.0)}, "--crop-aspect"),
        ({"crop_aspect": (0.0, 1.0)}, "--crop-aspect"),
    ],
)
def test_impossible_sizes_and_crops_are_refused(source, change, flag):
    assert refusal(replace(source, **change)).startswith(flag)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_named(source, tmp_path, workers):
    broken = tmp_path / "val" / "bee" / "000.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError) as caught:
        list(source.val_loader(Share(val_batch_size=2), workers))
    message = str(caught.value)
    del caught  # it refers to the loader's frames and so to its workers
    assert message.startswith(f"{broken} cannot be decoded")
    assert "Traceback" not in message


def test_workers_end_with_the_loader_after_an_error(source, tmp_path):
    (tmp_path / "val" / "ant" / "000.jpg").write_bytes(b"")
    loader = source.val_loader(Share(val_batch_size=2), workers=1)
    gc.collect()  # loaders of earlier tests
    gc.disable()
    try:
        with pytest.raises(DataError):
            list(loader)
        assert multiprocessing.active_children()
        del loader
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_pixels_do_not_depend_on_how_much_is_decoded(source, monkeypatch):
    def images() -> list[np.ndarray]:
        loader = source.train_loader(Share(effective_batch_size=4), workers=0)
        return [images.numpy() for epoch in range(5) for images, _ in loader.epoch(epoch)]

    if decoding.region_decoder() is None:
        pytest.skip("nvImageCodec 0.9 is not installed: it comes with DALI")
    by_region = images()
    monkeypatch.setattr(decoding, "region_decoder", lambda: None)
    assert all(np.array_equal(a, b) for a, b in zip(by_region, images(), strict=True))


def test_each_sample_has_its_own_augmentation(tmp_path):
    write_tree(tmp_path / "tree", {"a": 1})
    first = tmp_path / "tree" / "a" / "000.jpg"
    for number in range(1, 6):
        shutil.copy(first, first.with_stem(f"{number:03d}"))
    source = ImageFolders(str(tmp_path / "tree"), str(tmp_path / "tree"), image_size=16)
    seen = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        share = Share(batch_size=6, effective_batch_size=6, seed=seed)
        loader = source.train_loader(share, workers=0)
        seen += [image.numpy().tobytes() for images, _ in loader.epoch(epoch) for image in images]
    assert len(set(seen)) == 18


@pytest.mark.parametrize("name", ["loop", "loop.jpg", "ant/loop", "ant/loop.jpg"])
def test_links_that_point_to_themselves_are_refused_by_name(source, tmp_path, name):
    link = tmp_path / "val" / name
    link.symlink_to(link.name)
    message = refusal(source)
    assert message.startswith(f"--val-dir: {link} cannot be listed: Too many levels")


def test_a_file_that_went_away_is_named(source, tmp_path):
    source.check()
    gone = tmp_path / "val" / "bee" / "000.jpg"
    gone.unlink()
    with pytest.raises(DataError, match=f"{gone} cannot be read: No such file"):
        list(source.val_loader(Share(val_batch_size=2), workers=0))
