"""The doctor: the failing cases of every check with made-up facts, and the real ranks of this machine."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from conftest import ROOT, run
from launch.doctor import checks, facts, main
from launch.doctor.checks import OK, WARNING, WRONG
from launch.doctor.facts import Facts

HEALTHY = Facts(
    size=2, host="a", backend="Horovod", versions={"Python": "3.11.7", "Horovod": "0.28.1"},
    built={"MPI": True, "Gloo": True}, loaded_mpis=["/lib/libmpi.so.40"], cpus=[0, 1, 2, 3],
    threads=2, workers=1, shm_free=10**10, open_files=20000, disk_free=10**11, networks={"eth0": "10.0.0.1/24"},
)  # fmt: skip
ON_B = {"rank": 1, "host": "b", "networks": {"eth0": "10.0.0.2/24"}}
GPUS = {"gpus": 4, "gpu": "H100", "cuda_build": True, "built": {"MPI": True, "NCCL": True}}


def pair(both: dict | None = None, **second) -> list[Facts]:
    """Two ranks that differ from `HEALTHY` in `both`; the second one also differs in the keyword arguments."""
    first = dataclasses.replace(HEALTHY, **(both or {}))
    return [first, dataclasses.replace(first, **({"rank": 1, "local_rank": 1} | second))]


@pytest.mark.parametrize("ranks", [pair(), pair(**ON_B), pair(GPUS | {"gpus": 2}), [HEALTHY]])
def test_healthy_ranks_pass_every_check(ranks):
    rows = [check(ranks) for check in checks.CHECKS]
    assert {row.state for row in rows} == {OK}, rows
    assert not any(row.fix for row in rows)


CASES = [
    (checks.check_versions, pair(versions={"Python": "3.12.1", "Horovod": "0.28.1"}), WRONG, "3.12.1 on rank 1"),
    (checks.check_versions, pair(versions={"Python": "3.11.7", "Horovod": ""}), WRONG, "Horovod is missing"),
    (checks.check_torch_distributed, pair({"backend": "torch.distributed"}, **ON_B, gloo_error="no name"), WRONG,
     "no name (on b)"),
    (checks.check_torch_distributed, [Facts(gloo_error="no name")], WRONG, "no name"),
    (checks.check_torch_distributed, pair({"gloo_error": "no name"}), WARNING, "no name (on a)"),
    (checks.check_horovod, [Facts(horovod_error="undefined symbol: _ZN3c10")], WARNING, "undefined symbol"),
    (checks.check_horovod, [Facts(horovod_error="undefined symbol", world_error="4 tasks")], WRONG, "undefined"),
    (checks.check_horovod, pair({"built": {"MPI": False, "Gloo": True}}), WRONG, "no MPI, Gloo"),
    (checks.check_horovod, pair(GPUS | {"built": {"MPI": True, "NCCL": False}}), WARNING, "no NCCL"),
    (checks.check_kernels, pair(kernels_error="there is no C compiler"), WARNING, "no C compiler"),
    (checks.check_world, [Facts(world_error="srun started 4 tasks")], WRONG, "srun started 4 tasks"),
    (checks.check_mpis, pair(loaded_mpis=["/a/libmpi.so.40", "/b/libmpi.so.12"]), WRONG, "(rank 1)"),
    (checks.check_gpus, pair({"cuda_build": True}), WARNING, "none is visible"),
    (checks.check_gpus, pair(GPUS, **ON_B, gpus=0), WRONG, "none on b, 4 elsewhere"),
    (checks.check_gpus, pair(GPUS | {"gpus": 1}), WRONG, "2 ranks for 1 on a"),
    (checks.check_gpus, pair(GPUS), WARNING, "2 ranks for 4 on a"),
    (checks.check_cpus, pair({"threads": 3}), WARNING, "2 ranks x 3 threads on 4 CPUs of a"),
    (checks.check_cpus, pair(cpus=[0]), WRONG, "2 threads on 1 CPUs"),
    (checks.check_cpus, pair({"cpus_per_task": 8}), WRONG, "4 of 8 CPUs per task"),
    (checks.check_shared_memory, pair({"shm_free": 80 << 20, "workers": 2}), WARNING, "80 MiB free on a"),
    (checks.check_shared_memory, pair({"shm_free": 60 << 20}), WRONG, "60 MiB free on a"),
    (checks.check_shared_memory, pair(**ON_B, shm_free=0), WRONG, "0 MiB free on b"),
    (checks.check_open_files, pair(open_files=256), WRONG, "at most 256"),
    (checks.check_open_files, pair({"open_files": -1}, **ON_B, open_files=256), WRONG, "at most 256 on b"),
    (checks.check_run_folder, pair(folder_error="/x cannot be written"), WRONG, "/x cannot be written"),
    (checks.check_run_folder, pair({"disk_free": 10**9}), WARNING, "1.0 GB free"),
    (checks.check_run_folder, pair({"disk_free": 10**8}), WRONG, "0.1 GB free"),
    (checks.check_data, pair(**ON_B, data_error="/d: No such file"), WRONG, "(on b)"),
    (checks.check_data, pair({"data_entries": 0}), WRONG, "empty"),
    (checks.check_data, pair({"data_entries": 1000}, **ON_B, data_entries=999), WRONG, "999 entries on b"),
    (checks.check_clocks, pair(clock=5.0), WARNING, "5.00 s apart"),
    (checks.check_clocks, pair(clock=61.0), WRONG, "61.00 s apart"),
    (checks.check_interfaces, pair(**ON_B | {"networks": {"ib0": "10.9.0.2/24"}}), WARNING, "no network connects all"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "ranks", "state", "words"),
    CASES,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_problem_is_named_with_its_fix(check, ranks, state, words):
    row = check(ranks)
    assert row.state == state, row
    assert words in row.found
    assert row.fix


def test_the_engine_of_the_job_is_named():
    assert checks.check_backend(pair()).found == "Horovod"
    backends = {"mpirun": "Horovod", "srun": "torch.distributed", "torchrun": "torch.distributed"}
    row = checks.check_backend([Facts(backends=backends)])
    assert row.found == "Horovod with mpirun; torch.distributed with srun, torchrun"


def test_without_horovod_every_launcher_uses_torch_distributed(monkeypatch):
    assert facts.backends()["torchrun"] == facts.backends()["srun"] == "torch.distributed"
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda name: None)
    assert set(facts.backends().values()) == {"torch.distributed"}
    assert facts.horovod_error() == facts.NOT_INSTALLED
    row = checks.check_horovod([Facts(horovod_error=facts.NOT_INSTALLED)])
    assert (row.state, row.fix) == (OK, "")


def test_a_host_where_gloo_finds_no_network_is_noticed(monkeypatch):
    assert facts.gloo_error() == ""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    assert "none0" in facts.gloo_error()


def test_a_bridge_with_the_same_address_everywhere_does_not_count_as_a_network():
    docker = {"docker0": "172.17.0.1/16"}
    first, second = {"eth0": "10.0.0.1/24"} | docker, {"eth0": "10.0.0.2/24"} | docker
    ranks = pair({"networks": first}, **ON_B | {"networks": second})
    assert checks.shared_interfaces(ranks) == ["eth0 (10.0.0.1/24)"]
    row = checks.check_interfaces(ranks)
    assert row.state == WARNING
    assert "--interface eth0" in row.fix


def test_the_allreduce_is_judged_by_its_result_and_its_bandwidth():
    assert checks.check_allreduce(True, [9.0], 2, hosts=1).state == OK  # slow is fine on one host
    assert checks.check_allreduce(True, [0.1, 0.2, 0.3], 2, hosts=2) == checks.Row(
        "allreduce", OK, "100 MiB in 0.200 s: 0.52 GB/s of bus bandwidth"
    )
    assert checks.check_allreduce(True, [0.1, 9.0, 9.0], 2, hosts=2).state == WARNING
    assert checks.check_allreduce(False, [0.1], 2, hosts=1).state == WRONG


def test_the_real_cause_of_a_broken_build_is_shown(tmp_path, monkeypatch):
    """Horovod reports "has not been built" when its library cannot be loaded; the loader knows why."""
    package = tmp_path / "horovod" / "torch"
    package.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (package / "__init__.py").write_text("raise ImportError('Extension has not been built')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
    assert facts.horovod_error() == "Extension has not been built (it was built without PyTorch)"
    (package / "mpi_lib_v2.so").write_bytes(b"torn")
    assert "mpi_lib_v2.so" in facts.horovod_error()
    assert "has not been built" not in facts.horovod_error()
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        del sys.modules[name]  # the next tests must not find this package


def test_a_run_folder_need_not_exist_yet_but_must_be_possible(tmp_path):
    assert facts.folder_problem(tmp_path / "new" / "logs") == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert "is not a folder" in facts.folder_problem(tmp_path / "file" / "logs")
    problem = facts.folder_problem(Path("/proc/logs"))  # os.access says that root may write there
    assert problem == "/proc cannot be written: No such file or directory"
    row = checks.check_run_folder(pair({"folder_error": problem, "disk_free": 0}))
    assert (row.state, row.found) == (WRONG, f"{problem} (on a)")


def test_cpus_are_shown_as_ranges():
    assert main.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_waiting_too_long_for_other_ranks_ends_with_advice():
    program = (
        "from launch.doctor.main import time_limit; import time\n"
        "with time_limit(0.2, 'it', 'look there'): time.sleep(9)"
    )
    done = run(sys.executable, "-c", program, timeout=8)
    assert done.returncode == 1
    assert "doctor: it took over 0.2 s" in done.stderr
    assert "look there" in done.stderr


DOCTOR = ("-m", "launch.doctor", "--data-dir", ROOT / "lars", "--log-dir")


def lists_two_ranks(done, backend: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["rank", "0", "1"]
    assert f"OK  backend            {backend}" in [line.rstrip() for line in lines]
    for words in ("2 on 1 host(s)", "GB/s of bus bandwidth", "entries"):
        assert done.stdout.count(words) == 1, done.stdout


@pytest.mark.mpi
def test_real_ranks_are_checked_and_listed_once(mpirun, tmp_path):
    done = mpirun(2, *DOCTOR, tmp_path)
    lists_two_ranks(done, "Horovod")
    assert done.stdout.count("Horovod 0.28.1") == 1


def test_ranks_of_torchrun_are_checked(tmp_path):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    lists_two_ranks(run(sys.executable, "-m", *torchrun, *DOCTOR, tmp_path), "torch.distributed")


def test_ranks_that_do_not_see_each_other_are_a_problem(tmp_path):
    """These variables are those of MPICH's mpiexec, which Horovod's Open MPI does not know."""
    pytest.importorskip("horovod")
    alone = [sys.executable, "-m", "launch.doctor", "--log-dir", tmp_path]
    first = run(*alone, PMI_SIZE="2", PMI_RANK="0")
    assert first.returncode == 1
    assert "mpiexec started 2 tasks, but each of them sees only itself" in first.stdout
    assert "launch/mpirun.sh" in first.stdout
    second = run(*alone, PMI_SIZE="2", PMI_RANK="1")
    assert (second.returncode, second.stdout) == (1, "")
