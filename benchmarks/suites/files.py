"""Suites about files: images that become batches, checkpoints, and the lists of large trees."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import listing, loader
from benchmarks.processes import finish, ranks_of
from benchmarks.rounds import Comparison, Row, Suite, alone, missing, speed, timed
from benchmarks.transforms import augmentation_variants, transform_variants

IMAGES = 64
PIL_FLOATS = "torchvision, PIL, float"


def make_images(folder: Path) -> list[bytes]:
    """Write generated images of ImageNet's usual size into folders and records, and return them."""
    noise = ["--num-classes", "2", "--train-size", str(IMAGES), "--val-size", "2", "--grain", "13"]
    arguments = ["--train-dir", str(folder / "train"), "--val-dir", str(folder / "val")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        loader.synthetic.main([str(folder), *noise])
        loader.make_tfrecords([*arguments, "--data-dir", str(folder / "records"), "--workers", "0"])
    return [path.read_bytes() for path in sorted((folder / "train").glob("*/*.jpg"))]


def timm_transform(files: list[bytes]) -> int:
    """Decode and transform all files as timm does: crop, mirror, normalised floats."""
    from timm.data import create_transform

    transform = create_transform(224, is_training=True, color_jitter=0.0)
    for i, data in enumerate(files):
        torch.manual_seed(i)
        transform(Image.open(io.BytesIO(data)).convert("RGB"))
    return len(files)


@contextlib.contextmanager
def transforms(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Decoding and transforms of training images, whole epochs of one process, DALI's included."""
    files = make_images(folder)
    run = transform_variants(files, train=True)
    name = "crop and mirror only"
    run["torchvision v2, tensors, float"] = augmentation_variants(files, name)[
        "torchvision v2, tensors"
    ]
    run["timm.data, PIL, float"] = functools.partial(timm_transform, files)
    with contextlib.redirect_stdout(io.StringIO()):
        run |= {f"epoch: {name}": each for name, each in loader.source_variants(folder, 0).items()}
    not_installed = {"timm.data, PIL, float": missing("timm")}
    if not any("DALI" in name for name in run):
        not_installed["epoch: records through DALI"] = "NVIDIA DALI"
    rows = [Row(name, PIL_FLOATS, not_installed.get(name, "")) for name in run | not_installed]
    clock = time.process_time
    turns = [alone(row.name, speed(run[row.name], clock)) for row in rows if not row.lacks]
    yield Comparison(rows, turns)


@contextlib.contextmanager
def workers(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Epochs of loaders with two worker processes."""
    make_images(folder)
    run = loader.loader_variants(folder, 2)
    yield Comparison(
        [Row(name, PIL_FLOATS) for name in run],
        [alone(name, speed(each)) for name, each in run.items()],
    )


# ------------------------------------------------------------------------------------ checkpoints


def state() -> dict[str, Any]:
    """What a checkpoint of ResNet-50 and LARS holds: weights and momentum."""
    from lars import LARS
    from lars.models import build

    model = build("resnet50", 1000)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return {"model": model.state_dict(), "optimizer": momentum, "rule": LARS.__name__}


def synced(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def checkpoints(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Save and load the same tensors."""
    from safetensors.torch import load_file, save_file

    from lars.run import checkpoint

    content = state()
    flat = {f"{part}.{n}": t for part in ("model", "optimizer") for n, t in content[part].items()}
    ours, theirs, safe = (folder / name for name in ("ours.pt", "torch.pt", "flat.safetensors"))
    run: dict[str, Callable[[], object]] = {
        "torch.save, fsync": lambda: (torch.save(content, theirs), synced(theirs)),
        "save: trainer": lambda: checkpoint.save(ours, content),
        "safetensors.save_file, fsync": lambda: (save_file(flat, safe), synced(safe)),
        "torch.load": lambda: torch.load(theirs, weights_only=True),
        "load: trainer": lambda: checkpoint.load(ours),
        # It maps the file, and the copy reads it.
        "safetensors.load_file, copied": lambda: [t.clone() for t in load_file(safe).values()],
    }
    names = list(run)
    rows = [Row(name, names[0] if "save" in name else names[3]) for name in names]
    yield Comparison(rows, [alone(name, timed(each)) for name, each in run.items()])


# ---------------------------------------------------------------------------------------- listing


def make_tree(root: str, images: int) -> None:
    """Make the tree whose images are listed.

    Raises:
        SystemExit: There is no space for it.
    """
    try:
        listing.make(root, images)
    except OSError as error:
        raise SystemExit(
            f"--files {images}: cannot make the files ({error.strerror}); use fewer, or "
            "set TMPDIR to a folder with space"
        ) from error


@contextlib.contextmanager
def lists(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Find the images of a large tree, in this process."""
    import torchvision.datasets  # noqa: F401  not part of the measurement

    if not missing("timm"):
        import timm.data.readers.reader_image_folder  # noqa: F401  nor is this

    with tree_and_cache(folder, options.files) as (root, cache):
        run: dict[str, Callable[[], object]] = {
            "torchvision.datasets.ImageFolder": lambda: image_folders(root),
            "first start": lambda: (
                shutil.rmtree(cache, ignore_errors=True),
                listing.open_tree(root),
            ),
            "later starts": lambda: listing.open_tree(root),
        }
        names = list(run)
        rows = [Row(name, names[0]) for name in names]
        rows.append(Row("timm.data.readers", names[0], missing("timm")))
        if not rows[-1].lacks:
            run["timm.data.readers"] = lambda: timm_readers(root)
        clock = time.process_time
        yield Comparison(rows, [alone(n, timed(each, clock=clock)) for n, each in run.items()])


@contextlib.contextmanager
def tree_and_cache(folder: Path, images: int) -> Iterator[tuple[str, Path]]:
    """Make a tree of images, and keep its lists below `folder`. Yield the tree and the folder of the lists."""
    root, cache = str(folder / "tree"), folder / "cache"
    if images:
        make_tree(root, images)
        # A list that is made less than 10 s after the last change does not count later.
        time.sleep(11)
    with cache_in(cache):
        yield root, cache


@contextlib.contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Keep the lists in this folder, as `XDG_CACHE_HOME` does."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def image_folders(root: str) -> None:
    """List both splits as torchvision's own example does."""
    from torchvision.datasets import ImageFolder

    for split in ("train", "val"):
        ImageFolder(f"{root}/{split}")


def timm_readers(root: str) -> None:
    """List both splits as timm does."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    for split in ("train", "val"):
        ReaderImageFolder(f"{root}/{split}")


def command_line(root: str, *flags: str) -> list[str]:
    """A short training run on a tree, whose network is so small that its steps take no time."""
    tiny = ["--model=resnet18", "--image-size=64", "--batch-size=2"]
    return [*tiny, "--no-cuda", "--benchmark=data", "--max-steps=1", f"--data={root}", *flags]


@contextlib.contextmanager
def first_steps(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Whole jobs on a large tree with 1, 2 and 4 ranks, from the launch to the end of the first steps."""
    with tree_and_cache(folder, options.files) as (root, cache):
        rows, turns = [], []
        for ranks in (1, 2, 4):
            names = [f"{ranks} rank{'s' * (ranks > 1)}, {which}" for which in STARTS]
            rows += [Row(name, names[1]) for name in names]
            turns.append(functools.partial(both_starts, names, cache, root, ranks))
        yield Comparison(rows, turns)


STARTS = ("first start", "later start")


def both_starts(names: list[str], cache: Path, root: str, ranks: int) -> dict[str, float]:
    """The seconds of a job without saved lists, and of the next one."""
    shutil.rmtree(cache, ignore_errors=True)
    command = [*ranks_of(ranks), "train_imagenet.py", *command_line(root)]
    return {name: timed(lambda: finish(command), 1)() for name in names}


@contextlib.contextmanager
def requests(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Count what each of 1, 2 and 4 processes asks the file system about the tree."""
    lacks = "" if shutil.which("strace") else "strace"
    rows, turns = [], []
    with tree_and_cache(folder, 0 if lacks else options.files) as (root, cache):
        for ranks in (1, 2, 4):
            names = {f"{ranks} rank{'s' * (ranks > 1)}, {each}": each for each in RANKS}
            if ranks == 1:
                names = dict(list(names.items())[::2])
            rows += [Row(name, lacks=lacks) for name in names]
            turns.append(functools.partial(count_requests, names, cache, root, ranks))
        yield Comparison(rows, [] if lacks else turns)


RANKS = ("the rank that lists", "every other rank", "every rank at a later start")


def count_requests(names: dict[str, str], cache: Path, root: str, ranks: int) -> dict[str, float]:
    """The requests of the ranks of a job, by row: the largest number is that of the rank that lists.

    The other rows have the largest number of the ranks that they describe.
    """
    shutil.rmtree(cache, ignore_errors=True)
    first, later = (sorted(requests_of(root, ranks)) for _ in STARTS)
    found = dict(
        zip(RANKS, (first[-1], first[-2] if ranks > 1 else first[-1], later[-1]), strict=True)
    )
    return {name: found[which] for name, which in names.items()}


def requests_of(root: str, ranks: int) -> list[int]:
    """Open a tree in several processes at the same time; return the requests of each about files below it."""
    logs = [Path(root).with_name(f"requests-{rank}") for rank in range(ranks)]
    trace = ["strace", "-f", "--seccomp-bpf", "-y", "-e", "trace=file,getdents64", "-o"]
    opening = [sys.executable, "-m", "benchmarks.listing", root]
    running = [
        subprocess.Popen([*trace, str(log), *opening], stdout=subprocess.DEVNULL) for log in logs
    ]
    if any([process.wait() for process in running]):
        raise SystemExit("strace or benchmarks.listing failed: see the message above")
    return [sum(root in line for line in log.read_text().splitlines()) for log in logs]


SUITES = (
    Suite(
        "loader",
        "Training images, one process",
        f"{IMAGES} generated JPEGs of 500x375 pixels and 110 KB become crops of 224 px: images per second of CPU time. "
        "The first rows decode and transform bytes in memory. The rows of an epoch also read the files and make "
        "batches. torchvision and timm end with normalised floats, the other rows with uint8 pixels, because the "
        "trainer normalises on its device.",
        "images/s",
        transforms,
    ),
    Suite(
        "workers",
        "Training images, two worker processes",
        "The same images through loaders with two workers: images per second of elapsed time.",
        "images/s",
        workers,
    ),
    Suite(
        "checkpoint",
        "Checkpoint",
        "The weights and the momentum of ResNet-50 (205 MB), on the disk after each save. The trainer's checkpoints "
        "have a checksum, which a load verifies. They appear under their name only after they are complete.",
        "ms",
        checkpoints,
    ),
    Suite(
        "listing",
        "List of the images",
        "Finding the images of a tree of 1,000 classes and {files:,} training images, and of 50,000 for validation, in "
        "one process. `--files 1281167` has ImageNet's size.",
        "CPU ms",
        lists,
        warm_up=False,
    ),
    Suite(
        "first-step",
        "From the launch to the first step",
        "Seconds of whole jobs on a tree of {files:,} training images, which take 7 steps of a tiny network. At the "
        "first start there is no saved list.",
        "s",
        first_steps,
        quick=False,
        warm_up=False,
    ),
    Suite(
        "requests",
        "Requests to the file system",
        "Requests of each rank (open, stat, getdents) about a tree of {files:,} training images, counted by strace.",
        "requests",
        requests,
        quick=False,
        warm_up=False,
        rounds=1,  # the numbers hardly change
    ),
)
