"""The contract of a source (see `data`), held by every source at 1, 2, 3 and 4 ranks."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from data import loading, make_tfrecords
from data.cifar import Cifar
from data.folder import ImageFolders
from data.imagenet import ImageNet, ImageNetDali
from data.synthetic import Synthetic
from data.tiny_imagenet import TinyImageNet
from data_fixtures import write_cifar10, write_tiny_imagenet, write_tree

SIDE = 24
BATCH = 3
SEED = 5


def folders(root) -> ImageFolders:
    write_tree(root / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(root / "val", {"ant": 6, "bee": 5}, seed=2)
    return ImageFolders(str(root / "train"), str(root / "val"), image_size=SIDE)


def noise(root) -> Synthetic:
    return Synthetic(image_size=SIDE, num_classes=2, train_size=23, val_size=11)


def records(root, **options) -> ImageNet:
    made = folders(root)
    flags = ["--train-dir", made.train_dir, "--val-dir", made.val_dir, "--workers", "0"]
    out = str(root / "records")
    assert make_tfrecords.main([*flags, "--data-dir", out, "--images-per-shard", "4"]) == 0
    return ImageNet(records=out, image_size=SIDE, **options)


def pieces_of_records(root) -> ImageNet:
    return records(root, shuffle_window=3)


def dali_records(root) -> ImageNetDali:
    return ImageNetDali(data_dir=records(root).records, image_size=SIDE)


def dali_folders(root) -> ImageNetDali:
    made = folders(root)
    return ImageNetDali(made.train_dir, made.val_dir, image_size=SIDE, reader="folder")


def cifar(root) -> Cifar:
    rng = np.random.default_rng(0)
    archive = write_cifar10(root / "cifar-10-python.tar.gz", [rng.integers(0, 10, n)
                            for n in (5, 5, 4, 4, 5)], rng.integers(0, 10, 11))  # fmt: skip
    return Cifar(archive=archive)


def tiny_imagenet(root) -> TinyImageNet:
    classes = {"n02124075": 8, "n01443537": 8, "n04067472": 7}
    val = list(classes) * 3 + list(classes)[:2]
    return TinyImageNet(archive=write_tiny_imagenet(root / "tiny.zip", classes, val))


SOURCES = {
    "folders": folders,
    "noise": noise,
    "records": records,
    "pieces of records": pieces_of_records,
    "CIFAR-10": cifar,
    "Tiny-ImageNet": tiny_imagenet,
    "records by DALI": dali_records,
    "folders by DALI": dali_folders,
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    if "DALI" in request.param:
        pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    made = SOURCES[request.param](tmp_path_factory.mktemp(request.param))
    made.check()
    return made


def train(source, rank=0, size=1, epoch=0, first_step=0, accumulate=4, **options):
    """Return one rank's micro-batches of an epoch; four of three samples make a step."""
    arguments = {"batch_size": BATCH, "effective_batch_size": BATCH * accumulate, "seed": SEED,
                 "drop_last": False, "workers": 0} | options  # fmt: skip
    loader = source.train_loader(rank=rank, size=size, **arguments)
    batches = list(loader.epoch(epoch, first_step))
    loader.close()
    return batches


def val(source, rank=0, size=1, batch_size=4, workers=0):
    return list(source.val_loader(batch_size=batch_size, rank=rank, size=size, workers=workers))


def same(a, b) -> bool:
    """Say whether two lists of batches are the same to the last bit."""
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def flat(batches):
    """Return (image, label) of every sample in order."""
    return [(image, int(label)) for batch in batches for image, label in zip(*batch, strict=True)]


def test_batches_have_the_shapes_and_types_of_the_contract(source):
    batches = train(source) + val(source)
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, source.image_size, source.image_size)
        assert labels.dtype == torch.int64
        assert labels.shape == images.shape[:1]
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert all(0 <= label < source.num_classes for label in labels.tolist())
    assert len(source.mean) == len(source.std) == 3
    assert all(1 < value < 255 for value in (*source.mean, *source.std))


def test_a_run_is_told_by_what_it_reads_and_not_by_where_it_lies(source):
    assert re.fullmatch(r"\w+-\w+", source.fingerprint)
    assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint
    for field in dataclasses.fields(source):
        if field.name == "exclude" or str(getattr(source, field.name)).startswith("/"):
            assert field.metadata["same_run"] is False, field.name


def test_an_epoch_holds_every_sample_once(source):
    batches = train(source)
    assert [len(images) for images, _ in batches] == [3, 3, 3, 3, 2, 3, 3, 3]
    # The same labels as often as another epoch and a single big step give them.
    labels = sorted(label for _, label in flat(batches))
    assert len(labels) == source.train_size
    assert labels == sorted(label for _, label in flat(train(source, epoch=9)))
    assert labels == sorted(label for _, label in flat(train(source, accumulate=8)))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_micro_batches_do_not_depend_on_the_number_of_ranks(source, size):
    accumulate = 12 // BATCH
    alone = train(source)
    ranks = [train(source, rank, size) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1  # else collectives hang
    per_step = -(-accumulate // size)
    dealt = []
    for start in range(0, len(ranks[0]), per_step):
        step = [batches[start : start + per_step] for batches in ranks]
        dealt += [step[rank][i] for i in range(len(step[0])) for rank in range(size)]
    assert same([batch for batch in dealt if len(batch[0])], alone)
    for images, labels in dealt:
        assert images.shape[1:] == (3, source.image_size, source.image_size)
        assert len(images) == len(labels)


def test_ranks_without_a_share_of_the_last_step_get_empty_batches(source):
    # 23 samples in steps of 20 leave 3: one micro-batch for four ranks.
    ranks = [train(source, rank, 4, effective_batch_size=20, batch_size=5) for rank in range(4)]
    assert [[len(images) for images, _ in batches] for batches in ranks] == [
        [5, 3], [5, 0], [5, 0], [5, 0]]  # fmt: skip


def test_dropping_the_short_step(source):
    batches = train(source, drop_last=True)
    assert same(batches, train(source)[:4])


def test_epochs_differ_and_repeat_exactly(source):
    assert same(train(source, epoch=3), train(source, epoch=3))
    assert not same(train(source, epoch=3), train(source, epoch=4))
    assert not same(train(source), train(source, seed=SEED + 1))


def test_an_epoch_begun_in_the_middle_goes_on_as_the_whole_one(source):
    assert same(train(source, epoch=1, first_step=1), train(source, epoch=1)[4:])
    assert train(source, first_step=2) == []


def test_a_loader_serves_epochs_in_any_order_and_after_an_unfinished_one(source):
    loader = source.train_loader(
        batch_size=BATCH, effective_batch_size=12, drop_last=False, rank=0, size=1, seed=SEED,
        workers=0)  # fmt: skip
    next(iter(loader.epoch(7)))
    assert same(list(loader.epoch(1)), train(source, epoch=1))
    assert same(list(loader.epoch(0)), train(source, epoch=0))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 13])
def test_validation_gives_each_image_once_over_all_ranks(source, size):
    alone = flat(val(source))
    assert len(alone) == source.val_size
    ranks = [flat(val(source, rank, size)) for rank in range(size)]
    dealt = [s for row in itertools.zip_longest(*ranks) for s in row if s is not None]
    assert all(torch.equal(a, b) and i == j for (a, i), (b, j) in zip(dealt, alone, strict=True))


def test_validation_can_be_iterated_again(source):
    loader = source.val_loader(batch_size=4, rank=0, size=2, workers=0)
    assert same(list(loader), list(loader))


def test_worker_processes_give_the_same_bytes(source):
    source.start_workers()
    loader = source.train_loader(
        batch_size=BATCH, effective_batch_size=12, drop_last=False, rank=1, size=2, seed=SEED,
        workers=2)  # fmt: skip
    next(loader.epoch(0))  # an unfinished epoch leaves nothing behind
    for epoch, first_step in [(0, 0), (1, 1)]:
        expected = train(source, 1, 2, epoch, first_step)
        got = list(loader.epoch(epoch, first_step))
        assert same(got, expected)
        if not isinstance(source, ImageNetDali):  # DALI has threads instead
            assert all(images.is_shared() for images, _ in got if len(images))
    loader.close()
    assert same(val(source, 1, 2, workers=1), val(source, 1, 2))


def test_a_worker_makes_batches_in_shared_memory_at_once(monkeypatch):
    shape = (3, SIDE, SIDE)
    assert not loading._empty_images(2, shape).is_shared()
    monkeypatch.setattr(loading, "get_worker_info", lambda: "in a worker")
    images = loading._empty_images(2, shape)
    assert images.is_shared()
    assert images.shape == (2, *shape)
    assert loading._empty_images(0, shape).shape == (0, *shape)


def test_a_source_can_be_sent_to_another_process(source):
    assert same(val(pickle.loads(pickle.dumps(source))), val(source))


@pytest.mark.parametrize(
    "module",
    [
        "data.folder",
        "data.imagenet",
        "data.synthetic",
        "data.cifar",
        "data.tiny_imagenet",
        "data.workers",
    ],
)
def test_importing_the_source_is_cheap(module):
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_worker_module_is_light():
    code = (
        "import sys, data.loading\n"
        "sys.exit(any(m in sys.modules for m in ('torchvision', 'mpi4py', 'horovod', 'lars')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
