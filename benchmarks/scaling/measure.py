"""Measurements in the process of a rank: passes without exchange, collectives, and whole steps of the trainer."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lars import benchmark
from lars.comm.world import World
from lars.config import Config
from lars.config.plan import Share, make_plan
from lars.learner.build import build_model, make_learner
from lars.learner.classification import Classification
from lars.learner.device import pick_device
from lars.learner.learner import Learner
from lars.run.files import atomic_write

CLASSES = 1000
# Collectives that are started together, as the buckets of a step are.
QUEUE = 8


class Unconnected(World):
    """Two ranks of which the other one answers at once. Gradients have the buckets of an exchange, but none is sent."""

    size = 2


class Passes(NamedTuple):
    """Seconds of the parts of one step without exchange, and when each gradient was complete after backward began.

    `share` is the part of a core that the step had. It is below 1 if other processes also use the core.
    """

    forward: float
    backward: float
    update: float
    complete: list[float]
    share: float


class Trainer:
    """The trainer's step on noise, with an exchange over `world`.

    Attributes:
        learner: The learner of the trainer.
        batch_size: Samples of this rank.
    """

    def __init__(self, args: Any, batch_size: int, world: World, device: torch.device) -> None:
        """Build the network, its optimizer and the buckets of its gradients. `args` has the model and image size."""
        config = Config(model=args.model, batch_size=batch_size, base_op="lars")
        plan = make_plan(config, size=world.size, train_size=world.size * batch_size)
        task = Classification(mean=(127.5,) * 3, std=(64.0,) * 3)
        model = build_model(config, CLASSES)
        self.learner: Learner = make_learner(config, plan, task, model, world, device)
        self.batch_size, self.samples = batch_size, world.size * batch_size
        self.batch = benchmark.noise(batch_size, args.image_size, CLASSES)

    def step(self) -> None:
        """Take one step, and wait for the device."""
        batches = self.learner.prepared([self.batch])
        self.learner.step(batches, 0, count=1, samples=self.samples)
        self.wait()

    def wait(self) -> None:
        """Wait for the device."""
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)

    def gradients(self) -> list[float]:
        """Bytes of each gradient, in the order in which the buckets hold them."""
        parameters = self.learner.gradients.parameters
        return [float(p.numel() * p.element_size()) for p in reversed(parameters)]

    def passes(self) -> Passes:
        """Take one step and time its parts."""
        marks: dict[Any, Any] = {}

        def mark(name: Any) -> None:
            marks[name] = self._now()

        learner, forward = self.learner, self.learner.forward
        finish = learner.gradients.finish_exchange

        def marked_forward(*given: Any) -> Any:
            mark("forward")
            loss = forward(*given)
            mark("backward")
            return loss

        def marked_finish() -> None:
            mark("finish")
            finish()
            mark("finished")

        learner.forward = marked_forward  # type: ignore[method-assign,assignment]
        learner.gradients.finish_exchange = marked_finish  # type: ignore[method-assign]
        parameters = list(reversed(learner.gradients.parameters))
        hooks = [
            p.register_post_accumulate_grad_hook(lambda _, place=place: mark(place))
            for place, p in enumerate(parameters)
        ]
        began, busy = time.perf_counter(), time.process_time()
        mark("start")
        try:
            self.step()
            mark("end")
            self.wait()
            share = (time.process_time() - busy) / (time.perf_counter() - began)
        finally:
            for hook in hooks:
                hook.remove()
            learner.forward = forward  # type: ignore[method-assign]
            learner.gradients.finish_exchange = finish  # type: ignore[method-assign]

        def between(first: Any, last: Any) -> float:
            return _seconds(marks[first], marks[last])

        return Passes(
            between("forward", "backward"),
            between("backward", "finish"),
            between("start", "forward") + between("finished", "end"),
            [between("backward", place) for place in range(len(parameters))],
            min(1.0, share)
            if learner.device.type == "cpu" and torch.get_num_threads() == 1
            else 1.0,
        )

    def _now(self) -> Any:
        """A moment: of the device's stream on a GPU, which the host does not wait for."""
        if self.learner.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(first: Any, last: Any) -> float:
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1000


class Collective(NamedTuple):
    """Seconds of an allreduce: alone, as one of several that were started together, and CPU seconds of the latter."""

    size: int
    alone: float
    queued: float
    busy: float


def collective(world: World, size: int, device: torch.device) -> Collective:
    """Measure an allreduce of `size` bytes. Every rank calls this at the same point."""
    tensors = [torch.zeros(size // 4, device=device) for _ in range(QUEUE)]

    def summed(count: int) -> tuple[float, float]:
        world.barrier("scaling.barrier")
        begin, busy = time.perf_counter(), time.process_time()
        handles = [world.start_sum(t, f"scaling.{size}.{i}") for i, t in enumerate(tensors[:count])]
        for handle in handles:
            world.finish(handle)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin, time.process_time() - busy

    alone, _ = summed(1)
    together, busy = summed(QUEUE)
    return Collective(size, alone, together / QUEUE, busy / QUEUE)


def device_of(world: World) -> torch.device:
    """The device of this rank, as in the trainer."""
    return pick_device(not torch.cuda.is_available(), world)


def timed(function: Callable[[], object]) -> float:
    """Seconds that a function takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def checkpoint_seconds(trainer: Trainer, folder: Path) -> float:
    """Time to write a checkpoint of the network and its optimizer into a folder."""
    from lars.run import checkpoint

    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = Path(made) / "checkpoint.pth.tar"
        return timed(lambda: checkpoint.save(path, trainer.learner.state_dict()))


def loader_rate(source: Any, world: World, batch_size: int, workers: int, batches: int) -> float:
    """Images/s that the loader of this rank delivers while all ranks load."""
    share = Share(world.rank, world.size, batch_size, world.size * batch_size, batch_size, False, 0)
    loader = source.train_loader(share, workers)
    try:
        iterator = loader.batches_from(0)
        for _ in range(workers + 1):
            next(iterator)
        seconds = timed(lambda: [next(iterator) for _ in range(batches)])
    finally:
        loader.close()
    return batches * batch_size / seconds


def seconds_since_start() -> float:
    """Seconds since this process started (Linux)."""
    started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------ turns of jobs
# Several jobs that measure in turn see the same load of the machine. They agree through a file with the number of turns
# that have ended. A place is "FILE:NUMBER:COUNT": the file, the number of this job, and the number of jobs.


def wait_for_turn(place: str | None, turn: int) -> None:
    """Wait until it is this job's turn for the given time, from 0. Without a place, do not wait."""
    if place:
        path, number, count = place.split(":")
        while _turns_ended(Path(path)) < turn * int(count) + int(number):
            time.sleep(0.01)


def end_turn(place: str | None) -> None:
    """Let the next job measure. One rank of a job calls this."""
    if place:
        path = Path(place.split(":")[0])
        ended = _turns_ended(path) + 1
        with atomic_write(path) as file:
            file.write(str(ended).encode())


def _turns_ended(path: Path) -> int:
    return int(path.read_text())
