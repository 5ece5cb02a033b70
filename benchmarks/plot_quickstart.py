"""Draw the figure of the quickstart: the curves of LARS and SGD.

    python -m benchmarks.plot_quickstart               # docs/images/quickstart.png from logs/quickstart
    python -m benchmarks.plot_quickstart --logs DIR --out FILE

``launch/quickstart.sh --compare`` trains both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes

from lars.errors import UsageError
from lars.figures import figure, look, save, style
from lars.run.records import read_runs

RUNS = {"LARS": "digits_lars_1024", "SGD": "digits_sgd_1024"}
CHANCE = 10.0  # top-1 of random guesses among ten digits, in percent


def draw_panel(axes: Axes, logs: Path, split: str, metric: str) -> None:
    """Draw one metric of both runs against the optimizer steps."""
    for number, (name, folder) in enumerate(RUNS.items()):
        (run,) = read_runs([logs / folder])
        steps, values = ([row[key] for row in run.split(split)] for key in ("step", metric))
        axes.plot(steps, values, label=name, **look(number))
    axes.set_xlabel("optimizer step (2 per epoch)")
    axes.set_xlim(left=0)


def draw(logs: Path, out: Path) -> None:
    """Write validation top-1 and training loss of both runs, side by side, to `out`."""
    with style():
        drawn, (top1, loss) = figure(2)
        draw_panel(top1, logs, "val", "top1")
        top1.axhline(CHANCE, color="#666666", linestyle="--", linewidth=1, zorder=1, label="chance")
        top1.set_ylabel("validation top-1 (%)")
        top1.set_ylim(0, 103)
        top1.legend(loc="upper left")
        draw_panel(loss, logs, "train", "loss")
        loss.set_ylabel("training loss (nats, log scale)")
        loss.set_yscale("log")
        ticks = [0.5, 1, 2, 5, 10, 20, 50]
        loss.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        loss.minorticks_off()
        loss.legend(loc="upper right")
        drawn.suptitle("Handwritten digits, ResNet-18, batch size 1024, 20 epochs")
    save(drawn, out)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot_quickstart",
        description="Draw the curves of LARS and SGD at batch size 1024 from launch/quickstart.sh --compare.",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("logs/quickstart"),
        help="folder that holds the two run folders (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/images/quickstart.png"),
        help="image file to write (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        draw(arguments.logs, arguments.out)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
