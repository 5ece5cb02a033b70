"""Train on noise, record the samples of each step, and let the ranks of one host die.

Arguments: a file for the records, the log folder, the step before which the host dies, the number of samples, the
effective batch size and the seed. The variable DOOMED marks the
ranks of that host, which kill torchrun and themselves. A record is the number of ranks, the rank, the step and the
samples of the rank.
"""

import contextlib
import os
import signal
import sys

from data.sources.noise import Synthetic
from lars import engine, launcher
from lars.config import Config
from lars.learner.learner import Learner

RECORDS, LOGS = sys.argv[1:3]
LAST, TRAIN_SIZE, EFFECTIVE, SEED = map(int, sys.argv[3:])
AGENT = os.getppid()


class Recorded:
    """Micro-batches whose labels are recorded. With as many classes as samples, a label is a sample's number."""

    def __init__(self, batches: object, step: int) -> None:
        self.batches, self.step = iter(batches), step

    def __iter__(self):
        return self

    def __next__(self):
        images, labels = next(self.batches)
        place = launcher.place()
        with open(RECORDS, "a") as file:
            print(place.size, place.rank, self.step, *labels.tolist(), file=file)
        return images, labels


def main() -> None:
    """Train for two epochs."""
    launch = Learner.launch

    def step(learner, batches, number, **options):
        if number == LAST and "DOOMED" in os.environ:
            with contextlib.suppress(ProcessLookupError):
                os.kill(AGENT, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return launch(learner, Recorded(batches, number), number, **options)

    Learner.launch = step
    config = Config(
        model="squeezenet1_1", batch_size=2, effective_batch_size=EFFECTIVE, epochs=2, seed=SEED, no_cuda=True,
        workers=0, log_dir=LOGS, run_name="run", checkpoint_steps=1, val_every=2,
    )  # fmt: skip
    source = Synthetic(image_size=32, num_classes=TRAIN_SIZE, train_size=TRAIN_SIZE, val_size=4)
    engine.train(config, source)


if __name__ == "__main__":
    main()
