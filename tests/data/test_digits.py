"""The digits: stratified, byte-identical, complete or not at all; as folders and in memory."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch

from data import DataError, digits
from data.sources.digits import Digits
from data.sources.folder import ImageFolders
from data_fixtures import Share


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "set"
    assert digits.main([str(path)]) == 0
    return path


def contents(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.jpg")
    }


def test_counts_classes_and_strata(folder):
    source = ImageFolders(str(folder / "train"), str(folder / "val"), image_size=32, val_resize=32)
    source.check()
    assert (source.num_classes, source.train_size, source.val_size) == (10, 1437, 360)
    shares = [len(list((folder / "val" / str(digit)).iterdir())) for digit in range(10)]
    assert set(shares) <= {34, 35, 36, 37}
    assert len({path.name for path in folder.rglob("*.jpg")}) == 1797  # no image twice
    names = "\n".join(sorted(contents(folder)))
    assert (
        hashlib.sha256(names.encode()).hexdigest()
        == "946f583a92bc1e5f8631ebde8ca87c7a6a286e89501b0ff680e089b7c0aaee28"
    )  # the split never changes


def test_images_are_the_digits(folder):
    from sklearn.datasets import load_digits

    source = ImageFolders(str(folder / "train"), str(folder / "val"), image_size=32, val_resize=32)
    images, labels = next(iter(source.val_loader(Share(val_batch_size=360), workers=0)))
    names = [
        int(p.stem) for digit in range(10) for p in sorted((folder / "val" / str(digit)).iterdir())
    ]
    bunch = load_digits()
    assert labels.tolist() == bunch.target[names].tolist()
    # Averaged over 4x4 pixels, each enlarged JPEG is closest to its own original.
    small = images.double().mean(1).reshape(360, 8, 4, 8, 4).mean((2, 4)).reshape(360, 64)
    originals = torch.from_numpy(bunch.images[names] * 255 / 16).reshape(360, 64)
    assert torch.cdist(small, originals).argmin(1).tolist() == list(range(360))


def test_a_second_run_writes_nothing_and_two_sets_are_the_same_bytes(folder, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert digits.main([str(folder)]) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert digits.write_digits(str(tmp_path / "other"))
    assert contents(tmp_path / "other") == contents(folder)


def test_a_damaged_or_foreign_folder_is_refused_and_kept(tmp_path, capsys):
    assert digits.write_digits(str(tmp_path / "set"))
    (
        tmp_path / "set" / "train" / "3" / os.listdir(tmp_path / "set" / "train" / "3")[0]
    ).write_bytes(b"")
    (tmp_path / "mine").mkdir()
    for name in ("set", "mine"):
        with pytest.raises(DataError, match="not a complete copy of this data set"):
            digits.write_digits(str(tmp_path / name))
        assert digits.main([str(tmp_path / name)]) == 3
        assert name in capsys.readouterr().err
        assert (tmp_path / name).is_dir()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    calls = iter(range(100))

    def enlarged(digit):
        if next(calls) == 50:
            raise KeyboardInterrupt
        return original(digit)

    (tmp_path / "set.unfinished.k2x").mkdir()  # what a SIGKILL would have left
    original = digits._enlarged
    monkeypatch.setattr(digits, "_enlarged", enlarged)
    with pytest.raises(KeyboardInterrupt):
        digits.write_digits(str(tmp_path / "set"))
    assert os.listdir(tmp_path) == []


def test_the_source_in_memory_has_the_images_and_labels_of_the_folders(folder):
    trees = ImageFolders(str(folder / "train"), str(folder / "val"), image_size=32, val_resize=32)
    source = Digits()
    source.check()
    assert (source.num_classes, source.train_size, source.val_size) == (10, 1437, 360)
    share = Share(val_batch_size=360)
    (images, labels), (jpegs, expected) = (
        next(iter(each.val_loader(share, workers=0))) for each in (source, trees)
    )
    # The tree's files are named by the digits' numbers, so both are in the same order.
    assert labels.equal(expected)
    assert (images.int() - jpegs.int()).abs().float().mean() < 6  # of 255: the JPEGs' loss


def test_the_statistics_are_those_of_the_training_images():
    source = Digits(padding=0)
    loader = source.train_loader(Share(batch_size=1437, effective_batch_size=1437), workers=0)
    ((images, _),) = loader.epoch(0)
    assert images.float().mean().item() == pytest.approx(source.mean[0], abs=0.5)
    assert images.float().std().item() == pytest.approx(source.std[0], abs=0.5)
