"""How the ranks of torch.distributed find each other, under launchers that do not provide the address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from conftest import ROOT, environment, ranks_of, until
from data.tooling import launcher as tooling
from lars import launcher
from lars.comm import rendezvous, start
from lars.errors import UsageError
from lars.launcher import Place, place

SLURM = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-7@1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (SLURM, Place("srun", 4, 3, 1, 2)),
        (TORCHRUN, Place("torchrun", 4, 2, 0, 2)),
        (MPIRUN, Place("mpirun", 4, 1, 1, 2)),
        (SLURM | TORCHRUN, Place("torchrun", 4, 2, 0, 2)),  # srun has started torchrun
        ({}, Place("", 1, 0, 0, 1)),
    ],
)
def test_the_launcher_states_the_place_of_a_rank(variables, expected):
    assert place(variables) == expected


@pytest.mark.parametrize(
    ("variables", "backend"),
    [(TORCHRUN, "torch"), (SLURM, "torch"), (SLURM | {"PMIX_RANK": "3"}, "horovod"), (MPIRUN, "horovod")],
)  # fmt: skip
def test_auto_takes_what_the_launcher_offers(monkeypatch, variables, backend):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "horovod")
    assert start.choose_backend("auto", variables)[0] == backend
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert start.choose_backend("auto", variables)[0] == "torch"
    assert start.choose_backend("horovod", variables)[0] == "horovod"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,7],login1", "gpu03"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]n[4-9]", "rack1n4"),
        ("gpu[07,09].cluster", "gpu07.cluster"),
    ],
)
def test_the_first_host_in_slurms_notation(hosts, first):
    assert rendezvous.first_host(hosts) == first


def test_the_address_of_the_store(monkeypatch):
    several, one = place(SLURM), Place("mpirun", 2, 0, 0, 2)
    host, port = rendezvous.address(several, rendezvous.job_name(SLURM), SLURM)
    assert (host, port in range(20000, 30000)) == ("gpu07", True)
    assert rendezvous.address(one, "job", {})[0] == "127.0.0.1"
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert rendezvous.address(several, "job", SLURM | chosen) == ("10.0.0.1", 29500)
    with pytest.raises(UsageError, match="MASTER_PORT=http is not a port; use a number"):
        rendezvous.address(one, "job", {"MASTER_PORT": "http"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"the 4 ranks run on several hosts.* -x MASTER_ADDR=HOST"):
        rendezvous.address(place(MPIRUN), "job", MPIRUN)


def test_jobs_do_not_share_ports_or_keys():
    """Two jobs on one host. A rank that connects to another job's store by mistake does not see its keys."""
    ports = {rendezvous.address(Place("mpirun", 2, 0, 0, 2), name, {})[1] for name in "abcdef"}
    assert len(ports) == 6
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    stores = [
        rendezvous.store(
            Place("mpirun", 2, rank, rank, 2), {"PMIX_NAMESPACE": job, "MASTER_PORT": port}
        )
        for rank, job in ((0, "one"), (1, "one"), (1, "two"))
    ]
    stores[0].set("key", "value")
    assert [store.check(["key"]) for store in stores] == [True, True, False]


def test_jobs_have_different_names_and_their_tasks_the_same():
    names = {
        rendezvous.job_name(MPIRUN),
        rendezvous.job_name(MPIRUN | {"PMIX_NAMESPACE": "prterun-8@1"}),
        rendezvous.job_name(SLURM),
        rendezvous.job_name(SLURM | {"SLURM_STEP_ID": "1"}),
        rendezvous.job_name({}),
    }
    assert len(names) == 5
    assert rendezvous.job_name(SLURM) == rendezvous.job_name(SLURM | {"SLURM_PROCID": "0"})
    # mpirun within a Slurm job: srun started the task of the second host, but not that of the first one.
    first = MPIRUN | {"SLURM_JOB_ID": "123"}
    assert rendezvous.job_name(first) == rendezvous.job_name(first | {"SLURM_STEP_ID": "0"})


def test_jobs_of_mpich_are_named_by_its_proxy():
    """MPICH sets no variable that differs between jobs. A task may be a shell that starts Python."""
    job = [
        "hydra_pmi_proxy",
        "-c",
        "sh -c 'sleep 60 & echo $!; wait'; true",
        "--control-port",
        "node1:40123",
    ]
    with subprocess.Popen(
        job, executable="/bin/sh", stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as proxy:
        try:
            task = int(proxy.stdout.readline())
            assert rendezvous.hydra_job(task) == "node1:40123"
            assert rendezvous.hydra_job(os.getpid()) == ""
        finally:
            os.killpg(proxy.pid, signal.SIGKILL)


def test_torchrun_may_number_the_hosts_in_another_order_than_srun():
    inner = {
        "TORCHELASTIC_RUN_ID": "a",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
    }
    outer = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    first = inner | outer | {"RANK": "0", "SLURM_PROCID": "1"}
    third = inner | outer | {"RANK": "2", "SLURM_PROCID": "0"}
    for rank in (launcher.rank, tooling.rank):
        assert (rank(first), rank(third)) == (0, 2)


def agreed(sizes, store):
    """The names on which the ranks of one start agree. Rank 0 comes last."""
    with ThreadPoolExecutor() as ranks:
        names = ranks.map(
            lambda rank: rendezvous.start_name(Place("torchrun", sizes, rank, 0, 1), store),
            reversed(range(sizes)),
        )
        return set(names)


def test_every_start_of_the_ranks_has_a_name_of_its_own():
    """The store of torchrun outlives the ranks. An earlier start has left its tokens there, one of them unanswered."""
    store = dist.HashStore()
    store.set("token of rank 2", "of a rank that was killed")
    names = [agreed(sizes, store) for sizes in (4, 4, 3, 2)]
    assert [len(name) for name in names] == [1, 1, 1, 1]
    assert len(set.union(*names)) == 4


def test_rank_0_says_who_has_not_arrived(monkeypatch):
    monkeypatch.setattr(rendezvous, "_JOIN_SECONDS", 0.1)
    with pytest.raises(dist.DistError, match=r"timed out: 2 ranks have not arrived: 1, 2"):
        rendezvous.start_name(Place("torchrun", 3, 0, 0, 3), dist.HashStore())


def test_a_store_of_torchrun_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(rendezvous, "_JOIN_SECONDS", 0.1)
    task = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(
        UsageError, match=r"rank 0 cannot reach 127.0.0.1:9 .*torchrun .*--local-addr"
    ):
        rendezvous.store(Place("torchrun", 2, 0, 0, 2), task)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_ends_a_rank_that_waits_for_the_others(tmp_path, number, code):
    """The other rank of two has not been started."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    alone = SLURM | step | {"SLURM_PROCID": "0", "TORCH_CPP_LOG_LEVEL": "INFO"}
    command = [sys.executable, ROOT / "train_imagenet.py", "--benchmark", "noise", "--no-cuda"]
    printed = tmp_path / "printed"
    with (
        printed.open("w") as output,
        subprocess.Popen(command, env=environment(**alone), stdout=output, stderr=output) as task,
    ):
        try:
            until(lambda: "The client socket has connected" in printed.read_text(), 60)
            time.sleep(0.5)
            task.send_signal(number)
            task.wait(timeout=20)
        finally:
            task.kill()
    assert task.returncode == code
    assert f"stopped on request ({number.name}): no step was taken" in printed.read_text()


BROADCAST = ROOT / "tests" / "ranks" / "broadcast.py"


def test_tasks_of_srun_without_pmix_find_each_other():
    """Two processes with the variables that srun sets."""
    one_host = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, BROADCAST],
            env=environment(**one_host | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        printed = [task.communicate(timeout=100)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0]
    assert printed == ["RANK 0 True\n", "RANK 1 True\n"]


@pytest.mark.mpi
def test_a_tree_of_tensors_reaches_every_rank_of_torchrun():
    done = ranks_of("torch")(2, BROADCAST)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["RANK 0 True", "RANK 1 True"]


@pytest.mark.parametrize("name", ["JSM_NAMESPACE_SIZE", "PALS_RANKID", "ALPS_APP_PE"])
def test_a_launcher_that_does_not_state_its_tasks_is_refused(name):
    with pytest.raises(UsageError, match=r"torch\.distributed cannot count; start the ranks with"):
        start.join({name: "3"}, backend="torch")
