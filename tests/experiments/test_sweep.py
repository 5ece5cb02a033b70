"""A sweep keeps every result, whatever happens to it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import HEARING_SIGNALS, ROOT, environment, run, until

NOISE = ("--dataset", "noise", "--image-size", "28", "--num-classes", "2", "--train-size", "256", "--val-size", "32",
         "--model", "small_cnn", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0", "--no-cuda")  # fmt: skip

# A study of four trainings. It is a script, because a sweep is killed with its process.
STUDY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from experiments.cells import Cell
from experiments.sweep import run_study

class Four:
    def cells(self, results):
        flags = {NOISE!r} + tuple(FLAGS)
        return [Cell(f"seed{{s}}", (*flags, "--seed", str(s)), {{"seed": s}}) for s in range(4)]
    def still_unknown(self, results):
        return 0
    def report(self, results, out, command):
        (out / "table.md").write_text(" ".join(sorted(results)))

run_study({{"four": Four()}}, "Four trainings.")
"""


@pytest.fixture
def study(tmp_path):
    """A function that writes the script of the study, with more flags for its trainings."""

    def write(*flags: str) -> list[str | Path]:
        script = tmp_path / "four.py"
        script.write_text(f"FLAGS = {flags!r}\n{STUDY}")
        return [sys.executable, script, "--preset", "four", "--out", tmp_path / "out"]

    return write


def started_lines(out: Path) -> dict[str, int]:
    """How often each training printed that it finished, by the name of its cell."""
    return {path.stem: path.read_text().count("finished: val") for path in (out / "logs").iterdir()}


def results_in(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}


def test_a_killed_sweep_runs_no_cell_twice_and_loses_none(tmp_path, study):
    command, out = study(), tmp_path / "out"
    for fraction in (1, 2):  # kill it in the middle of a cell, and again later
        sweep = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment(),
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        until(lambda n=fraction: len(results_in(out)) >= n, 120)
        time.sleep(0.3 * fraction)
        sweep.kill()
        sweep.wait()
    before = results_in(out)
    assert len(before) < 4, "the sweep ended before it was killed"
    done = run(*command, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    after = results_in(out)
    assert {name: after[name] for name in before} == before
    assert sorted(after) == ["seed0", "seed1", "seed2", "seed3"]
    assert all(result["steps"] == 64 for result in after.values())
    assert all(times == 1 for times in started_lines(out).values()), started_lines(out)
    assert (out / "table.md").read_text() == "seed0 seed1 seed2 seed3"
    assert not list(out.glob("cells/*/*.pth.tar"))
    assert run(*command).returncode == 0
    assert results_in(out) == after


def test_ctrl_c_lets_the_cells_save_and_a_second_sweep_is_refused(tmp_path, study):
    command, out = study("--epochs", "60", "--checkpoint-steps", "1000"), tmp_path / "out"
    words = [*HEARING_SIGNALS, *(str(word) for word in command), "--jobs", "1"]
    sweep = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    log = out / "logs" / "seed0.log"
    until(lambda: log.exists() and "epoch   1" in log.read_text(), 60)
    second = run(*command)
    assert second.returncode == 2
    assert "--out: " in second.stderr
    assert f"is in use by process {sweep.pid}" in second.stderr
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 75
    assert "the same command continues them" in errors
    assert "saved after step" in log.read_text()
    assert list(out.glob("cells/seed0/*.pth.tar"))
    assert not results_in(out)


def test_a_training_that_breaks_down_is_a_result_and_other_failures_are_tried_again(
    tmp_path, study
):
    command, out = study("--base-lr", "1e30", "--max-skipped-steps", "3"), tmp_path / "out"
    broken = tmp_path / "out" / "cells" / "seed1"
    broken.parent.mkdir(parents=True)
    broken.write_text("a file where the run folder should be")
    done = run(*command, "--only", "seed[01]", "--jobs", "1")
    assert done.returncode == 1
    assert "seed1 cannot start" in done.stderr
    assert "1 cells failed and have no result: seed1" in done.stderr
    result = results_in(out)["seed0"]
    assert (result["last"], result["exit_code"]) == (None, 5)
    broken.unlink()
    assert run(*command, "--only", "seed[01]").returncode == 0
    assert sorted(results_in(out)) == ["seed0", "seed1"]


def test_a_failed_cell_shows_the_end_of_its_log(tmp_path, study):
    done = run(*study("--model", "resnet1000"), "--only", "seed0")
    assert done.returncode == 1
    assert "seed0 failed with exit code 2; the end of " in done.stderr + done.stdout
    assert "--model resnet1000 is not known" in done.stderr + done.stdout


def test_a_result_of_other_flags_is_reported(tmp_path, study):
    command = study("--max-steps", "1")
    assert run(*command, "--only", "seed0").returncode == 0
    listed = run(*command, "--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["done", "to", "to", "to"]
    done = run(*study("--max-steps", "1", "--base-lr", "0.5"), "--only", "seed0")
    assert done.returncode == 2
    assert "the result of cell seed0 was made with other settings" in done.stderr
    assert "base_lr was 0.0125 and is now 0.5" in done.stderr


def test_wrong_flags_are_refused_before_any_training(tmp_path, study):
    done = run(*study("--base-lrr", "1"))
    assert done.returncode == 2
    assert "--base-lrr is not a flag; did you mean --base-lr?" in done.stderr
    assert "cell seed0: experiments/train_small.py refuses these flags" in done.stderr
    assert not (tmp_path / "out").exists()
    for words, message in (
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--only", "nothing"], "--only nothing: no cell has such a name"),
        (["--preset", "five"], "invalid choice: 'five'"),
    ):
        done = run(*study(), *words)
        assert done.returncode == 2
        assert message in done.stderr
