"""python -m lars.plot: which curves it draws, how it labels runs, and its files."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from run_folders import row, write_run

from lars import plot
from lars.figures import COLOURS, figure, format_of, legend, look, save, style
from lars.run.records import read_runs

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.lines import Line2D  # noqa: E402
from tensorboard.compat.proto.event_pb2 import Event  # noqa: E402
from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: E402
from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: E402


def write_readings(folder: Path, rates: list[float]) -> None:
    """Write TensorBoard's file: after step k the learning rate is rates[k - 1], and the loss is k."""
    piece = io.BytesIO()
    events = [Event(file_version="brain.Event:2")]
    for step, rate in enumerate(rates, start=1):
        values = {"train/lr": rate, "train/loss": float(step), "train/images_per_second": 9.0}
        drawn = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        events.append(Event(step=step, summary=Summary(value=drawn)))
    for event in events:
        RecordWriter(piece).write(event.SerializeToString())
    (folder / "events.out.tfevents.1.host.1").write_bytes(piece.getvalue())


def runs_of(tmp_path: Path, count: int, **flags) -> list:
    folders = [write_run(tmp_path / f"r{i}", base_lr=float(2**i), **flags) for i in range(count)]
    return read_runs(folders)


def lines(drawn, panel: int = 0) -> list[Line2D]:
    return drawn.axes[panel].get_lines()


def test_a_run_is_drawn_with_training_and_validation(tmp_path):
    drawn = plot.draw(runs_of(tmp_path, 1), ["top1", "loss", "lr"])
    assert [axes.get_ylabel() for axes in drawn.axes] == ["top-1 (%)", "loss", "learning rate"]
    val, train = lines(drawn)
    assert list(val.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(val.get_ydata())[:3] == [10, 40, 35]
    assert math.isnan(val.get_ydata()[3])
    assert val.get_linestyle() != train.get_linestyle()
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["validation", "training"]


@pytest.mark.parametrize(
    ("x", "expected"),
    [("epochs", [1, 2, 3, 4, 5]), ("steps", [4, 8, 12, 16, 20]), ("hours", [10 * k / 3600 for k in range(1, 6)])],
)  # fmt: skip
def test_the_horizontal_axes(tmp_path, x, expected):
    drawn = plot.draw(runs_of(tmp_path, 1), ["loss"], x)
    assert list(lines(drawn)[0].get_xdata()) == pytest.approx(expected)
    assert drawn.axes[0].get_xlabel() == plot.AXES[x]


def test_the_learning_rate_has_a_point_for_each_reading(tmp_path):
    (record,) = runs_of(tmp_path, 1)
    write_readings(record.folder, [0.1 * k for k in range(1, 23)])
    (line,) = lines(plot.draw([record], ["lr"]))
    assert list(line.get_xdata())[:20] == pytest.approx([k / 4 for k in range(1, 21)])
    assert all(math.isnan(x) for x in line.get_xdata()[20:]), "the sixth epoch is not finished"
    assert list(line.get_ydata()) == pytest.approx([0.1 * k for k in range(1, 23)])


def test_the_loss_over_the_learning_rate(tmp_path):
    (record,) = runs_of(tmp_path, 1)
    write_readings(record.folder, [0.001, 0.01, 0.1])
    drawn = plot.draw([record], ["loss"], "lr")
    (line,) = lines(drawn)
    assert list(line.get_xdata()) == pytest.approx([0.001, 0.01, 0.1])
    assert list(line.get_ydata()) == [1, 2, 3]
    assert drawn.axes[0].get_xscale() == "log"
    assert drawn.axes[0].get_ylabel() == "training loss"


def test_many_runs_are_drawn_with_the_validation_only(tmp_path):
    drawn = plot.draw(runs_of(tmp_path, 9), ["top1"])
    assert len(lines(drawn)) == 9
    assert drawn.axes[0].get_ylabel() == "validation top-1 (%)"
    looks = {(line.get_color(), line.get_linestyle()) for line in lines(drawn)}
    assert len(looks) == 9
    assert len({line.get_color() for line in lines(drawn)}) == len(COLOURS)
    assert [text.get_text() for text in drawn.legends[0].get_texts()][:2] == ["lr 1", "lr 2"]


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("panels", [["top1"], ["top1", "loss", "lr"]])
def test_the_legend_is_above_the_panels_and_within_the_figure(tmp_path, count, panels):
    drawn = plot.draw(runs_of(tmp_path, count, model="a_model_with_a_long_name"), panels)
    drawn.draw_without_rendering()
    page, box = drawn.bbox, drawn.legends[0].get_window_extent()
    assert box.x0 >= page.x0
    assert box.x1 <= page.x1
    assert box.y1 <= page.y1
    assert all(box.y0 >= axes.get_tightbbox().y1 - 1 for axes in drawn.axes)


def labels(tmp_path: Path, *flags: dict) -> list[str]:
    folders = [write_run(tmp_path / f"{i}" / "run", **each) for i, each in enumerate(flags)]
    return plot.labels(read_runs(folders))


def test_labels_show_what_differs(tmp_path):
    lars, sgd = {"base_op": "lars"}, {"base_op": "sgd", "base_lr": 0.1}
    assert labels(tmp_path / "a", lars, sgd) == ["lars", "sgd"]
    assert labels(tmp_path / "b", lars, lars | {"seed": 1}, sgd) == [
        "lars, seed 42", "lars, seed 1", "sgd, seed 42",
    ]  # fmt: skip
    assert labels(tmp_path / "c", lars, lars | {"ema_decay": 0.9}) == [
        "default ema decay", "ema decay 0.9",
    ]  # fmt: skip
    assert labels(tmp_path / "d", lars, lars | {"flip": False}, lars | {"flip": True}) == [
        "default flip", "no flip", "flip",
    ]  # fmt: skip
    assert labels(tmp_path / "e", lars, lars | {"log_dir": "y", "records": "/data"}) == ["0", "1"]


def test_an_older_run_has_the_defaults_of_newer_flags(tmp_path):
    assert labels(tmp_path, {}, {"label_smoothing": 0.1}, {"label_smoothing": 0.2}) == [
        "label smoothing 0.1 0", "label smoothing 0.1 1", "label smoothing 0.2",
    ]  # fmt: skip


def test_losses_of_very_different_size_have_a_logarithmic_axis(tmp_path):
    rows = [row("train", 1), row("train", 2, loss=5000.0)]
    drawn = plot.draw(read_runs([write_run(tmp_path / "run", rows)]), ["loss"])
    assert drawn.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_equal_figures_give_equal_files(tmp_path, kind, capsys):
    folder = write_run(tmp_path / "run")
    contents = []
    for name in ("one", "two"):
        plot.main([str(folder), "--out", str(tmp_path / f"{name}.{kind}")])
        contents.append((tmp_path / f"{name}.{kind}").read_bytes())
    assert len(contents[0]) > 5000
    assert contents[0] == contents[1]
    assert capsys.readouterr().out.split() == [
        str(tmp_path / f"{n}.{kind}") for n in ("one", "two")
    ]


def test_the_style_does_not_leak_and_can_be_reused(tmp_path):
    before = dict(matplotlib.rcParams)
    with style():
        drawn, (axes,) = figure()
        axes.plot([1, 2], [3, 4], **look(1))
        legend(drawn, [Line2D([], [], **look(1), label="a line")])
    save(drawn, tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before
    assert drawn.axes[0].get_lines()[0].get_color() == COLOURS[1]
    assert format_of(Path("x.PDF")) == "pdf"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--out", "x.jpg"], "--out x.jpg: the name must end in .png, .pdf or .svg"),
        (["run", "--out", "nowhere/x.png"], "--out nowhere/x.png cannot be written: No such file"),
        (["run", "--out", "x.png", "--metric", "top2"], "--metric top2: .* the runs have loss, top1, top5, lr"),
        (["run", "--out", "x.png", "--x", "lr"], "--metric top1: no run has such values for this axis"),
        (["new", "--out", "x.png"], "no run has a finished epoch yet"),
        (["nowhere", "--out", "x.png"], "nowhere does not exist"),
    ],
)  # fmt: skip
def test_errors_name_the_flag(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    write_run(tmp_path / "new", [])
    with pytest.raises(SystemExit) as stop:
        plot.main(words)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("*x.png"))
