"""How long opening the images of a tree takes, and what it costs.

    python -m benchmarks.listing DIR --make 1281167
    python -m benchmarks.listing DIR
    mpirun -np 4 python -m benchmarks.listing DIR

The first command makes a tree with ImageNet's names in 1,000 class folders, and 50,000 images for
validation. All images of a class are hard links to one small JPEG, so that they take little space and
can be trained on. The other commands open them as the training scripts do. Each rank prints its seconds, its
CPU seconds and its memory. The first run lists the files. Later runs find the saved lists, unless you
remove ~/.cache/lars-imagenet/listings. To count the requests to the file system, put
``strace -f -c -e trace=file,getdents64`` before the command.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from pathlib import Path

from PIL import Image

from data.sources.imagenet import ImageNet

_CLASSES = 1000
_VAL_IMAGES = 50_000


def make(root: str, images: int) -> None:
    """Make files with ImageNet's names: `images` for training, 50,000 for validation."""
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 150)).save(encoded, "JPEG")
    for split, count in (("train", images), ("val", _VAL_IMAGES)):
        for number in range(_CLASSES):
            name = f"n{1_440_764 + 9173 * number:08d}"
            folder = os.path.join(root, split, name)
            os.makedirs(folder)
            paths = [
                os.path.join(folder, f"{name}_{i}.JPEG") for i in range(number, count, _CLASSES)
            ]
            for path in paths[:1]:
                Path(path).write_bytes(encoded.getvalue())
            for path in paths[1:]:
                os.link(paths[0], path)


def memory() -> dict[str, int]:
    """Return the memory of this process now (VmRSS) and at its peak (VmHWM), in MiB."""
    with open("/proc/self/status") as file:
        rows = (line.split() for line in file if line.startswith(("VmRSS", "VmHWM")))
        return {name.rstrip(":"): int(size) // 1024 for name, size, _ in rows}


def open_tree(root: str) -> ImageNet:
    """Open the images under `root` as the training scripts do."""
    source = ImageNet(data=root)
    source.check()
    return source


def measure(root: str) -> str:
    """Open the images under `root`, and return what it cost."""
    before, began, cpu_began = memory(), time.perf_counter(), time.process_time()
    source = open_tree(root)
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
        try:
            make(options.root, options.make)
        except OSError as error:
            parser.error(f"--make {options.make}: {error}")
    else:
        print(measure(options.root), flush=True)


if __name__ == "__main__":
    main()
