"""Batches on their way to a GPU: copied beside the computation, one ahead."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data import Batch


def batch_device() -> torch.device:
    """Return where batches go: this process's current GPU if it has initialised CUDA by now."""
    if torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`.

    On a GPU the next batch is fetched, and its copy begun on a stream of its own, before one is
    handed out: the copy runs while that one is computed with, even if every step ends with the
    host waiting for the device. So two batches at most are on the device. What `batches` itself
    does there, it does on that stream too. On the CPU batches go through as they are, none ahead.
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
            images, labels = batch  # a pinned batch's memory is not used anew before it is copied
            return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    coming = fetch()
    while coming is not None:
        ready = coming
        user = torch.cuda.current_stream(device)
        user.wait_stream(stream)  # for this batch; the copy of the next is not in the stream yet
        for part in ready:
            part.record_stream(user)  # its memory belongs to `stream`, which must wait to reuse it
        coming = fetch()
        yield ready
