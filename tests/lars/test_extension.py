"""A backend and an observer each need their own file and one line elsewhere. A task needs only its own file.

test_metrics.py adds a metric, and tests/data adds a data source.
"""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from torch import nn

from lars import names, observe
from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.comm.world import World
from lars.config import Config, parse
from lars.config.flags import flag
from lars.config.plan import make_plan
from lars.errors import UsageError
from lars.learner import build
from lars.learner.classification import Classification
from lars.learner.learner import Learner, StepResult
from lars.learner.metrics import means
from lars.learner.task import Setup
from lars.observe import Observer, Training, observers_of
from lars.run.identity import defaults, same_run

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
    module.CANNOT_JOIN, module.COUNTS_TASKS = ("srun",), True
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
        start.check(srun, backend="twice")
    start.check(TASKS, backend="twice")
    start.check({}, backend="twice")


def test_torchrun_is_refused_with_the_line_that_works():
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}
    with pytest.raises(UsageError, match=r"torchrun started 2 tasks, .* launch/mpirun.sh -np 2 "):
        start.check(torchrun, backend="horovod")


def test_horovod_refuses_bfloat16_and_names_the_fix():
    with pytest.raises(UsageError, match=r"--bf16-allreduce: Horovod .* add --backend torch"):
        start.check(TASKS, backend="horovod", bfloat16=True)
    start.check(TASKS, backend="torch", bfloat16=True)
    start.check({}, backend="horovod", bfloat16=True)


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
    config = types.SimpleNamespace(observer=())
    observers = observers_of(Training(config, None, run, None, None))
    observers.start()
    for taken in (True, False, True):
        observers.step(StepResult(taken, stop=False, save=False))
    observers.validated()
    observers.saved()
    observers.end()
    assert [member.steps for member in observers.members] == ([2] if rank == 0 else [])


@dataclasses.dataclass(frozen=True)
class BrightnessConfig(Config):
    """The flags of a task that predicts the brightness of an image."""

    task = "brightness:setup"

    offset: float = flag(0.0, "added to the brightness", group="brightness")


class Brightness:
    """Regression of the mean of an image, with its absolute error as a metric."""

    best = "error"

    def __init__(self, offset: float) -> None:
        self.scales, self.offset = {"loss": 1.0, "error": 1.0}, offset

    def prepare(self, batch, device):
        return batch[0].to(device), batch[1]

    def samples_in(self, batch):
        return len(batch[0])

    def loss_and_sums(self, model, batch):
        gap = model(batch[0]).flatten() - batch[0].mean((1, 2, 3)) - self.offset
        loss = gap.square().sum()
        return loss, {"loss": loss, "error": gap.abs().sum()}


def test_a_new_task_needs_only_its_file_and_its_flags_belong_to_the_run(monkeypatch):
    module = types.ModuleType("brightness")
    module.setup = lambda config, source, world, model: Setup(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 1)), Brightness(config.offset)
    )
    monkeypatch.setitem(sys.modules, "brightness", module)
    words = ["--model", "small_cnn", "--no-cuda", "--offset", "0.5", "--base-lr", "0.01"]
    (config,) = parse([*words, "--batch-size", "4"], BrightnessConfig, description="")

    @dataclasses.dataclass(frozen=True)
    class Source:
        num_classes, image_size, train_size, fingerprint = 1, 8, 4, "x"

    learner = build.learner(config, make_plan(config, size=1, train_size=4), Source(), World())
    batch = (torch.rand(4, 3, 8, 8), torch.zeros(4))
    assert learner.step(learner.prepared([batch]), 0, count=1, samples=4).taken
    assert means(learner.task.scales, learner.metrics.totals)["error"] > 0
    assert same_run(config, Source())["offset"] == 0.5
    assert defaults(config, Source())["offset"] == 0.0
