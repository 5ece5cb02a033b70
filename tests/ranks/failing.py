"""Train on random images until one rank fails. Arguments: phase, kind of failure, rank, file, log folder.

The time of the failure and the process ids are written to the file.
"""

import os
import signal
import subprocess
import sys
import time

from data import DataError
from data.sources.noise import Synthetic
from lars import engine, launcher
from lars.comm.world import World
from lars.config import Config
from lars.job.job import Job
from lars.learner.learner import Learner
from lars.run import checkpoint

PHASE, KIND, RANK, FILE, LOGS = sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]


def fail() -> None:
    """Fail in the requested way if this is the requested rank."""
    if launcher.rank() != RANK:
        return
    with open(FILE, "a") as file:
        file.write(f"failed {time.time()}\n")
    if KIND == "raise":
        raise RuntimeError("made to fail")
    if KIND == "data":
        raise DataError("image 7 cannot be read")
    if KIND == "exit":
        sys.exit(0)
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "freeze":
        die_after_the_other_rank()
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def die_after_the_other_rank() -> None:
    """Have this process killed when the other rank has ended. torchrun would do so 30 s later."""
    with open(FILE) as file:
        pids = [int(line.split()[1]) for line in file if line.startswith("pid")]
    (other,) = set(pids) - {os.getpid()}
    wait_and_kill = f"while kill -0 {other}; do sleep 0.2; done; kill -KILL {os.getpid()}"
    subprocess.Popen(
        ["sh", "-c", wait_and_kill], start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def before(owner: object, name: str, when: object = lambda *args: True) -> None:
    """Make a method fail before it does its work if `when` returns true."""
    work = getattr(owner, name)

    def failing(*args, **kwargs):
        if when(*args):
            fail()
        return work(*args, **kwargs)

    setattr(owner, name, failing)


class FailingSource(Synthetic):
    """Random images whose loader fails on one rank after the first steps."""

    def train_loader(self, share, workers):
        loader = super().train_loader(share, workers)
        epoch = loader.epoch

        def failing(*args):
            for number, batch in enumerate(epoch(*args)):
                if number == 3:
                    fail()
                yield batch

        loader.epoch = failing
        return loader


def heartbeat(job: Job, phase: str, beat=Job.heartbeat) -> None:
    """Limit the stall from the second step on, because the start takes longer on a busy machine."""
    beat(job, phase)
    if KIND in ("sleep", "freeze") and phase == "step 2":
        job._watchdog.seconds = 4.0


def main() -> None:
    with open(FILE, "a") as file:
        file.write(f"pid {os.getpid()}\n")
    if PHASE == "training":
        before(Learner, "_update", lambda learner, step, samples: step == 3)
    if PHASE == "validation":
        before(
            Learner,
            "forward",
            lambda learner, batch, model, metrics: metrics is not learner.metrics,
        )
    if PHASE == "saving":
        before(checkpoint, "save")
    kind = FailingSource if PHASE == "loading" else Synthetic
    source = kind(image_size=32, num_classes=2, train_size=64, val_size=16)
    Job.heartbeat = heartbeat
    config = Config(
        model="squeezenet1_1", batch_size=4, epochs=2, no_cuda=True, workers=0, log_dir=LOGS
    )
    assert World.size == 1
    engine.train(config, source)


main()
