"""Wrapped by Horovod on two ranks, the optimizers step on the averaged gradients."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

pytest.importorskip("horovod.torch", reason="Horovod is not installed")

WORKER = """
import horovod.torch as hvd
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam

from lars import LAMB, LARS, TVLARS, LARSWrapper, parameter_groups
from lars.names import LAMB_FORMS, LARS_FORMS

hvd.init()
assert hvd.size() == 2
torch.set_num_threads(1)


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    return net.to(torch.float64)


def gradients(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model().parameters()]


def options(**own):
    return {"lr": 0.5, "weight_decay": 0.1, "nonfinite": "skip", **own}


builds = {
    "sgd in a wrapper": lambda g: LARSWrapper(SGD(g, lr=0.5, momentum=0.9), 1e-3, 0.2),
    "adam in a wrapper": lambda g: LARSWrapper(Adam(g, lr=0.5, betas=(0.5, 0.6)), 1e-3, 0.2),
    "adagrad in a wrapper": lambda g: LARSWrapper(Adagrad(g, lr=0.5, lr_decay=0.1), 1e-3, 0.2),
    "tvlars": lambda g: TVLARS(g, **options(lmbda=0.3, alpha=0.7, delay=2, floor=0.1)),
    "lars, every option": lambda g: LARS(
        g, **options(momentum=0.8, trust_coefficient=0.3, eps=0.1, inside="ratio",
        denominator="joint", max_ratio=0.2, max_element=0.3, trust_clip=True,
        zero_norm="raw", nesterov=True, maximize=True)),
    "lamb, every option": lambda g: LAMB(
        g, **options(betas=(0.5, 0.6), eps=0.1, max_grad_norm=2.0, max_weight_norm=0.5,
        max_ratio=0.5, decoupled_weight_decay=False)),
}
for form in LARS_FORMS:
    builds["lars " + form] = lambda g, form=form: LARS(g, **options(momentum=0.9, form=form))
for form in LAMB_FORMS:
    builds["lamb " + form] = lambda g, form=form: LAMB(g, **options(form=form))

for name, build in builds.items():
    alone, shared = model(), model()
    single = build(parameter_groups(alone, 0.1))
    wrapped = hvd.DistributedOptimizer(
        build(parameter_groups(shared, 0.1)), named_parameters=shared.named_parameters()
    )
    for group, reference in zip(wrapped.param_groups, single.param_groups):
        assert group.keys() == reference.keys(), name
        for key in group.keys() - {"params"}:
            assert group[key] == reference[key], (name, key)
    for step in range(4):
        mean = [(a + b) / 2 for a, b in zip(gradients(step, 0), gradients(step, 1))]
        for p, g in zip(alone.parameters(), mean):
            p.grad = g
        single.step()
        wrapped.zero_grad()
        mine = gradients(step, hvd.rank())
        sum((p * g).sum() for p, g in zip(shared.parameters(), mine)).backward()
        wrapped.step()
    for p, q in zip(shared.parameters(), alone.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert not any(torch.equal(p, q) for p, q in zip(shared.parameters(), model().parameters()))

# The opposite order of wrapping: LARSWrapper waits for the averaged gradients.
for inner in (lambda p: SGD(p, lr=0.5, momentum=0.9), lambda p: Adam(p, lr=0.5)):
    alone, shared = model(), model()
    single = LARSWrapper(inner(alone.parameters()))
    averaging = hvd.DistributedOptimizer(
        inner(shared.parameters()), named_parameters=shared.named_parameters()
    )
    around = LARSWrapper(averaging)
    for step in range(3):
        mean = [(a + b) / 2 for a, b in zip(gradients(step, 0), gradients(step, 1))]
        for p, g in zip(alone.parameters(), mean):
            p.grad = g
        single.step()
        around.zero_grad()
        mine = gradients(step, hvd.rank())
        sum((p * g).sum() for p, g in zip(shared.parameters(), mine)).backward()
        around.step()
    for p, q in zip(shared.parameters(), alone.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)

print("rank", hvd.rank(), "saw", len(builds), "optimizers agree")
hvd.shutdown()
"""


@pytest.mark.mpi
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_two_ranks_step_like_one_on_the_averaged_gradients(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": str(ROOT),
        "HOROVOD_CYCLE_TIME": "0.5",
    }
    command = ["mpirun", "-np", "2", "--bind-to", "none", "--oversubscribe"]
    done = subprocess.run(
        [*command, sys.executable, str(worker)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"rank {rank} saw 19 optimizers agree" in done.stdout
