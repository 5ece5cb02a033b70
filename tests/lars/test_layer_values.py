"""Per-layer values: what is measured, where it is written, and which layer a divergence is blamed on."""

from __future__ import annotations

import sys
import types

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from conftest import ROOT, run
from lars.comm.gradients import make_gradients
from lars.comm.world import World
from lars.config import Config
from lars.errors import NonFiniteError, UsageError
from lars.learner.classification import Classification
from lars.learner.learner import Learner, StepResult
from lars.names import OPTIMIZERS
from lars.observe import Layers, Training
from lars.observe.layer_file import QUANTITIES, LayerFile, LayerHistory
from lars.observe.layer_range import first_departure
from lars.observe.layers import LayerProbe, read
from lars.optim import create_optimizer
from lars.run.progress import Progress

LR, DECAY = 0.1, 0.01
LAYERS = ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3))


def learner_of(optimizer: str = "lars", **options) -> Learner:
    model = network()
    made = create_optimizer(optimizer, model, lr=LR, weight_decay=DECAY, **options)
    gradients = make_gradients(model.parameters(), World())
    return Learner(model, made, gradients, Classification(), lr_at=lambda step: LR)


def take_steps(learner: Learner, first: int, last: int) -> None:
    """Take the steps from `first` to `last`, counted from 1. The batch of a step depends only on its number."""
    for step in range(first - 1, last):
        torch.manual_seed(step)
        batch = (torch.randn(6, 4), torch.randint(3, (6,)))
        assert learner.step([batch], step, count=1, samples=6).taken


def watched(optimizer: str, **options) -> tuple[LayerProbe, Learner]:
    learner = learner_of(optimizer, **options)
    probe = LayerProbe(learner.optimizer, learner.model)
    probe.watch(lambda: True)
    return probe, learner


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_reading_holds_the_norms_of_the_step(optimizer):
    probe, learner = watched(optimizer)
    take_steps(learner, 1, 2)
    before = [p.detach().clone() for p in learner.model.parameters()]
    take_steps(learner, 3, 3)
    values = dict(zip(QUANTITIES, probe.take(), strict=True))
    assert probe.take() is None, "each reading is taken once"
    assert probe.layers == LAYERS
    for i, (w, p) in enumerate(zip(before, learner.model.parameters(), strict=True)):
        p, g = p.detach(), p.grad
        assert values["weight_norm"][i] == pytest.approx(w.norm().item(), rel=1e-5)
        assert values["grad_norm"][i] == pytest.approx(g.norm().item(), rel=1e-5)
        update = ((p - w).norm() / w.norm()).item()
        assert values["update_ratio"][i] == pytest.approx(update, rel=1e-5)
        adapted = probe.kinds[i] == "adapted"
        assert adapted == (LAYERS[i] in ("0.weight", "2.weight"))
        if not adapted or optimizer not in ("lars", "lamb", "tvlars"):
            assert values["trust_ratio"][i] == 1
        elif optimizer == "lars":
            ratio = 1e-3 * w.norm() / (g.norm() + DECAY * w.norm() + 1e-5)
            assert values["trust_ratio"][i] == pytest.approx(ratio.item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["lars", "lamb", "tvlars"])
def test_the_implementations_give_the_same_readings(optimizer):
    found = []
    for path in ("loop", "fused", "foreach"):
        probe, learner = watched(optimizer, path=path)
        take_steps(learner, 1, 3)
        found.append(probe.take())
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_readings_do_not_change_the_weights(optimizer):
    _, observed = watched(optimizer)
    alone = learner_of(optimizer)
    for learner in (observed, alone):
        take_steps(learner, 1, 4)
    pairs = zip(observed.model.parameters(), alone.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_parameter_without_a_gradient_has_no_values():
    probe, learner = watched("sgd")
    learner.model[2].requires_grad_(False)
    take_steps(learner, 1, 1)
    values = probe.take()
    assert np.isnan(values[:, 3:]).all()
    assert np.isfinite(values[:, :2]).all()


def test_the_ratio_of_an_unknown_optimizer_is_unknown():
    class Own(torch.optim.SGD):
        pass

    model = network()
    optimizer = Own(model.parameters(), lr=LR)
    probe = LayerProbe(optimizer, model)
    probe.watch(lambda: True)
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    assert np.isnan(probe.take()[QUANTITIES.index("trust_ratio")]).all()


# ------------------------------------------------------------------------------------------------------------ a run


def job(folder, *, every: int = 2, step: int = 0) -> tuple[Layers, Learner, Training]:
    """A job with the observer alone. It starts at `step`, whose weights come from the same steps without observer."""
    learner = learner_of()
    take_steps(learner, 1, step)
    config = Config(layers_every=every)
    training = Training(
        config, None, types.SimpleNamespace(folder=folder), learner, Progress(step=step)
    )
    observer = Layers(training)
    training.curves.restart(step + 1)
    observer.start()
    return observer, learner, training


def train_to(observer: Layers, learner: Learner, training: Training, last: int) -> None:
    for step in range(training.progress.step + 1, last + 1):
        take_steps(learner, step, step)
        training.progress.step = step
        observer.step(StepResult(taken=True, stop=False, save=False))


def same(one: LayerHistory, two: LayerHistory) -> bool:
    same_names = one.layers == two.layers and one.kinds == two.kinds
    return (
        same_names
        and np.array_equal(one.steps, two.steps)
        and np.array_equal(one.values, two.values, equal_nan=True)
    )


def drawn(folder) -> tuple[dict, dict]:
    """The steps of each of TensorBoard's curves and histograms."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    board.Reload()
    tags = board.Tags()
    curves = {tag: [e.step for e in board.Scalars(tag)] for tag in tags["scalars"]}
    return curves, {tag: [e.step for e in board.Histograms(tag)] for tag in tags["histograms"]}


def test_a_run_writes_its_readings_to_its_folder_and_to_tensorboard(tmp_path):
    observer, *rest = job(tmp_path, every=3)
    train_to(observer, *rest, 31)
    during = read(tmp_path)
    assert during.steps.tolist() == [1, 2, *range(3, 31, 3)]
    observer.end()
    after = read(tmp_path)
    assert same(during, after)
    assert not (tmp_path / "layers.arrow").exists()
    assert after["trust_ratio"].shape == (12, 5)
    table = pyarrow.parquet.read_table(tmp_path / "layers.parquet").to_pylist()
    assert table[5]["step"] == 2
    assert (table[5]["layer"], table[5]["kind"]) == ("0.weight", "adapted")
    assert table[5]["trust_ratio"] == after["trust_ratio"][1, 0]
    curves, histograms = drawn(tmp_path)
    names = {f"layers/{q}/{s}" for q in QUANTITIES for s in ("min", "median", "max")}
    assert set(curves) == names
    assert all(steps == after.steps.tolist() for steps in curves.values())
    assert histograms == {f"layers/{name}": [30] for name in QUANTITIES}


def test_a_resumed_run_has_neither_gaps_nor_doubles(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    train_to(*job(whole), 10)
    for killed_at in range(4, 9):  # the checkpoint is that of step 4
        folder = tmp_path / f"{killed_at}"
        folder.mkdir()
        train_to(*job(folder), killed_at)
        with open(folder / "layers.arrow", "r+b") as file:  # half a reading
            end = file.seek(0, 2)
            file.truncate(end - 10 if killed_at % 2 else end)
        parts = job(folder, step=4)
        train_to(*parts, 10)
        if killed_at == 5:  # half of the reading of step 4 is lost, which no kill alone does
            assert read(folder).steps.tolist() == [1, 2, 6, 8, 10]
            continue
        assert same(read(folder), read(whole))
        curves, _ = drawn(folder)
        assert all(steps == [1, 2, 4, 6, 8, 10] for steps in curves.values())


def test_a_finished_run_can_be_continued(tmp_path):
    observer, *rest = job(tmp_path)
    train_to(observer, *rest, 4)
    observer.end()
    observer, *rest = job(tmp_path, step=4)
    assert not (tmp_path / "layers.parquet").exists()
    train_to(observer, *rest, 6)
    observer.end()
    assert read(tmp_path).steps.tolist() == [1, 2, 4, 6]


def test_the_points_of_the_checkpoint_are_drawn_again_if_tensorboard_discards_them(tmp_path):
    train_to(*job(tmp_path), 4)
    observer, _, training = job(tmp_path, step=4)
    training.curves.restart(4)
    observer.start()
    curves, _ = drawn(tmp_path)
    assert all(steps == [1, 2, 4] for steps in curves.values())


def test_values_of_another_network_are_replaced(tmp_path, capsys):
    file = LayerFile(tmp_path, ["other"], ["adapted"])
    file.restart(0)
    file.add(1, np.ones((4, 1), np.float32))
    train_to(*job(tmp_path, step=2), 4)
    assert read(tmp_path).steps.tolist() == [4]
    assert "holds values of other layers" in capsys.readouterr().out


def test_a_damaged_parquet_file_is_replaced(tmp_path, capsys):
    (tmp_path / "layers.parquet").write_bytes(b"PAR1 nothing")
    train_to(*job(tmp_path), 2)
    assert read(tmp_path).steps.tolist() == [1, 2]
    assert "layers.parquet cannot be read and is replaced" in capsys.readouterr().out


def test_a_full_disk_loses_no_reading(tmp_path, monkeypatch, capsys):
    observer, *rest = job(tmp_path)
    train_to(observer, *rest, 2)
    path = observer.file.file.path
    observer.file.file.path = tmp_path / "missing" / "layers.arrow"
    train_to(observer, *rest, 6)
    observer.end()
    assert "new records are kept in memory" in capsys.readouterr().out
    assert read(tmp_path).steps.tolist() == [1, 2], "the growing file stays"
    observer.file.file.path = path
    observer.end()
    assert read(tmp_path).steps.tolist() == [1, 2, 4, 6]


def test_zero_switches_the_readings_off(tmp_path):
    observer, *rest = job(tmp_path, every=0)
    train_to(observer, *rest, 4)
    observer.end()
    assert not list(tmp_path.glob("layers*"))
    with pytest.raises(FileNotFoundError, match=r"holds no values of layers.*--layers-every"):
        read(tmp_path)
    with pytest.raises(UsageError, match="--layers-every must be at least 0, not -1"):
        Config(layers_every=-1)


# ------------------------------------------------------------------------------------------------------- divergence


def calm(readings: int = 20) -> tuple[LayerHistory, np.ndarray, np.ndarray]:
    """Values of three layers that move by at most a factor of 2; the last is a bias."""
    random = np.random.default_rng(0)
    values = random.uniform(1, 2, (readings, 4, 3)).astype(np.float32)
    steps = np.array([1, *range(10, 10 * readings, 10)])
    rates = np.linspace(0.01, 1, readings)
    values[:, 3] *= rates[:, None]
    history = LayerHistory(steps, ["a.weight", "b.weight", "b.bias"], ["adapted"] * 3, values)
    return history, rates, np.array([True, True, False])


def test_a_calm_run_and_its_warm_up_have_no_departure():
    assert first_departure(*calm()) is None
    for readings in range(1, 8):
        assert first_departure(*calm(readings)) is None


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_first_layer_out_of_its_range_is_named(quantity):
    history, rates, matrices = calm()
    place = QUANTITIES.index(quantity)
    history.values[14:, place, 1] *= 90
    history.values[15:, :, 0] *= 1e4  # the others follow
    found = first_departure(history, rates, matrices)
    assert (found.layer, found.quantity, found.step) == ("b.weight", quantity, 140)
    assert found.value == history.values[14, place, 1]
    assert 40 < found.value / found.usual < 400
    assert f"{found.value:.3g} at step 140" in str(found)


def test_a_gradient_is_named_only_if_nothing_else_is_out_of_range():
    history, rates, matrices = calm()
    history.values[15:, 1, 0] *= 1e6
    history.values[15:, 2, 1] *= 20
    found = first_departure(history, rates, matrices)
    assert (found.layer, found.quantity) == ("b.weight", "trust_ratio")


def test_a_departure_that_ended_is_forgotten():
    history, rates, matrices = calm()
    history.values[8, 2, 0] *= 100
    history.values[18:, 2, 1] *= 100
    assert first_departure(history, rates, matrices).layer == "b.weight"
    history.values[18:, 2, 1] /= 100
    assert first_departure(history, rates, matrices) is None


def test_the_first_readings_are_compared_with_the_other_layers():
    history, rates, matrices = calm(2)
    history.values[:, 3, 2] = 1e3  # a bias that began at 0
    assert first_departure(history, rates, matrices) is None
    matrices = np.array([True] * 3)
    found = first_departure(history, rates, matrices)
    assert (found.layer, found.step, found.is_early) == ("b.bias", 1, True)
    history.steps[0] = 5  # a window of later readings
    assert first_departure(history, rates, matrices) is None


@pytest.mark.filterwarnings("error")
def test_a_warm_up_from_zero_does_not_hide_a_large_update():
    history, rates, matrices = calm(10)
    rates[0] = history.values[0, 3] = 0.0  # the update per unit of learning rate is not known
    history.values[:, :, 2] = np.nan  # a layer without a gradient
    assert first_departure(history, rates, matrices) is None
    history.values[9, 3, 1] *= 100
    found = first_departure(history, rates, matrices)
    assert (found.layer, found.quantity) == ("b.weight", "update_ratio")


@pytest.mark.parametrize(("begins", "blamed"), [(0, "at step 3; the median"), (12, "at step 13")])
def test_a_run_with_100_times_the_rate_in_one_layer_is_explained(tmp_path, begins, blamed):
    """The layer has that rate from the first step on, or only later."""
    done = run(sys.executable, ROOT / "tests" / "ranks" / "one_layer.py", str(begins), tmp_path)
    assert done.returncode == NonFiniteError.exit_code, done.stderr
    warnings = [line for line in done.stdout.splitlines() if "left its range is" in line]
    assert len(warnings) == 2, "one for the loss, and one for the first skipped step"
    assert "the loss is" in warnings[0]
    assert "before the skipped step" in warnings[1]
    for warning in warnings:
        assert "is 6.weight: relative update" in warning, warning
        assert blamed in warning, warning
    steps = read(tmp_path / "run").steps.tolist()
    assert steps == list(range(1, steps[-1] + 1))
