"""``python -m lars.report``: one self-contained page about one or several runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from conftest import environment
from conftest import run as run_command
from lars.observe.layer_file import LayerFile
from lars.observe.output import Curves
from lars.report.__main__ import main
from lars.report.curves import Curve, reduced
from lars.report.heatmap import MOST_COLUMNS, HeatMap, _columns, heat_map
from lars.report.page import page
from lars.run.records import encoded, read_runs

HOSTILE = "<img src=x onerror=alert(1)> $x$ & '\"-->"
STEPS_PER_EPOCH = 5


def write_run(folder: Path, *, epochs: int = 4, lr: float = 0.5, **summary) -> Path:
    """Write the files of a run of `epochs` epochs."""
    folder.mkdir(parents=True)
    flags = {"model": "resnet18", "base_op": "lars", "base_lr": lr, "wd": 1e-4, "train_dir": "x"}
    description = {
        "flags": flags,
        "defaults": flags | {"base_lr": 0.0125},
        "plan": {"size": 2, "effective_batch_size": 64, "steps_per_epoch": STEPS_PER_EPOCH,
                 "total_steps": 4 * STEPS_PER_EPOCH, "peak_lr": lr},
        "versions": {"torch": "2.0"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(description))
    with open(folder / "metrics.jsonl", "wb") as file:
        for epoch in range(1, epochs + 1):
            place = {"epoch": epoch, "step": STEPS_PER_EPOCH * epoch}
            results = {"loss": 2.0 / epoch, "top1": 20.0 * epoch, "top5": 100.0}
            times = {"lr": lr, "images_per_second": 900.0, "seconds": 10.0}
            waits = {"data_seconds": 2.5, "exchange_seconds": 1.0}
            file.write(encoded({"split": "train", **place, **results, **times, **waits}))
            file.write(encoded({"split": "val", **place, **results, **times}))
    with SummaryWriter(folder) as curves:
        for step in range(1, STEPS_PER_EPOCH * epochs + 1):
            values = {"loss": 2 / step, "lr": lr, "images_per_second": 900, "grad_norm": 3 / step}
            for name, value in values.items():
                curves.add_scalar(f"train/{name}", value, step)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def edit(file: Path, change: Callable[[dict], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page that has been parsed: its elements, its identifiers and the values that may load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.elements, self.ids, self.links, self.text = [], [], [], [], ""
        self.feed(html)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.links.append(value)
            assert not name.startswith("on"), f"{name} is a script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data.strip()} " if data.strip() else ""

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def parsed(*folders: Path) -> Page:
    return Page(page(read_runs(folders)))


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    html = page(read_runs([write_run(tmp_path / "run")]))
    found = Page(html)
    assert all(link.startswith(("#", "data:image/png")) for link in found.links)
    assert found.count("script") == found.count("link") == found.count("iframe") == 0
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)


def test_the_page_shows_the_results(tmp_path):
    found = parsed(write_run(tmp_path / "run"))
    assert "80.00 % top-1" in found.text
    assert "data 25.0 % exchange 10.0 % compute 65.0 %" in found.text
    assert "900 images/s" in found.text
    charts = [a["aria-label"] for tag, a in found.elements if tag == "svg"]
    assert len(charts) == 6, "accuracy, loss, rate, speed, waiting for data, gradient norm"
    assert "run: 80 after epoch 4" in charts[0]
    flags = found.text[found.text.index("Bold flags differ") :].split()
    assert flags.index("--base-lr") < flags.index("--model"), "flags that were set come first"


def test_several_runs_are_side_by_side(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=0.25)
    found = parsed(one, two)
    assert len(found.ids) == len(set(found.ids))
    assert found.count("article") == 2
    differing = found.text[found.text.index("Flags that differ") :]
    assert differing.startswith("Flags that differ flag one two --base-lr 0.5 0.25")
    assert "--wd" not in differing[: differing.index("Curves")]
    assert parsed(tmp_path).text == found.text, "a folder of runs"


def test_runs_with_default_folder_names_are_called_by_their_flags(tmp_path):
    folders = [write_run(tmp_path / f"resnet18_lars_lr{lr}", lr=lr) for lr in (0.5, 0.25)]
    for folder in folders:
        edit(folder / "config.json", lambda config: config["flags"].update(run_name=None))
    found = parsed(*folders)
    assert "lr 0.5 state" in found.text
    assert "lr 0.25 state" in found.text


def test_flags_that_an_older_run_lacks_do_not_differ(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=0.25)
    edit(two / "config.json", lambda config: config["flags"].pop("wd"))
    found = parsed(one, two)
    differing = found.text[found.text.index("Flags that differ") : found.text.index("Curves")]
    assert "--base-lr" in differing
    assert "--wd" not in differing


def test_the_published_runs_are_drawn_behind_the_accuracy(tmp_path):
    folder = write_run(tmp_path / "run", expected_curve="mlperf-8192")
    edit(folder / "config.json", lambda config: config["flags"].update(epochs=90))
    found = parsed(folder)
    assert "30 published runs with batch sizes of 8192 to 8192" in found.text
    edit(folder / "config.json", lambda config: config["flags"].update(epochs=2))
    assert "published runs with" not in parsed(folder).text, "no epoch of a short run compares"
    plain = parsed(write_run(tmp_path / "plain"))
    assert "published runs with" not in plain.text


def test_the_layers_of_a_run_are_drawn(tmp_path):
    folder = write_run(tmp_path / "run")
    file = LayerFile(folder, ["conv.weight", HOSTILE, "bn.weight"], ["adapted"] * 2 + ["excluded"])
    file.restart(0)
    for step in range(1, 11):
        values = np.full((4, 3), 0.01, np.float32)
        values[:, 0] = 50 if step == 7 else 0.02
        file.add(step, values)
    found = parsed(folder)
    titles = [a["data-map"] for _, a in found.elements if "data-map" in a]
    assert titles == ["Trust ratio of each layer", "Relative update ‖Δw‖ / ‖w‖ of each layer"]
    assert "conv.weight: 50 at step 7, median 0.02." in found.text
    assert HOSTILE in found.text
    assert "bn.weight" not in found.text, "excluded layers have no trust ratio"
    assert found.count("image") >= 2


def test_names_are_escaped(tmp_path):
    folder = write_run(tmp_path / HOSTILE, state="training", warnings=[HOSTILE], notes=[{"step": 2, "text": HOSTILE}],
                       skipped=1, skipped_steps=[{"step": 3, "cause": HOSTILE}])  # fmt: skip
    more = {"train_dir": HOSTILE, HOSTILE: HOSTILE}
    edit(folder / "config.json", lambda config: config["flags"].update(more))
    found = parsed(folder)
    assert found.count("img") == 0
    assert found.text.count(HOSTILE) >= 7, "title, heading, warning, note, cause, flag and value"


def test_a_run_in_progress_and_torn_files_are_shown(tmp_path):
    folder = write_run(tmp_path / "run", epochs=2)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"split": "train", "epo')
    events = next(folder.glob("events*"))
    events.write_bytes(events.read_bytes()[:-7])
    (folder / "summary.json").write_text('{"state": "tr')
    found = parsed(folder)
    assert "40.00 % top-1" in found.text
    assert "10 of 20 steps" in found.text


def test_a_run_without_an_epoch_is_shown(tmp_path):
    folder = write_run(tmp_path / "run", epochs=0)
    (folder / "config.json").unlink()
    found = parsed(folder)
    assert "no validation yet" in found.text
    assert "No epoch is complete yet" in found.text


def test_a_run_that_has_just_started_again_is_shown(tmp_path):
    folder = write_run(tmp_path / "run", epochs=0)
    curves = Curves(folder)
    curves.scalars({"train/loss": 1.0}, step=1)
    curves.restart(1)  # discards the point
    assert "No epoch is complete yet" in parsed(folder).text


def test_a_run_with_values_that_are_not_finite_is_shown(tmp_path):
    folder = write_run(tmp_path / "run", skipped=2, skipped_steps=[{"step": 7, "cause": "nan"}])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(encoded({"split": "val", "epoch": 5, "step": 25, "loss": math.inf,
                            "top1": math.nan, "lr": 0.1, "seconds": 1.0}))  # fmt: skip
    found = parsed(folder)
    assert "skipped steps: 2, first step 7: nan" in found.text
    assert "Dotted: skipped steps" in found.text


def test_a_long_curve_is_reduced_but_keeps_its_range():
    values = np.ones(10_000)
    values[5000] = 50.0
    points = reduced(Curve(np.arange(10_000.0), values))
    assert len(points.steps) <= 300
    assert points.high.max() == 50
    assert points.mean.max() < 3
    assert np.all(np.diff(points.steps) > 0)
    gaps = reduced(Curve(np.arange(3.0), np.array([1.0, np.nan, 3.0])))
    assert gaps.steps.tolist() == [0, 2]


def map_of_many_layers(readings: int) -> HeatMap:
    """53 layers with a constant ratio, one of which runs away at one reading. One layer has no values."""
    values = np.full((53, readings), 0.4)
    values[20, readings // 2] = 37.0
    values[30] = np.nan
    steps = 100 * np.arange(1, readings + 1)
    return heat_map("map", "Trust ratio", [f"layer{n}.weight" for n in range(53)], steps, values)


@pytest.mark.parametrize("readings", [50, 20 * MOST_COLUMNS])
def test_the_heat_map_shows_the_layer_that_ran_away(readings):
    found = map_of_many_layers(readings)
    assert found.outliers[0].startswith(f"layer20.weight: 37 at step {50 * readings + 100}")
    parsed_map = Page(str(found.svg))
    assert parsed_map.count("image") >= 1
    assert "layer52.weight" in parsed_map.text
    assert len(found.svg) < 150_000


def test_a_map_of_many_readings_keeps_the_value_farthest_from_the_median():
    logs = np.full((2, 10 * MOST_COLUMNS), 0.5)
    logs[1, 1234] = -3.0
    places, columns = _columns(logs)
    assert columns.shape == (2, MOST_COLUMNS)
    assert columns[1, 123] == -3
    assert columns.sum() == 0.5 * (2 * MOST_COLUMNS - 1) - 3
    assert places[123] == 1230


def test_a_map_of_one_reading_has_no_outliers():
    values = np.array([[0.4], [37.0]])
    assert heat_map("map", "Trust ratio", ["a", "b"], np.array([1]), values).outliers == []


def test_a_map_without_values_is_left_out():
    assert heat_map("map", "Trust ratio", ["fc"], np.array([1]), np.array([[0.0]])) is None


def test_the_command_writes_the_page(tmp_path):
    write_run(tmp_path / "run")
    out = tmp_path / "report.html"
    done = run_command(sys.executable, "-m", "lars.report", tmp_path / "run", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    assert out.stat().st_size < 2_000_000


def test_the_command_names_wrong_paths(tmp_path, capsys):
    for arguments, message in {
        (tmp_path / "nothing",): "nothing does not exist",
        (write_run(tmp_path / "run"), "--out", tmp_path / "none" / "x.html"): "--out .*x.html",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_browser_shows_the_page_without_errors_or_a_network(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on the PATH")
    write_run(tmp_path / "run")
    path = tmp_path / "report.html"
    path.write_text(page(read_runs([tmp_path / "run"])))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom", path.as_uri()],
        env=environment(HOME=str(tmp_path)), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    shown = Page(done.stdout.split("<!DOCTYPE html>")[1])
    assert shown.count("svg") == 6
    assert "80.00 % top-1" in shown.text
