"""Every source keeps the contract in `data`, on 1, 2, 3 and 4 ranks."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import multiprocessing
import pickle
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from conftest import until
from data.loader import reader
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.sources.cifar import Cifar
from data.sources.folder import ImageFolders
from data.sources.imagenet import ImageNet, ImageNetDali
from data.sources.mnist import Mnist
from data.sources.noise import Synthetic
from data.sources.tiny_imagenet import TinyImageNet
from data_fixtures import (
    Share,
    write_as,
    write_cifar10,
    write_mnist,
    write_tiny_imagenet,
    write_tree,
)

SIDE = 24
BATCH = 3
SEED = 5


def folders(root) -> ImageFolders:
    write_tree(root / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(root / "val", {"ant": 6, "bee": 5}, seed=2)
    return ImageFolders(str(root / "train"), str(root / "val"), image_size=SIDE)


def kaggle(root) -> ImageNet:
    """The same images in Kaggle's layout, whose validation images lie in one folder."""
    made = folders(root / "made")
    base = root / "ILSVRC/Data/CLS-LOC"
    shutil.copytree(made.train_dir, base / "train")
    (base / "val").mkdir()
    rows = ["ImageId,PredictionString"]
    for image in sorted((root / "made/val").glob("*/*")):
        rows.append(f"{image.parent.name}-{image.stem},{image.parent.name} 1 2 3 4")
        shutil.copy(image, base / "val" / f"{image.parent.name}-{image.name}")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows))
    return ImageNet(data=str(root), image_size=SIDE)


def noise(root) -> Synthetic:
    return Synthetic(image_size=SIDE, num_classes=2, train_size=23, val_size=11)


def records(root, **options) -> ImageNet:
    made = folders(root)
    flags = ["--train-dir", made.train_dir, "--val-dir", made.val_dir, "--workers", "0"]
    out = str(root / "records")
    assert make_tfrecords([*flags, "--data-dir", out, "--images-per-shard", "4"]) == 0
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


def mnist(root) -> Mnist:
    return Mnist(data_dir=write_mnist(root, [i % 10 for i in range(23)], [*range(10), 3]))


def parquet(root) -> ImageNet:
    return ImageNet(data=write_as("parquet", root), image_size=SIDE)


def web_dataset(root) -> ImageNet:
    return ImageNet(data=write_as("web_dataset", root), image_size=SIDE)


SOURCES = {
    "folders": folders,
    "Kaggle's layout": kaggle,
    "noise": noise,
    "records": records,
    "pieces of records": pieces_of_records,
    "CIFAR-10": cifar,
    "Tiny-ImageNet": tiny_imagenet,
    "MNIST": mnist,
    "parquet": parquet,
    "WebDataset": web_dataset,
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
    """Return one rank's micro-batches of an epoch. A step has four micro-batches of three samples."""
    arguments = {"batch_size": BATCH, "effective_batch_size": BATCH * accumulate, "seed": SEED}
    loader = source.train_loader(Share(rank, size, **arguments | options), workers=0)
    batches = list(loader.epoch(epoch, first_step))
    loader.close()
    return batches


def val(source, rank=0, size=1, batch_size=4, workers=0):
    return list(source.val_loader(Share(rank, size, val_batch_size=batch_size), workers))


def same(a, b) -> bool:
    """Whether two lists of batches are equal, bit for bit."""
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


def test_the_fingerprint_depends_on_the_samples_and_not_on_paths(source):
    assert re.fullmatch(r"\w+-\w+", source.fingerprint)
    assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint
    for field in dataclasses.fields(source):
        if field.name == "exclude" or str(getattr(source, field.name)).startswith("/"):
            assert field.metadata["same_run"] is False, field.name


def test_an_epoch_holds_every_sample_once(source):
    batches = train(source)
    assert [len(images) for images, _ in batches] == [3, 3, 3, 3, 2, 3, 3, 3]
    # Another epoch, and an epoch of one big step, give the same labels equally often.
    labels = sorted(label for _, label in flat(batches))
    assert len(labels) == source.train_size
    assert labels == sorted(label for _, label in flat(train(source, epoch=9)))
    assert labels == sorted(label for _, label in flat(train(source, accumulate=8)))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_micro_batches_do_not_depend_on_the_number_of_ranks(source, size):
    accumulate = 12 // BATCH
    single = train(source)
    ranks = [train(source, rank, size) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1  # otherwise collectives hang
    per_step = -(-accumulate // size)
    dealt = []
    for start in range(0, len(ranks[0]), per_step):
        step = [batches[start : start + per_step] for batches in ranks]
        dealt += [step[rank][i] for i in range(len(step[0])) for rank in range(size)]
    assert same([batch for batch in dealt if len(batch[0])], single)
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


def test_an_epoch_can_start_in_the_middle(source):
    assert same(train(source, epoch=1, first_step=1), train(source, epoch=1)[4:])
    assert train(source, first_step=2) == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_batches_from_a_step_continue_over_the_ends_of_epochs(source, step, workers, rank):
    # An epoch has two steps: a full one of two micro-batches per rank, and a short one of two.
    loader = source.train_loader(Share(rank, 2, batch_size=BATCH, seed=SEED), workers)
    everything = [batch for epoch in range(4) for batch in train(source, rank, 2, epoch)]
    got = list(itertools.islice(loader.batches_from(step), 10))
    loader.close()
    assert same(got, everything[2 * step : 2 * step + 10])


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_of_the_next_epoch_is_read_before_it_is_asked_for(source, workers, monkeypatch):
    loader = source.train_loader(Share(batch_size=BATCH, seed=SEED), workers)
    epochs = []
    sampler = type(loader._sampler)
    monkeypatch.setattr(
        sampler, "__iter__", spied(sampler.__iter__, lambda it: epochs.append(it.epoch))
    )
    batches = loader.batches_from(0)
    assert len(list(itertools.islice(batches, 8))) == 8
    assert set(epochs) == {0}
    next(batches)
    assert set(epochs) == {0, 1}
    loader.close()


def spied(method, report):
    def call(self):
        report(self)
        return method(self)

    return call


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_closing_stops_everything_at_any_point_of_an_epoch(source, workers, count):
    gc.collect()  # loaders of earlier tests
    processes, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    loader = source.train_loader(Share(batch_size=BATCH, seed=SEED), workers)
    batches = loader.batches_from(0)  # still referenced when the loader is closed
    assert len(list(itertools.islice(batches, count))) == count
    loader.close()
    assert set(multiprocessing.active_children()) <= processes
    until(lambda: set(threading.enumerate()) <= threads, 10)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(batches)
    loader.close()  # a second time is harmless
    val_loader = source.val_loader(Share(), workers)
    val_batches = iter(val_loader)
    next(val_batches)
    val_loader.close()
    assert set(multiprocessing.active_children()) <= processes
    until(lambda: set(threading.enumerate()) <= threads, 10)


def test_a_loader_serves_epochs_in_any_order_and_after_an_unfinished_one(source):
    loader = source.train_loader(Share(batch_size=BATCH, seed=SEED), workers=0)
    next(iter(loader.epoch(7)))
    assert same(list(loader.epoch(1)), train(source, epoch=1))
    assert same(list(loader.epoch(0)), train(source, epoch=0))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 13])
def test_validation_gives_each_image_once_over_all_ranks(source, size):
    single = flat(val(source))
    assert len(single) == source.val_size
    ranks = [flat(val(source, rank, size)) for rank in range(size)]
    dealt = [s for row in itertools.zip_longest(*ranks) for s in row if s is not None]
    assert all(torch.equal(a, b) and i == j for (a, i), (b, j) in zip(dealt, single, strict=True))


def test_validation_can_be_iterated_again(source):
    loader = source.val_loader(Share(size=2), workers=0)
    assert same(list(loader), list(loader))


def test_a_source_for_validation_gives_the_same_batches(source):
    alone = source.for_validation()
    alone.check()
    assert (alone.val_size, alone.num_classes) == (source.val_size, source.num_classes)
    assert list(alone.class_names) == list(source.class_names)
    assert same(val(alone), val(source))
    assert alone.fingerprint.split("-")[1] == source.fingerprint.split("-")[1]


@pytest.mark.parametrize(
    "name", ["folders", "Kaggle's layout", "records", "folders by DALI", "records by DALI"]
)
def test_validation_needs_no_training_images(name, tmp_path):
    if "DALI" in name:
        pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    made = SOURCES[name](tmp_path)
    for name in ("train", "records/train", "ILSVRC/Data/CLS-LOC/train"):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
    alone = made.for_validation()
    alone.check()
    assert sum(len(labels) for _, labels in val(alone)) == 11


def test_worker_processes_give_the_same_bytes(source):
    source.start_workers(2)
    loader = source.train_loader(Share(1, 2, batch_size=BATCH, seed=SEED), workers=2)
    next(loader.epoch(0))  # an unfinished epoch must not disturb the next one
    for epoch, first_step in [(0, 0), (1, 1)]:
        expected = train(source, 1, 2, epoch, first_step)
        got = list(loader.epoch(epoch, first_step))
        assert same(got, expected)
        if not isinstance(source, ImageNetDali):  # DALI has threads instead
            assert all(images.is_shared() for images, _ in got if len(images))
    loader.close()
    assert same(val(source, 1, 2, workers=1), val(source, 1, 2))


def test_without_workers_no_process_is_started(source, monkeypatch):
    started = []
    monkeypatch.setattr(
        "data.loader.workers.start_forkserver", lambda modules: started.append(True)
    )
    source.start_workers(0)
    assert started == []
    source.start_workers(2)
    assert started == ([] if isinstance(source, ImageNetDali) else [True])


def test_a_worker_allocates_batches_in_shared_memory(monkeypatch):
    shape = (3, SIDE, SIDE)
    assert not reader._empty_images(2, shape).is_shared()
    monkeypatch.setattr(reader, "get_worker_info", lambda: "in a worker")
    images = reader._empty_images(2, shape)
    assert images.is_shared()
    assert images.shape == (2, *shape)
    assert reader._empty_images(0, shape).shape == (0, *shape)


def test_a_source_can_be_sent_to_another_process(source):
    assert same(val(pickle.loads(pickle.dumps(source))), val(source))


@pytest.mark.parametrize(
    "module",
    [
        "data.sources.folder",
        "data.sources.imagenet",
        "data.sources.noise",
        "data.layouts",
        "data.sources.cifar",
        "data.sources.tiny_imagenet",
        "data.sources.mnist",
        "data.sources.digits",
        "data.loader.workers",
        "data.check.__main__",
        "data.make_tfrecords.__main__",
        "data.prepare.__main__",
        "data.digits",
        "data.synthetic",
    ],
)
def test_importing_sources_and_command_lines_is_cheap(module):
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_of_the_workers_is_light():
    code = (
        "import sys, data.loader.torch_loader\n"
        "sys.exit(any(m in sys.modules for m in ('torchvision', 'mpi4py', 'horovod', 'lars')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
