"""How long opening the images of a tree takes, and what it costs.

    python -m benchmarks.listing DIR --make 1281167
    python -m benchmarks.listing DIR
    mpirun -np 4 python -m benchmarks.listing DIR

The first command makes empty files with ImageNet's names in 1,000 class folders, and 50,000 for
validation. The other commands open them as the training scripts do. Each rank prints its seconds, its
CPU seconds and its memory. The first run lists the files. Later runs find the saved lists, unless you
remove ~/.cache/lars-imagenet/listings. To count the requests to the file system, put
``strace -f -c -e trace=file,getdents64`` before the command.
"""

from __future__ import annotations

import argparse
import os
import time

_CLASSES = 1000
_VAL_IMAGES = 50_000


def make(root: str, images: int) -> None:
    """Make empty files with ImageNet's names: `images` for training, 50,000 for validation."""
    for split, count in (("train", images), ("val", _VAL_IMAGES)):
        for number in range(_CLASSES):
            name = f"n{1_440_764 + 9173 * number:08d}"
            folder = os.path.join(root, split, name)
            os.makedirs(folder)
            for image in range(number, count, _CLASSES):
                open(os.path.join(folder, f"{name}_{image}.JPEG"), "x").close()


def memory() -> dict[str, int]:
    """Return the memory of this process now (VmRSS) and at its peak (VmHWM), in MiB."""
    with open("/proc/self/status") as file:
        rows = (line.split() for line in file if line.startswith(("VmRSS", "VmHWM")))
        return {name.rstrip(":"): int(size) // 1024 for name, size, _ in rows}


def measure(root: str) -> str:
    """Open the images under `root`, and return what it cost."""
    import torch  # noqa: F401  not part of the measurement

    from data.sources.imagenet import ImageNet

    before, began, cpu_began = memory(), time.perf_counter(), time.process_time()
    source = ImageNet(data=root)
    source.check()
    fingerprint = source.fingerprint
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    after = memory()
    return (
        f"{source.train_size:,} + {source.val_size:,} images, {fingerprint}: {seconds:.2f} s, "
        f"{cpu:.2f} s of CPU, {before['VmRSS']} -> {after['VmRSS']} MiB, peak {after['VmHWM']} MiB"
    )


def main() -> None:
    """Make or open a tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", help="folder of the tree")
    parser.add_argument("--make", type=int, help="make a tree with this number of training images")
    options = parser.parse_args()
    if options.make is not None:
        make(options.root, options.make)
    else:
        print(measure(options.root), flush=True)


if __name__ == "__main__":
    main()
