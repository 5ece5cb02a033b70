"""The host launches a step before it knows the result of the last one, and everything stays as if it had waited.

On a CPU a learner with ahead=True is the test double of one on a GPU: it lets
tensors decide whether a step is skipped, and it delivers results one step late.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, ranks_of
from data.sources.noise import Synthetic
from lars.comm.gradients import LocalGradients
from lars.config import Config
from lars.engine import train
from lars.errors import NonFiniteError, Preempted
from lars.job.interrupt import Interrupt
from lars.learner import build
from lars.learner.average import moving_average
from lars.learner.classification import Classification
from lars.learner.forward import Forward
from lars.learner.learner import Learner
from lars.learner.result import StepResult
from lars.optim import create_optimizer

STEPS, SAMPLES = 30, 8
BAD_LOSS, BAD_GRADIENT, UNREADABLE, NO_IMAGES = (0, 9, 10), (5, 21), (3, 12), (14,)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "fused": True},
    "adamw": {"fused": True},
    "adagrad": {"fused": True},
    "lars": {"path": "foreach", "momentum": 0.9},
    "lars-kernels": {"momentum": 0.9, "form": "mlperf"},
    "lamb": {"path": "foreach", "form": "apex"},
    "tvlars": {"path": "foreach"},
}


class BadLoss(Classification):
    """The loss of some steps is nan."""

    is_bad = False

    def loss_and_sums(self, model, batch):
        loss, sums = super().loss_and_sums(model, batch)
        return (loss * float("nan") if self.is_bad else loss), sums


def learner_of(optimizer: str = "sgd", *, ahead: bool, average: str = "", **options) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    made = create_optimizer(
        optimizer.split("-")[0], model, lr=0.1, weight_decay=0.01, **OPTIMIZERS[optimizer]
    )
    if average:
        options["average"] = moving_average(model, 0.9, warmup=average == "warmup")
    gradients = LocalGradients(model.parameters())
    learner = Learner(
        model,
        made,
        gradients,
        BadLoss(),
        lr_at=lambda step: 0.1 / (1 + step),
        ahead=ahead,
        **options,
    )
    model[0].weight.register_hook(lambda g: g / 0 if learner.launched in BAD_GRADIENT else g)
    return learner


def batches_of(step: int) -> list[tuple[Tensor, Tensor]]:
    """Two micro-batches, of which some or all samples cannot be read in some steps."""
    torch.manual_seed(step)
    sizes = (0, 0) if step in NO_IMAGES else (3, 2) if step in UNREADABLE else (4, 4)
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]


def launch(learner: Learner, step: int, **options) -> list[StepResult]:
    learner.task.is_bad = step in BAD_LOSS
    return learner.launch(batches_of(step), step, count=2, samples=SAMPLES, **options)


def run(learner: Learner, first: int = 0, last: int = STEPS) -> list[StepResult]:
    results = []
    for step in range(first, last):
        results += launch(learner, step, settle=step + 1 == last)
    return [result._replace(seconds=0, data_seconds=0, exchange_seconds=0) for result in results]


def bits(tree: Any) -> Any:
    """A copy in which tensors are replaced by their bytes, so that nan equals nan and -0.0 differs from 0.0."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.detach().cpu().contiguous().view(-1).view(
            torch.uint8
        ).tolist()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    return [bits(value) for value in tree] if isinstance(tree, list | tuple) else tree


def state(learner: Learner) -> Any:
    return bits([learner.state_dict(), learner.metrics.totals])


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        *((name, {}) for name in OPTIMIZERS),
        ("lars", {"average": "warmup", "clip_grad_norm": 0.05, "amp": "fp16"}),
        ("sgd", {"average": "constant", "clip_grad_norm": 0.05}),
    ],
)
def test_the_bytes_and_results_are_those_of_a_host_that_waits(optimizer, options):
    waiting, ahead = (learner_of(optimizer, ahead=a, **options) for a in (False, True))
    expected, found = run(waiting), run(ahead)
    assert repr(found) == repr(expected), "nan differs from itself, but not in text"
    assert state(ahead) == state(waiting)
    skipped = {step for step, result in enumerate(found) if not result.taken}
    assert skipped >= {*BAD_LOSS, *BAD_GRADIENT, *NO_IMAGES}
    assert len(skipped) < 15
    assert found[5].cause == "not finite, first in 0.weight" or "amp" in options


def test_a_run_that_resumes_at_any_step_ends_with_the_same_bytes():
    options = {"average": "warmup", "amp": "fp16", "ahead": True}
    straight = learner_of("lars", **options)
    run(straight)
    for stop in (1, 6, 13, 22):
        first, second = (learner_of("lars", **options) for _ in range(2))
        run(first, 0, stop)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.metrics.totals.copy_(first.metrics.totals)
        run(second, stop, STEPS)
        assert state(second) == state(straight), stop


def test_results_arrive_one_step_late_and_a_request_settles_the_next_step():
    learner = learner_of(ahead=True)
    assert [r.taken for r in launch(learner, 1, settle=False)] == [True], "the first one is awaited"
    assert launch(learner, 2, settle=False) == []
    with pytest.raises(RuntimeError, match="settle"):
        learner.state_dict()
    for step, flag in ((3, "save"), (6, "stop")):
        assert len(launch(learner, step, settle=False, **{flag: True})) == 1, (
            "the result of the step before"
        )
        requested, newest = launch(learner, step + 1, settle=False)
        assert not getattr(requested, flag)
        assert getattr(newest, flag)
        assert launch(learner, step + 2, settle=False) == []
    before, last = launch(learner, 9, settle=True)
    assert before.taken
    assert last.cause == "not finite, first in 3.bias"
    assert learner.state_dict()


class NoReading(TorchDispatchMode):
    """Raises if the host reads a value of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "lamb", "tvlars"])
def test_the_host_reads_nothing_of_a_step_that_it_launches(optimizer):
    learner = learner_of(optimizer, ahead=True, amp="fp16", average="warmup", clip_grad_norm=0.1)
    launch(learner, 1)
    batches = batches_of(2)
    learner.mailbox.collect = lambda newest, settle: []
    with NoReading():
        learner.launch(batches, 2, count=2, samples=SAMPLES, settle=False)
    learner.ahead = False
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        float(learner.metrics.totals[0])


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_counts_its_updates_on_the_device_of_the_network(warmup):
    """On a GPU, the count of a CPU cannot be increased by a flag of the device."""
    network = nn.Linear(2, 2, device="meta")
    assert moving_average(network, 0.9, warmup=warmup).n_averaged.device.type == "meta"


@pytest.mark.parametrize(("ahead", "end"), [(False, "1+4"), (True, "1+5")])
def test_a_run_saves_validates_and_stops_in_the_settled_state(ahead, end, tmp_path, monkeypatch):
    """With the engine: two skipped steps in a row, a stop in step 10, checkpoints, metrics and an average."""
    monkeypatch.setattr(build, "Learner", partial(Learner, ahead=ahead))
    # Otherwise an error would end this process.
    monkeypatch.setattr("lars.job.job.fail_together", lambda world: contextlib.nullcontext())
    forward = Forward.forward

    def sometimes_nan(self, batch, model, metrics):
        loss = forward(self, batch, model, metrics)
        return loss * float("nan") if getattr(self, "launched", None) in (3, 4) else loss

    monkeypatch.setattr(Learner, "forward", sometimes_nan)

    def run(name: str, stop_in: int | None = None, **flags) -> Any:
        config = Config(
            model="small_cnn", base_op="lars", base_lr=0.5, batch_size=8, epochs=2, log_every=3, checkpoint_steps=4,
            log_dir=str(tmp_path), run_name=name, no_cuda=True, workers=0, ema_decay=0.9, keep_checkpoints=9, **flags,
        )  # fmt: skip
        interrupt = Interrupt(())
        launched = Learner.launch

        def launch(self, batches, step, **options):
            if step == stop_in:
                interrupt.received = "SIGTERM"
            options["stop"] = interrupt.received is not None
            return launched(self, batches, step, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "launch", launch)
            source = Synthetic(image_size=28, num_classes=3, train_size=48, val_size=8)
            train(config, source, interrupt)
        files = {path.name: path for path in (tmp_path / name).glob("checkpoint-*")}
        return {name: torch.load(path, weights_only=True) for name, path in files.items()}

    straight = run("straight")
    assert set(straight) == {f"checkpoint-{n}.pth.tar" for n in ("0+4", "1", "1+2", "2")}
    assert straight["checkpoint-2.pth.tar"]["progress"]["skipped"] == 2
    with pytest.raises(Preempted):
        run("halves", stop_in=9)
    assert (tmp_path / "halves" / f"checkpoint-{end}.pth.tar").exists()
    resumed = run("halves")["checkpoint-2.pth.tar"]
    assert bits(resumed["learner"]) == bits(straight["checkpoint-2.pth.tar"]["learner"])
    with pytest.raises(NonFiniteError):
        run("diverged", max_skipped_steps=2)
    ends.setdefault("learner", []).append(bits(straight["checkpoint-1+2.pth.tar"]["learner"]))
    kept = [
        {k: row[k] for k in ("loss", "top1", "step", "lr")}
        for row in resumed["progress"]["history"]
    ]
    ends.setdefault("rows", []).append(kept)
    assert all(len(values) == 1 or values[0] == values[1] for values in ends.values())


# What the runs of a host that waits and of one that does not end with.
ends: dict[str, list[Any]] = {}


def test_two_ranks_skip_and_stop_after_the_same_steps():
    done = ranks_of("torch")(2, ROOT / "tests" / "ranks" / "ahead.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal, 3 skipped, stopped after 8") == 2, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "lamb", "tvlars"])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_step_on_cuda_does_not_synchronize(optimizer, amp):
    learner = learner_of(optimizer, ahead=True)
    model = learner.model.cuda()
    options = {"average": moving_average(model, 0.9), "clip_grad_norm": 0.1, "amp": amp}
    made = create_optimizer(optimizer, model, lr=0.1, **OPTIMIZERS[optimizer])
    learner = Learner(
        model,
        made,
        LocalGradients(model.parameters()),
        BadLoss(),
        lr_at=lambda step: 0.1,
        **options,
    )
    assert learner.ahead
    steps = [[(x.cuda(), y.cuda()) for x, y in batches_of(step)] for step in (1, 2, 4, 6)]
    results = []
    for step, batches in enumerate(steps):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            results += learner.launch(batches, step, count=2, samples=SAMPLES, settle=step == 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(results) == 4
