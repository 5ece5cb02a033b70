"""The scaling model: closed forms, monotony, published points, tables and figures, and a small calibration."""

from __future__ import annotations

import json
import math
import sys
from statistics import NormalDist

import pytest

from benchmarks.scaling import __main__ as program
from benchmarks.scaling import machine as machines
from benchmarks.scaling import presets, published
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.model import (
    FREE,
    Cores,
    Cost,
    Link,
    allreduce,
    buckets,
    expected_maximum,
    hierarchical,
    interpolate,
    overlap,
    ring,
    tree,
)
from benchmarks.scaling.predict import Job, limits, predict, training
from conftest import ranks_of
from lars.errors import UsageError

SLOW = Link(latency=1e-3, bandwidth=1e8)


def small(**changes: object) -> Machine:
    """A machine whose step takes 1 + 2 seconds for 10 images."""
    made = Machine(
        "small", ((10, 1.0),), ((10, 2.0),), 0.0, gradients=(1e8, 1e8), ready=(0.5, 1.0), bucket=1e8,
        network=SLOW, per_node=1, largest_batch=10,
    )  # fmt: skip
    return made.replace(**changes)


# ------------------------------------------------------------------------------------ collectives


def test_ring_and_tree_have_their_closed_forms():
    assert ring(4, 8e8, SLOW).alone == pytest.approx(6e-3 + 1.5 * 8)
    assert tree(8, 1e8, SLOW).alone == pytest.approx(6e-3 + 2)
    assert ring(1, 1e8, SLOW).alone == tree(1, 1e8, SLOW).alone == 0
    assert allreduce(1, 1e8, SLOW) == Cost(0, 0, 0)
    # A ring needs fewer bytes, and a tree fewer messages.
    assert allreduce(64, 1e9, SLOW) == ring(64, 1e9, SLOW)
    assert allreduce(64, 10, SLOW) == tree(64, 10, SLOW)
    assert allreduce(64, 10, SLOW, "ring") == ring(64, 10, SLOW)


def test_two_levels_agree_with_one_where_they_must():
    inside = Link(1e-6, 1e9)
    assert hierarchical(4, 1, 1e8, inside, SLOW).alone == pytest.approx(
        allreduce(4, 1e8, SLOW).alone
    )
    assert hierarchical(1, 4, 1e8, inside, SLOW).alone == pytest.approx(ring(4, 1e8, inside).alone)
    both = hierarchical(2, 4, 1e8, inside, SLOW).alone
    assert both == pytest.approx(6e-6 + 1.5 * 0.1 + ring(2, 1e8, SLOW).alone)


def test_latencies_of_waiting_collectives_overlap():
    cost = ring(2, 1e8, SLOW._replace(in_flight=2))
    assert cost.alone - cost.queued == pytest.approx(1e-3)
    ends = overlap(0.0, [1, 1, 1], [cost] * 3)
    assert ends == pytest.approx(3 * cost.queued + 1e-3)


# ------------------------------------------------------------------------------------------ overlap


def test_one_bucket_is_never_hidden():
    assert overlap(2.0, [1.0], [Cost(0.5, 0.5, 0.0)]) == 2.5


def test_buckets_are_sent_one_after_the_other_while_backward_runs():
    half = Cost(0.5, 0.5, 0.0)
    assert overlap(2.0, [0.5, 1.0], [half, half]) == 2.5
    long = Cost(3.0, 3.0, 0.0)
    assert overlap(2.0, [0.5, 1.0], [long, half]) == 4.5
    assert overlap(2.0, [0.5, 1.0], [Cost(0, 0, 0)] * 2) == 2.0


def test_on_a_cpu_the_exchange_takes_time_from_backward():
    busy = Cost(1.0, 1.0, 1.0)  # needs a whole core
    assert overlap(2.0, [0.5], [busy], cores=Cores(2)) == 2.0
    assert overlap(2.0, [0.5], [busy], cores=Cores(1)) == pytest.approx(3.0)
    # All work is done, whatever the order: 2 s of backward and 1 s of exchange on half a core.
    assert overlap(2.0, [0.5], [busy], cores=Cores(2, ranks=4)) == pytest.approx(6.0)


def test_buckets_are_those_of_the_trainer():
    import torch

    from lars.comm.gradients import _groups_of

    sizes = [300, 200, 900, 100, 100, 2000, 8]
    parameters = [torch.nn.Parameter(torch.zeros(size // 4)) for size in sizes]
    groups = [sum(4 * p.numel() for p in group) for group in _groups_of(parameters, 1000)]
    held, complete = buckets(sizes, [0.1, 0.3, 0.4, 0.6, 0.7, 0.9, 1.0], 1000)
    assert held == groups
    assert complete == [0.3, 0.6, 0.7, 0.9, 1.0]


# ---------------------------------------------------------------------------------------- statistics


def test_the_expected_maximum_of_a_sample():
    sample = [NormalDist().inv_cdf((i + 0.5) / 4000) for i in range(4000)]
    assert expected_maximum(sample, 1) == pytest.approx(0, abs=1e-3)
    assert expected_maximum(sample, 2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-2)
    assert expected_maximum(sample, 10) == pytest.approx(1.5388, rel=1e-2)
    assert expected_maximum([3.0], 5) == 3.0


def test_interpolation_goes_through_its_points():
    points = [(2, 1.0), (4, 3.0), (8, 4.0)]
    assert [interpolate(x, points) for x in (1, 2, 3, 4, 6, 12)] == [0.0, 1.0, 2.0, 3.0, 3.5, 5.0]
    assert interpolate(5, [(10, 1.0)]) == 0.5


# --------------------------------------------------------------------------------------- predictions


def test_one_rank_only_computes():
    step = predict(small(), Job(1, 1, 10))
    assert step.step == pytest.approx(3.0)
    assert step.exposed == step.waiting == step.statistics == 0


def test_a_network_without_cost_scales_perfectly():
    machine = small(network=FREE, inside=FREE)
    assert predict(machine, Job(8, 2, 160)).rate == pytest.approx(
        16 * predict(machine, Job(1, 1, 10)).rate
    )


def test_a_step_of_two_hosts():
    """The first bucket is sent at 2 s and takes 1.002 s, the second at 3.002 s."""
    step = predict(small(), Job(2, 1, 20))
    assert step.step == pytest.approx(3.002 + 1.002)
    assert step.exposed == pytest.approx(1.004)


def test_a_faster_network_never_hurts():
    steps = [
        predict(small(network=Link(1e-3, bandwidth)), Job(4, 1, 40)).step
        for bandwidth in (1e6, 1e7, 1e8, 1e9, math.inf)
    ]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) > 3
    later = [
        predict(small(network=Link(latency, 1e8)), Job(4, 1, 40)).step for latency in (0, 1e-3, 1)
    ]
    assert later == sorted(later)


def test_large_batches_are_accumulated():
    step = predict(small(network=FREE), Job(1, 1, 25))
    assert step.forward_backward == pytest.approx(7.5)


def test_slow_input_limits_a_step():
    machine = small(input_rate=2.0)
    step = predict(machine, Job(1, 1, 10))
    assert (step.step, step.waiting) == (pytest.approx(5.0), pytest.approx(2.0))
    assert limits(machine, step)[0].name == "loading of images"
    shared = predict(
        machine.replace(network=FREE), Job(1, 2, 20)
    )  # both ranks of a host share its loaders
    assert shared.step == pytest.approx(10.0)


def test_ranks_that_share_a_core_take_longer():
    step = predict(small(cores=2.0, network=FREE), Job(1, 4, 40))
    assert step.step == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("changes", "job", "name"),
    [
        ({}, Job(4, 1, 40), "bandwidth of the network"),
        ({"network": Link(1.0, 1e12)}, Job(4, 1, 40), "latency of the network"),
        ({"spread": (0.5, 1.5), "network": FREE}, Job(4, 1, 40), "slow ranks"),
        ({"cores": 1.0, "network": FREE}, Job(1, 2, 20), "CPU cores shared by ranks"),
        ({"forward": ((0, 1.0), (10, 1.0)), "network": FREE}, Job(2, 1, 2), "small batch per rank"),
    ],
)
def test_the_next_bottleneck_is_named(changes, job, name):
    machine = small(**changes)
    assert limits(machine, predict(machine, job))[0].name == name


def test_statistics_over_ranks_cost_two_exchanges_per_layer():
    machine = small(inside=Link(1e-2, 1e12), norms=50)
    alone, shared = (predict(machine, Job(1, 2, 20, bn_ranks)) for bn_ranks in (1, 2))
    assert shared.step - alone.step == pytest.approx(2 * 50 * 2e-2)
    assert any(limit.name.startswith("BatchNorm") for limit in limits(machine, shared))


def test_a_run_has_validations_checkpoints_and_a_start():
    machine = small(largest_batch=50_000, start=60.0, checkpoint=7.0, validation_fixed=3.0)
    step = predict(machine, Job(1, 1, 10))
    run = training(machine, step, epochs=4, images=100, validate_every=2)
    assert run.epoch == pytest.approx(30)
    assert run.validation == pytest.approx(5003)
    assert 60 * run.minutes == pytest.approx(60 + 4 * 30 + 2 * (5003 + 7))
    assert run.gpu_hours == pytest.approx(run.minutes / 60)


# -------------------------------------------------------------------------------- presets, published


def test_the_blocks_of_resnet50_have_all_its_parameters():
    from torchvision.models import resnet50

    gradients, ready = presets.resnet50()
    assert sum(gradients) == 4 * sum(p.numel() for p in resnet50().parameters())
    assert list(ready) == sorted(ready)
    assert ready[-1] == 1.0


def test_a_preset_has_the_published_speed_on_one_host():
    for point in published.points():
        if point.gpus == 8 and point.round in ("v0.7", "v2.1", "v4.0"):
            assert published.compare(point).rate_error == pytest.approx(0, abs=2e-3)


def test_the_fastest_batch_size_grows_with_the_gpus():
    machine = presets.machine("h100", presets.NETWORKS["ib-ndr-8"])
    fastest = [published.choices(machine, hosts, 8) for hosts in (1, 8, 32, 512)]
    batches = [ranked[0].published.batch for ranked in fastest]
    assert batches == sorted(batches)
    assert batches[0] == 3264
    assert batches[-1] >= 32_768
    assert all(len(ranked) > 10 for ranked in fastest)


# -------------------------------------------------------------------------------------- the program


def scaling(monkeypatch, capsys, *words: object) -> str:
    """Run the program with these arguments in this process, and return what it printed."""
    monkeypatch.setattr(sys, "argv", ["scaling", *map(str, words)])
    program.main()
    return capsys.readouterr().out


def test_predictions_as_table_json_and_figure(monkeypatch, capsys, tmp_path):
    out, data = tmp_path / "scaling.png", tmp_path / "scaling.json"
    flags = ["--gpu", "a100-pytorch", "--bandwidth", "3", "--latency", "30", "--nodes", 1, 16]
    printed = scaling(monkeypatch, capsys, *flags, "--out", out, "--json", data)
    assert "bandwidth of the network" in printed
    first, last = json.loads(data.read_text())
    assert first["efficiency"] == 1.0
    assert last["job"]["nodes"] == 16
    assert last["images_per_second"] > first["images_per_second"]
    assert out.stat().st_size > 10_000
    halved = scaling(monkeypatch, capsys, *flags, "--fp16-allreduce", "--json", data)
    assert json.loads(data.read_text())[1]["step"] < last["step"], halved


def test_minutes_and_published_points(monkeypatch, capsys, tmp_path):
    out, data = tmp_path / "minutes.svg", tmp_path / "minutes.json"
    printed = scaling(monkeypatch, capsys, "--minutes", "--out", out, "--json", data)
    assert "Predicted minutes" in printed
    assert "4,096" in printed
    assert out.stat().st_size > 10_000
    assert {row["gpus"] for row in json.loads(data.read_text())} == {8 << i for i in range(10)}
    printed = scaling(monkeypatch, capsys, "--published", "--json", data)
    rows = {(r["round"], r["gpus"], r["batch"]): r for r in json.loads(data.read_text())}
    assert abs(rows["v4.0", 64, 3200]["rate_error"]) < 0.1
    assert "sets the speed" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h100", "--machine", "x.json"], "--machine and --gpu"),
        (["--machine", "missing.json"], "--machine missing.json: cannot read it"),
        (["--effective-batch-size", "8", "--nodes", "2"], "--effective-batch-size 8: 16 ranks"),
        (["--out", "figure.jpg"], "--out figure.jpg"),
        (
            ["--published", "--out", "figure.png"],
            "--out: --published and --calibrate draw no figure",
        ),
        (
            ["--calibrate", "x.json", "--json", "y.json"],
            "--json: --calibrate writes only its own FILE",
        ),
        (
            ["--json", "no/such/folder.json"],
            "no/such/folder.json: the folder no/such does not exist",
        ),
    ],
)
def test_wrong_flags_are_explained(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        scaling(monkeypatch, capsys, *words)
    assert f"error: {message}" in capsys.readouterr().err


def test_a_machine_survives_its_file(tmp_path):
    path = tmp_path / "machine.json"
    for machine in (small(), presets.machine("a100", presets.NETWORKS["ethernet-10g"])):
        machines.save(machine, path)
        assert machines.load(path) == machine
        assert "Infinity" not in path.read_text()  # which JSON does not have
    path.write_text('{"version": 1, "machine": {"name": 1}}')
    with pytest.raises(UsageError, match="it is not a file of --calibrate"):
        machines.load(path)


# --------------------------------------------------------------------------------------- calibration


def test_a_link_is_recovered_from_its_allreduces():
    from benchmarks.scaling.calibrate import fit_link
    from benchmarks.scaling.measure import Collective

    link = Link(2e-4, 5e8, in_flight=2.0, cpu_latency=1e-5, cpu_per_byte=1e-9)
    found = [
        Collective(size, cost.alone, cost.queued, cost.busy)
        for size in (1 << 16, 1 << 20, 1 << 23)
        for cost in [ring(4, size, link)]
    ]
    fitted = fit_link(found, 4)
    assert fitted._replace(launch=0.0) == pytest.approx(link, rel=1e-6)


def test_cores_are_shared_with_other_processes():
    assert Cores().speeds(2.0) == (1.0, 1.0)
    assert Cores(2, ranks=2).speeds(0.0) == (1.0, 1.0)
    assert Cores(2, ranks=2).speeds(0.25) == (0.75, 1.0)  # a small exchange gets what it wants
    assert Cores(2, ranks=2).speeds(1.0) == (0.5, 0.5)
    assert Cores(2, ranks=1, others=1.0).speeds(0.0)[0] == 1.0
    assert Cores(2, ranks=2, others=2.0).speeds(0.0)[0] == 0.5
    assert Cores(1, ranks=2).speeds(1.0, computing=False)[1] == 0.5


def test_jobs_measure_in_turn(tmp_path):
    from benchmarks.scaling.measure import end_turn, wait_for_turn

    path = tmp_path / "turns"
    path.write_text("0")
    for turn in range(2):
        for job in range(3):
            wait_for_turn(f"{path}:{job}:3", turn)  # does not wait for ever
            end_turn(f"{path}:{job}:3")
    assert path.read_text() == "6"


def test_a_shaped_link_has_the_given_rate_and_latency():
    from benchmarks.scaling.check import shaped
    from benchmarks.scaling.hosts import Shape

    fast = Link(1e-4, 1e10)
    assert shaped(fast, Shape(None, 0.0)) == fast
    made = shaped(fast, Shape(1e8, 2e-3))
    assert made.latency == pytest.approx(2.1e-3)
    assert 0.9e8 < made.bandwidth < 1e8


def test_a_calibration_of_two_ranks_and_a_prediction_from_it(monkeypatch, capsys, tmp_path):
    """A small network is measured. The prediction for its own step is of the right magnitude."""
    path, data = tmp_path / "here.json", tmp_path / "scaling.json"
    flags = [
        "--model",
        "small_cnn",
        "--image-size",
        "32",
        "--batch-sizes",
        "2",
        "4",
        "--rounds",
        "4",
    ]
    done = ranks_of("torch")(2, "-m", "benchmarks.scaling", "--calibrate", path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"wrote {path}" in done.stdout
    machine = machines.load(path)
    assert machine.per_node == 2
    assert 0 < machine.inside.bandwidth < 1e12
    assert [batch for batch, _ in machine.forward] == [2, 4]
    assert list(machine.ready) == pytest.approx(sorted(machine.ready), abs=0.2)
    measured = json.loads(path.read_text())["steps"]["4"]
    scaling(monkeypatch, capsys, "--machine", path, "--nodes", 1, "--json", data)
    (row,) = json.loads(data.read_text())
    assert measured / 5 < row["step"] < 5 * measured
