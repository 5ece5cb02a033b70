"""Mutated images and record files: each is read as PIL reads it, or refused by name.

    python tests/fuzz_data.py --cases 10000 --seed 1

A case takes an intact file and flips bits, cuts, inserts, swaps pieces or writes a field of a header.
The result goes through the sources' own reading code. An image must give the pixels that PIL gives
(torchvision's loader), and a record the image and the label that it holds; or a `DataError` must name
the file. Any other exception, wrong pixels, a crash or a case that takes too long is a failure, and
the file is kept.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import signal
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from PIL import Image

from data import DataError
from data.pixels.boxes import Box, Pixels, crop, full_image
from data.pixels.decode import MAX_PIXELS
from data.samples import NumberedSamples, tfrecord
from data.samples.flat_records import open_flat_records
from data.samples.listing import pack
from data.samples.parquet import open_parquet
from data.samples.records import RecordSet
from data.samples.tars import open_tars
from data.samples.tree import FileTree
from data_fixtures import photograph, write_parquet, write_records, write_tar_of_samples

SECONDS = 20  # one case; it usually takes milliseconds
BATCH = 200  # cases of one process
LARGE_FILES = 0.1  # share of parquet files, tars and flat records among the rest


class TooSlow(BaseException):
    """A case has reached its time limit. No handler of ordinary errors catches it."""


def flip_bits(data: bytearray, chance: random.Random) -> None:
    """Flip a few bits."""
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    """Remove the end."""
    del data[chance.randrange(1, len(data)) :]


def remove(data: bytearray, chance: random.Random) -> None:
    """Remove a piece from the middle."""
    start = chance.randrange(len(data) - 1)
    del data[start : start + chance.randrange(1, 200)]
    data.extend(b"" if data else b"\0")


def insert(data: bytearray, chance: random.Random) -> None:
    """Insert random bytes, or zeros."""
    size = chance.randrange(1, 200)
    data[(start := chance.randrange(len(data))) : start] = (
        chance.randbytes(size) if chance.random() < 0.5 else bytes(size)
    )


def swap(data: bytearray, chance: random.Random) -> None:
    """Exchange two pieces."""
    size = chance.randrange(1, max(len(data) // 4, 2))
    first = chance.randrange(max(len(data) - 2 * size, 1))
    second = chance.randrange(first + size, max(len(data) - size, first + size + 1))
    a, b = data[first : first + size], data[second : second + size]
    data[second : second + size], data[first : first + size] = a, b


def write_header(data: bytearray, chance: random.Random) -> None:
    """Write an extreme number near the beginning, where sizes, depths and lengths are."""
    value = chance.choice((0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
    code = chance.choice(("B", ">H", "<H", ">I", "<I"))
    size = struct.calcsize(code)
    start = chance.randrange(max(min(len(data), 700) - size, 1))
    data[start : start + size] = struct.pack(code, value & (256**size - 1))


MUTATIONS = (flip_bits, cut, remove, insert, swap, write_header)


def mutated(original: bytes, chance: random.Random) -> bytes:
    """Apply one to three mutations."""
    data = bytearray(original)
    for _ in range(chance.choice((1, 1, 2, 3))):
        if len(data) > 2:
            chance.choice(MUTATIONS)(data, chance)
    return bytes(data)


def with_right_checksums(png: bytes) -> bytes:
    """Return a PNG whose chunks have right checksums, so that a decoder looks at their contents."""
    data, position = bytearray(png), 8
    while position + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, position)
        end = position + 8 + size
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return bytes(data)


@functools.cache
def seeds() -> dict[str, bytes]:
    """Return intact image files of the kinds that ImageNet and other sets hold."""
    image = Image.fromarray(photograph(45, 61, seed=1))
    variants = {
        "baseline": (image, "JPEG", {"quality": 85}),
        "444": (image, "JPEG", {"quality": 60, "subsampling": 0}),
        "progressive": (image, "JPEG", {"progressive": True}),
        "restart": (image, "JPEG", {"restart_marker_blocks": 3}),
        "grey": (image.convert("L"), "JPEG", {}),
        "cmyk": (image.convert("CMYK"), "JPEG", {}),
        "exif": (image, "JPEG", {"exif": Image.Exif()}),
        "png": (image, "PNG", {}),
        "palette": (image.convert("P"), "PNG", {}),
        "alpha": (image.convert("RGBA"), "PNG", {}),
        "bits": (image.convert("1"), "PNG", {}),
        "grey16": (image.convert("I;16"), "PNG", {}),
    }
    files = {}
    for name, (picture, kind, options) in variants.items():
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    return files


def by_pil(encoded: bytes) -> Pixels | None:
    """Return what torchvision's loader returns; None where it raises or PIL refuses the size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        except Exception:  # PIL can raise anything for damaged files
            return None


def central_box(height: int, width: int) -> Box:
    """Return a box that does not cover the image."""
    return height // 4, width // 4, max(height // 2, 1), max(width // 2, 1)


def require_name(error: DataError, path: Path) -> None:
    """Fail unless an error names the file."""
    assert str(path) in str(error), f"the error does not name the file: {error}"


def check_image(folder: Path, encoded: bytes) -> str:
    """Read one image file through an image folder; return what came of it."""
    path = folder / "class" / "image.jpg"
    path.write_bytes(encoded)
    tree = FileTree(str(folder), ["class"], [pack(["image.jpg"])])
    part = None
    with contextlib.suppress(DataError):  # later epochs decode a box only
        part, _ = tree.read(0, central_box)
    expected = by_pil(encoded)
    try:
        pixels, _ = tree.read(0)
    except DataError as error:
        require_name(error, path)
        if expected is None:
            return "refused, as by PIL"
        if "grey levels beyond 255" in str(error):
            return "refused, 16 bits"
        raise AssertionError(f"PIL reads it: {error}") from error
    assert expected is not None, "PIL refuses it"
    assert pixels.shape == expected.shape, "another shape than PIL's"
    assert np.array_equal(pixels, expected), "other pixels than PIL's"
    assert pixels.size <= 3 * MAX_PIXELS
    expected_part = crop(pixels, central_box(*pixels.shape[:2]))
    assert part is not None, "the box cannot be read"
    assert np.array_equal(part, expected_part), "the box has other pixels than the image"
    return "read"


def intact_records(images: dict[str, bytes]) -> list[bytes]:
    """Return the examples of a record file, all of which can be read."""
    return [
        tfrecord.encode_example({
            tfrecord.IMAGE: image,
            tfrecord.LABEL: number % 3 + 1,
            tfrecord.CLASS_NAME: b"n%08d" % (number % 3),
        })
        for number, image in enumerate(image for name, image in images.items() if name != "grey16")
    ]  # fmt: skip


def check_records(folder: Path, examples: list[bytes], chance: random.Random) -> str:
    """Damage a record file, an index file, or an example with a right checksum; read all records."""
    what = chance.choice(("file", "index", "example"))
    examples = list(examples)
    if what == "example":
        number = chance.randrange(len(examples))
        examples[number] = mutated(examples[number], chance)
    records = [tfrecord.record(example) for example in examples]
    content, offset, rows = b"".join(records), 0, []
    for record in records:
        rows.append((offset, len(record)))
        offset += len(record)
    index = tfrecord.index_text(rows).encode()
    path = folder / "records"
    path.write_bytes(mutated(content, chance) if what == "file" else content)
    (folder / "records.idx").write_bytes(mutated(index, chance) if what == "index" else index)
    try:
        samples = RecordSet([(str(path), str(path) + ".idx")], num_classes=3)
    except DataError as error:
        require_name(error, path)
        return f"{what} refused at the start"
    outcomes = {read_record(samples, number, path) for number in range(len(samples))}
    return f"{what} {' and '.join(sorted(outcomes))}"


def check_large_file(folder: Path, images: list[bytes], chance: random.Random) -> str:
    """Damage a parquet file, a tar or a record file without an index; read all images."""
    kind, write, open_split = chance.choice((
        ("parquet", write_parquet, lambda path: open_parquet([path], "train")),
        ("tar", write_tar_of_samples,
         lambda path: open_tars(str(folder), [path], "train", index_dir=str(folder))),
        ("flat records", write_records,
         lambda path: open_flat_records(str(folder), [path], "train", index_dir=str(folder))),
    ))  # fmt: skip
    path = write(folder / f"train.{kind.split()[-1]}", images, [i % 3 for i in range(len(images))])
    path.write_bytes(mutated(path.read_bytes(), chance))
    try:
        samples = open_split(str(path))
    except DataError as error:
        require_name(error, path)
        return f"{kind} refused at the start"
    outcomes = {read_record(samples, number, path) for number in range(len(samples))}
    return f"{kind} {' and '.join(sorted(outcomes))}"


def read_record(samples: NumberedSamples, number: int, path: Path) -> str:
    """Read one image; return what came of it."""
    try:
        encoded, label = samples.encoded(number)
        pixels, _ = samples.read(number, full_image)
    except DataError as error:
        require_name(error, path)
        return "refused"
    assert 0 <= label < samples.num_classes
    expected = by_pil(encoded)
    assert expected is not None, "PIL refuses it"
    assert np.array_equal(pixels, expected), "other pixels than PIL's"
    return "read"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TooSlow in the block after some seconds."""

    def too_slow(*_: object) -> None:
        raise TooSlow

    earlier = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def case(folder: Path, seed: str) -> str:
    """Run the case that `seed` determines; return what came of it."""
    chance = random.Random(seed)
    images = seeds()
    if chance.random() < 0.25:
        return "records: " + check_records(folder, intact_records(images), chance)
    if chance.random() < LARGE_FILES:
        files = [image for name, image in images.items() if name != "grey16"]
        return "large files: " + check_large_file(folder, files, chance)
    name = chance.choice(sorted(images))
    encoded = mutated(images[name], chance)
    if not images[name].startswith(b"\x89PNG"):
        return f"jpeg: {check_image(folder, encoded)}"
    if chance.random() < 0.7:
        encoded = with_right_checksums(encoded)
    return f"png: {check_image(folder, encoded)}"


def run_batch(numbers: range, seed: int, send: Callable[[tuple[int, str]], None]) -> None:
    """Run some cases, and send the outcome of each before the next begins."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg writes a line about each damaged file
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        (folder / "class").mkdir()
        for number in numbers:
            try:
                with time_limit(SECONDS):
                    outcome = case(folder, f"{seed}-{number}")
            except TooSlow:
                outcome = f"FAILED: longer than {SECONDS} s"
            except Exception as error:
                outcome = f"FAILED: {type(error).__name__}: {error}"
            send((number, outcome))


def fuzz(cases: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Return how often each outcome came, and the failures.

    The cases run in processes of their own, so that a crash of a decoder is one failure too.
    """
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    context = multiprocessing.get_context("fork")
    start = 0
    while start < cases:
        receiver, sender = context.Pipe(duplex=False)
        numbers = range(start, min(start + BATCH, cases))
        process = context.Process(target=run_batch, args=(numbers, seed, sender.send))
        process.start()
        sender.close()
        done = start
        with contextlib.suppress(EOFError):
            while done < numbers.stop and receiver.poll(2 * SECONDS):
                number, outcome = receiver.recv()
                done = number + 1
                counts[outcome.split(":")[0] if outcome.startswith("FAILED") else outcome] += 1
                if outcome.startswith("FAILED"):
                    failures.append(f"case {number}: {outcome}")
        process.kill() if done < numbers.stop else None
        process.join()
        if done < numbers.stop:
            counts["FAILED"] += 1
            failures.append(f"case {done}: the process ended with {process.exitcode}, or hung")
            done += 1
        start = done
    return dict(sorted(counts.items())), failures


def main(argv: list[str] | None = None) -> int:
    """Fuzz, print a summary, and return 1 if anything failed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="number of mutated files (10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (0)")
    parser.add_argument("--summary", type=Path, help="JSON file for the summary")
    args = parser.parse_args(argv)
    counts, failures = fuzz(args.cases, args.seed)
    summary = {"cases": args.cases, "seed": args.seed, "outcomes": counts, "failures": failures}
    print(json.dumps(summary, indent=2))
    if args.summary:
        args.summary.write_text(json.dumps(summary, indent=2) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
