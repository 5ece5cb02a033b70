"""Checkpoints are written completely or not at all, verified, rotated, and cannot run code."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import zlib

import pytest
import torch

from conftest import environment
from lars.errors import CheckpointError, Preempted
from lars.run import checkpoint

FORMAT = "checkpoint-{epoch}.pth.tar"


def state(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((1000,), value)}, "step": 3, "history": [{"loss": 0.1}]}


def test_a_checkpoint_is_loaded_bit_for_bit(tmp_path):
    path = tmp_path / "x.pth"
    nhwc = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    saved = state() | {"half": torch.randn(3, dtype=torch.bfloat16), "nhwc": nhwc}
    checkpoint.save(path, saved)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["w"], saved["model"]["w"])
    assert torch.equal(loaded["half"], saved["half"])
    assert loaded["nhwc"].stride() == saved["nhwc"].stride()
    assert loaded["history"] == saved["history"]
    assert torch.load(path, weights_only=True)["step"] == 3, "torch can read the file"
    assert os.listdir(tmp_path) == ["x.pth"]


def test_any_damage_is_detected(tmp_path):
    path = tmp_path / "x.pth"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), len(whole) - 1, len(whole) - 9]:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint"):
            checkpoint.load(path)
    for length in (0, 5, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    checkpoint.save(path, state(1.0))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, state(2.0))
    assert checkpoint.load(path)["model"]["w"][0] == 1.0
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_killed_writer_leaves_a_complete_file(tmp_path):
    path = tmp_path / "x.pth"
    script = (
        "import sys, torch, itertools; from pathlib import Path; from lars.run import checkpoint\n"
        "for i in itertools.count(): checkpoint.save(Path(sys.argv[1]), {'w': torch.full((200000,), float(i))})"
    )
    for delay in (0.0, 0.003, 0.01, 0.02, 0.03):
        writer = subprocess.Popen([sys.executable, "-c", script, str(path)], env=environment())
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        values = checkpoint.load(path)["w"]
        assert torch.equal(values, values[0].expand_as(values))


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch /tmp/owned-by-a-checkpoint",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"format": checkpoint.FORMAT, "model": Malicious()}, path)
    payload = path.read_bytes()
    path.write_bytes(payload + checkpoint._trailer(zlib.crc32(payload)))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/owned-by-a-checkpoint")
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/owned-by-a-checkpoint")


def test_the_newest_and_the_best_are_kept(tmp_path):
    for name in ("1", "2", "9", "10", "10+5", "11"):
        (tmp_path / FORMAT.replace("{epoch}", name)).touch()
    (tmp_path / "checkpoint-x.pth.tar").touch()
    (tmp_path / ".tmp-checkpoint-12.pth.tar").touch()
    places = [place for place, _ in checkpoint.newest_first(tmp_path, FORMAT)]
    assert places == [(11, 0), (10, 5), (10, 0), (9, 0), (2, 0), (1, 0)]
    checkpoint.rotate(tmp_path, FORMAT, newest=(11, 0), keep=2, keep_also=[(2, 0)])
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-10+5.pth.tar", "checkpoint-11.pth.tar", "checkpoint-2.pth.tar", "checkpoint-x.pth.tar",
    ]  # fmt: skip


def test_a_damaged_newest_checkpoint_takes_no_place(tmp_path):
    """Epoch 5 is damaged, and the job resumed from epoch 3: what it writes stays, and 5 goes."""
    for name in ("3", "3+10", "5"):
        (tmp_path / FORMAT.replace("{epoch}", name)).touch()
    checkpoint.rotate(tmp_path, FORMAT, newest=(3, 10), keep=1, keep_also=[(3, 0)])
    assert [place for place, _ in checkpoint.newest_first(tmp_path, FORMAT)] == [(3, 10), (3, 0)]


def test_a_stop_while_a_checkpoint_is_read_is_a_stop(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    checkpoint.save(path, state())

    def stop(*_, **__):
        raise Preempted("stopped on request")

    monkeypatch.setattr(torch, "load", stop)
    with pytest.raises(Preempted):
        checkpoint.load(path)
