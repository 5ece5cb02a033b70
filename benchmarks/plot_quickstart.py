"""Draw the README's figure: the curves of LARS and SGD from ``launch/quickstart.sh --compare``.

python -m benchmarks.plot_quickstart               # docs/images/quickstart.png from logs/quickstart
python -m benchmarks.plot_quickstart --logs DIR --out FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

# Blue and vermilion of the Okabe-Ito palette, which colour-blind readers can distinguish.
RUNS = {
    "LARS": ("digits_lars_1024", "#0072B2", "o"),
    "SGD": ("digits_sgd_1024", "#D55E00", "s"),
}
CHANCE = 10.0  # top-1 of random guesses among ten digits, in percent


def read(run_folder: Path, split: str, metric: str) -> tuple[list[int], list[float]]:
    """Return the optimizer steps and the values of one metric of a run."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == split]
    return [row["step"] for row in rows], [row[metric] for row in rows]


def draw_panel(axes: Any, logs: Path, split: str, metric: str) -> None:
    """Draw one metric of both runs against the optimizer steps."""
    for name, (folder, colour, marker) in RUNS.items():
        steps, values = read(logs / folder, split, metric)
        axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=name)
    axes.set_xlabel("optimizer step (2 per epoch)")
    axes.set_xlim(left=0)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(logs: Path, out: Path) -> None:
    """Write validation top-1 and training loss of both runs, side by side, to `out`."""
    plt.rcParams["font.size"] = 12
    # The background is opaque, so that the labels are legible on dark pages too.
    figure, (top1, loss) = plt.subplots(1, 2, figsize=(10, 4), facecolor="white")
    draw_panel(top1, logs, "val", "top1")
    top1.axhline(CHANCE, color="#666666", linestyle="--", linewidth=1, zorder=1, label="chance")
    top1.set_ylabel("validation top-1 (%)")
    top1.set_ylim(0, 103)
    top1.legend(loc="upper left", framealpha=1)
    draw_panel(loss, logs, "train", "loss")
    loss.set_ylabel("training loss (nats, log scale)")
    loss.set_yscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    loss.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    loss.minorticks_off()
    loss.legend(loc="upper right", framealpha=1)
    figure.suptitle("Handwritten digits, ResNet-18, batch size 1024, 20 epochs")
    figure.tight_layout()
    figure.savefig(out, dpi=150, metadata={"Software": None})
    plt.close(figure)


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
    draw(arguments.logs, arguments.out)


if __name__ == "__main__":
    main()
