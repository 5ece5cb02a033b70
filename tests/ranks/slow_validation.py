"""Run train_imagenet.py with a validation that takes a minute.

The first argument is a file for the process ids of the ranks. It appears when all ranks have begun their first
validation.
"""

import os
import sys
import time

begun = sys.argv.pop(1)

from lars import engine  # noqa: E402

evaluate = engine.evaluate


def slowly(learner, model, loader, val_size, job):
    """Report that the validation has begun, wait, and validate."""
    pids = job.world.all_gather_object(os.getpid(), "process ids")
    if job.world.is_root:
        with open(f"{begun}.part", "w") as file:
            print(*pids, file=file)
        os.replace(f"{begun}.part", begun)
    for _ in range(600):
        time.sleep(0.1)
    return evaluate(learner, model, loader, val_size, job)


engine.evaluate = slowly

import train_imagenet  # noqa: E402

if __name__ == "__main__":
    train_imagenet.main()
