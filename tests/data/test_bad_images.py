"""Images that cannot be read are named, and each policy keeps the ranks in step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data import DataError
from data.loader.order import sample_seeds
from data.loader.reader import Reader
from data.loader.sampler import MicroBatch
from data.pixels.boxes import crop, full_image
from data.pixels.transforms import TrainTransform
from data.samples.arrays import ArraySamples
from data.samples.tree import FileTree
from data.sources.imagenet import ImageNet
from data_fixtures import Share, photograph, write_tree


@pytest.fixture
def source(tmp_path):
    write_tree(tmp_path / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(tmp_path / "val", {"ant": 6, "bee": 5}, seed=2)
    for path in ("train/bee/004.jpg", "train/bee/005.jpg", "val/ant/001.jpg"):
        broken = tmp_path / path
        broken.write_bytes(broken.read_bytes()[:150])
    return ImageNet(str(tmp_path / "train"), str(tmp_path / "val"), image_size=16)


def loader(source, rank=0, size=1, workers=0):
    return source.train_loader(Share(rank, size, batch_size=3), workers)


def test_an_error_stops_by_default(source):
    with pytest.raises(DataError, match=r"bee/00[45]\.jpg cannot be decoded"):
        list(loader(source).epoch(0))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_skipping_makes_micro_batches_smaller_and_not_fewer(source, size):
    source = replace(source, on_bad_image="skip")
    loaders = [loader(source, rank, size) for rank in range(size)]
    lengths = [[len(labels) for _, labels in each.epoch(0)] for each in loaders]
    assert len({len(each) for each in lengths}) == 1
    assert sum(map(sum, lengths)) == 21
    bad = [text for each in loaders for text in each.bad_images]
    assert sorted(text.split()[0][-11:] for text in bad) == ["bee/004.jpg", "bee/005.jpg"]


class Boxes:
    """One image, and the boxes of it that were requested."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, int]] = []
        self.pixels = photograph(60, 80, seed=1)

    def __len__(self) -> int:
        return 1

    def read(self, index, crop_fn):
        self.asked.append(crop_fn(60, 80))
        return crop(self.pixels, self.asked[-1]), 0


def test_the_first_epoch_decodes_full_images_to_find_all_damage():
    """It still takes the crop that the sample's seed draws."""
    samples, transform, one = Boxes(), TrainTransform(16), np.array([0])
    for epoch, policy in ((0, "error"), (1, "error"), (1, "skip")):
        reader = Reader(samples, transform, on_bad_image=policy)
        (images, _), _ = reader.read(MicroBatch(epoch, one, np.zeros_like(one)))
        generator = torch.Generator().manual_seed(
            int(sample_seeds(0, epoch, one, np.zeros_like(one))[0])
        )
        box = transform.box(60, 80, generator)
        assert torch.equal(images[0], transform(crop(samples.pixels, box), generator))
        only_the_box = epoch == 1 and policy == "error"
        assert samples.asked.pop() == (box if only_the_box else (0, 0, 60, 80))


def test_replacing_keeps_micro_batches_full(source):
    train = loader(replace(source, on_bad_image="replace"))
    labels = [label for _, batch in train.epoch(0) for label in batch.tolist()]
    assert (labels.count(0), labels.count(1)) == (9, 14)
    assert len(train.bad_images) == 2
    list(train.epoch(1))
    assert len(train.bad_images) == 2  # each is named once


def test_the_last_image_is_replaced_by_the_first(source, tmp_path):
    (tmp_path / "train" / "bee" / "013.jpg").write_bytes(b"")
    train = loader(replace(source, on_bad_image="replace"))
    labels = [label for _, batch in train.epoch(0) for label in batch.tolist()]
    assert (labels.count(0), labels.count(1)) == (10, 13)


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_validation_leaves_bad_images_out(source, policy):
    val = replace(source, on_bad_image=policy).val_loader(Share(), workers=0)
    assert [len(labels) for _, labels in val] == [3, 4, 3]
    assert [text.split()[0][-11:] for text in val.bad_images] == ["ant/001.jpg"]


def test_workers_report_too(source):
    train = loader(replace(source, on_bad_image="skip"), workers=1)
    assert sum(len(labels) for _, labels in train.epoch(0)) == 21
    assert len(train.bad_images) == 2
    train.close()


def test_there_is_a_limit(source):
    source = replace(source, on_bad_image="skip", max_bad_images=1)
    with pytest.raises(DataError, match=r"more than --max-bad-images 1 .*data\.check.*bee/00"):
        list(loader(source).epoch(0))


def test_replacing_obeys_the_limit_when_a_file_system_goes_away(source, monkeypatch):
    train = loader(replace(source, on_bad_image="replace", max_bad_images=3))
    asked = []

    def gone(_, index):
        asked.append(index)
        raise DataError("it is gone")

    monkeypatch.setattr(FileTree, "encoded", gone)
    with pytest.raises(DataError, match=r"more than --max-bad-images 3 .*The last: it is gone"):
        list(train.epoch(0))
    assert len(asked) == 4


def test_names_in_the_list_that_match_no_image_are_reported_once(source, tmp_path, capsys):
    names = tmp_path / "bad.txt"
    names.write_text("train/bee/004.jpg\ntrain/bee/999.jpg\nval/cow/001.jpg\n")
    source = replace(source, exclude=str(names))
    for rank in (0, 1):
        loader(source, rank, 2)
    assert (
        capsys.readouterr().err
        == f"warning: --exclude {names}: no image for bee/999.jpg, cow/001.jpg\n"
    )
    names.write_text("bee/004.jpg\n")
    with pytest.raises(DataError, match=r"--exclude: .*line 1: 'bee/004.jpg' does not begin with"):
        replace(source, exclude=str(names)).check()


def test_a_replacement_draws_what_the_bad_image_would_have():
    """It does not matter whether the bad image was noticed before or after its box was drawn."""

    class FirstIsBad(ArraySamples):
        drawn = False

        def read(self, index, crop_fn=full_image):
            if index == 0:
                if self.drawn:
                    crop_fn(40, 50)
                raise DataError("bad")
            return super().read(index, crop_fn)

    images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)
    samples = FirstIsBad(images, np.zeros(2, np.int64), 1)
    reader = Reader(samples, TrainTransform(16), 0, "replace", max_bad_images=1)
    (before, _), _ = reader.read(MicroBatch(1, np.array([0]), np.array([0])))
    samples.drawn = True
    (after, _), _ = reader.read(MicroBatch(1, np.array([0]), np.array([0])))
    assert torch.equal(before, after)


def test_a_run_without_any_readable_image_ends(tmp_path, source):
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image can be read"):
        list(loader(replace(source, on_bad_image="replace")).epoch(0))


def test_a_list_excludes_them(source, tmp_path):
    names = tmp_path / "bad.txt"
    names.write_text(
        "# made by data.check\n\ntrain/bee/004.jpg\ntrain/bee/005.jpg\nval/ant/001.jpg\n"
    )
    source = replace(source, exclude=str(names))
    source.check()
    assert (source.train_size, source.val_size) == (21, 10)
    assert sum(len(labels) for _, labels in loader(source).epoch(0)) == 21
    with pytest.raises(DataError, match=r"--exclude: .*nowhere\.txt cannot be read"):
        replace(source, exclude=str(tmp_path / "nowhere.txt")).check()
