"""A sweep keeps every result, whatever happens to it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import HEARING_SIGNALS, ROOT, environment, run, until

STAND_IN = "tests/experiments/counting_trainer.py"
NOISE = (
    "--dataset", "noise", "--image-size", "28", "--num-classes", "2", "--train-size", "256", "--val-size", "32",
    "--model", "small_cnn", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0", "--no-cuda",
)  # fmt: skip

# A study of four training runs. It is a program, because a test kills it.
STUDY = """
import sys
sys.path[:0] = [ROOT, ROOT + "/tests/experiments"]
import counting_trainer
from experiments.cells import SCRIPTS, Cell, Study
from experiments.sweep import run_study

SCRIPTS["tests/experiments/counting_trainer.py"] = counting_trainer.read_flags

class Four(Study):
    def cells(self, results):
        return [Cell(f"seed{s}", (*FLAGS, "--seed", str(s)), {"seed": s}, SCRIPT) for s in range(4)]
    def report(self, results, out, command):
        (out / "table.md").write_text(" ".join(sorted(results)))

run_study({"four": Four()}, "Four training runs.")
"""


@pytest.fixture
def study(tmp_path):
    """A function that writes the program of the study for a script and flags, and returns its command."""

    def write(*flags: str, script: str = STAND_IN) -> list[str]:
        path = tmp_path / "four.py"
        path.write_text(f"ROOT, SCRIPT, FLAGS = {str(ROOT)!r}, {script!r}, {flags!r}\n{STUDY}")
        return [sys.executable, str(path), "--preset", "four", "--out", str(tmp_path / "out")]

    return write


def results_in(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}


def steps_taken(out: Path) -> int:
    return sum(len(path.read_text().split()) for path in out.glob("steps-*"))


def start(command: list[str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*HEARING_SIGNALS, *command, *words], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_sweep_killed_at_random_moments_repeats_no_step_and_loses_none(tmp_path, study, jobs):
    command, out, moments = study("--steps", "60"), tmp_path / "out", random.Random(int(jobs))
    for _ in range(4):
        before = steps_taken(out)
        sweep = start(command, "--jobs", jobs)
        until(lambda n=before: steps_taken(out) > n, 60)
        time.sleep(moments.uniform(0, 0.4))
        assert sweep.poll() is None, "the sweep ended before it was killed"
        sweep.kill()
        sweep.communicate()
    sweep = start(command, "--jobs", jobs)
    sweep.communicate(timeout=120)
    assert sweep.returncode == 0
    results = results_in(out)
    assert {name: result["last"] for name, result in results.items()} == {
        f"seed{s}": 50 + s for s in range(4)
    }
    for name in results:
        taken = [int(step) for step in (out / f"steps-{name}").read_text().split()]
        assert taken == list(range(60)), name
    assert (out / "table.md").read_text() == "seed0 seed1 seed2 seed3"
    assert not list(out.glob("cells/*/*.pth.tar"))
    assert run(*command).returncode == 0
    assert results_in(out) == results


def test_ctrl_c_lets_the_cells_save_and_a_second_sweep_is_refused(tmp_path, study):
    command, out = study("--steps", "1000"), tmp_path / "out"
    sweep = start(command, "--jobs", "2")
    until(lambda: len(list(out.glob("cells/*/*.pth.tar"))) == 2, 30)
    second = run(*command)
    assert second.returncode == 2
    assert f"--out: {out} is in use by process {sweep.pid} " in second.stderr
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate(timeout=30)
    assert sweep.returncode == 75
    assert "stopping: the cells save; run the same command to continue them" in errors
    assert not results_in(out)
    before = {path.name: path.read_text() for path in out.glob("steps-*")}
    assert sorted(before) == ["steps-seed0", "steps-seed1"]
    time.sleep(0.2)
    assert {path.name: path.read_text() for path in out.glob("steps-*")} == before


def test_a_failure_is_shown_and_tried_again_while_the_other_cells_go_on(tmp_path, study):
    out = tmp_path / "out"
    blocked = out / "cells" / "seed1"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file in the place of the run folder")
    done = run(*study(), "--jobs", "1")
    assert done.returncode == 1
    assert "seed1 cannot start: " in done.stderr
    assert (
        "1 cell failed and has no result: seed1; run the same command to try again" in done.stderr
    )
    assert sorted(results_in(out)) == ["seed0", "seed2", "seed3"]
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[:-1]] == [
        "[1/4] seed0", "[2/4] seed2", "[3/4] seed3",
    ]  # fmt: skip
    blocked.unlink()
    assert run(*study()).returncode == 0
    assert sorted(results_in(out)) == ["seed0", "seed1", "seed2", "seed3"]


def test_the_real_trainer_fails_with_its_message_or_diverges(tmp_path, study):
    script, out = "experiments/train_small.py", tmp_path / "out"
    failed = run(*study(*NOISE, "--model", "resnet1000", script=script), "--only", "seed1")
    assert failed.returncode == 1
    shown = failed.stderr + failed.stdout
    assert "seed1 failed with exit code 2; the end of " in shown
    assert "--model resnet1000 is not known" in shown
    diverges = study(*NOISE, "--base-lr", "1e30", "--max-skipped-steps", "3", script=script)
    assert run(*diverges, "--only", "seed0").returncode == 0
    result = results_in(out)["seed0"]
    assert (result["last"], result["exit_code"]) == (None, 5)


def test_a_result_of_other_flags_is_reported(tmp_path, study):
    assert run(*study(), "--only", "seed0").returncode == 0
    listed = run(*study(), "--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["done", "to", "to", "to"]
    done = run(*study("--steps", "21"), "--only", "seed0")
    assert done.returncode == 2
    assert (
        "--out: the result of cell seed0 was made with other settings (steps was 20 and is now 21)"
        in done.stderr
    )
    (tmp_path / "out" / "results" / "seed0.json").write_text("{}")
    done = run(*study(), "--only", "seed0")
    assert done.returncode == 2
    assert "seed0.json is not a result" in done.stderr


def test_wrong_flags_are_refused_before_any_training(tmp_path, study):
    done = run(*study("--base-lrr", "1", script="experiments/train_small.py"))
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
