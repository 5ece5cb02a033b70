"""Copies of batches to a GPU: one batch ahead, alongside the computation."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from data import Batch


def batch_device() -> torch.device:
    """Return where batches go: this process's current GPU if it has initialised CUDA by now."""
    if torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def one_ahead(batches: Iterator[Batch], device: torch.device) -> Generator[Batch]:
    """Yield the batches on `device`.

    On a GPU the next batch is fetched, and its copy started on a separate stream, before the
    current one is yielded. So the copy runs during the computation on the current batch, even if
    every step ends with the host waiting for the device. At most two batches are on the device.
    Work that `batches` itself does on the GPU runs on that stream too. On the CPU batches pass
    through unchanged, and none is read ahead.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def fetch() -> Batch | None:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            if batch is None:
                return None
            images, labels = batch  # pinned memory is not reused before its copy has finished
            return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    coming = fetch()
    while coming is not None:
        ready = coming
        user = torch.cuda.current_stream(device)
        user.wait_stream(stream)  # waits for this batch only: the next copy is not queued yet
        for part in ready:
            part.record_stream(user)  # its memory belongs to `stream`, which must wait to reuse it
        coming = fetch()
        yield ready
