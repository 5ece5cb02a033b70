"""The acceptance run: on a CPU, on a bare machine, on two ranks, and with parts that fail."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ranks_of, run
from lars import launcher
from launch.acceptance import main as acceptance
from launch.acceptance import meeting
from launch.acceptance.budget import Budget
from launch.acceptance.expected import expected
from launch.acceptance.parts import PARTS, Part, gpu_tests, ranks, resume, step
from launch.acceptance.process import run_part
from launch.acceptance.rows import FAILED, NOT_TESTED, OK, SLOW, Row, measured

# Packages that only setup.sh installs.
EXTRAS = (
    *("horovod", "nvidia", "simplejpeg", "tensorboard", "tqdm", "matplotlib", "mpi4py", "sklearn", "psutil"),
    *("pyarrow", "safetensors", "pytest", "scipy", "google_crc32c", "jinja2", "timm"),
)  # fmt: skip
HIDE = f"""
import importlib.machinery
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {EXTRAS!r} else found(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""


def rows_in(folder: Path) -> dict[str, list[dict]]:
    """The rows in a folder's acceptance.json, by part."""
    content = json.loads((folder / "acceptance.json").read_text())
    assert content["machine"]["cpus"] >= 1
    assert content["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    found: dict[str, list[dict]] = {}
    for row in content["rows"]:
        found.setdefault(row["part"], []).append(row)
    return found


def test_a_bare_machine_runs_everything_that_it_can(tmp_path):
    """With torch, torchvision and NumPy alone. What is missing is a row."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    root = str(Path(__file__).parents[2])
    done = run(
        sys.executable, "-m", "launch.acceptance", "--skip", "compile", "--skip", "ranks", "--out", tmp_path,
        "--minutes", "6", timeout=400, PYTHONPATH=f"{tmp_path}:{root}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path)
    assert list(rows) == [name for name in PARTS if name not in ("compile", "ranks")]
    verdicts = {row["verdict"] for part in rows.values() for row in part}
    assert verdicts <= {OK, NOT_TESTED, SLOW}
    missing = {row["what"]: row["note"] for part in rows.values() for row in part}
    assert missing["DALI"] == "DALI is not installed; ./launch/setup.sh --dali"
    for part, unit in (
        *(("step", "images/s"), ("optimizer", "ms"), ("loader", "images/s")),
        *(("end-to-end", "images/s"),),
    ):
        assert any(row["unit"] == unit and row["value"] > 0 for row in rows[part]), part
    learner, trainer = rows["resume"]
    assert learner["note"] == "all bytes are equal"
    assert trainer["note"] == "tensorboard is not installed; ./launch/setup.sh"
    assert "PIL" in rows["loader"][0]["what"]
    assert "no figure: matplotlib is not installed" in done.stdout
    assert "[1/8] doctor, at most" in done.stdout


def test_two_ranks_measure_each_backend_and_rank_0_reports(tmp_path):
    mpirun = ranks_of("horovod")
    # A file that an earlier run left must not start the other ranks.
    (tmp_path / "ranks-may-start").write_text("earlier")
    done = mpirun(
        2, "-m", "launch.acceptance", "--only", "ranks", "--only", "no-wait", "--out", tmp_path,
        "--minutes", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrote ") == 2
    assert (tmp_path / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    found = {row["what"]: row for row in rows_in(tmp_path)["ranks"]}
    assert found["ranks"]["note"] == "2 on 1 host(s)"
    for backend in ("Horovod", "torch.distributed"):
        assert found[f"allreduce of 25 MiB, {backend}, 2 ranks on cpu"]["value"] > 0
    assert not (tmp_path / "ranks-may-start").exists()


FAILING = {
    "raises": "raise ValueError('no luck')",
    "exits": "import os; os._exit(3)",
    "crashes": "import os; os.kill(os.getpid(), 9)",
    "hangs": "import subprocess, time; subprocess.run(['sleep', '600.125'])",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Parts that yield a row, and then fail."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in (*FAILING.items(), ("works", "pass")):
        (tmp_path / f"{name}_part.py").write_text(
            "from launch.acceptance.rows import measured\n"
            "def run(budget):\n"
            "    (budget.folder / 'file').write_text('')\n"
            f"    yield measured('{name}', 1.0, 'ms')\n    {code}\n"
        )
    return tmp_path


def test_a_part_that_fails_is_a_row_and_its_earlier_rows_count(modules):
    expected_end = {
        "works": None,
        "raises": "ended with exit code 1; ValueError: no luck",
        "exits": "ended with exit code 3",
        "crashes": "was ended by SIGKILL",
        "hangs": "took longer than its 1 s",
    }
    for name, end in expected_end.items():
        began = time.monotonic()
        first, *more = run_part(f"{name}_part", 1.0 if name == "hangs" else 30.0, modules / name)
        assert (first.what, first.verdict) == (name, OK)
        assert [row.verdict for row in more] == [FAILED] * (end is not None)
        assert all(end in row.note and str(modules / name) in row.note for row in more)
        assert time.monotonic() - began < 20
    assert "600.125" not in commands(), "the processes that a part started end with it"


def commands() -> str:
    """The command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text())
        except OSError:
            continue
    return "\n".join(found)


def test_the_others_go_on_and_the_exit_code_is_1(modules, monkeypatch, capfd):
    parts = {name: Part(name, f"{name}_part", 10, "a part") for name in ("raises", "works")}
    monkeypatch.setattr(acceptance, "PARTS", parts)
    out = modules / "out"
    assert acceptance.main(["--out", str(out), "--minutes", "1"]) == 1
    assert [row["verdict"] for part in rows_in(out).values() for row in part] == [OK, FAILED, OK]
    assert "2 ok, 1 failed" in capfd.readouterr().out
    assert acceptance.main(["--out", str(out), "--minutes", "1", "--skip", "raises"]) == 0
    assert list(rows_in(out)) == ["works"]
    assert acceptance.main(["--out", str(out), "--minutes", "0.01"]) == 0
    assert {row["note"] for part in rows_in(out).values() for row in part} == {
        "the time is used up; --minutes"
    }


def test_wrong_flags_are_refused_before_time_is_spent(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for flags, message in (
        (["--only", "gpu"], "argument --only: invalid choice: 'gpu'"),
        (["--minutes", "0"], "argument --minutes: 0 is not a number above 0"),
        (["--only", "step", "--skip", "step"], "leave no part to run"),
        (["--out", str(tmp_path / "file")], "name a folder that can be written"),
    ):
        with pytest.raises(SystemExit) as ended:
            acceptance.main(flags)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert acceptance.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PARTS)


def test_the_verdict_on_a_gpu_is_that_of_published_speeds():
    def rows(speed: float, gpu: str) -> list[Row]:
        return list(step.judged([measured("a", speed / 2, ""), measured("b", speed, "")], gpu))

    assert expected("NVIDIA GeForce RTX 3090") is None
    assert rows(9999.0, "NVIDIA GeForce RTX 3090") == []
    for speed, gpu, verdict, high in (
        (2400.0, "NVIDIA A100-SXM4-80GB", SLOW, 3396),
        (2500.0, "NVIDIA A100-SXM4-80GB", OK, 3396),
        (6000.0, "NVIDIA H100 80GB HBM3", OK, 7157),
        (2000.0, "NVIDIA H200", SLOW, 7945),
    ):
        (row,) = rows(speed, gpu)
        assert (row.value, row.verdict, row.low, row.high) == (speed, verdict, 2470, high)
    assert rows(0.0, "NVIDIA H200") == []


def test_the_verdict_on_a_resumed_run():
    def state(value: float) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor([3.0, 4.0 + value])}

    for again, resumed, verdict, words in (
        (0.0, 0.0, OK, "all bytes are equal"),
        (0.0, 1e-3, FAILED, "two runs without a stop are equal"),
        (1e-3, 2e-3, OK, "not deterministic"),
        (1e-5, 2e-3, FAILED, "not deterministic"),
    ):
        row = resume.verdict("", state(0), state(again), state(resumed))
        assert row.verdict == verdict
        assert words in row.note
    ends = {"straight": {"w": torch.ones(1)}, "halves": {"v": torch.ones(1)}}
    assert resume.compared("", ends.__getitem__).verdict == FAILED
    assert resume.compared("", lambda name: ends["straight"]).verdict == OK


def test_the_verdict_on_the_tests():
    assert gpu_tests.row_of(0, "...\n=== 4 passed in 2 s ===\n").note == "4 passed in 2 s"
    row = gpu_tests.row_of(1, "FAILED tests/a.py::b - assert\n1 failed in 2 s\n")
    assert (row.verdict, row.note) == (FAILED, "1 failed in 2 s, tests/a.py::b")


def test_the_parts_get_the_environment_without_a_launcher():
    set_by = {"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
              "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}  # fmt: skip
    kept = {"PATH": "/bin", "SLURM_CPUS_PER_TASK": "4", "CUDA_VISIBLE_DEVICES": "1"}
    assert launcher.without(set_by | kept) == kept
    assert not launcher.is_task(launcher.without(set_by))


def test_the_other_ranks_wait_for_the_call_of_this_run(tmp_path):
    assert not meeting.wait(tmp_path, time.monotonic() + 0.1)
    with meeting.called(tmp_path):
        assert meeting.wait(tmp_path, time.monotonic() + 20)
    assert list(tmp_path.iterdir()) == []


def test_without_a_launcher_the_ranks_are_started_here(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(ranks, "rows_of", lambda *given: commands.append(given[:2]) or [])
    budget = Budget(60, tmp_path)
    list(ranks.started(budget))
    (torchrun, first), (mpirun, second) = commands
    assert (first, second) == (["torch"], ["horovod"])
    assert "--nproc-per-node=2" in torchrun
    assert mpirun[0].endswith("launch/mpirun.sh")
    assert mpirun[1:3] == ["-np", "2"]
    monkeypatch.setattr(ranks.importlib.util, "find_spec", lambda name: None)
    (row,) = ranks.started(budget)
    assert (row.verdict, row.note) == (
        NOT_TESTED,
        "Horovod is not installed; ./launch/setup.sh --horovod",
    )
