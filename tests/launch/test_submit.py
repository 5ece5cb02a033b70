"""launch/submit.sh, and what a Slurm job does at its end."""

import os
import re
import shlex
import shutil
import subprocess
import sys

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
        "--nodes", "4", "--gpus-per-node", "8", RECIPE, "--log-dir", "a b", "--dry-run"
    )
    size = ["sbatch", "--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8"]
    assert words == [*size, "launch/slurm_mpirun.sbatch", RECIPE, "--log-dir", "a b"]
    words = submitted("--nodes=4", "--gpus-per-node=8", "--launcher=srun", RECIPE, "--dry-run")
    assert words == [*size, "launch/slurm_srun.sbatch", RECIPE]
    words = submitted("--nodes=4", "--gpus-per-node=8", "--launcher=torch", RECIPE, "--dry-run")
    assert words == [*size, "launch/slurm_torch.sbatch", RECIPE]
    words = submitted("--gpus-per-node=a100:4", "--time=infinite", RECIPE, "--dry-run")
    size = ["--gpus-per-node=a100:4", "--ntasks-per-node=4"]
    assert words == ["sbatch", *size, "--time=infinite", "launch/slurm_mpirun.sbatch", RECIPE]
    more = ["--partition=gpu", "--time=1-12:00:00", "--array=0-4"]
    words = submitted("--dry-run", "--launcher", "srun", *more, RECIPE, "--seed", "%a")
    assert words == ["sbatch", *more, "launch/slurm_srun.sbatch", RECIPE, "--seed", "%a"]


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        (["-N", "2", "-p", "gpu"], ["--nodes=2", "-p", "gpu"]),
        (["-N2", "-pgpu"], ["--nodes=2", "-p", "gpu"]),
        (["--partition", "gpu"], ["--partition=gpu"]),
        (["--exclusive", "-H", "--mem", "64G"], ["--exclusive", "-H", "--mem=64G"]),
        (["-t", "1-12", "-c", "8", "-n16"], ["--time=1-12", "--cpus-per-task=8", "--ntasks=16"]),
        (["--comment=", "-A", "a b"], ["--comment=", "-A", "a b"]),
        (["--launcher", "mpirun", "--hold"], ["--hold"]),
    ],
)
def test_options_of_sbatch_can_be_written_as_sbatch_accepts_them(options, passed):
    words = submitted(*options, RECIPE, "--dry-run")
    assert words == ["sbatch", *passed, "launch/slurm_mpirun.sbatch", RECIPE]


def test_the_example_in_the_help_works_as_typed():
    example = (
        run(ROOT / "launch/submit.sh", "--help").stdout.partition("Example:")[2].split("\n", 1)[1]
    )
    done = run("bash", "-c", example)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 -p gpu --time=8:00:00 "
    )


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
        (
            ["--launcher", "mpiexec", RECIPE],
            "--launcher must be mpirun, srun or torch, not mpiexec",
        ),
        (["--nodes"], "--nodes needs a value"),
        (["gpu", RECIPE], "gpu: expected a recipe"),
        (["-N", RECIPE], "--nodes needs a value"),
        (["-N", "four", RECIPE], "--nodes needs a number, got 'four'"),
        (["-t8h", RECIPE], "--time needs minutes, HH:MM:SS or DAYS-HH:MM:SS, got '8h'"),
        (["-a", "0-4", RECIPE], "--array=0-4: the tasks would share one run"),
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
def queue(tmp_path):
    """``queue(*arguments, **variables)`` submits to programs of Slurm that only log their calls."""
    tools = tmp_path / "tools"
    program(
        tools / "sbatch",
        'echo "$*" >>"$CALLS"; [ -z "$BROKEN" ] || exit 3; echo "Submitted batch job 47"\n',
    )
    program(
        tools / "scontrol",
        'echo "   StdErr=/a b/slurm-47.out"; echo "   StdOut=/a b/slurm-47.out"\n',
    )
    calls = tmp_path / "calls"

    def call(*arguments: str, **variables: str):
        path = f"{tools}:{os.environ['PATH']}"
        done = run(ROOT / "launch/submit.sh", *arguments, PATH=path, CALLS=str(calls), **variables)
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_after_the_submission_it_says_how_to_follow_and_how_to_stop_the_job(queue):
    done, calls = queue("-N", "2", RECIPE, "--seed", "5", BROKEN="")
    assert done.returncode == 0
    assert calls == [f"--nodes=2 launch/slurm_mpirun.sbatch {RECIPE} --seed 5"]
    assert done.stdout == "Submitted batch job 47\n"
    commands = [line.split("   ")[-1].strip() for line in done.stderr.splitlines()]
    assert commands == [
        "tail -F /a\\ b/slurm-47.out",
        "squeue --jobs=47",
        "scancel --batch --signal=USR1 47",
        "scancel 47",
    ]


def test_an_array_has_a_log_per_task(queue):
    done, _ = queue("--array=0-4", RECIPE, "--seed", "%a", BROKEN="")
    assert "scontrol show job 47 | grep StdOut\n" in done.stderr


def test_the_exit_code_of_sbatch_is_returned(queue):
    done, calls = queue(RECIPE, BROKEN="1")
    assert (done.returncode, done.stderr, len(calls)) == (3, "", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trian-dir", "x"], "--trian-dir is not a flag; did you mean --train-dir?"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--seed", "%a"], "argument --seed: invalid int value: '%a'"),
        (["--partition=gpu"], "options of sbatch before it"),
        (["launch/recipes/imagenet_lars_512.args"], "did you mean @launch/recipes"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_wrong_flags_of_the_trainer_are_refused_before_the_submission(
    queue, arguments, message, more
):
    done, calls = queue(RECIPE, *arguments, *more, BROKEN="")
    assert done.returncode == 2
    assert "train_imagenet.py: error: " in done.stderr
    assert message in done.stderr
    assert "submit.sh: nothing was submitted" in done.stderr
    assert (done.stdout, calls) == ("", [])


def test_a_wrong_flag_in_the_users_recipe_is_refused_with_its_line(queue, tmp_path):
    (tmp_path / "my.args").write_text("--epochs 3\n--base-lrr 1\n")
    done, calls = queue(f"@{tmp_path}/my.args", BROKEN="")
    assert (done.returncode, calls) == (2, [])
    assert (
        f"{tmp_path}/my.args, line 2: --base-lrr is not a flag; did you mean --base-lr?"
        in done.stderr
    )


def test_each_script_is_checked_with_its_own_flags():
    script = ROOT / "train_imagenet_dali.py"
    line = [sys.executable, ROOT / "launch/check_flags.py"]
    assert run(*line, script, "--reader", "folder").returncode == 0
    assert run(*line, ROOT / "train_imagenet.py", "--reader", "folder").returncode == 2
    assert run(*line, ROOT / "experiments/train_small.py", "--dataset", "cifar10").returncode == 0


def test_without_a_usable_python_the_job_is_submitted_with_a_warning(clone):
    shutil.copytree(ROOT / "launch/recipes", clone / "launch/recipes")
    for file in (ROOT / "launch").glob("*.sbatch"):
        shutil.copy(file, clone / "launch")
    program(clone / ".venv/bin/python", "echo SyntaxError: too old >&2; exit 1\n")
    done = run(clone / "launch/submit.sh", RECIPE, "--trian-dir", "x", "--dry-run")
    assert done.returncode == 0
    assert done.stderr == (
        "submit.sh: warning: the flags cannot be checked on this machine (SyntaxError: too old)\n"
    )
    assert done.stdout.startswith("sbatch ")


@pytest.mark.parametrize(("horovod", "launcher"), [("false", "torch"), ("true", "mpirun")])
def test_a_clone_without_horovod_submits_to_torch(clone, horovod, launcher):
    shutil.copytree(ROOT / "launch/recipes", clone / "launch/recipes")
    for file in (ROOT / "launch").glob("*.sbatch"):
        shutil.copy(file, clone / "launch")
    (clone / ".venv/lars-imagenet.json").write_text(f'{{\n "horovod": {horovod}\n}}')
    done = run(clone / "launch/submit.sh", RECIPE, "--dry-run")
    assert f"launch/slurm_{launcher}.sbatch" in done.stdout


def test_the_templates_differ_only_in_how_the_ranks_start():
    """What Slurm is asked for, and what follows a signal, is the same with each of them."""
    common = []
    for file in sorted((ROOT / "launch").glob("slurm_*.sbatch")):
        lines = file.read_text().splitlines()
        common.append(
            [line for line in lines if line.startswith(("#SBATCH", "script=", "max_", "source"))]
        )
    assert len(common) == 3
    assert common[0] == common[1] == common[2]


def test_the_check_of_the_flags_loads_neither_torch_nor_numpy():
    code = (
        "import runpy, sys; sys.argv = ['check_flags.py', 'train_imagenet.py', '--epochs', '3'];"
        "runpy.run_path('launch/check_flags.py', run_name='__main__');"
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


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


def test_the_log_shows_when_a_job_started_and_ended(slurm_job):
    done, _ = slurm_job("exit 5")
    started, ended = done.stdout.splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d job: job 9"
    assert re.fullmatch(rf"{stamp}, start 1: 2 ranks x 1 CPUs on n", started)
    assert re.fullmatch(rf"{stamp} ends with exit code 5", ended)


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
