"""launch/mpirun.sh: the command that it builds for each MPI, its signals and its exit codes."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_fixtures import MPICH, OPEN_MPI_4, OPEN_MPI_5, clone_of_scripts, program

from conftest import HEARING_SIGNALS, ROOT, SESSIONS, environment, flags, run, until


@pytest.fixture
def clone(tmp_path):
    return clone_of_scripts(tmp_path)


def dry_run(clone: Path, mpi: str, *arguments: str, **more: str) -> list[str]:
    """The command that mpirun.sh would run, as words; programs of the clone have no folder."""
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
def test_the_command_suits_the_mpi_and_the_machine(clone, mpi, ranks, line):
    words = dry_run(clone, mpi, "-np", str(ranks), "--dry-run", "train.py", "--wd", "1e-4")
    threads = "OMP_NUM_THREADS=2" if ranks == 4 else "OMP_NUM_THREADS=1"
    assert words == [threads, *line.split(), "train.py", "--wd", "1e-4"]


@pytest.mark.parametrize("mpi", [OPEN_MPI_4, OPEN_MPI_5, MPICH])
def test_only_open_mpi_gets_the_option_for_root(clone, mpi):
    program(clone / ".venv/bin/id", "echo 0\n")
    words = dry_run(clone, mpi, "-np", "2", "--dry-run", "x.py")
    assert ("--allow-run-as-root" in words) == (mpi != MPICH)


def test_hosts_get_the_environment_and_their_slots(clone):
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


def test_values_can_follow_an_equals_sign(clone):
    words = dry_run(
        clone, OPEN_MPI_5, "--np=2", "--hosts=a:1,b:1", "--dry-run", "x.py", "--wd=1e-4"
    )
    assert words[1:8] == ["mpirun", "-np", "2", "--bind-to", "none", "--host", "a:1,b:1"]
    assert words[-2:] == ["x.py", "--wd=1e-4"]


def test_a_hostfile_must_exist(clone):
    program(clone / ".venv/bin/mpirun", OPEN_MPI_5)
    missing = run(clone / "launch/mpirun.sh", "-np", "2", "--hostfile", "none", "x.py")
    assert missing.returncode == 2
    assert "--hostfile: none cannot be read" in missing.stderr
    hosts = clone / "my hosts"
    hosts.write_text("a slots=4\n")
    words = dry_run(clone, OPEN_MPI_4, "-np", "2", "--hostfile", str(hosts), "--dry-run", "x.py")
    assert words[words.index("--hostfile") + 1] == str(hosts)


def test_ranks_can_be_bound_to_their_own_cores(clone):
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
def test_the_interface_is_passed_to_mpi_and_nccl(clone, mpi, flags):
    arguments = ["-np", "2", "--hosts", "a,b", "--interface", "ib0", "--dry-run", "x.py"]
    line = " ".join(dry_run(clone, mpi, *arguments))
    assert flags in line
    assert ("-x NCCL_SOCKET_IFNAME" in line) == (mpi != MPICH)


@pytest.mark.parametrize(("mpi", "option"), [(OPEN_MPI_4, "--mca"), (OPEN_MPI_5, "--prtemca")])
def test_a_lost_host_is_noticed_within_half_a_minute(clone, mpi, option):
    words = dry_run(clone, mpi, "-np", "2", "--hosts", "a,b", "--dry-run", "x.py")
    found = {words[i + 1]: int(words[i + 2]) for i, w in enumerate(words) if "mca" in w}
    time, interval, probes = (found[f"oob_tcp_keepalive_{n}"] for n in ("time", "intvl", "probes"))
    assert time + interval * probes == 30
    assert words.count(option) == 3
    here = dry_run(clone, mpi, "-np", "2", "--dry-run", "x.py")
    assert option not in here


def test_a_lost_host_is_not_a_success(clone):
    """Open MPI 5 exits with 0 if it loses a host, and hangs if a rank aborts while a host is lost."""
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
    """``asked(*signals, seconds=0, stay=0)`` sends signals to the process group of mpirun.sh, as a terminal does.

    The signals are `seconds` apart. The fake mpirun prints each signal that it gets, and exits with 75, `stay` seconds
    after USR1. Returns the exit code and the output.
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
            os.killpg(job.pid, number)  # the group exists until communicate returns
            time.sleep(seconds)
        output = "".join(job.communicate(timeout=8))
        return job.returncode, output

    return call


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_mpirun_asks_the_ranks_to_save(asked, name):
    code, output = asked(signal.Signals[name])
    assert code == 75
    assert f"{name}: asked the ranks to save" in output
    assert [word for word in output.split() if word in ("USR1", "TERM", "INT", "HUP")] == ["USR1"]


def test_a_second_signal_ends_mpirun_and_the_exit_code_is_that_of_the_ranks(asked):
    """The ranks reported 75 before mpirun, which got SIGTERM, exited with 1."""
    code, output = asked(signal.SIGINT, signal.SIGINT, seconds=2.1, stay=9)
    assert (code, output.count("USR1\n"), output.count("TERM\n")) == (75, 1, 1)
    assert "exit code 75" in output


def test_two_signals_in_quick_succession_count_as_one(asked):
    code, output = asked(signal.SIGTERM, signal.SIGTERM, seconds=0.3, stay=0.6)
    assert (code, output.count("USR1\n"), output.count("TERM\n")) == (75, 1, 0)


def test_the_exit_code_survives_signals_that_arrive_as_the_job_ends(tmp_path):
    script = 'source "$1/launch/run_to_its_end.sh"; run_to_its_end : forward_signal setsid sh -c "$2" - "$3"'
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
def test_a_training_that_gets_sigterm_saves_and_can_be_resumed(folders, tmp_path):
    line = [
        ROOT / "launch/mpirun.sh",
        "-np",
        "2",
        "train_imagenet.py",
        *flags(folders, tmp_path, "--epochs", "30"),
    ]
    job = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    until((tmp_path / "run/checkpoint-1.pth.tar").exists, 60)
    job.terminate()
    output = job.communicate(timeout=30)[1]
    assert job.returncode == 75, output
    assert re.search(r"saved after step \d+|step \d+ is saved", output), output
    assert "MPI_ABORT" not in output
    assert "non-zero status" not in output
    again = run(*line)
    assert again.returncode == 0, again.stderr
    assert "resuming after" in again.stdout


@pytest.mark.parametrize(
    ("hosts", "threads"), [("a:2,b:2", "4"), ("a:4,b:2", "2"), ("a,b", "8"), ("a:16", "1")]
)
def test_threads_are_the_cpus_divided_by_the_ranks_per_host(clone, hosts, threads):
    """Each host has 8 CPUs."""
    words = dry_run(clone, OPEN_MPI_5, "-np", "4", "--hosts", hosts, "--dry-run", "x.py")
    assert words[0] == f"OMP_NUM_THREADS={threads}"
    file = clone / "hosts"
    file.write_text("# slots=64\n" + hosts.replace(":", " slots=").replace(",", "\n") + "\n")
    words = dry_run(clone, OPEN_MPI_5, "-np", "4", "--hostfile", str(file), "--dry-run", "x.py")
    assert words[0] == f"OMP_NUM_THREADS={threads}"


def test_under_slurm_the_slots_come_from_slurm(clone):
    words = dry_run(clone, OPEN_MPI_5, "-np", "64", "--dry-run", "x.py", SLURM_JOB_ID="1")
    assert ":OVERSUBSCRIBE" not in words


def test_the_number_of_threads_that_the_user_set_is_kept(clone):
    words = dry_run(clone, OPEN_MPI_5, "-np", "2", "--dry-run", "x.py", OMP_NUM_THREADS="7")
    assert words[0] == "OMP_NUM_THREADS=7"


def test_arguments_of_the_script_are_passed_on_unchanged(clone):
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


@pytest.mark.mpi
def test_the_example_in_the_help_works_as_typed(tmp_path):
    help_text = run(ROOT / "launch/mpirun.sh", "--help").stdout
    example = help_text.partition("Example:")[2].split("\n", 1)[1].rstrip()
    done = run("bash", "-c", f"{example} --max-steps 1 --log-dir {tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "5 epochs x 6" in done.stdout


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (["a folder/x.py", "-m"], "x.py"),
        (["-m", "launch.doctor", "--json"], "launch.doctor"),
        (["-c", "print(1)"], "python"),
    ],
)
def test_the_start_is_reported(clone, script, name):
    program(clone / ".venv/bin/mpirun", f'[ "$1" != --version ] || {OPEN_MPI_4}\n')
    assert run(clone / "launch/mpirun.sh", "-np", "1", *script).stderr == (
        f"mpirun.sh: starting 1 rank of {name} with Open MPI 4.1.4\n"
    )
    program(clone / ".venv/bin/mpirun", f'[ "$1" != --version ] || {MPICH}\n')
    assert run(clone / "launch/mpirun.sh", "-np", "3", *script).stderr == (
        f"mpirun.sh: starting 3 ranks of {name} with MPICH 4.3.2\n"
    )
    assert run(clone / "launch/mpirun.sh", "-np", "3", "--dry-run", *script).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.py"], "-np needs the number of ranks, got ''"),
        (["-np", "two", "x.py"], "got 'two'"),
        (["-np"], "-np needs a value"),
        (["-np", "2"], "a script is missing"),
        (["-np", "2", "--host", "a:1", "x.py"], "--host is not an option of mpirun.sh"),
        (["-np", "2", "--bind-to=none", "x.py"], "--bind-to is not an option of mpirun.sh"),
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


@pytest.fixture
def killed_before(clone, tmp_path):
    """The clone's mpirun is the real one, and finds the leftovers of a killed mpirun with its process number."""
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
def test_a_test_is_not_disturbed_by_leftovers_of_a_killed_mpirun(clone, killed_before):
    mpirun = [clone / ".venv/bin/mpirun", "-np", "1", "--bind-to", "none", "echo", "here"]
    done = run(*mpirun, TMPDIR=str(killed_before))
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr
    assert len({environment()[SESSIONS] for _ in range(3)}) == 3


@pytest.mark.mpi
def test_a_job_is_not_disturbed_by_leftovers_of_a_killed_mpirun(clone, killed_before):
    program(clone / ".venv/bin/python", 'echo "here $*"\n')
    mine = environment(TMPDIR=str(killed_before))
    del mine[SESSIONS]
    done = subprocess.run(
        [clone / "launch/mpirun.sh", "-np", "1", "x.py"], env=mine, capture_output=True, text=True,
        timeout=20, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "here x.py\n"), done.stderr
    assert [path.name[:5] for path in killed_before.iterdir()] == ["ompi."], (
        "mpirun.sh leaves nothing behind"
    )


@pytest.mark.mpi
def test_an_allreduce_of_two_real_ranks_is_correct(mpirun):
    result = mpirun(2, "launch/install/check_allreduce.py")
    assert result.returncode == 0, result.stderr
    assert "2 ranks: allreduce is correct" in result.stdout
