"""The page: what the template page.html shows about each run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from lars.report.charts import charts
from lars.report.heatmap import HeatMap, heat_map
from lars.report.run import ReportedRun, read_all
from lars.report.svg import COLOURS, dashes
from lars.run.epochs import columns, epochs_table
from lars.run.outcome import PARTS, duration, reached
from lars.run.records import RunRecord

# What the page says about the state of a run in summary.json.
STATES = {
    "finished": "finished",
    "stopped": "stopped before the end",
    "diverged": "ended because its steps were not finite",
    "training": "not finished: still training, or ended by an error",
}

# The heat maps of a run: quantities of `lars.observe.layer_file` with their titles.
MAPS = {
    "trust_ratio": "Trust ratio of each layer",
    "update_ratio": "Relative update ‖Δw‖ / ‖w‖ of each layer",
}


class Table(NamedTuple):
    """A table of the page."""

    columns: list[str]
    rows: list[list[str]]


class Flag(NamedTuple):
    """A flag with its value and its default."""

    name: str
    value: str
    default: str
    is_set: bool


def page(records: Sequence[RunRecord]) -> str:
    """Make the page about these runs as HTML. All names are escaped, and nothing is loaded from elsewhere."""
    runs = read_all(records)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    described = [describe(run) for run in runs]
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} training runs",
        made=time.strftime("%Y-%m-%d at %H:%M %Z"),
        runs=described,
        colours=len(COLOURS),
        charts=charts(runs),
        differences=differences(runs) if len(runs) > 1 else None,
        maps=[run for run in described if run["maps"]],
    )


def describe(run: ReportedRun) -> dict[str, Any]:
    """The values of one run that the template shows."""
    summary = run.summary
    share = [(part, summary["time_share"][part]) for part in PARTS if summary["time_share"]]
    return {
        "name": run.name,
        "colour": run.number % len(COLOURS),
        "dashed": bool(dashes(run.number)),
        "state": _state(summary),
        "result": "no validation yet" if summary["best"] is None else _result(summary, "best"),
        "facts": list(_facts(run)),
        "share": share,
        "share_words": ", ".join(f"{part} {100 * value:.1f} %" for part, value in share),
        "problems": list(_problems(summary)),
        "skipped": Table(
            ["step", "cause"], [[str(s["step"]), s["cause"]] for s in summary["skipped_steps"]]
        ),
        "flags": flags(run.record),
        "facts_of_job": list(_facts_of_job(run)),
        "epochs": epochs(run.record),
        "maps": heat_maps(run),
    }


def _state(summary: dict[str, Any]) -> str:
    state = STATES.get(summary["state"], "state unknown: the run folder has no summary.json")
    steps = f"{summary['step']} of {summary['total_steps']} steps"
    written = f", recorded on {summary['written']}" if summary["written"] else ""
    return f"{state}; {steps}{written}"


def _result(summary: dict[str, Any], which: str) -> str:
    """The metric of the best or the last validation."""
    metric = summary["metric"]
    value = summary[which][metric]
    return f"{value:.2f} % top-1" if metric == "top1" else f"{metric} {value:.4g}"


def _facts(run: ReportedRun) -> Iterator[tuple[str, str]]:
    """The main values of a run."""
    summary, plan, flag = run.summary, run.record.plan, run.record.flags
    best, last, target = summary["best"], summary["last"], summary["target"]
    if best is not None:
        yield "best", f"epoch {best['epoch']} ({best['split']})"
    if last is not None and last[summary["metric"]] is not None:
        yield "last", f"{_result(summary, 'last')}, epoch {last['epoch']}"
    if target is not None:
        yield f"target {target['value']:g}", reached(target)
    hours = summary["hours"]
    if hours["training"]:
        for part in ("training", "validation"):
            yield part, duration(3600 * hours[part])
    if summary["images_per_second"] is not None:
        yield "speed", f"{summary['images_per_second']:,.0f} images/s"
    if flag:
        yield "model", str(flag.get("model"))
        yield "optimizer", str(flag.get("base_op"))
    if plan:
        ranks = f"{plan['size']} rank{'s' if plan['size'] > 1 else ''}"
        yield "batch", f"{plan['effective_batch_size']} on {ranks}"
        yield "peak rate", f"{plan['peak_lr']:g}"


def _problems(summary: dict[str, Any]) -> Iterator[str]:
    """What the user should know about: the warnings of the run, skipped steps and unreadable images."""
    yield from summary["warnings"]
    if summary["skipped"]:
        first = summary["skipped_steps"][0]
        yield f"skipped steps: {summary['skipped']}, first step {first['step']}: {first['cause']}"
    for note in summary["notes"]:
        yield f"step {note['step']}: {note['text']}"
    if summary["bad_images"]:
        yield f"{summary['bad_images']} images could not be read; bad_images.json lists them"


def flags(record: RunRecord) -> list[Flag]:
    """All flags of a run, those that differ from their defaults first."""
    known = record.description.get("defaults", {})
    found = [
        Flag(
            "--" + name.replace("_", "-"),
            _text(value),
            _text(known.get(name)),
            name not in known or value != known[name],
        )
        for name, value in record.flags.items()
    ]
    return sorted(found, key=lambda flag: not flag.is_set)


def differences(runs: Sequence[ReportedRun]) -> Table | None:
    """The flags whose values differ between the runs. None if all are equal.

    A run that is older than a flag has its default.
    """
    defaults: dict[str, Any] = {}
    for run in runs:
        defaults |= run.record.description.get("defaults", {})
    names = dict.fromkeys(name for run in runs for name in run.record.flags)
    rows = []
    for name in names:
        values = [_text(run.record.flags.get(name, defaults.get(name))) for run in runs]
        if len(set(values)) > 1 and name != "run_name":
            rows.append(["--" + name.replace("_", "-"), *values])
    return Table(["flag", *(run.name for run in runs)], rows) if rows else None


def _facts_of_job(run: ReportedRun) -> Iterator[tuple[str, str]]:
    """The folder, the plan, the branch point, the machine and the versions."""
    yield "run folder", str(run.record.folder.resolve())
    for name, value in (run.record.plan | run.summary["environment"]).items():
        yield name.replace("_", " "), _text(value)
    branch = run.record.description.get("branch")
    if branch:
        yield "branched from", f"{branch['from']} after step {branch['step']}"


def epochs(record: RunRecord) -> Table:
    """The results of all epochs."""
    rows = epochs_table(record)
    names = [name for name in columns(rows) if name != "run"]
    return Table(names, [[_text(row.get(name)) for name in names] for row in rows])


def heat_maps(run: ReportedRun) -> list[HeatMap]:
    """The heat maps of a run. Empty if it has recorded no values of its layers."""
    if run.layers is None:
        return []
    layers = run.layers
    # Excluded layers, such as those of BatchNorm, have a trust ratio of 1. Some optimizers adapt no layer.
    shown = [n for n, kind in enumerate(layers.kinds) if kind == "adapted"] or [
        *range(len(layers.kinds))
    ]
    names = [layers.layers[n] for n in shown]
    made = (
        heat_map(
            f"{quantity}-{run.number}", title, names, layers.steps, layers[quantity][:, shown].T
        )
        for quantity, title in MAPS.items()
    )
    return [found for found in made if found is not None]


def _text(value: Any) -> str:
    """A value as a cell of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return str(value)
