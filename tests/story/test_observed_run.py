"""Everything that a run can report at once: it changes no weight, and TensorBoard shows it in a browser."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections import Counter

import pytest
from PIL import Image

from conftest import ROOT, environment, run, until

SMALL = (
    *("--dataset", "noise", "--image-size", "28", "--num-classes", "10", "--train-size", "96"),
    *("--val-size", "16", "--model", "small_cnn", "--batch-size", "16", "--effective-batch-size", "32"),
    *("--base-op", "lars", "--base-lr", "0.5", "--epochs", "3", "--no-cuda", "--workers", "0"),
)  # fmt: skip

COUNTER = """
from lars.observe import Observer

class Counter(Observer):
    def start(self):
        self.steps = 0

    def step(self, result):
        self.steps += 1
        if self.steps == 7:
            raise RuntimeError("seven is enough")
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The run folders `quiet` and `loud`: without and with every observer. Also the output of `loud`."""
    root = tmp_path_factory.mktemp("watching")
    (root / "counter.py").write_text(COUNTER)
    script = [
        sys.executable,
        ROOT / "experiments/train_small.py",
        *SMALL,
        "--log-dir",
        root / "logs",
    ]
    loud = [
        *("--log-every", "1", "--layers-every", "1", "--profile", "2", "--mllog"),
        *("--observer", "counter:Counter"),
    ]
    done = {
        name: run(*script, "--run-name", name, *more, PYTHONPATH=f"{ROOT}:{root}")
        for name, more in (("quiet", ["--layers-every", "0"]), ("loud", loud))
    }
    for each in done.values():
        assert each.returncode == 0, each.stderr
    return root / "logs", done["loud"]


def test_observers_change_no_weight(logs):
    folder, _ = logs
    quiet, loud = ((folder / name / "model.safetensors").read_bytes() for name in ("quiet", "loud"))
    assert quiet == loud


def test_a_profile_has_six_steps_and_names_the_expensive_operations(logs):
    folder, done = logs
    trace = json.loads(gzip.decompress((folder / "loud/steps-2.pt.trace.json.gz").read_bytes()))
    operations = Counter(event.get("name") for event in trace["traceEvents"])
    convolutions, micro_batches = 3, 2
    assert operations["aten::convolution_backward"] == 6 * micro_batches * convolutions
    table = done.stdout.split("the most expensive operations of 6 steps from step 2;")[1]
    rows = re.findall(r"^  (\S.*?) +([\d.]+)% +([\d.]+) ms on the CPU, ([\d.]+) calls", table, re.M)
    shares = [float(row[1]) for row in rows]
    assert len(rows) == 5
    assert shares == sorted(shares, reverse=True)
    assert "convolution" in " ".join(row[0] for row in rows)


def test_a_failing_observer_does_not_end_the_run_and_its_name_is_kept(logs):
    folder, done = logs
    assert done.stdout.count("--observer counter:Counter failed and is switched off") == 1
    assert "seven is enough" in done.stderr
    summary = json.loads((folder / "loud/summary.json").read_text())
    assert [note["step"] for note in summary["notes"]] == [7]
    assert summary["state"] == "finished"


def test_the_log_of_mlperf_is_complete(logs):
    folder, _ = logs
    lines = (folder / "loud/mllog.txt").read_text().splitlines()
    keys = Counter(json.loads(line.removeprefix(":::MLLOG "))["key"] for line in lines)
    assert keys["epoch_start"] == keys["epoch_stop"] == keys["eval_accuracy"] == 3
    assert keys["run_start"] == keys["run_stop"] == keys["opt_name"] == 1


def test_tensorboard_shows_the_layout_and_the_hyper_parameters_in_a_browser(logs, tmp_path):
    """The screenshots stay in the folder of the test: see pytest's --basetemp."""
    folder, _ = logs
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on the PATH")
    log = tmp_path / "log"
    with log.open("wb") as file:
        board = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"],
            env=environment(), stdout=file, stderr=file,
        )  # fmt: skip
    try:
        until(lambda: re.search(r"http://\S+", log.read_text()), 120)
        address = re.search(r"http://\S+:(\d+)", log.read_text())
        url = f"http://localhost:{address[1]}"
        until(
            lambda: set(json.load(urllib.request.urlopen(f"{url}/data/runs"))) == {"quiet", "loud"},
            60,
        )
        for tab in ("custom_scalars", "hparams"):
            picture = tmp_path / f"{tab}.png"
            done = subprocess.run(
                [browser, "--headless", "--no-sandbox", "--window-size=1500,1100",
                 "--virtual-time-budget=20000", f"--screenshot={picture}", f"{url}/#{tab}"],
                cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert picture.exists(), done.stderr
            colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
            is_blank = max(count for count, _ in colours) > 0.97 * 1500 * 1100
            assert not is_blank, picture
    finally:
        board.terminate()
        board.wait(timeout=30)
