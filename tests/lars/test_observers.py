"""Custom observers: --observer, their errors, and the examples of the documentation."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch

from conftest import ROOT
from lars.config import Config, parse
from lars.errors import UsageError
from lars.learner.classification import Classification
from lars.learner.learner import StepResult
from lars.observe import Observer, Training
from lars.observe.own import observers_at
from lars.run.progress import Progress

TAKEN = StepResult(taken=True, stop=False, save=False)


class Counter(Observer):
    """Fails in the method that `fails` names."""

    fails = ""

    def __init__(self, training):
        super().__init__(training)
        self.calls = []

    def called(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise OSError("no network")

    def start(self):
        self.called("start")

    def step(self, result):
        self.called("step")

    def validated(self):
        self.called("validated")

    def saved(self):
        self.called("saved")

    def end(self):
        self.called("end")


@pytest.fixture
def module(monkeypatch):
    found = types.ModuleType("own_module")
    found.Counter, found.number = Counter, 3
    monkeypatch.setitem(sys.modules, "own_module", found)


def training_of(loaded=None, folder=None, **progress):
    learner = types.SimpleNamespace(
        task=Classification(), networks=lambda: {"val": None}, device=torch.device("cpu")
    )
    run = types.SimpleNamespace(folder=folder, plan=types.SimpleNamespace(size=2))
    return Training(Config(), None, run, learner, Progress(**progress), loaded)


def called(training):
    """The observer after all its methods have been called."""
    (kind,) = observers_at(["own_module:Counter"])
    guarded = kind(training)
    member = guarded.member
    guarded.start()
    guarded.step(TAKEN)
    guarded.validated()
    guarded.saved()
    guarded.end()
    return member


def test_the_flag_may_be_repeated_and_is_checked_early(module):
    words = ["--observer", "a:B", "--base-lr", "1", "--observer", "c:D", "e:F"]
    (config,) = parse(words, Config, description="")
    assert config.observer == ("a:B", "c:D", "e:F")
    assert parse([], Config, description="")[0].observer == ()
    for place, words in (
        ("own_module", "write package.module:Name"),
        ("no_such_module:A", r"the module no_such_module cannot be imported \(ModuleNotFoundError"),
        ("own_module:Countr", "did you mean own_module:Counter"),
        ("own_module:number", "not a class derived from lars.observe.Observer"),
    ):
        with pytest.raises(UsageError, match=f"--observer {place}.*{words}"):
            observers_at([place])


def test_a_custom_observer_sees_the_whole_run(module):
    assert called(training_of()).calls == ["start", "step", "validated", "saved", "end"]


def test_an_error_switches_an_observer_off_and_is_reported(module, monkeypatch, capsys):
    monkeypatch.setattr(Counter, "fails", "validated")
    training = training_of(step=7)
    assert called(training).calls == ["start", "step", "validated"]
    printed = capsys.readouterr()
    assert "--observer own_module:Counter failed and is switched off" in printed.out
    assert "Traceback" in printed.err
    (note,) = training.progress.notes
    assert note["step"] == 7
    assert "no network" in note["text"]


def test_an_error_at_the_start_ends_a_new_run_but_not_a_resumed_one(module, monkeypatch):
    monkeypatch.setattr(Counter, "fails", "start")
    with pytest.raises(UsageError, match=r"--observer own_module:Counter failed at its start \(OS"):
        called(training_of())
    assert called(training_of(loaded="a checkpoint")).calls == ["start"]


class Recorder(types.ModuleType):
    """A module that records the calls of all its functions and of what they return."""

    def __init__(self, name, calls):
        super().__init__(name)
        self.calls = calls

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            found = Recorder(name, self.calls)
            found.info = types.SimpleNamespace(run_id="run-1")
            return found

        return call


def examples():
    """The complete modules in the documentation, by the module that they import."""
    text = (ROOT / "docs/observers.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return {
        found[1]: block
        for block in blocks
        if (found := re.search(r"^import (wandb|mlflow)$", block, re.M))
    }


@pytest.mark.parametrize(("package", "name"), [("wandb", "Wandb"), ("mlflow", "Mlflow")])
def test_the_examples_of_the_documentation_send_every_value(package, name, tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, package, Recorder(package, calls))
    (tmp_path / f"{package}_observer.py").write_text(examples()[package])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, f"{package}_observer", raising=False)
    (kind,) = observers_at([f"{package}_observer:{name}"])

    training = training_of(folder=tmp_path, step=2)
    progress = training.progress
    for _ in range(2):  # two jobs of a run
        observer = kind(training)
        observer.start()
        progress.reading = {"loss": 1.5, "lr": 0.1, "step": progress.step}
        observer.step(TAKEN)
        progress.step += 1
        observer.step(TAKEN)
        progress.history.append(
            {"split": "val", "step": progress.step, "loss": 1.0, "top1": 50.0, "top5": 90.0}
        )
        observer.validated()
    observer.end()
    assert not progress.notes, "no error"
    logged = [(args[0], kw["step"]) for call, args, kw in calls if call in ("log", "log_metrics")]
    validation = {"val/loss": 1.0, "val/top1": 50.0, "val/top5": 90.0}
    assert logged == [
        ({"train/loss": 1.5, "train/lr": 0.1}, 2), (validation, 3),
        ({"train/loss": 1.5, "train/lr": 0.1}, 3), (validation, 4),
    ]  # fmt: skip
    names = [call for call, _, _ in calls]
    assert names[-1] in ("finish", "end_run")
    if package == "wandb":
        ids = {kw["id"] for call, _, kw in calls if call == "init"}
        assert len(ids) == 1, "both jobs belong to one run"
    else:
        assert names.count("log_params") == 1
        assert [kw for call, _, kw in calls if call == "start_run"][1] == {"run_id": "run-1"}
    count = len(calls)
    observer.step(StepResult(taken=True, stop=True, save=False))
    assert len(calls) == count + 1, "a stop ends the record of the job"
