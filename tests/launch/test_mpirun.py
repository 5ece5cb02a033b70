"""The scripts of launch/: the commands that they build, and what they do with what comes back."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch_setup import program

from conftest import HEARING_SIGNALS, ROOT, SESSIONS, environment, flags, run, until

OPEN_MPI_4 = "echo 'mpirun (Open MPI) 4.1.4'"
OPEN_MPI_5 = "echo 'mpirun (Open MPI) 5.0.11'"
MPICH = "printf 'HYDRA build details:\\n    Version: 4.3.2\\n'"


@pytest.fixture
def clone(tmp_path):
    """The scripts in a clone with a space in its path, on a machine of 4 cores, without root."""
    root = tmp_path / "a clone"
    (root / "launch").mkdir(parents=True)
    for script in (ROOT / "launch").glob("*.sh"):
        shutil.copy(script, root / "launch")
    tools = root / ".venv/bin"
    program(tools / "python", "exit 1\n")
    program(tools / "id", "echo 1000\n")
    program(tools / "nproc", "echo 8\n")
    cores = "".join(f"{core},0\\n{core},0\\n" for core in range(4))
    program(tools / "lscpu", f"printf '# Core,Socket\\n{cores}'\n")
    return root


def dry_run(clone: Path, mpi: str, *arguments: str, **more: str) -> list[str]:
    """The words of the command that mpirun.sh would run, without the programs' folder."""
    program(clone / ".venv/bin/mpirun", mpi + "\n")
    environ = {"OMP_NUM_THREADS": "", "SLURM_JOB_ID": ""} | more
    result = run(clone / "launch/mpirun.sh", *arguments, **environ)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout.replace(str(clone).replace(" ", "\\ ") + "/.venv/bin/", ""))


@pytest.mark.parametrize(
    ("mpi", "ranks", "line"),
    [
        (OPEN_MPI_4, 4, "mpirun -np 4 --bind-to none python"),
        (OPEN_MPI_4, 5, "mpirun -np 5 --bind-to none --oversubscribe python"),
        (OPEN_MPI_5, 4, "mpirun -np 4 --bind-to none python"),
        (OPEN_MPI_5, 5, "mpirun -np 5 --bind-to none --map-by :OVERSUBSCRIBE python"),
        (MPICH, 4, "mpirun -np 4 -bind-to none python"),
        (MPICH, 5, "mpirun -np 5 -bind-to none python"),
    ],
)
def test_the_line_fits_the_mpi_and_the_machine(clone, mpi, ranks, line):
    words = dry_run(clone, mpi, "-np", str(ranks), "--dry-run", "train.py", "--wd", "1e-4")
    threads = "OMP_NUM_THREADS=2" if ranks == 4 else "OMP_NUM_THREADS=1"
    assert words == [threads, *line.split(), "train.py", "--wd", "1e-4"]


@pytest.mark.parametrize("mpi", [OPEN_MPI_4, OPEN_MPI_5, MPICH])
def test_only_open_mpi_is_told_that_root_is_meant(clone, mpi):
    program(clone / ".venv/bin/id", "echo 0\n")
    words = dry_run(clone, mpi, "-np", "2", "--dry-run", "x.py")
    assert ("--allow-run-as-root" in words) == (mpi != MPICH)


def test_hosts_get_the_environment_and_their_own_slots(clone):
    more = {"HOROVOD_FUSION_THRESHOLD": "1", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0"}
    arguments = ["-np", "64", "--hosts", "a:32,b:32", "--dry-run", "x.py"]
    words = dry_run(clone, OPEN_MPI_5, *arguments, **more)
    assert words[4:8] == ["--bind-to", "none", "--host", "a:32,b:32"]
    passed = {words[i + 1] for i, word in enumerate(words) if word == "-x"}
    assert {"PATH", "HOROVOD_FUSION_THRESHOLD", "NCCL_DEBUG", "OMP_NUM_THREADS"} <= passed
    assert "CUDA_VISIBLE_DEVICES" not in passed
    assert ":OVERSUBSCRIBE" not in words
    words = dry_run(clone, MPICH, *arguments, **more)
    assert words[1:-2] == ["mpirun", "-np", "64", "-bind-to", "none", "-hosts", "a:32,b:32"]


def test_a_hostfile_must_be_there(clone):
    program(clone / ".venv/bin/mpirun", OPEN_MPI_5)
    missing = run(clone / "launch/mpirun.sh", "-np", "2", "--hostfile", "none", "x.py")
    assert missing.returncode == 2
    assert "--hostfile: none cannot be read" in missing.stderr
    hosts = clone / "my hosts"
    hosts.write_text("a slots=4\n")
    words = dry_run(clone, OPEN_MPI_4, "-np", "2", "--hostfile", str(hosts), "--dry-run", "x.py")
    assert words[words.index("--hostfile") + 1] == str(hosts)


def test_ranks_may_have_cores_of_their_own(clone):
    arguments = ["-np", "2", "--cpus-per-rank", "2", "--dry-run", "x.py"]
    bound = ["--map-by", "slot:PE=2", "--bind-to", "core"]
    for mpi in (OPEN_MPI_4, OPEN_MPI_5):
        words = dry_run(clone, mpi, *arguments)
        assert words[0] == "OMP_NUM_THREADS=2"
        assert words[4:8] == bound
    assert dry_run(clone, MPICH, *arguments)[4:6] == ["-bind-to", "core:2"]
    program(clone / ".venv/bin/mpirun", OPEN_MPI_5)
    refused = run(clone / "launch/mpirun.sh", "-np", "3", *arguments[2:], SLURM_JOB_ID="")
    assert refused.returncode == 2
    assert "--cpus-per-rank 2: this machine has 4 cores for 3 ranks" in refused.stderr


@pytest.mark.parametrize(
    ("mpi", "flags"),
    [
        (OPEN_MPI_4, "--mca btl_tcp_if_include ib0 --mca oob_tcp_if_include ib0"),
        (OPEN_MPI_5, "--mca btl_tcp_if_include ib0 --prtemca oob_tcp_if_include ib0"),
        (MPICH, "-iface ib0"),
    ],
)
def test_the_interface_is_told_to_mpi_and_nccl(clone, mpi, flags):
    arguments = ["-np", "2", "--hosts", "a,b", "--interface", "ib0", "--dry-run", "x.py"]
    line = " ".join(dry_run(clone, mpi, *arguments))
    assert flags in line
    assert ("-x NCCL_SOCKET_IFNAME" in line) == (mpi != MPICH)


@pytest.mark.parametrize(("mpi", "option"), [(OPEN_MPI_4, "--mca"), (OPEN_MPI_5, "--prtemca")])
def test_a_lost_host_is_noticed_in_half_a_minute(clone, mpi, option):
    words = dry_run(clone, mpi, "-np", "2", "--hosts", "a,b", "--dry-run", "x.py")
    found = {words[i + 1]: int(words[i + 2]) for i, w in enumerate(words) if "mca" in w}
    time, interval, probes = (found[f"oob_tcp_keepalive_{n}"] for n in ("time", "intvl", "probes"))
    assert time + interval * probes == 30
    assert words.count(option) == 3
    here = dry_run(clone, mpi, "-np", "2", "--dry-run", "x.py")
    assert option not in here


def test_a_lost_host_is_no_success(clone):
    """Open MPI 5 ends with 0 when a host is lost, and hardly ends when a rank aborts while one is."""
    script = """
        [ "$1" = --version ] && { echo 'mpirun (Open MPI) 5.0.11'; exit; }
        if [ "$LOST" = abort ]; then printf 'MPI_ABORT was invoked on rank 0\\n  Errorcode: 6\\n' >&2; exec sleep 50; fi
        [ -z "$LOST" ] || { echo 'PRTE has lost communication with a remote daemon.' >&2; exit "$CODE"; }
    """
    program(clone / ".venv/bin/mpirun", script)
    arguments = [clone / "launch/mpirun.sh", "-np", "2", "--hosts", "a,b", "x.py"]
    for code, expected in (("0", 7), ("3", 3)):
        lost = run(*arguments, LOST="1", CODE=code)
        assert lost.returncode == expected
        assert lost.stderr.count("has lost communication") == 1
    assert run(*arguments, LOST="", CODE="").returncode == 0
    stuck = run(*arguments, LOST="abort", timeout=20)
    assert stuck.returncode == 6
    assert "exit code 6" in stuck.stderr


@pytest.fixture
def asked(clone, tmp_path):
    """``asked(*signals, seconds=0, stay=0)`` sends signals, so many seconds apart, to mpirun.sh's whole process group.

    That is what a terminal does. This mpirun says what it gets, and ends `stay` seconds after USR1 with 75. Gives the
    exit code and what was said.
    """
    script = """
        [ "$1" = --version ] && { echo 'mpirun (Open MPI) 5.0.11'; exit; }
        left=100
        trap 'echo USR1; left=$STAY' USR1
        trap 'echo TERM; exit 1' TERM
        trap 'echo INT; exit 1' INT
        trap 'echo HUP; exit 1' HUP
        printf '  Errorcode: 75\\n' >&2
        touch started
        while [ "$left" -gt 0 ]; do sleep 0.1; left=$((left - 1)); done
        exit 75
    """
    program(clone / ".venv/bin/mpirun", script)

    def call(*signals: signal.Signals, seconds: float = 0, stay: float = 0) -> tuple[int, str]:
        job = subprocess.Popen(
            [*HEARING_SIGNALS, clone / "launch/mpirun.sh", "-np", "2", "x.py"], cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=environment(STAY=str(round(10 * stay))),
        )  # fmt: skip
        until((tmp_path / "started").exists, 10)
        (tmp_path / "started").unlink()
        for number in signals:
            os.killpg(job.pid, number)  # which is there until communicate
            time.sleep(seconds)
        said = "".join(job.communicate(timeout=8))
        return job.returncode, said

    return call


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_who_ends_mpirun_asks_its_ranks_to_save(asked, name):
    code, said = asked(signal.Signals[name])
    assert code == 75
    assert f"{name}: the ranks are asked to save" in said
    assert [word for word in said.split() if word in ("USR1", "TERM", "INT", "HUP")] == ["USR1"]


def test_asked_twice_it_ends_mpirun_and_tells_the_ranks_code(asked):
    """The ranks said 75 before mpirun, which was told to end, ended with 1."""
    code, said = asked(signal.SIGINT, signal.SIGINT, seconds=2.1, stay=9)
    assert (code, said.count("USR1\n"), said.count("TERM\n")) == (75, 1, 1)
    assert "exit code 75" in said


def test_one_request_that_comes_twice_is_one(asked):
    code, said = asked(signal.SIGTERM, signal.SIGTERM, seconds=0.3, stay=0.6)
    assert (code, said.count("USR1\n"), said.count("TERM\n")) == (75, 1, 0)


def test_an_exit_code_survives_signals_that_come_as_the_job_ends(tmp_path):
    script = (
        'source "$1/launch/run_to_its_end.sh"; run_to_its_end : hand_on setsid sh -c "$2" - "$3"'
    )
    program = 'trap "sleep 0.02; exit 75" TERM; touch "$1"; while :; do sleep 0.01; done'
    line = ["bash", "-c", script, "-", str(ROOT), program]
    jobs = [subprocess.Popen([*line, tmp_path / str(number)]) for number in range(20)]
    until(lambda: len(list(tmp_path.iterdir())) == len(jobs), 30)
    for _ in range(4):
        for job in jobs:
            job.terminate()
        time.sleep(0.01)
    assert [job.wait(20) for job in jobs] == [75] * len(jobs)


@pytest.mark.mpi
def test_a_training_that_is_told_to_end_saves_and_goes_on(folders, tmp_path):
    line = [ROOT / "launch/mpirun.sh", "-np", "2", "train_imagenet.py", *flags(folders, tmp_path)]
    job = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    until((tmp_path / "run/config.json").exists, 60)  # before the first step
    job.terminate()
    said = job.communicate(timeout=30)[1]
    assert job.returncode == 75, said
    assert "asked to stop; saved after step" in said
    again = run(*line)
    assert again.returncode == 0, again.stderr
    assert "going on after" in again.stdout


@pytest.mark.parametrize(
    ("hosts", "threads"), [("a:2,b:2", "4"), ("a:4,b:2", "2"), ("a,b", "8"), ("a:16", "1")]
)
def test_threads_follow_from_the_ranks_of_a_host(clone, hosts, threads):
    """Of 8 CPUs, whatever the number of hosts."""
    words = dry_run(clone, OPEN_MPI_5, "-np", "4", "--hosts", hosts, "--dry-run", "x.py")
    assert words[0] == f"OMP_NUM_THREADS={threads}"
    file = clone / "hosts"
    file.write_text("# slots=64\n" + hosts.replace(":", " slots=").replace(",", "\n") + "\n")
    words = dry_run(clone, OPEN_MPI_5, "-np", "4", "--hostfile", str(file), "--dry-run", "x.py")
    assert words[0] == f"OMP_NUM_THREADS={threads}"


def test_slurm_counts_the_slots(clone):
    words = dry_run(clone, OPEN_MPI_5, "-np", "64", "--dry-run", "x.py", SLURM_JOB_ID="1")
    assert ":OVERSUBSCRIBE" not in words


def test_the_users_threads_are_kept(clone):
    words = dry_run(clone, OPEN_MPI_5, "-np", "2", "--dry-run", "x.py", OMP_NUM_THREADS="7")
    assert words[0] == "OMP_NUM_THREADS=7"


def test_what_follows_the_script_is_passed_on_unchanged(clone):
    show = f'[ "$1" = --version ] && {OPEN_MPI_5} || for word in "$@"; do echo "<$word>"; done'
    program(clone / ".venv/bin/mpirun", show + "\n")
    result = run(clone / "launch/mpirun.sh", "-np", "2", "my script.py", "--dry-run", "-np", "a b")
    words = result.stdout.splitlines()
    assert words[-5:] == [
        f"<{clone}/.venv/bin/python>",
        "<my script.py>",
        "<--dry-run>",
        "<-np>",
        "<a b>",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.py"], "-np needs the number of ranks, got ''"),
        (["-np", "two", "x.py"], "got 'two'"),
        (["-np"], "-np needs a value"),
        (["-np", "2"], "a script is missing"),
        (["-np", "2", "--hosts", "a", "--hostfile", "b", "x.py"], "not both"),
        (["-np", "2", "--cpus-per-rank", "x", "x.py"], "--cpus-per-rank needs a number, got 'x'"),
    ],
)
def test_unusable_arguments_are_refused(clone, arguments, message):
    refused = run(clone / "launch/mpirun.sh", *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr


def test_an_unknown_mpi_is_refused(clone):
    program(clone / ".venv/bin/mpirun", "echo 'SuperMPI 1'\n")
    refused = run(clone / "launch/mpirun.sh", "-np", "2", "x.py")
    assert refused.returncode == 2
    assert "SuperMPI 1" in refused.stderr


# submit.sh, and the end of a Slurm job


def submitted(*arguments: str) -> list[str]:
    done = run(ROOT / "launch/submit.sh", *arguments)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


RECIPE = "@launch/recipes/imagenet_lars_8192.args"


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


def test_a_recipe_is_looked_for_where_the_user_is(tmp_path):
    """The job itself runs in the clone's folder."""
    (tmp_path / "my.args").touch()
    line = [ROOT / "launch/submit.sh", "--dry-run", "@my.args", RECIPE]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout)[-2:] == [f"@{tmp_path}/my.args", RECIPE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "4"], "a recipe is missing"),
        (["@launch/recipes/none.args"], "launch/recipes/imagenet_lars_8192.args"),
        (["--launcher", "mpiexec", RECIPE], "--launcher is mpirun or srun, not mpiexec"),
        (["--nodes"], "--nodes needs a value"),
        (["--partition", "gpu", RECIPE], "--partition: a recipe"),
        (["--nodes", "four", RECIPE], "--nodes needs a number, got 'four'"),
        (["--gpus-per-node=0", RECIPE], "--gpus-per-node needs a number, got '0'"),
        (["--gpus-per-node=a100", RECIPE], "--gpus-per-node needs a number, got 'a100'"),
        (["--cpus-per-task=-1", RECIPE], "--cpus-per-task needs a number, got '-1'"),
        (["--time=8h", RECIPE], "--time needs minutes, HH:MM:SS or DAYS-HH:MM:SS, got '8h'"),
        (["--array=0-4", RECIPE, "--seed", "1"], "--array=0-4: its tasks would share one run"),
        (["@launch/recipes"], "@launch/recipes: there is no such recipe"),
    ],
)
def test_what_cannot_be_submitted_is_refused(arguments, message):
    refused = run(ROOT / "launch/submit.sh", *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr


@pytest.fixture
def slurm_job(clone):
    """``slurm_job(command, *arguments, **variables)`` is a job that runs a command; Slurm's programs only tell."""
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
def test_only_a_job_that_was_asked_to_stop_is_requeued(slurm_job, code, variables, requeued):
    done, calls = slurm_job(f"exit {code}", "%a", **{"STATE": "RUNNING"} | variables)
    assert done.returncode == code
    told = [call for call in calls if call.startswith("scontrol")]
    assert told == ([f"scontrol requeue {requeued}"] if requeued else [])
    if code == 75:
        assert ("saved; requeued" in done.stdout) == bool(requeued)


def test_an_arrays_task_has_its_number_in_the_arguments(slurm_job):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    done, _ = slurm_job('echo "<$2>"', "--run-name", "seed %a", **array)
    assert "<seed 3>" in done.stdout
    refused, _ = slurm_job("echo never", "--seed", "1", **array)
    assert refused.returncode == 2
    assert "put %a into the arguments" in refused.stderr
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


@pytest.fixture
def killed_before(clone, tmp_path):
    """Makes the clone's mpirun the real one, which finds what a killed mpirun with its process number has left."""
    real = shutil.which("mpirun")
    if real is None:
        pytest.skip("no mpirun on the PATH: ./launch/setup.sh installs one")
    left = 'mkdir "$TMPDIR/ompi.$$"; touch "$TMPDIR/ompi.$$/pmix.$(hostname -s).tool"'
    program(
        clone / ".venv/bin/mpirun",
        f'[ "$1" = --version ] || {{ {left}; }}\nexec {shlex.quote(real)} "$@"\n',
    )
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


@pytest.mark.mpi
def test_a_test_does_not_meet_what_a_killed_mpirun_has_left(clone, killed_before):
    mpirun = [clone / ".venv/bin/mpirun", "-np", "1", "--bind-to", "none", "echo", "here"]
    done = run(*mpirun, TMPDIR=str(killed_before))
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr
    assert len({environment()[SESSIONS] for _ in range(3)}) == 3


@pytest.mark.mpi
def test_a_job_does_not_meet_what_a_killed_mpirun_has_left(clone, killed_before):
    program(clone / ".venv/bin/python", 'echo "here $*"\n')
    mine = environment(TMPDIR=str(killed_before))
    del mine[SESSIONS]
    done = subprocess.run(
        [clone / "launch/mpirun.sh", "-np", "1", "x.py"], env=mine, capture_output=True, text=True,
        timeout=20, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "here x.py\n"), done.stderr
    assert [path.name[:5] for path in killed_before.iterdir()] == ["ompi."], "only what was there"


@pytest.mark.mpi
def test_two_real_ranks_add_up(mpirun):
    result = mpirun(2, "launch/check_allreduce.py")
    assert result.returncode == 0, result.stderr
    assert "2 ranks: allreduce is right" in result.stdout


# test.sh and .ci/run


@pytest.fixture
def tested(clone):
    """A clone whose setup and checks only write down how they were called."""
    program(clone / "launch/setup.sh", 'echo "setup $*" >>calls\n')
    program(
        clone / ".venv/bin/python",
        'echo "$2 $OMP_NUM_THREADS $*" >>calls; [ "$2" != "$BROKEN" ] || exit 5\n',
    )
    return clone


def test_the_checks_run_after_setup_and_arguments_go_to_pytest(tested):
    result = run(tested / "launch/test.sh", "-k", "two words", BROKEN="none")
    assert result.returncode == 0, result.stderr
    calls = (tested / "calls").read_text().splitlines()
    assert calls[0] == "setup --dev --dali"
    assert [call.split()[0] for call in calls[1:]] == ["ruff", "ruff", "mypy", "pytest"]
    assert calls[-1] == "pytest 1 -m pytest -k two words"


@pytest.mark.parametrize(("broken", "code"), [("ruff", 1), ("mypy", 1), ("pytest", 5)])
def test_a_failed_check_fails_the_command_after_all_have_run(tested, broken, code):
    result = run(tested / "launch/test.sh", BROKEN=broken)
    assert result.returncode == code
    assert f"failed: {broken}" in result.stderr
    assert "pytest" in (tested / "calls").read_text()


def test_nothing_is_checked_without_a_setup(tested):
    program(tested / "launch/setup.sh", "exit 3\n")
    assert run(tested / "launch/test.sh").returncode == 3
    assert not (tested / "calls").exists()


@pytest.fixture
def ci(clone):
    """``ci(**variables)`` runs .ci/run as the superuser of a machine whose apt-get and dpkg only tell."""
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    program(clone / "launch/test.sh", "echo summary; exit 7\n")
    program(clone / ".venv/bin/id", "echo ${ID:-0}\n")
    program(clone / ".venv/bin/dpkg", "exit ${MISSING:-0}\n")
    program(clone / ".venv/bin/apt-get", 'echo "$*" >>calls; exit ${BROKEN:-0}\n')
    path = f"{clone / '.venv/bin'}:{os.environ['PATH']}"

    def call(**variables: str):
        (clone / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            [clone / ".ci/run"], cwd=clone, env=environment(PATH=path, **variables), capture_output=True, text=True,
            timeout=20, check=False,
        )  # fmt: skip
        calls = clone / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_ci_runs_the_users_test_command_and_passes_its_code_on(ci):
    done, calls = ci()
    assert (done.returncode, done.stdout, calls) == (7, "summary\n", [])


def test_ci_installs_what_the_cluster_tests_start_and_goes_on_without(ci):
    done, calls = ci(MISSING="1")
    assert (done.returncode, done.stderr) == (7, "")
    assert calls[0] == "update -qq"
    assert calls[1].endswith("slurm-wlm munge libpmix-dev openssh-server iproute2")
    done, calls = ci(MISSING="1", BROKEN="1")
    assert done.returncode == 7
    assert "are skipped" in done.stderr
    assert ci(MISSING="1", ID="1000")[1] == []


# quickstart.sh


@pytest.fixture
def trained(clone):
    """A clone in which training takes no time and ends with the accuracies of the environment."""
    program(clone / "launch/setup.sh", "")
    program(clone / ".venv/bin/mpirun", OPEN_MPI_5)
    program(
        clone / ".venv/bin/python",
        f"""
        [ "$1" = - ] && exec {shlex.quote(sys.executable)} "$@"
        echo "python $*" >>calls
        """,
    )
    script = """
        while [ "$1" != --run-name ]; do
          [ "$1" != --dry-run ] || { echo THE COMMAND; exit; }
          shift
        done
        [ -z "$CRASH" ] || exit "$CRASH"
        case $2 in *lars*) top1=$LARS ;; *) top1=$SGD ;; esac
        mkdir -p "logs/quickstart/$2"
        printf '{"split": "val", "top1": 3.0}\\n{"split": "val", "top1": %s}\\n{"split": "train", "top1": 0}\\n' \
          "$top1" >"logs/quickstart/$2/metrics.jsonl"
    """
    program(clone / "launch/mpirun.sh", script)
    return clone


def test_the_quick_start_ends_with_the_accuracy_and_the_way_to_the_curves(trained):
    result = run(trained / "launch/quickstart.sh", LARS="98.61", SGD="")
    assert result.returncode == 0, result.stderr
    assert (trained / "calls").read_text() == "python -m data.digits logs/quickstart/digits\n"
    assert "quickstart: THE COMMAND" in result.stdout
    assert "LARS at a batch of 1024: 98.6 %" in result.stdout
    assert "SGD" not in result.stdout
    folder = str(trained).replace(" ", "\\ ")
    assert f"{folder}/.venv/bin/tensorboard --logdir {folder}/logs/quickstart" in result.stdout


def test_both_accuracies_are_shown_when_they_are_compared(trained):
    result = run(trained / "launch/quickstart.sh", "--compare", LARS="98.0", SGD="14.42")
    assert result.returncode == 0, result.stderr
    assert "SGD  at a batch of 1024: 14.4 %" in result.stdout


def test_a_quick_start_that_learns_too_little_fails(trained):
    result = run(trained / "launch/quickstart.sh", LARS="97.9", SGD="")
    assert result.returncode == 1
    assert "below 98 %" in result.stderr


def test_the_trainers_exit_code_is_passed_on(trained):
    assert run(trained / "launch/quickstart.sh", CRASH="75").returncode == 75


def test_unknown_options_are_refused_before_anything_is_done(trained):
    refused = run(trained / "launch/quickstart.sh", "--fast")
    assert refused.returncode == 2
    assert "--fast" in refused.stderr
    assert not (trained / "calls").exists()
