"""The Slurm templates in a real Slurm with one node; its daemons keep their files in a temporary folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from run_folders import end_of

from conftest import ROOT, environment, long_flags, run, until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")

# A requeued job also waits for AuthInfo's cred_expire before it starts again: 120 s by default, at least 5 s.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:4 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    """Ports that are not in use."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """A Slurm with one node of 4 CPUs; returns the environment in which its commands find it."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge libpmix-dev")
    if os.getuid() != 0:
        pytest.skip("only root can start Slurm's daemons")
    # Munge requires a socket that every user can reach, but pytest's folders are private.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge/key").write_bytes(os.urandom(128))
    (folder / "munge/key").chmod(0o400)
    for gpu in range(4):  # to Slurm, a GPU is only a file
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    host = socket.gethostname().split(".")[0]
    configuration = CONFIGURATION.format(folder=folder, host=host, ports=free_ports(2))
    (folder / "slurm.conf").write_text(configuration)
    commands = {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", f"--key-file={folder}/munge/key", f"--seed-file={folder}/munge/seed",
             f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge/pid"]  # fmt: skip
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
            log = (folder / f"{command[0]}.log").open("w")
            daemons.append(
                subprocess.Popen(command, env=environment(**commands), stdout=log, stderr=log)
            )
            until((folder / "munge.socket").exists, 10)
        try:
            until(lambda: "idle" in run("sinfo", "--noheader", **commands).stdout, 30)
        except AssertionError:
            pytest.fail("\n".join(log.read_text()[-2000:] for log in folder.glob("*.log")))
        yield commands
        run("scancel", "--user=root", **commands)
        until(lambda: not run("squeue", "--noheader", **commands).stdout.strip(), 60)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)
        shutil.rmtree(folder)


class Job:
    """A training of 2 ranks, submitted with launch/submit.sh; its log and run folder are in `folder`."""

    def __init__(
        self,
        slurm: dict[str, str],
        folder: Path,
        recipe: list[str],
        more: Sequence[str],
        options: Sequence[str],
    ) -> None:
        self.slurm, self.folder = slurm, folder
        file = folder / "recipe.args"
        file.write_text("\n".join(recipe))
        submit = [ROOT / "launch/submit.sh", "--nodes", "1", "--gpus-per-node", "2", *options]
        submit += ["--cpus-per-task=1", f"--output={folder}/%j.out"]
        done = run(*submit, f"@{file}", *more, **slurm)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.split()[-1]
        self.hints = done.stderr

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def shows(self, word: str, task: str = "") -> str:
        """The value of `word` in the output of ``scontrol show job``."""
        job = run("scontrol", "show", "job", "--oneliner", self.number + task, **self.slurm).stdout
        return job.split(f" {word}=")[1].split()[0]

    def awaits(self, happened: Callable[[], object], seconds: float = 120) -> None:
        """Wait until `happened()` is true; fail with the log of the job if that takes too long."""
        try:
            until(happened, seconds)
        except AssertionError:
            job = run("scontrol", "show", "job", self.number, **self.slurm).stdout
            pytest.fail(f"{job}\n{self.log()}")

    def reaches(self, state: str, task: str = "", seconds: float = 120) -> None:
        """Wait until the job is in a state; fail at once if it has failed instead."""

        def reached() -> bool:
            current = self.shows("JobState", task)
            assert current == state or current not in ("FAILED", "TIMEOUT")
            return current == state

        self.awaits(reached, seconds)

    def trains(self, run_name: str = "run") -> None:
        """Wait until the first epoch is saved."""
        self.awaits((self.folder / run_name / "checkpoint-1.pth.tar").exists)


@pytest.fixture
def submit(slurm, folders, tmp_path):
    """``submit(*options, more=())`` submits a job with options of submit.sh and more flags of the trainer."""

    def call(*options: str, more: tuple[str, ...] = ()) -> Job:
        if "srun" in options:
            need_pmix(slurm)
        return Job(slurm, tmp_path, long_flags(folders, tmp_path), more, ("--time=5", *options))

    return call


def need_pmix(slurm: dict[str, str]) -> None:
    """Skip the test if srun has no PMIx. Debian's Slurm loads libpmix.so, which only libpmix-dev contains."""
    tried = run("srun", "--mpi=pmix", "--ntasks=1", "true", **slurm)
    if "can not load PMIx library" in tried.stderr:
        pytest.skip("this Slurm cannot load PMIx: apt-get install libpmix-dev")
    assert tried.returncode == 0, tried.stderr


LAUNCHERS = pytest.mark.parametrize("launcher", ["mpirun", "srun", "torch"])


@LAUNCHERS
def test_the_warning_signal_saves_and_requeues_and_the_result_is_the_same(
    slurm, submit, unbroken, launcher
):
    """The signal goes to the batch script only, as with --signal=B:USR1@."""
    job = submit("--launcher", launcher)
    assert f"tail -F {job.folder}/{job.number}.out\n" in job.hints
    job.trains()
    save = f"scancel --batch --signal=USR1 {job.number}"
    assert f"{save}\n" in job.hints
    assert run(*save.split(), **slurm).returncode == 0
    job.awaits(lambda: job.shows("Restarts") == "1")
    job.reaches("COMPLETED")
    log = job.log()
    for line in ("start 1: 2 ranks x 1 CPUs", "saved; requeued", "start 2: 2 ranks x 1 CPUs"):
        assert log.count(line) == 1, log
    assert "2 ranks x 2 micro-batches x 4 samples" in log
    assert "resuming after" in log
    assert end_of(job.folder / "run") == unbroken


# Slurm checks time limits every 30 s, and sends the signal up to 30 s early. Here it arrives 20 to 50 s after the
# start, while the ranks are training.
LIMIT = ("--time=1", "--signal=B:USR1@10")
LONG = ("--epochs", "450")  # a minute and more


@pytest.mark.soak
@LAUNCHERS
def test_the_time_limit_saves_and_requeues(submit, unbroken_long, launcher):
    job = submit("--launcher", launcher, *LIMIT, more=LONG)
    job.awaits(lambda: "saved; requeued" in job.log())
    job.awaits(lambda: "start 2" in job.log())
    job.reaches("COMPLETED", seconds=900)  # on a busy machine, each minute trains for seconds only
    assert job.log().count("saved; requeued") == int(job.shows("Restarts")) >= 1
    assert "DUE TO TIME LIMIT" not in job.log()
    assert end_of(job.folder / "run") == unbroken_long


@pytest.fixture(scope="session")
def unbroken_long(folders, tmp_path_factory, mpirun):
    logs = tmp_path_factory.mktemp("unbroken")
    done = mpirun(2, "train_imagenet.py", *long_flags(folders, logs, *LONG), timeout=400)
    assert done.returncode == 0, done.stderr
    return end_of(logs / "run")


def test_a_job_that_slurm_requeues_continues_and_a_cancelled_job_does_not(slurm, submit):
    job = submit("--launcher", "srun")
    job.trains()
    assert run("scontrol", "requeue", job.number, **slurm).returncode == 0
    job.awaits(lambda: "resuming after" in job.log())
    assert "start 2" in job.log()
    assert run("scancel", job.number, **slurm).returncode == 0
    job.reaches("CANCELLED")
    ranks = ["pgrep", "-f", f"^{sys.executable} .*{job.folder}"]
    until(lambda: run(*ranks).returncode == 1, 15)
    assert job.shows("Restarts") == "1"
    assert not (job.folder / "run/model.safetensors").exists()


def test_a_task_of_an_array_is_requeued_on_its_own(slurm, submit, unbroken):
    """Task 42 has the seed of the undisturbed run; task 41 is asked to stop."""
    job = submit("--array=41-42", more=("--seed", "%a", "--run-name", "seed-%a"))
    job.trains("seed-41")
    asked = run("scancel", "--batch", "--signal=USR1", f"{job.number}_41", **slurm)
    assert asked.returncode == 0
    for task in ("_41", "_42"):
        job.reaches("COMPLETED", task)
    assert [job.shows("Restarts", task) for task in ("_41", "_42")] == ["1", "0"]
    ends = [end_of(job.folder / f"seed-{seed}") for seed in (41, 42)]
    assert ends[0] != ends[1] == unbroken


@pytest.mark.parametrize(
    ("flag", "value", "code", "message"),
    [
        ("--train-dir", "/nowhere", 3, "error: --train-dir: /nowhere is not a folder"),
        ("--effective-batch-size", "12", 2, "--effective-batch-size 12 is not a multiple of"),
    ],
)
@pytest.mark.parametrize("launcher", ["srun", "torch"])
def test_the_job_has_the_exit_code_of_the_ranks(submit, launcher, flag, value, code, message):
    """The exit code of srun is the highest of all ranks, including a rank that srun had to end."""
    job = submit("--launcher", launcher, more=(flag, value))
    job.reaches("FAILED")
    assert job.shows("ExitCode") == f"{code}:0", job.log()
    assert job.log().count(message) == 1, job.log()
    assert "requeued" not in job.log()


def test_an_error_of_one_rank_decides_the_exit_code_of_the_step(slurm, tmp_path):
    need_pmix(slurm)
    step = ["srun", "--ntasks=2", "--mpi=pmix", "--kill-on-bad-exit=1", sys.executable]
    failing = [ROOT / "tests/ranks/failing.py", "loading", "data", "1", tmp_path / "told", tmp_path]
    done = run(*step, *failing, **slurm)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("(rank 1 of 2") == done.stderr.count("image 7 cannot be read") == 1


def test_srun_without_pmix_uses_torch_distributed_and_refuses_horovod(
    slurm, folders, tmp_path, unbroken
):
    step = ["srun", "--ntasks=2", "--mpi=none", sys.executable, "train_imagenet.py"]
    training = long_flags(folders, tmp_path)
    refused = run(*step, *training, "--backend", "horovod", **slurm)
    assert refused.returncode == 2, refused.stderr
    assert "srun started 2 tasks, but each of them sees only itself" in refused.stderr
    assert "srun --mpi=pmix" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = run(*step, *training, **slurm)
    assert done.returncode == 0, done.stderr
    assert end_of(tmp_path / "run") == unbroken
