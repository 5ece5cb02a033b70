"""A backend and an observer each need their own file and one line elsewhere.

test_metrics.py adds a metric, and tests/data adds a data source.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from lars import names, observe
from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.comm.world import World
from lars.errors import UsageError
from lars.learner.classification import Classification
from lars.learner.learner import Learner, StepResult
from lars.observe import Observer, Training, observers_of

TASKS = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}


class Twice(World):
    """Two ranks that always have the same values, so a sum doubles its input."""

    size = 2

    def all_reduce(self, tensor, name):
        return 2 * tensor

    def start_sum(self, tensor, name):
        tensor.mul_(2)

    def all_gather_object(self, value, name):
        return [value, value]


@pytest.fixture
def backend(monkeypatch):
    """A module with a backend, registered in the table."""
    module = types.ModuleType("twice")
    module.NAME, module.INSTALL, module.ALONE = "Twice", "install it", "cannot join it"
    module.CANNOT_JOIN = ("srun",)
    module.join = lambda environment, **options: Twice()
    monkeypatch.setitem(sys.modules, "twice", module)
    monkeypatch.setitem(names.BACKENDS, "twice", "twice")
    return module


def learned(world: World, samples: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = make_gradients(model.parameters(), world)
    learner = Learner(model, optimizer, gradients, Classification(), lr_at=lambda step: 0.1)
    batch = (torch.ones(2, 4, dtype=torch.float64), torch.tensor([0, 2]))
    learner.step([batch], 0, count=1, samples=samples)
    return model.weight.detach()


def test_a_new_backend_needs_only_its_file_and_a_row(backend):
    world = start.join(dict(TASKS), backend="twice")
    assert isinstance(world, Twice)
    assert torch.equal(learned(world, samples=4), learned(World(), samples=2))


def test_a_backend_that_is_not_installed_or_cannot_join_is_refused(backend):
    backend.join = lambda environment, **options: World()
    with pytest.raises(UsageError, match=r"mpirun started 2 tasks, .* mpirun cannot join it"):
        start.join(dict(TASKS), backend="twice")

    def missing(environment, **options):
        raise ImportError("no such library")

    backend.join = missing
    with pytest.raises(
        UsageError, match=r"Twice cannot be imported \(no such library\); install it"
    ):
        start.join(dict(TASKS), backend="twice")


def test_a_launcher_that_a_backend_can_never_join_is_refused_at_once(backend):
    srun = {"SLURM_STEP_NUM_TASKS": "4"}
    with pytest.raises(UsageError, match="srun started 4 tasks, but Twice cannot join them"):
        start.check_launcher(srun, backend="twice")
    start.check_launcher(TASKS, backend="twice")
    start.check_launcher({}, backend="twice")


def test_torchrun_is_refused_with_the_line_that_works():
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}
    with pytest.raises(UsageError, match=r"torchrun started 2 tasks, .* launch/mpirun.sh -np 2 "):
        start.check_launcher(torchrun, backend="horovod")


class Counter(Observer):
    """Counts the steps that were taken."""

    def start(self) -> None:
        self.steps = 0

    def step(self, result: StepResult) -> None:
        self.steps += result.taken


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_observer_needs_only_its_file_and_a_line_and_runs_on_the_root_only(monkeypatch, rank):
    monkeypatch.setattr(observe, "OBSERVERS", (Counter,))
    world = World()
    world.rank = rank
    run = types.SimpleNamespace(world=world)
    observers = observers_of(Training(None, None, run, None, None))
    observers.start()
    for taken in (True, False, True):
        observers.step(StepResult(taken, stop=False, save=False))
    observers.validated()
    observers.saved()
    observers.end()
    assert [member.steps for member in observers.members] == ([2] if rank == 0 else [])
