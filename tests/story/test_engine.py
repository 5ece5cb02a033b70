"""The engine's arithmetic on real ranks, in float64: recorded runs, factorisations of a batch, exact exchange."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import GOLDENS, ROOT, golden, run
from lars.comm.gradients import LocalGradients
from lars.comm.world import World
from lars.config import Config
from lars.config.plan import make_plan
from lars.learner.build import build_model, make_learner
from lars.learner.classification import Classification
from lars.learner.learner import Learner
from lars.learner.metrics import count
from lars.names import OPTIMIZERS
from lars.run.agreement import check_weights_agree

RANKS = ROOT / "tests" / "ranks"


@pytest.fixture(scope="session")
def toy_runs(mpirun):
    """The published trainer's toy runs, made by this engine on 2 ranks."""
    done = mpirun(2, RANKS / "golden_trainer.py", GOLDENS / "nus_trainer_2rank.json")
    assert done.returncode == 0, done.stderr
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))[7:])


@pytest.mark.mpi
@pytest.mark.parametrize("case", ["lars_sep", "lars_all", "sgd"])
def test_the_published_trainers_runs_are_met(toy_runs, case):
    """Parameters and the root's BatchNorm statistics after each of 6 steps of 2 ranks x 2 micro-batches."""
    expected = golden("trainer_expected.json")["expected"][case]["no_initial_step_sample_weighted"]
    for step, values in enumerate(expected):
        for name, value in values.items():
            ours = torch.tensor(toy_runs[case]["after"][step][name], dtype=torch.float64)
            assert torch.allclose(
                ours, torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-12
            ), (step, name)


@pytest.mark.mpi
def test_half_precision_exchange_stays_near(toy_runs):
    expected = golden("trainer_expected.json")["expected"]["lars_sep"][
        "no_initial_step_sample_weighted"
    ]
    gap = max(
        (torch.tensor(toy_runs["lars_sep_fp16_allreduce"]["after"][-1][name]) - torch.tensor(value))
        .abs()
        .max()
        for name, value in expected[-1].items()
        if "running" not in name
    )
    assert 1e-9 < gap < 1e-3


@pytest.mark.mpi
@pytest.mark.parametrize("case", ["lars_sep", "lars_all", "sgd"])
def test_validation_is_the_mean_over_samples(toy_runs, case):
    recorded = golden("nus_trainer_2rank.json")["cases"][case]
    result = toy_runs[case]["val"]
    assert result["top1"] == pytest.approx(100 * recorded["exact_val_accuracy"], rel=1e-12)
    # The recorded loss comes after the published script's extra step at the start, so it is near, not equal.
    assert result["loss"] == pytest.approx(recorded["exact_val_loss"], rel=2e-2)


@pytest.mark.mpi
def test_every_factorisation_of_a_batch_gives_the_same_update(mpirun, tmp_path):
    """16 samples as 1 x 4, 2 x 2 and 4 x 1 micro-batches of 4, with a short last step, BatchNorm and dropout."""
    ends = {}
    for ranks in (1, 2, 3, 4):
        if 4 % ranks:
            continue
        done = mpirun(ranks, RANKS / "factorisation.py", tmp_path / f"{ranks}.pth")
        assert done.returncode == 0, done.stderr
        ends[ranks] = torch.load(tmp_path / f"{ranks}.pth")
    for ranks in (2, 4):
        for name, value in ends[1]["parameters"].items():
            assert torch.allclose(ends[ranks]["parameters"][name], value, rtol=0, atol=1e-12), (
                ranks,
                name,
            )
        assert torch.allclose(ends[ranks]["totals"], ends[1]["totals"], rtol=1e-12)
    assert ends[1]["totals"][3] == 2 * 69


@pytest.mark.mpi
def test_synchronised_batch_norm_sees_one_batch(mpirun, tmp_path):
    """16 samples on 1 rank, or 8 each on 2, of which one has none in the short last step."""
    ends = []
    for ranks in (1, 2):
        done = mpirun(ranks, RANKS / "factorisation.py", tmp_path / "end.pth", "sync")
        assert done.returncode == 0, done.stderr
        ends.append(torch.load(tmp_path / "end.pth"))
    for kind in ("parameters", "buffers"):
        assert len(ends[0][kind]) >= 3
        for name, value in ends[0][kind].items():
            assert torch.allclose(ends[1][kind][name], value, rtol=0, atol=1e-12), name


@pytest.mark.mpi
def test_one_exchange_a_step(mpirun):
    done = mpirun(2, RANKS / "exchanges.py")
    assert done.returncode == 0, done.stderr
    assert "gradients.0 gradients.0 gradients.0" in done.stdout, done.stdout


def test_the_engine_needs_no_horovod_for_a_world_of_one():
    done = run(
        "python",
        "-c",
        "import sys, lars.engine; print('horovod' in sys.modules, 'mpi4py' in sys.modules)",
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.mpi
def test_half_precision_neither_overflows_nor_vanishes(mpirun):
    """Gradients of 6e4 on two ranks would sum to infinity, and 1e-7 is below what half precision resolves."""
    done = mpirun(2, RANKS / "half_precision.py", "6e4", "1e-7", "1e-12", "1e30")
    assert done.returncode == 0, done.stderr
    told = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("ERRORS")]
    assert len(told) == 4
    for errors in told:
        full, half = [[float(x) for x in errors[k::2]] for k in (0, 1)]
        assert all(e < 1e-6 for e in full), (
            "the first, and one that outgrows the scale 10,000 times"
        )
        assert all(1e-6 < e < 2**-10 for e in half)


@pytest.mark.mpi
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(mpirun):
    done = mpirun(2, RANKS / "guard.py")
    assert done.returncode == 0, done.stderr
    for where in ("gradient", "loss", "none"):
        expected = "taken True moved True momentum kept False"
        if where != "none":
            expected = "taken False moved False momentum kept True"
        for rank in (0, 1):
            assert f"{where}: rank {rank} step 0 taken True moved True" in done.stdout
            assert f"{where}: rank {rank} step 1 {expected}" in done.stdout
            assert f"{where}: rank {rank} step 2 taken True moved True" in done.stdout
    assert done.stdout.count("gradient: broken in 0.weight") == 2


def test_images_that_cannot_be_read_leave_a_mean_over_the_others():
    """A step of 5 samples of which 2 are left: the gradient is the mean over these two."""

    def learn(batches, samples):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradients = LocalGradients(model.parameters())
        learner = Learner(model, optimizer, gradients, Classification(), lr_at=lambda step: 0.1)
        learner.step(batches, 0, count=len(batches), samples=samples)
        return model.weight.detach()

    images, labels = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 2])
    nothing = (images[:0], labels[:0])
    both = learn([(images[:1], labels[:1]), (images[1:], labels[1:]), nothing], samples=5)
    assert torch.allclose(both, learn([(images, labels)], samples=2), rtol=1e-12)


class Zeros(LocalGradients):
    """Gradients that are always there, as those of several ranks are."""

    def zero(self) -> None:
        super().zero()
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)


def small_learner(kind=LocalGradients, **options) -> Learner:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = kind(model.parameters())
    task = Classification()
    return Learner(model, optimizer, gradients, task, lr_at=lambda step: 0.1, **options)


@pytest.mark.parametrize("kind", [LocalGradients, Zeros])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_step_without_a_readable_image_is_left_out_and_nothing_has_broken_down(amp, kind):
    learner = small_learner(kind, amp=amp)
    images, labels = 0.1 * torch.randn(2, 4), torch.tensor([0, 2])
    results = [
        learner.step([batch], step, count=1, samples=2)
        for step, batch in enumerate([(images[:0], labels[:0]), (images, labels)])
    ]
    assert not results[0].taken
    assert not results[0].nonfinite
    assert results[0].cause == "none of its images could be read"
    assert results[1].taken


def test_a_step_that_is_left_out_counts_in_no_mean():
    learner = small_learner()
    images, labels = torch.randn(2, 4), torch.tensor([0, 2])
    for factor in (1.0, float("inf")):
        result = learner.step([(images * factor, labels)], 0, count=1, samples=2)
    assert not result.taken
    assert result.nonfinite
    assert learner.metrics.totals.isfinite().all()
    assert count(learner.metrics.totals) == 2


def test_the_search_for_half_precisions_loss_scale_is_told_as_that():
    """The loss is finite; its gradient times 65536 is beyond half precision until the scale has come down."""
    learner = small_learner(amp="fp16")
    batch = [(300 * torch.randn(2, 4), torch.tensor([0, 2]))]
    results = [learner.step(batch, step, count=1, samples=2) for step in range(12)]
    assert [result.nonfinite for result in results] == [False] * 12
    assert results[0].cause == "fp16's loss scale was too large, and is 32768 now"
    assert results[-1].taken


class Drifted(World):
    """Three ranks, of which the last says something else than the others."""

    def all_gather_object(self, value, name):
        return [value, value, value | {"wd": 0.5} if isinstance(value, dict) else value + 1]


def test_a_rank_that_has_drifted_is_named():
    model = torch.nn.Linear(2, 2)
    check_weights_agree(World(), model)
    with pytest.raises(RuntimeError, match=r"ranks \[2\] differ from those of rank 0"):
        check_weights_agree(Drifted(), model)


def test_the_checksum_sees_every_bit_of_the_weights():
    told = []

    class Listener(World):
        def all_gather_object(self, value, name):
            told.append(value)
            return [value]

    model = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    check_weights_agree(Listener(), model)
    check_weights_agree(Listener(), model)
    with torch.no_grad():
        model.bias[0] = torch.nextafter(model.bias[0], torch.tensor(9.0))
    check_weights_agree(Listener(), model)
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_trainers_optimizers_walk_weights_and_gradients_alike(name, layout):
    """Fused kernels ignore strides; what they compute is compared with torch's plain loops."""
    config = Config(model="resnet18", base_op=name, base_lr=0.01, warmup_epochs=0.0)
    plan = make_plan(config, size=1, train_size=320)

    def learn(**options):
        learner = make_learner(
            config, plan, Classification(), build_model(config, 10), World(), torch.device("cpu")
        )
        learner.model.to(memory_format=layout)
        for group in learner.optimizer.param_groups:
            group.update({k: v for k, v in options.items() if k in group})
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        batches = [(images.contiguous(memory_format=layout), torch.arange(4))]
        learner.step(batches, 0, count=1, samples=4)
        return learner.model.state_dict()

    plain = learn(fused=False, foreach=False, path="loop")
    for key, value in learn().items():
        assert torch.allclose(value, plain[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize(
    ("said", "eps"),
    [
        ({}, 1e-5),
        ({"lars_form": "torchlars"}, 1e-8),
        ({"lars_form": "mlperf"}, 0.0),
        ({"lars_form": "mlperf", "epsilon": 1e-4}, 1e-4),
        ({"epsilon": 0.0}, 0.0),
    ],
)
def test_a_form_brings_its_own_eps_unless_one_is_said(said, eps):
    config = Config(model="resnet18", base_op="lars", **said)
    plan = make_plan(config, size=1, train_size=320)
    learner = make_learner(
        config, plan, Classification(), build_model(config, 10), World(), torch.device("cpu")
    )
    assert {group["eps"] for group in learner.optimizer.param_groups} == {eps}
