"""The start of a rank: its CPUs, its launcher, joining the others, and how errors end the job."""

from __future__ import annotations

import os

import pytest

from lars import launcher
from lars.comm import start
from lars.comm.world import World
from lars.errors import UsageError
from lars.job.ending import fail_together


@pytest.mark.parametrize(
    ("mask", "machine", "variables", "expected"),
    [
        (8, 8, {}, 8),
        (8, 8, {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 2),  # ranks that are not bound share the CPUs
        (2, 8, {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 2),  # bound ranks have two CPUs each
        (8, 64, {"MPI_LOCALNRANKS": "8"}, 8),
        (64, 64, {"SLURM_CPUS_PER_TASK": "6", "SLURM_STEP_TASKS_PER_NODE": "8"}, 6),
        (4, 64, {"SLURM_CPUS_PER_TASK": "6"}, 4),  # at most the CPUs in the affinity mask
        (8, 8, {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, 4),
        (8, 8, {"OMPI_COMM_WORLD_LOCAL_SIZE": "16"}, 1),
        (8, 8, {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_CPUS_PER_TASK": "junk"}, 4),
    ],
)
def test_allotted_cpus(monkeypatch, mask, machine, variables, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(mask)))
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    assert launcher.allotted_cpus(variables) == expected


def test_without_a_launcher_the_world_is_a_single_process():
    world = start.join({"HOME": "/", "PATH": "/bin"})
    assert (type(world), world.rank, world.size, world.is_root) == (World, 0, 1, True)


def test_an_error_ends_the_job_with_its_exit_code_and_is_reported_in_one_line(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with fail_together(World):
        raise UsageError("--flag is wrong")
    with fail_together(World):
        raise KeyError("nobody expected this")
    output = capsys.readouterr().err
    assert codes == [2, 1]
    assert "error: --flag is wrong" in output
    assert output.count("Traceback") == 1
