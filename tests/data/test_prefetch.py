"""Batches are copied to a GPU in order, one ahead, and are not overwritten too early."""

from __future__ import annotations

import contextlib

import pytest
import torch

from data.loader.prefetch import batch_device, one_ahead
from data.sources.noise import Synthetic
from data_fixtures import Share

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU: none here")


class Recorder:
    """Replaces CUDA's streams and records the calls."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.current = "main"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "side"))
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, self.current))

    @contextlib.contextmanager
    def use(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def part(self, name):
        return Part(self, name)


class Stream:
    def __init__(self, recorder, name) -> None:
        self.recorder, self.name = recorder, name

    def wait_stream(self, other) -> None:
        self.recorder.log.append(f"{self.name} waits for {other.name}")


class Part:
    """Images or labels of one batch."""

    def __init__(self, recorder, name) -> None:
        self.recorder, self.name = recorder, name

    def to(self, device, non_blocking):
        assert device == torch.device("cuda", 0)
        assert non_blocking
        self.recorder.log.append(f"copy {self.name} on {self.recorder.current}")
        return self

    def record_stream(self, stream) -> None:
        self.recorder.log.append(f"keep {self.name} for {stream.name}")


def test_each_copy_starts_before_the_batch_before_it_is_yielded(monkeypatch):
    recorder = Recorder(monkeypatch)

    def batches():
        for k in range(3):
            recorder.log.append(f"fetch {k} on {recorder.current}")
            yield recorder.part(f"x{k}"), recorder.part(f"y{k}")

    for images, labels in one_ahead(batches(), torch.device("cuda", 0)):
        recorder.log.append(f"use {images.name} {labels.name} on {recorder.current}")

    def copied(k):
        return [f"fetch {k} on side", f"copy x{k} on side", f"copy y{k} on side"]

    def ready(k):
        return ["main waits for side", f"keep x{k} for main", f"keep y{k} for main"]

    def used(k):
        return [f"use x{k} y{k} on main"]

    assert recorder.log == [
        *copied(0),
        *[*ready(0), *copied(1), *used(0)],
        *[*ready(1), *copied(2), *used(1)],
        *[*ready(2), *used(2)],
    ]


def test_an_error_and_the_end_are_passed_on(monkeypatch):
    recorder = Recorder(monkeypatch)
    device = torch.device("cuda", 0)
    assert list(one_ahead(iter(()), device)) == []

    def broken():
        yield recorder.part("x0"), recorder.part("y0")
        raise ValueError("image 1")

    with pytest.raises(ValueError, match="image 1"):
        list(one_ahead(broken(), device))


def test_an_abandoned_loader_closes_its_batches(monkeypatch):
    recorder = Recorder(monkeypatch)
    left = []

    def batches():
        try:
            while True:
                yield recorder.part("x"), recorder.part("y")
        finally:
            left.append(True)

    next(one_ahead(batches(), torch.device("cuda", 0)))
    assert left == [True]


def test_on_the_cpu_nothing_is_read_ahead():
    read = []

    def batches():
        for k in range(3):
            read.append(k)
            yield torch.full((1,), k), torch.full((1,), k)

    passed = one_ahead(batches(), torch.device("cpu"))
    assert next(passed)[0].item() == 0
    assert read == [0]
    assert [images.item() for images, _ in passed] == [1, 2]


def loaders(workers):
    source = Synthetic(image_size=32, num_classes=3, train_size=200, val_size=50)
    share = Share(batch_size=8, effective_batch_size=24, val_batch_size=16)
    return source.train_loader(share, workers), source.val_loader(share, workers)


def all_batches(train, val):
    return [*train.epoch(0), *train.epoch(1, 3), *val]


@needs_a_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_sees_the_batches_of_the_cpu(workers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    expected = all_batches(*loaders(0))
    monkeypatch.undo()
    torch.cuda.init()
    assert batch_device() == torch.device("cuda", torch.cuda.current_device())
    train, val = loaders(workers)
    # This work takes longer than the copies, so a batch that is overwritten too early is noticed.
    busy = torch.randn(2048, 2048, device="cuda")
    kept = []
    for images, labels in (*train.epoch(0), *train.epoch(1, 3), *val):
        assert images.device == labels.device == batch_device()
        assert images.is_contiguous(memory_format=torch.channels_last)
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        kept.append((images.clone(), labels.clone()))
        del images, labels
    for (images, labels), (other_images, other_labels) in zip(kept, expected, strict=True):
        assert torch.equal(images.cpu(), other_images)
        assert torch.equal(labels.cpu(), other_labels)
    train.close()
