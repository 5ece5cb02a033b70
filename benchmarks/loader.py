"""How fast images become batches, relative to torchvision's transforms, on one core.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.loader            (transforms and records)
    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.loader --augmentation   (each augmentation)
    OMP_NUM_THREADS=1 python -m benchmarks.loader --workers 2             (loaders with workers)
    OMP_NUM_THREADS=1 python -m benchmarks.loader --wait                  (share of time spent waiting)
    OMP_NUM_THREADS=1 python -m benchmarks.loader --start --workers 2     (until the first batch)

All variants take turns in every round, so that other load on the machine slows all of them alike.
The figures are medians over the rounds: images per second of this process's CPU time, or, with
workers, images per second of elapsed time. The images are generated: 500x375 pixels and about
110 KB, ImageNet's usual size.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from benchmarks.rounds import alone, in_turn, speed, timed
from benchmarks.transforms import (
    AUGMENTATIONS,
    MEAN,
    STD,
    augmentation_variants,
    transform_variants,
)
from data import synthetic
from data.loader.reader import Reader
from data.loader.sampler import ValSampler
from data.loader.workers import start_forkserver
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.pixels import decode as decoding
from data.pixels.transforms import ValTransform
from data.samples.arrays import ArraySamples
from data.sources.imagenet import ImageNet, ImageNetDali

BATCH = 32


@dataclass(frozen=True)
class Share:
    """All samples, for one rank; see `data.Share`."""

    rank: int = 0
    size: int = 1
    batch_size: int = BATCH
    effective_batch_size: int = BATCH
    val_batch_size: int = BATCH
    drop_last: bool = False
    seed: int = 0


def interleaved(
    variants: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Run all variants in turn; return images per second of each, round by round."""
    return in_turn([alone(name, speed(run, clock)) for name, run in variants.items()], rounds)


def show(title: str, speeds: dict[str, list[float]]) -> None:
    """Print medians, and ratios to the first variant: their median over the rounds and their range."""
    reference = next(iter(speeds.values()))
    print(f"\n{title}\n{'variant':44}{'images/s':>9}{'ratio':>7}   range")
    for name, values in speeds.items():
        ratios = [value / other for value, other in zip(values, reference, strict=True)]
        print(
            f"{name:44}{statistics.median(values):9.0f}{statistics.median(ratios):7.2f}"
            f"   {min(ratios):.2f} .. {max(ratios):.2f}"
        )


def counted(batches: Iterable) -> int:
    """Read all batches; return the number of images."""
    return sum(len(labels) for _, labels in batches)


def source_variants(root: Path, workers: int) -> dict[str, Callable[[], int]]:
    """Return an epoch of each of our sources, including DALI's if it is installed."""
    sources = {
        "folders": ImageNet(str(root / "train"), str(root / "val")),
        "records": ImageNet(records=str(root / "records")),
        "records, --shuffle-window 16": ImageNet(records=str(root / "records"), shuffle_window=16),
    }
    variants: dict[str, Callable[[], int]] = {}
    for name, source in sources.items():
        loader = source.train_loader(Share(), workers)
        variants[name] = lambda loader=loader: counted(loader.epoch(1))
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError:
        print("DALI is not installed, so its variants are left out")
        return variants
    dali = ImageNetDali(data_dir=str(root / "records"))
    loader = dali.train_loader(Share(), workers)
    variants["records through DALI, our order and boxes"] = lambda: counted(loader.epoch(1))
    variants["DALI's own TFRecord reader and crops"] = dali_alone(root / "records", workers)
    return variants


def dali_alone(records: Path, workers: int) -> Callable[[], int]:
    """Return an epoch of a pipeline that leaves everything to DALI."""
    from nvidia.dali import fn, pipeline_def, tfrecord, types

    paths = sorted(map(str, (records / "train").iterdir()))
    indices = sorted(map(str, (records / "idx_files" / "train").iterdir()))

    # Not asynchronous: it would keep working during the turns of the other variants.
    @pipeline_def(
        batch_size=BATCH,
        num_threads=max(workers, 1),
        device_id=None,
        exec_async=False,
        exec_pipelined=False,
    )
    def pipeline():
        features = {
            "image/encoded": tfrecord.FixedLenFeature((), tfrecord.string, ""),
            "image/class/label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
        }
        example = fn.readers.tfrecord(
            path=paths, index_path=indices, features=features, random_shuffle=True, name="reader"
        )
        images = fn.decoders.image_random_crop(
            example["image/encoded"],
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
            output_type=types.RGB,
        )
        images = fn.resize(images, size=[224, 224], antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), example["image/class/label"]

    built = pipeline()
    built.build()
    batches = built.epoch_size("reader") // BATCH

    def run() -> int:
        for _ in range(batches):
            images, _ = built.run()
            np.array(images.as_tensor())
        return batches * BATCH

    return run


class PilFloats(torch.utils.data.Dataset):
    """The data set that torchvision's own examples use."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted((root / "train").glob("*/*.jpg"))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one normalised image and a label."""
        from torchvision import transforms as tv

        if not hasattr(self, "transform"):
            self.transform = tv.Compose(
                [tv.RandomResizedCrop(224), tv.RandomHorizontalFlip(), tv.ToTensor(),
                 tv.Normalize(MEAN, STD)]
            )  # fmt: skip
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), 0


def loader_variants(root: Path, workers: int) -> dict[str, Callable[[], int]]:
    """Return an epoch of a DataLoader of PIL floats, and of our loader."""
    theirs = torch.utils.data.DataLoader(
        PilFloats(root), BATCH, num_workers=workers, persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None)  # fmt: skip
    source = ImageNet(str(root / "train"), str(root / "val"))
    ours = source.train_loader(Share(), workers)
    return {
        "torchvision, PIL, float": lambda: counted(theirs),
        "ours": lambda: counted(ours.epoch(1)),
    }


def wait_share(root: Path, workers: int, compute: float) -> None:
    """Print the share of time that a trainer waits if it needs `compute` seconds for a batch."""
    source = ImageNet(str(root / "train"), str(root / "val"))
    loader = source.train_loader(Share(), workers)
    counted(loader.epoch(0))
    waits, began = [], time.perf_counter()
    batches = loader.epoch(1)
    while True:
        start = time.perf_counter()
        if next(batches, None) is None:
            break
        waits.append(time.perf_counter() - start)
        time.sleep(compute)  # the accelerator does not use this CPU
    first, rest = waits[0], time.perf_counter() - began - waits[0]
    print(
        f"a trainer of {BATCH / compute:.0f} images/s with {workers} workers waits "
        f"{sum(waits[1:]) / rest:.1%} of the time, and {first * 1000:.0f} ms at an epoch's start"
    )


def first_batch(method: str, workers: int) -> None:
    """Wait for the first batch of new worker processes, which a start method of multiprocessing starts."""
    images = np.zeros((workers, 8, 8, 3), np.uint8)
    reader = Reader(ArraySamples(images, np.zeros(workers, np.int64), 1), ValTransform(8, 8))
    loader = torch.utils.data.DataLoader(
        reader, batch_sampler=ValSampler(workers, Share(val_batch_size=1)), num_workers=workers,
        collate_fn=len, multiprocessing_context=method)  # fmt: skip
    next(iter(loader))


def start_times(workers: int, rounds: int) -> None:
    """Print the time until the first batch of new worker processes, by start method."""
    methods = ("forkserver", "spawn")
    turns = [alone(m, timed(functools.partial(first_batch, m, workers), 1)) for m in methods]
    for method, values in in_turn(turns, rounds).items():
        print(f"{method:12} {workers} workers, first batch after {statistics.median(values):.2f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=192, help="generated images (192)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--workers", type=int, default=0, help="worker processes (0)")
    parser.add_argument(
        "--wait", action="store_true", help="the share of time that a trainer waits for data"
    )
    parser.add_argument("--start", action="store_true", help="the time until the first batch")
    parser.add_argument("--augmentation", action="store_true", help="each augmentation")
    parser.add_argument(
        "--grain",
        type=float,
        default=13.0,
        help="noise of the images; less noise makes smaller files (13)",
    )
    parser.add_argument(
        "--short-side",
        type=int,
        default=0,
        help="shorter side of the images in the records, in pixels (0: unchanged)",
    )
    options = parser.parse_args()
    start_forkserver()
    torch.set_num_threads(1)
    if options.start:
        start_times(max(options.workers, 1), options.rounds)
        return
    decoder = "simplejpeg" if decoding.simplejpeg else "PIL"
    if decoding.region_decoder():
        decoder += ", nvImageCodec for crops"
    print(f"torch {torch.__version__}, decoder {decoder}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        noise = ["--num-classes", "2", "--train-size", str(options.images), "--val-size", "2"]
        synthetic.main([folder, *noise, "--grain", str(options.grain)])
        files = [path.read_bytes() for path in sorted((root / "train").glob("*/*.jpg"))]
        print(f"{len(files)} images of {sum(map(len, files)) / len(files) / 1000:.0f} KB")
        if options.wait:
            for rate in (400, 800, 1600):
                wait_share(root, max(options.workers, 1), BATCH / rate)
            return
        if options.workers:
            title = f"loaders, {options.workers} workers"
            variants = loader_variants(root, options.workers)
            show(title, interleaved(variants, options.rounds, time.perf_counter))
            return
        if options.augmentation:
            for name in AUGMENTATIONS:
                variants = augmentation_variants(files, name)
                show(name, interleaved(variants, options.rounds, time.process_time))
            return
        for train in (True, False):
            title = "training transforms" if train else "validation transforms"
            variants = transform_variants(files, train)
            show(title, interleaved(variants, options.rounds, time.process_time))
        arguments = ["--train-dir", str(root / "train"), "--val-dir", str(root / "val")]
        arguments += ["--data-dir", str(root / "records"), "--workers", "0"]
        arguments += ["--short-side", str(options.short_side)]
        make_tfrecords(arguments)
        variants = source_variants(root, 0)
        show("sources, in this process", interleaved(variants, options.rounds, time.process_time))


if __name__ == "__main__":
    main()
