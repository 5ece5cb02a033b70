"""Optimizers by import path: the checks before a run, the two modes, and an exact resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from data.sources.noise import Synthetic
from lars.comm.world import World
from lars.config import Config, UsageError, parse
from lars.config.plan import make_plan
from lars.engine import train
from lars.learner.build import make_learner
from lars.learner.classification import Classification
from lars.learner.imported import check_optimizer, make_imported

MODULE = '''
import torch
from torch.optim import SGD, Optimizer

class Forgetful(SGD):
    """Counts its steps outside of its state."""
    count = 0
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
        super().step()

class Opaque(SGD):
    """Keeps an object in its state."""
    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["made of"] = type("Thing", (), {})

class Fixed(Optimizer):
    """Has no learning rate."""
    def __init__(self, params):
        super().__init__(params, {})
    def step(self, closure=None):
        pass

class OwnRate(SGD):
    """Has its own learning rate for groups without weight decay."""
    def __init__(self, params, lr, bias_lr=0.5):
        super().__init__(params, lr)
        for group in self.param_groups:
            if group["weight_decay"] == 0:
                group["lr"] = bias_lr

class TwoModes(Optimizer):
    """Evaluates the mean of all weights so far. The way back from it rounds."""
    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "training": False, "n": 0})
    def _switch(self, training):
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "other" in self.state[p]:
                        change = (self.state[p]["mean"] - self.state[p]["other"]) / 3
                        p.data.add_(change, alpha=-1 if training else 1)
                group["training"] = training
    def train(self):
        self._switch(True)
    def eval(self):
        self._switch(False)
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["training"], "step in the wrong mode"
            group["n"] += 1
            for p in group["params"]:
                state = self.state[p]
                p.add_(p.grad, alpha=-group["lr"])
                mean = state.setdefault("mean", p.clone())
                mean.lerp_(p, 1 / group["n"])
                state["other"] = p.clone()

not_a_class = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own_optimizers.py").write_text(MODULE)
    (tmp_path / "modules" / "broken_optimizers.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return "own_optimizers"


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        (
            "no_such_module:X",
            (),
            ["the module no_such_module cannot be imported", "install the package"],
        ),
        ("broken_optimizers:X", (), ["No module named 'no_such_package'"]),
        (":X", (), ["write package.module:Name"]),
        ("torch.optim:Adm", (), ["has no Adm", "did you mean torch.optim:Adam?"]),
        ("own_optimizers:not_a_class", (), ["is not a class derived from torch.optim.Optimizer"]),
        ("torch.nn:Linear", (), ["is not a class derived from torch.optim.Optimizer"]),
        ("torch.optim:LBFGS", (), ["closure"]),
        ("torch.optim:Muon", (), ["cannot be built", "Muon only supports 2D parameters"]),
        ("torch.optim:SparseAdam", (), ["failed on a small", "does not support dense gradients"]),
        ("torch.optim:NAdam", ("nope=1",), ["--optimizer-options nope", "momentum_decay"]),
        ("torch.optim:NAdam", ("lr=1",), ["--optimizer-options lr: use --base-lr"]),
        ("torch.optim:NAdam", ("betas=(0.9, 2)",), ["Invalid beta", "--optimizer-options"]),
        ("own_optimizers:Forgetful", (), ["does not continue exactly from its saved state"]),
        ("own_optimizers:Opaque", (), ["neither tensors nor plain values"]),
        ("own_optimizers:Fixed", (), ["no 'lr' in its parameter groups"]),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_with_its_cause(module, path, options, words):
    with pytest.raises(UsageError) as error:
        check_optimizer(Config(base_op=path, optimizer_options=options))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("path", ["torch.optim:NAdam", "torch.optim:RAdam", "lars.optim.lars:LARS"])
def test_other_optimizers_pass_the_trial(path):
    before = torch.get_rng_state()
    check_optimizer(Config(base_op=path))
    assert torch.equal(torch.get_rng_state(), before), "the trial must not change the random state"


def test_the_flags_reach_an_imported_optimizer():
    config = parse(
        ["--optimizer", "torch.optim:SGD", "--momentum", "0.7", "--wd", "0.01",
         "--optimizer-options", "dampening=0.5", "nesterov=False"],
        Config, description="",
    )[0]  # fmt: skip
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weights, others = make_imported(config, model, 0.3).param_groups
    assert (weights["lr"], weights["momentum"], weights["dampening"]) == (0.3, 0.7, 0.5)
    assert (weights["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert (weights["use_muon"], others["use_muon"]) == (True, False)


def learner_with(path: str, **flags):
    config = Config(base_op=path, base_lr=0.1, lr_schedule="none", no_cuda=True, **flags)
    plan = make_plan(config, size=1, train_size=320)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    task = Classification(channels_last=False)
    return make_learner(config, plan, task, model, World(), torch.device("cpu"))


def step(learner, number=0) -> None:
    generator = torch.Generator().manual_seed(number)
    batch = (torch.randn(4, 3, 2, 2, generator=generator), torch.tensor([0, 1, 2, 0]))
    learner.step([batch], number, count=1, samples=4)


def test_a_group_with_its_own_rate_keeps_its_ratio(module):
    learner = learner_with(f"{module}:OwnRate")
    learner.lr_at = lambda step: 0.2
    step(learner)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.2, 1.0]


def test_an_evaluation_uses_other_weights_and_returns_the_same_bits(module):
    learner = learner_with(f"{module}:TwoModes")
    for number in range(3):
        step(learner, number)
    weight = learner.model[1].weight
    before = weight.detach().clone()
    with learner.evaluating():
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    step(learner, 3)  # fails in the wrong mode


def test_a_run_resumes_exactly_and_exports_the_weights_of_the_evaluation(module, tmp_path):
    """The interrupted run ends after a validation, which changes the weights and must restore their bits."""
    from safetensors.torch import load_file

    def run(name: str, **flags) -> dict[str, torch.Tensor]:
        source = Synthetic(image_size=28, num_classes=3, train_size=64, val_size=16)
        config = Config(
            model="small_cnn", base_op=f"{module}:TwoModes", base_lr=0.05, lr_schedule="none", batch_size=16, epochs=2,
            log_dir=str(tmp_path), run_name=name, no_cuda=True, workers=0, **flags,
        )  # fmt: skip
        train(config, source)
        return load_file(tmp_path / name / "model.safetensors")

    straight = run("straight")
    run("halves", max_steps=4)
    resumed = run("halves")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    state = torch.load(tmp_path / "straight" / "checkpoint-2.pth.tar", weights_only=True)
    trained = state["learner"]["model"]
    assert not torch.equal(straight["0.weight"], trained["0.weight"])
