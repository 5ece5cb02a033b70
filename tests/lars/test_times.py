"""Where the time of a step goes: the wait for data, and the wait for the sums of the gradients."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from lars.comm.gradients import LocalGradients
from lars.config import Config
from lars.config.plan import make_plan
from lars.learner.classification import Classification
from lars.learner.learner import Learner, StepResult
from lars.run.progress import Progress

PAUSE = 0.05


class SlowExchange(LocalGradients):
    """An exchange that takes `PAUSE` seconds."""

    def finish_exchange(self) -> None:
        time.sleep(PAUSE)


def slow_batches():
    """Batches that take `PAUSE` seconds each."""
    while True:
        time.sleep(PAUSE)
        yield torch.ones(2, 4), torch.tensor([0, 2])


def test_a_step_measures_its_waits():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = SlowExchange(model.parameters())
    learner = Learner(model, optimizer, gradients, Classification(), lr_at=lambda step: 0.1)
    result = learner.step(slow_batches(), 0, count=3, samples=6)
    assert result.data_seconds >= 3 * PAUSE
    assert result.exchange_seconds >= PAUSE
    assert result.data_seconds + result.exchange_seconds < result.seconds
    quick = learner.step([(torch.ones(2, 4), torch.tensor([0, 2]))], 1, count=1, samples=2)
    assert quick.data_seconds < PAUSE, "each step has its own clock"


def test_the_row_of_an_epoch_has_the_waits_of_its_steps():
    plan = make_plan(Config(batch_size=4, effective_batch_size=8), size=1, train_size=16)
    progress = Progress()
    result = StepResult(True, False, False, samples=8, seconds=3.0, data_seconds=1.0)
    scales = {"loss": 1.0, "top1": 100.0, "top5": 100.0}
    waits = []
    for exchange in (0.25, 0.5, 0.125, 0.125):
        progress.advance(result._replace(exchange_seconds=exchange))
        if plan.ends_epoch(progress.step):
            progress.totals[-1] = 16
            progress.end_epoch(plan, 0.1, scales)
            waits.append([progress.history[-1][f"{name}_seconds"] for name in ("data", "exchange")])
    assert waits == [pytest.approx([2.0, 0.75]), pytest.approx([2.0, 0.25])]
