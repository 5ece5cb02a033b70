"""How fast images become batches: ratios to torchvision's transforms, on one core.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.loader            (transforms and records)
    OMP_NUM_THREADS=1 python -m benchmarks.loader --workers 2             (loaders with workers)
    OMP_NUM_THREADS=1 python -m benchmarks.loader --wait                  (share of time waited)
    OMP_NUM_THREADS=1 python -m benchmarks.loader --start --workers 2     (until the first batch)

All variants take turns in every round, so that a machine that is busy elsewhere slows all of them;
the figures are medians over the rounds, per second of this process's CPU time, and with workers per
second of the clock. Images are generated: 500x375 pixels, about 110 KB, the
size of ImageNet's.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from data import make_tfrecords, synthetic, transforms
from data.imagenet import ImageNet, ImageNetDali
from data.loading import Reader, ValSampler
from data.memory import ArraySamples
from data.transforms import TrainTransform, ValTransform, cut, decode, decode_pil
from data.workers import start_forkserver

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def interleaved(
    variants: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Run all variants in turn; return images per second of each, round by round."""
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()  # caches, imports, processes
    for _ in range(rounds):
        for name, run in variants.items():
            start = clock()
            images = run()
            speeds[name].append(images / (clock() - start))
    return speeds


def show(title: str, speeds: dict[str, list[float]]) -> None:
    """Print medians, and ratios to the first variant: the median over rounds, and its range."""
    reference = next(iter(speeds.values()))
    print(f"\n{title}\n{'variant':44}{'images/s':>9}{'ratio':>7}   range")
    for name, values in speeds.items():
        ratios = [value / other for value, other in zip(values, reference, strict=True)]
        print(
            f"{name:44}{statistics.median(values):9.0f}{statistics.median(ratios):7.2f}"
            f"   {min(ratios):.2f} .. {max(ratios):.2f}"
        )


def transform_variants(files: list[bytes], train: bool) -> dict[str, Callable[[], int]]:
    """Return decoding and transforming of all files, by torchvision and by us."""
    from torchvision import transforms as tv

    if train:
        steps = [tv.RandomResizedCrop(224), tv.RandomHorizontalFlip()]
        ours: Callable = TrainTransform(224)
        exact: Callable = TrainTransform(224, exact_pil=True)
    else:
        steps = [tv.Resize(256), tv.CenterCrop(224)]
        ours, exact = ValTransform(256, 224), ValTransform(256, 224, exact_pil=True)
    theirs = tv.Compose([*steps, tv.ToTensor(), tv.Normalize(MEAN, STD)])
    generator = torch.Generator()
    batch = torch.empty((len(files), 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def torchvision() -> int:
        for i, data in enumerate(files):
            torch.manual_seed(i)
            theirs(Image.open(io.BytesIO(data)).convert("RGB"))
        return len(files)

    def variant(decoder: Callable, transform: Callable) -> Callable[[], int]:
        def run() -> int:
            for i, data in enumerate(files):
                choose = functools.partial(transform.box, generator=generator.manual_seed(i))
                batch[i].copy_(transform(decoder(data, choose), generator))
            return len(files)

        return run

    def all_of(decoder: Callable) -> Callable:
        def decode_and_cut(data: bytes, choose: Callable) -> np.ndarray:
            pixels = decoder(data)
            return cut(pixels, choose(*pixels.shape[:2]))

        return decode_and_cut

    return {
        "torchvision, PIL, float": torchvision,
        "ours, PIL decoder": variant(all_of(decode_pil), ours),
        "ours, whole images decoded": variant(all_of(decode), ours),
        "ours": variant(decode, ours),
        "ours, --exact-pil": variant(decode, exact),
    }


def loader_options(workers: int) -> dict[str, int]:
    """Return the arguments that all loaders share."""
    return {"batch_size": BATCH, "effective_batch_size": BATCH, "rank": 0, "size": 1,
            "seed": 0, "workers": workers}  # fmt: skip


def counted(batches: Iterable) -> int:
    """Go through all batches; return the number of images."""
    return sum(len(labels) for _, labels in batches)


def source_variants(root: Path, workers: int) -> dict[str, Callable[[], int]]:
    """Return an epoch of each of our sources; DALI's if it is installed."""
    sources = {
        "folders": ImageNet(str(root / "train"), str(root / "val")),
        "records": ImageNet(records=str(root / "records")),
        "records, --shuffle-window 16": ImageNet(records=str(root / "records"), shuffle_window=16),
    }
    variants: dict[str, Callable[[], int]] = {}
    for name, source in sources.items():
        loader = source.train_loader(drop_last=False, **loader_options(workers))
        variants[name] = lambda loader=loader: counted(loader.epoch(1))
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError:
        print("DALI is not installed: left out")
        return variants
    dali = ImageNetDali(data_dir=str(root / "records"))
    loader = dali.train_loader(drop_last=False, **loader_options(workers))
    variants["records through DALI, our order and boxes"] = lambda: counted(loader.epoch(1))
    variants["DALI's own TFRecord reader and crops"] = dali_alone(root / "records", workers)
    return variants


def dali_alone(records: Path, workers: int) -> Callable[[], int]:
    """Return an epoch of a pipeline that leaves everything to DALI."""
    from nvidia.dali import fn, pipeline_def, tfrecord, types

    paths = sorted(map(str, (records / "train").iterdir()))
    indices = sorted(map(str, (records / "idx_files" / "train").iterdir()))

    # Not asynchronous: it would go on working while the other variants have their turn.
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
    """What torchvision's own examples feed a DataLoader with."""

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
    """Return an epoch by a DataLoader of PIL floats, and by ours."""
    theirs = torch.utils.data.DataLoader(
        PilFloats(root), BATCH, num_workers=workers, persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None)  # fmt: skip
    source = ImageNet(str(root / "train"), str(root / "val"))
    ours = source.train_loader(drop_last=False, **loader_options(workers))
    return {
        "torchvision, PIL, float": lambda: counted(theirs),
        "ours": lambda: counted(ours.epoch(1)),
    }


def wait_share(root: Path, workers: int, compute: float) -> None:
    """Print how much of the time a trainer waits that needs `compute` seconds for a batch."""
    source = ImageNet(str(root / "train"), str(root / "val"))
    loader = source.train_loader(drop_last=False, **loader_options(workers))
    counted(loader.epoch(0))
    waits, began = [], time.perf_counter()
    batches = loader.epoch(1)
    while True:
        start = time.perf_counter()
        if next(batches, None) is None:
            break
        waits.append(time.perf_counter() - start)
        time.sleep(compute)  # an accelerator works elsewhere
    first, rest = waits[0], time.perf_counter() - began - waits[0]
    print(
        f"a trainer of {BATCH / compute:.0f} images/s with {workers} workers waits "
        f"{sum(waits[1:]) / rest:.1%} of the time, and {first * 1000:.0f} ms at an epoch's start"
    )


def start_times(workers: int, rounds: int) -> None:
    """Print how long new worker processes take to the first batch, by how they are started."""
    seconds: dict[str, list[float]] = {"forkserver": [], "spawn": []}
    for _ in range(rounds):
        for method, values in seconds.items():
            reader = Reader(ArraySamples(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, int), 1),
                            ValTransform(8, 8))  # fmt: skip
            start = time.perf_counter()
            loader = torch.utils.data.DataLoader(
                reader, batch_sampler=ValSampler(workers, 1, 0, 1), num_workers=workers,
                collate_fn=len, multiprocessing_context=method)  # fmt: skip
            batches = iter(loader)
            next(batches)
            values.append(time.perf_counter() - start)
    for method, values in seconds.items():
        print(f"{method:12} {workers} workers, first batch after {statistics.median(values):.2f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--start", action="store_true")
    parser.add_argument(
        "--grain", type=float, default=13.0, help="of the images; less: smaller files"
    )
    parser.add_argument("--short-side", type=int, default=0, help="of the records' images")
    options = parser.parse_args()
    start_forkserver()
    torch.set_num_threads(1)
    if options.start:
        start_times(max(options.workers, 1), options.rounds)
        return
    decoder = "simplejpeg" if transforms.simplejpeg else "PIL"
    if transforms.region_decoder():
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
        for train in (True, False):
            title = "training transforms" if train else "validation transforms"
            variants = transform_variants(files, train)
            show(title, interleaved(variants, options.rounds, time.process_time))
        arguments = ["--train-dir", str(root / "train"), "--val-dir", str(root / "val")]
        arguments += ["--data-dir", str(root / "records"), "--workers", "0"]
        arguments += ["--short-side", str(options.short_side)]
        make_tfrecords.main(arguments)
        variants = source_variants(root, 0)
        show("sources, in this process", interleaved(variants, options.rounds, time.process_time))


if __name__ == "__main__":
    main()
