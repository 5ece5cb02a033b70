"""Run the cells of a study, each as a process, and keep every result.

A sweep can be killed at any time. The same command continues it: cells with a result are skipped, and a cell that was
interrupted resumes from its checkpoint. A training run that diverges is a result. Any other failure is shown, and the
next sweep tries that cell again.

Files in the folder of a sweep::

    results/NAME.json   one result per cell
    cells/NAME/         the run folder of a cell; its checkpoints are removed when it has a result
    logs/NAME.log       the output of its training
    table.md, results.csv, figure.png
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fnmatch
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from experiments.cells import Cell, Result, Results, Study, result_of
from lars.errors import CheckpointError, NonFiniteError, Preempted, UsageError
from lars.launcher import allotted_cpus
from lars.run.lock import locked

ROOT = Path(__file__).resolve().parents[1]
# Files of a run folder that are not needed once the cell has a result.
HEAVY = ("*.pth.tar", "*.safetensors", "events.out.tfevents.*")
# Lines of the log of a cell that failed.
LINES_SHOWN = 15

EPILOG = """\
Flags after -- go to every training run. Use them for flags that do not change the result, such as the path of the data:
  ... --preset mnist -- --data-dir DIR
"""


class Running:
    """A cell that is being trained."""

    def __init__(self, cell: Cell, command: Sequence[str], log: IO[bytes], threads: int) -> None:
        """Start the training in its own session, so that Ctrl-C reaches it only through the sweep."""
        self.cell, self.asked_to_stop = cell, False
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            start_new_session=True, preexec_fn=_stop_with_parent,
        )  # fmt: skip

    def ask_to_stop(self) -> None:
        """Ask the training to save and to end with exit code 75. A second call does nothing."""
        if not self.asked_to_stop:
            self.process.terminate()
        self.asked_to_stop = True


def _stop_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when the sweep dies, so that the training saves and ends."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


class Sweep:
    """Trains the cells of a study that have no result yet.

    Attributes:
        results: The results, old and new.
        failed: Names of the cells that failed in this sweep.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        *,
        jobs: int,
        ranks: int = 1,
        only: str = "*",
        place: Sequence[str] = (),
    ) -> None:
        """Prepare a sweep. Nothing is started yet.

        Args:
            study: Lists the cells.
            out: Folder of the sweep.
            jobs: Cells to train side by side.
            ranks: Ranks of each training. More than one are started by launch/mpirun.sh.
            only: Pattern of the names of the cells to train.
            place: Flags for every training that do not change its result.
        """
        self.study, self.out, self.jobs, self.ranks = study, out, jobs, ranks
        self.only, self.place = only, list(place)
        self.results = Results(out / "results")
        self.failed: list[str] = []
        self.checked: set[str] = set()
        self.running: list[Running] = []
        self.stop_requested = False
        self.began, self.ended, self.done, self.total = time.monotonic(), 0, 0, 0
        self.threads = max(1, allotted_cpus() // (jobs * ranks))

    def cells(self) -> list[Cell]:
        """The cells that are known now and match the pattern.

        Raises:
            UsageError: A result was made with other settings than its cell has now.
        """
        cells = self.study.cells(self.results.by_name)
        self.results.check([cell for cell in cells if cell.name not in self.checked])
        self.checked |= {cell.name for cell in cells}
        return [cell for cell in cells if fnmatch.fnmatch(cell.name, self.only)]

    def run(self) -> int:
        """Train until every cell has a result or has failed. Returns the exit code of the sweep."""
        cells = self.cells()
        for cell in cells:
            if cell.name in self.results.by_name:
                self._remove_heavy_files(cell)
        with self._stopping_gracefully(), tqdm(unit="cell", smoothing=0, disable=None) as bar:
            self._count(cells, bar)
            while (not self.stop_requested and self._start_more(cells)) or self.running:
                if self.stop_requested:
                    for each in self.running:
                        each.ask_to_stop()
                if self._collect(bar):
                    cells = self.cells()
                    self._count(cells, bar)
                time.sleep(0.1)
        if self.stop_requested:
            return Preempted.exit_code
        if self.failed:
            count = len(self.failed)
            what = "cell failed and has" if count == 1 else "cells failed and have"
            print(f"{count} {what} no result: {' '.join(self.failed)}; run the same command to try again",
                  file=sys.stderr)  # fmt: skip
        return 1 if self.failed else 0

    def _start_more(self, cells: Sequence[Cell]) -> bool:
        """Start cells until `jobs` are running. Returns whether any cell is running."""
        busy = {each.cell.name for each in self.running}
        for cell in cells:
            if len(self.running) == self.jobs:
                break
            if cell.name not in self.results.by_name and cell.name not in {*busy, *self.failed}:
                try:
                    self._start(cell)
                except (UsageError, CheckpointError) as error:  # the folder is in use or read-only
                    self.failed.append(cell.name)
                    print(f"{cell.name} cannot start: {error}", file=sys.stderr)
        return bool(self.running)

    def _start(self, cell: Cell) -> None:
        folder = self.out / "cells" / cell.name
        with locked(folder):  # the training of a killed sweep may need a moment to save
            if not any(folder.glob("*.pth.tar")):  # nothing was saved: start again
                for path in set(folder.iterdir()) - {folder / ".lock"}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        program = [sys.executable] if self.ranks == 1 else [
            str(ROOT / "launch" / "mpirun.sh"), "-np", str(self.ranks)
        ]  # fmt: skip
        command = [
            *program, cell.script, "--keep-checkpoints", "1", "--workers", str(self.threads - 1), *cell.flags,
            *self.place, "--log-dir", str(folder.parent.resolve()), "--run-name", cell.name,
        ]  # fmt: skip
        log = self._log(cell)
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            self.running.append(Running(cell, command, file, self.threads))

    def _log(self, cell: Cell) -> Path:
        return self.out / "logs" / f"{cell.name}.log"

    def _collect(self, bar: tqdm) -> bool:
        """Take the results of the cells that have ended. Returns whether there were any."""
        ended = [each for each in self.running if each.process.poll() is not None]
        self.running = [each for each in self.running if each not in ended]
        for each in ended:
            code, cell = each.process.returncode, each.cell
            if code in (0, NonFiniteError.exit_code):
                result = result_of(cell, self.out / "cells" / cell.name, code)
                self.results.add(result)
                self._remove_heavy_files(cell)
                self.ended += 1
                bar.write(self._line(result), file=sys.stdout)
            elif not self.stop_requested:
                self.failed.append(cell.name)
                bar.write(
                    f"{cell.name} failed with exit code {code}; the end of {self._log(cell)}:"
                )
                bar.write("".join(f"    {line}" for line in _last_lines(self._log(cell))))
        sys.stdout.flush()
        return bool(ended)

    def _count(self, cells: Sequence[Cell], bar: tqdm) -> None:
        """Count the cells that have a result and all cells, and show both in the bar."""
        self.done = sum(cell.name in self.results.by_name for cell in cells)
        self.total = len(cells) + self.study.still_unknown(self.results.by_name)
        bar.initial, bar.n, bar.total = self.done - self.ended, self.done, self.total
        bar.refresh()

    def _line(self, result: Result) -> str:
        self.done += 1
        left = (time.monotonic() - self.began) / self.ended * (self.total - self.done)
        top1 = "diverged" if result.exit_code else f"top1 {result.last:6.2f} %"
        return (
            f"[{self.done}/{self.total}] {result.name}: {top1}, {result.seconds:.0f} s; about "
            f"{tqdm.format_interval(left)} left"
        )

    def _remove_heavy_files(self, cell: Cell) -> None:
        for pattern in HEAVY:
            for path in (self.out / "cells" / cell.name).glob(pattern):
                path.unlink()

    @contextlib.contextmanager
    def _stopping_gracefully(self) -> Iterator[None]:
        """On SIGINT or SIGTERM, ask the running cells to save and stop. A second signal ends the sweep at once."""
        signals = (signal.SIGINT, signal.SIGTERM)

        def stop(number: int, frame: object) -> None:
            self.stop_requested = True
            for each_signal in signals:
                signal.signal(each_signal, signal.SIG_DFL)
            print(
                "stopping: the cells save; run the same command to continue them", file=sys.stderr
            )

        before = [signal.signal(number, stop) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


def _last_lines(path: Path) -> list[str]:
    with path.open(errors="replace") as file:
        return list(deque(file, maxlen=LINES_SHOWN))


def run_study(presets: Mapping[str, Study], description: str) -> None:
    """Read the command line of a study, run it, and exit.

    Args:
        presets: The studies that ``--preset`` selects, by name.
        description: What the study measures.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(presets), required=True, help="study to run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the sweep (default: logs/studies/STUDY-PRESET)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="cells to train at the same time (default: CPUs / ranks)",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="ranks of each training (default: 1)"
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="train only cells with such a name, such as 'lars_*'",
    )
    parser.add_argument("--list", action="store_true", help="show the cells without training them")
    parser.add_argument(
        "--plot", action="store_true", help="write the tables and the figure of the results so far"
    )
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, place = parser.parse_args(words[:end]), words[end + 1 :]
    out = options.out or Path("logs/studies") / f"{Path(sys.argv[0]).stem}-{options.preset}"
    try:
        sys.exit(_run(presets[options.preset], out, options, place))
    except (UsageError, CheckpointError) as error:
        parser.error(str(error))


def _run(study: Study, out: Path, options: argparse.Namespace, place: Sequence[str]) -> int:
    for name in ("jobs", "ranks"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    jobs = options.jobs or max(1, allotted_cpus() // options.ranks)
    sweep = Sweep(study, out, jobs=jobs, ranks=options.ranks, only=options.only, place=place)
    cells = sweep.cells()
    if not cells and not options.plot:
        raise UsageError(f"--only {options.only}: no cell has such a name; --list shows the names")
    if options.list:
        for cell in cells:
            state = "done" if cell.name in sweep.results.by_name else "to do"
            print(f"{state}  {cell.name}: {cell.script} {shlex.join(cell.flags)}")
        return 0
    code = 0
    if not options.plot:
        with locked(out, seconds=0, flag="--out"):
            sweep.results = Results(out / "results")  # another sweep may have just ended
            code = sweep.run()
    command = shlex.join(["python", *(word for word in sys.argv if word != "--plot")])
    study.report(sweep.results.by_name, out, command)
    print(f"the tables and the figure are in {out}")
    return code
