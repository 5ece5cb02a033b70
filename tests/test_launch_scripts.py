"""The scripts of launch/: the commands that they build, and what they do with what comes back."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from test_launch_setup import program

from conftest import ROOT, run

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


def test_ci_runs_the_users_test_command_and_passes_its_code_on(clone):
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    program(clone / "launch/test.sh", "echo summary; exit 7\n")
    result = run(clone / ".ci/run")
    assert (result.returncode, result.stdout) == (7, "summary\n")


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
