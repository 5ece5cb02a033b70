"""A branch from another run's checkpoint: what may change, and what is recorded."""

from __future__ import annotations

import pytest
import torch

from lars.config import Config, UsageError
from lars.config.plan import make_plan
from lars.optim import LARS, TVLARS
from lars.run.branch import branched, group_options, refuse_unfit_branch
from lars.run.resume import LoadedCheckpoint


def checkpoint_at(step: int, config: Config) -> LoadedCheckpoint:
    """The checkpoint of a run with these flags on one rank and 64 samples after a step."""
    plan = make_plan(config, size=1, train_size=64)
    rows = [{"split": "val", "epoch": 1, "step": plan.steps_per_epoch, "top1": 50.0}]
    state = {
        "progress": {"step": step, "history": rows, "reading": {"step": step, "loss": 1.0}},
        "said": {"plan": {"steps_per_epoch": plan.steps_per_epoch, "size": 1}},
        "same_run": {"effective_batch_size": plan.effective_batch_size},
    }
    return LoadedCheckpoint("old/checkpoint-2.pth.tar", state)


def test_a_branch_continues_at_the_same_step_and_records_what_changed():
    config = Config(batch_size=8, epochs=9)
    changed = {"epochs": (3, 9), "init": ("SHA-256 of a file", None)}
    plan = make_plan(config, size=1, train_size=64)
    progress = branched(checkpoint_at(19, config), plan, changed)
    assert progress.step == 19
    assert progress.branch == {
        "from": "old/checkpoint-2.pth.tar", "step": 19, "changed": {"epochs": [3, 9]},
    }  # fmt: skip


def test_a_branch_with_a_different_batch_size_continues_at_the_same_epoch():
    there, here = Config(batch_size=8), Config(batch_size=16)
    plan = make_plan(here, size=1, train_size=64)
    progress = branched(checkpoint_at(16, there), plan, {})
    assert progress.step == 8, "two epochs of four steps"
    assert progress.history[0]["step"] == 4
    assert progress.branch["changed"] == {"effective_batch_size": [8, 16]}
    assert progress.new_reading() == {}
    with pytest.raises(UsageError, match=r"--branch: .* within an epoch \(1 of 8 steps are done\)"):
        branched(checkpoint_at(17, there), plan, {})


@pytest.mark.parametrize("name", ["model", "small_stem", "projector", "base_op"])
def test_changes_that_do_not_fit_the_state_are_refused(name):
    loaded = checkpoint_at(8, Config(batch_size=8))
    with pytest.raises(UsageError, match=f"--branch: .* {name} = 'a', .* does not fit 'b'"):
        refuse_unfit_branch(loaded, {name: ("a", "b")})
    refuse_unfit_branch(loaded, {"base_lr": (0.1, 0.2)})


def test_branch_and_resume_exclude_each_other():
    with pytest.raises(UsageError, match="--branch and --resume x cannot be used together"):
        Config(branch="y", resume="x")


def test_a_change_that_the_rest_of_an_epoch_would_not_survive_is_refused():
    config = Config(batch_size=8)
    plan = make_plan(config, size=1, train_size=64)
    with pytest.raises(UsageError, match=r"within an epoch .* so ema_decay cannot change"):
        branched(checkpoint_at(17, config), plan, {"ema_decay": (None, 0.9)})
    branched(checkpoint_at(16, config), plan, {"ema_decay": (None, 0.9)})


def test_a_branch_has_the_options_of_its_own_flags():
    model = torch.nn.Linear(2, 2)
    old = LARS(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4)
    new = LARS(model.parameters(), lr=1.0, momentum=0.5, weight_decay=0.25)
    options = group_options(new)
    new.load_state_dict(old.state_dict())
    new.param_groups[0].update(options[0])
    assert (new.param_groups[0]["momentum"], new.param_groups[0]["weight_decay"]) == (0.5, 0.25)


def test_the_step_count_of_tvlars_stays_with_the_checkpoint():
    optimizer = TVLARS(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    assert "step" in optimizer.param_groups[0]
    assert not {"step", "params"} & group_options(optimizer)[0].keys()


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as the optimizers of schedulefree do."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["k"] = 0


def test_a_branch_keeps_what_an_imported_optimizer_counts_in_its_groups():
    model = torch.nn.Linear(2, 2)
    optimizer = Counting(model.parameters(), lr=0.5)
    options = group_options(optimizer)
    optimizer.param_groups[0] |= {"k": 7, "lr": 0.1}
    optimizer.param_groups[0].update(options[0])
    assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["lr"]) == (7, 0.5)
