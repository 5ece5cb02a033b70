"""launch/submit.sh, and what a Slurm job does at its end."""

import shlex
import subprocess

import pytest
from launch_fixtures import clone_of_scripts, program

from conftest import ROOT, environment, run

RECIPE = "@launch/recipes/imagenet_lars_8192.args"


@pytest.fixture
def clone(tmp_path):
    return clone_of_scripts(tmp_path)


def submitted(*arguments: str) -> list[str]:
    done = run(ROOT / "launch/submit.sh", *arguments)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_a_recipe_is_submitted_with_its_arguments():
    words = submitted(
        "--nodes", "4", "--gpus-per-node", "8", RECIPE, "--run-name", "a b", "--dry-run"
    )
    size = ["sbatch", "--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8"]
    assert words == [*size, "launch/slurm_mpirun.sbatch", RECIPE, "--run-name", "a b"]
    words = submitted("--nodes=4", "--gpus-per-node=8", "--launcher=srun", RECIPE, "--dry-run")
    assert words == [*size, "launch/slurm_srun.sbatch", RECIPE]
    words = submitted("--gpus-per-node=a100:4", "--time=infinite", RECIPE, "--dry-run")
    size = ["--gpus-per-node=a100:4", "--ntasks-per-node=4"]
    assert words == ["sbatch", *size, "--time=infinite", "launch/slurm_mpirun.sbatch", RECIPE]
    more = ["--partition=gpu", "--time=1-12:00:00", "--array=0-4"]
    words = submitted("--dry-run", "--launcher", "srun", *more, RECIPE, "--seed", "%a")
    assert words == ["sbatch", *more, "launch/slurm_srun.sbatch", RECIPE, "--seed", "%a"]


def test_a_recipe_is_looked_up_in_the_users_folder_first(tmp_path):
    """The job itself runs in the folder of the clone."""
    (tmp_path / "my.args").touch()
    line = [ROOT / "launch/submit.sh", "--dry-run", "@my.args", RECIPE]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout)[-2:] == [f"@{tmp_path}/my.args", RECIPE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "4"], "a recipe is missing"),
        (["@launch/recipes/none.args"], "launch/recipes/imagenet_lars_8192.args"),
        (["--launcher", "mpiexec", RECIPE], "--launcher must be mpirun or srun, not mpiexec"),
        (["--nodes"], "--nodes needs a value"),
        (["--partition", "gpu", RECIPE], "--partition: expected a recipe"),
        (["--nodes", "four", RECIPE], "--nodes needs a number, got 'four'"),
        (["--gpus-per-node=0", RECIPE], "--gpus-per-node needs a number, got '0'"),
        (["--gpus-per-node=a100", RECIPE], "--gpus-per-node needs a number, got 'a100'"),
        (["--cpus-per-task=-1", RECIPE], "--cpus-per-task needs a number, got '-1'"),
        (["--time=8h", RECIPE], "--time needs minutes, HH:MM:SS or DAYS-HH:MM:SS, got '8h'"),
        (["--array=0-4", RECIPE, "--seed", "1"], "--array=0-4: the tasks would share one run"),
        (["@launch/recipes"], "@launch/recipes: there is no such recipe"),
    ],
)
def test_an_unusable_submission_is_refused(arguments, message):
    refused = run(ROOT / "launch/submit.sh", *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr


@pytest.fixture
def slurm_job(clone):
    """``slurm_job(command, *arguments, **variables)`` runs a command as a job; Slurm's programs only log calls."""
    program(clone / ".venv/bin/squeue", 'echo "squeue $*" >>calls; echo "$STATE"\n')
    program(clone / ".venv/bin/scontrol", 'echo "scontrol $*" >>calls\n')
    program(clone / ".venv/bin/python3", "exit 1\n")
    body = (
        'max_restarts=2; source launch/slurm_job.sh; train bash -c "$COMMAND" - "${arguments[@]}"'
    )
    (clone / "job").write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
    (clone / "job").chmod(0o755)

    def call(command: str, *arguments: str, **variables: str):
        job = {
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_ID": "9",
            "SLURM_JOB_NODELIST": "n",
            "SLURM_NTASKS": "2",
        }
        done = subprocess.run(
            [clone / "job", *arguments], cwd=clone, env=environment(**job, COMMAND=command, **variables),
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        calls = clone / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


@pytest.mark.parametrize(
    ("code", "variables", "requeued"),
    [
        (75, {}, "9"),
        (75, {"SLURM_RESTART_COUNT": "1"}, "9"),
        (75, {"SLURM_RESTART_COUNT": "2"}, None),
        (75, {"STATE": "COMPLETING"}, None),
        (75, {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
        (0, {}, None),
        (5, {}, None),
    ],
)
def test_only_a_job_that_stopped_on_request_is_requeued(slurm_job, code, variables, requeued):
    done, calls = slurm_job(f"exit {code}", "%a", **{"STATE": "RUNNING"} | variables)
    assert done.returncode == code
    requests = [call for call in calls if call.startswith("scontrol")]
    assert requests == ([f"scontrol requeue {requeued}"] if requeued else [])
    if code == 75:
        assert ("saved; requeued" in done.stdout) == bool(requeued)


def test_a_task_of_an_array_gets_its_number_in_the_arguments(slurm_job):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    done, _ = slurm_job('echo "<$2>"', "--run-name", "seed %a", **array)
    assert "<seed 3>" in done.stdout
    refused, _ = slurm_job("echo never", "--seed", "1", **array)
    assert refused.returncode == 2
    assert "put %a (the task's number) into the arguments" in refused.stderr
    alone, _ = slurm_job('echo "<$1>"', "100 %a")
    assert "<100 %a>" in alone.stdout


def test_threads_are_the_cpus_of_a_task(slurm_job):
    done, _ = slurm_job(
        "echo threads=$OMP_NUM_THREADS", SLURM_CPUS_PER_TASK="6", OMP_NUM_THREADS=""
    )
    assert "threads=6" in done.stdout
    assert "2 ranks x 6 CPUs on n" in done.stdout
    done, _ = slurm_job(
        "echo threads=$OMP_NUM_THREADS", SLURM_CPUS_PER_TASK="6", OMP_NUM_THREADS="3"
    )
    assert "threads=3" in done.stdout
