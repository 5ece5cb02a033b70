"""The record format, compared with two other readers, and under damage."""

from __future__ import annotations

import random
import struct

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tfrecord import example_pb2
from tfrecord.reader import tfrecord_loader

from data import DataError
from data.samples import tfrecord


def write(path, payloads: list[bytes]) -> list[tuple[int, int]]:
    """Write a record file and its index (`path`.idx); return the index."""
    records = [tfrecord.record(payload) for payload in payloads]
    offsets = np.cumsum([0] + [len(r) for r in records]).tolist()
    index = [(offset, len(r)) for offset, r in zip(offsets, records, strict=False)]
    path.write_bytes(b"".join(records))
    path.with_suffix(".idx").write_text(tfrecord.index_text(index))
    return index


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_masked_crc_is_the_formats(data):
    crc = crc32c.crc32c(data)
    assert tfrecord.masked_crc(data) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


@given(st.lists(st.binary(max_size=100), max_size=8))
@settings(deadline=None)
def test_records_survive_a_round_trip(tmp_path_factory, payloads):
    path = tmp_path_factory.mktemp("records") / "a.tfrecord"
    index = write(path, payloads)
    found = list(tfrecord.read_records(str(path)))
    assert [p for _, p in found] == payloads
    assert [o for o, _ in found] == [o for o, _ in index]
    read = tfrecord.read_index(str(path.with_suffix(".idx")), path.stat().st_size)
    assert read.tolist() == [list(line) for line in index]


values = st.one_of(
    st.binary(max_size=50),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(width=32, allow_nan=False),
)


@given(st.dictionaries(st.text(max_size=12), values, max_size=5))
@settings(deadline=None)
def test_examples_are_protocol_buffers(features):
    encoded = tfrecord.encode_example(features)
    theirs = example_pb2.Example.FromString(encoded)
    as_lists = {name: [value] for name, value in features.items()}
    assert {
        name: list(getattr(feature, feature.WhichOneof("kind")).value)
        for name, feature in theirs.features.feature.items()
    } == as_lists
    assert tfrecord.decode_example(encoded) == as_lists


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4),
    st.lists(st.binary(max_size=9), max_size=4),
)
@settings(deadline=None)
def test_lists_written_by_other_programs_are_read(integers, floats, chunks):
    example = example_pb2.Example()
    example.features.feature["i"].int64_list.value.extend(integers)
    example.features.feature["f"].float_list.value.extend(floats)
    example.features.feature["b"].bytes_list.value.extend(chunks)
    example.features.feature["nothing"].SetInParent()
    found = tfrecord.decode_example(example.SerializeToString())
    assert found == {"i": integers, "f": floats, "b": chunks, "nothing": []}


def test_another_reader_reads_our_files(tmp_path):
    path = tmp_path / "a.tfrecord"
    images = [bytes([i]) * (i + 1) for i in range(9)]
    write(path, [tfrecord.encode_example({"image/encoded": image, "image/class/label": i})
                 for i, image in enumerate(images)])  # fmt: skip
    kinds = {"image/encoded": "byte", "image/class/label": "int"}
    in_order = list(tfrecord_loader(str(path), None, kinds))
    shards = [
        found
        for shard in ((0, 2), (1, 2))
        for found in tfrecord_loader(str(path), str(path.with_suffix(".idx")), kinds, shard=shard)
    ]
    assert [bytes(found["image/encoded"]) for found in in_order] == images
    assert [int(found["image/class/label"][0]) for found in in_order] == list(range(9))
    assert sorted(bytes(found["image/encoded"]) for found in shards) == images


def test_payload_checks_length_and_checksums():
    content = tfrecord.record(b"payload")
    assert tfrecord.payload(content) == b"payload"
    for position in range(len(content)):
        broken = bytearray(content)
        broken[position] ^= 4
        with pytest.raises(DataError):
            tfrecord.payload(bytes(broken))
    for wrong in (b"", content[:15], content[:-1], content + b"x"):
        with pytest.raises(DataError):
            tfrecord.payload(wrong)
    flipped = content[:12] + b"P" + content[13:]
    assert tfrecord.payload(flipped, check_crc=False) == b"Payload"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Damage `data` as disks, networks or people might do."""
    at = rng.randrange(len(data))
    other = rng.randrange(at, min(len(data), at + 40)) + 1
    return rng.choice([
        lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        lambda: data[:at],
        lambda: data[:at] + data[other:],
        lambda: data[:at] + rng.randbytes(other - at) + data[other:],
        lambda: data[:at] + bytes(other - at) + data[other:],
        lambda: data[:other] + data[at:],
        lambda: data + data[at:],
        lambda: data[:at] + rng.randbytes(3) + data[at:],
    ])()  # fmt: skip


def test_500_mutations_are_found_or_harmless(tmp_path):
    path = tmp_path / "a.tfrecord"
    payloads = [
        tfrecord.encode_example({"image/encoded": random.Random(i).randbytes(40 + i)})
        for i in range(6)
    ]
    write(path, payloads)
    records, index = path.read_bytes(), path.with_suffix(".idx").read_bytes()
    found = 0
    for seed in range(500):
        rng = random.Random(seed)
        hit_index = seed % 2
        path.write_bytes(records if hit_index else mutated(records, rng))
        path.with_suffix(".idx").write_bytes(mutated(index, rng) if hit_index else index)
        try:
            through = [p for _, p in tfrecord.read_records(str(path))]
            by_index = [
                tfrecord.payload(path.read_bytes()[offset : offset + size])
                for offset, size in tfrecord.read_index(
                    str(path.with_suffix(".idx")), path.stat().st_size
                ).tolist()
            ]
        except DataError:
            found += 1
            continue
        assert by_index == payloads
        assert through == payloads
    assert found > 450  # the others did not change the meaning, for example white space in an index


def test_damage_is_named_with_its_offset(tmp_path):
    path = tmp_path / "a.tfrecord"
    index = write(path, [b"one", b"two", b"three"])
    content = path.read_bytes()
    offset = index[1][0]
    path.write_bytes(content[: offset + 13] + b"?" + content[offset + 14 :])
    with pytest.raises(DataError, match=f"{path}, record at byte {offset}: the checksum"):
        list(tfrecord.read_records(str(path)))
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{path}, record at byte {index[2][0]}: the file ends"):
        list(tfrecord.read_records(str(path)))
    # The reader must not allocate a wrong length, even if its checksum is correct.
    length = struct.pack("<Q", 2**60)
    path.write_bytes(length + struct.pack("<I", tfrecord.masked_crc(length)) + content)
    with pytest.raises(DataError, match="record at byte 0: the file ends"):
        list(tfrecord.read_records(str(path)))


@pytest.mark.parametrize(
    "text", ["0 19\n19", "0 19 x\n", "0 99999999999999999999\n", "19 19\n", "\xff"]
)
def test_damaged_index_files_are_named(tmp_path, text):
    path = tmp_path / "a.idx"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"{path}.*--from-tfrecords"):
        tfrecord.read_index(str(path), 19)


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.idx cannot be read: No such file.*--from-tfrecords"):
        tfrecord.read_index(str(tmp_path / "a.idx"), 19)


@pytest.mark.parametrize(
    "junk", [b"\x0a", b"\x0a\xff", b"\x0b", b"\x0a\x03\x0a\x01\x08", b"\xff" * 20]
)
def test_junk_is_not_an_example(junk):
    with pytest.raises(DataError, match=r"does not hold a tf\.train\.Example"):
        tfrecord.decode_example(junk)
