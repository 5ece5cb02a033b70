"""Attack training runs with kills, signals, a full disk and damaged checkpoints, at random and at delicate moments.

    python tests/chaos.py --minutes 60 --ranks 2 3 4 --summary chaos.json
    python tests/chaos.py --attacks 200 --only kill        # takes a night
    python tests/chaos.py --attacks 50 --backend torch     # started by torchrun

Each run is restarted until it finishes. Its weights, statistics, momentum, metrics and curves must then be the same
bytes as those of an undisturbed run. The attack must explain every exit code on the way. The same seed gives the same
attacks in the same order, but the step at which an attack arrives depends on the machine.

The delicate moments are the start-up, the writing of a checkpoint, and the validation after it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from run_folders import same_end

from conftest import ROOT, Ranks, environment
from lars.run import checkpoint

SCRIPT = ROOT / "train_imagenet.py"
EPOCHS = 10  # each has four steps, and the last step is short
FLAGS = [
    "--model", "shufflenet_v2_x0_5", "--image-size", "32", "--batch-size", "2", "--effective-batch-size", "24",
    "--base-op", "lars", "--base-lr", "0.1", "--epochs", str(EPOCHS), "--no-cuda", "--workers", "0",
    "--log-every", "2", "--checkpoint-steps", "3", "--run-name", "run",
]  # fmt: skip


NOISE = [
    "--num-classes=4",
    "--train-size=92",
    "--val-size=20",
    "--height=32",
    "--width=40",
    "--workers=1",
]


class Job:
    """One start of the trainer on several ranks."""

    def __init__(
        self, start: Ranks, images: Path, logs: Path, ranks: int, *, full_disk: bool = False
    ) -> None:
        folders = ["--train-dir", images / "train", "--val-dir", images / "val", "--log-dir", logs]
        command = start.command(ranks, SCRIPT, *folders, *FLAGS)
        if full_disk:  # files are limited to a megabyte, and checkpoints are larger
            command = ["bash", "-c", 'trap "" XFSZ; ulimit -f 1024; exec "$@"', "bash", *command]
        self.start, self.mark = start, str(logs)
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.output: list[str] = []
        self.training = threading.Event()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if "tensorboard --logdir" in line:  # the end of the summary
                self.training.set()
        self.training.set()

    def running(self) -> bool:
        """Whether the launcher is still running."""
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are alive."""
        found = subprocess.run(
            ["pgrep", "-f", f"^{sys.executable} (-u )?{SCRIPT} .*{self.mark}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return [int(word) for word in found.stdout.split()]

    def wait(self, seconds: float = 120) -> int:
        """Wait for the end of the launcher and of all ranks. Return the job's exit code, or 128 + signal."""
        code = self.process.wait(seconds)
        if (
            code < 0
        ):  # a killed launcher leaves its ranks running, which would disturb the next start
            subprocess.run(["pkill", "-KILL", "-f", self.mark], check=False)
            code = 128 - code
        self.reader.join()
        return self.start.code(code, "".join(self.output))


def kill_a_rank(job: Job, chance: random.Random) -> None:
    """Send SIGKILL to a rank, as the kernel does when memory runs out."""
    send(job, signal.SIGKILL, chance)


def kill_the_launcher(job: Job, chance: random.Random) -> None:
    """Send SIGKILL to mpirun or torchrun."""
    job.process.kill()


def ask_a_rank_to_stop(job: Job, chance: random.Random) -> None:
    """Send one of the --stop-signals to one rank."""
    send(job, chance.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)), chance)


def ask_all_to_stop(job: Job, chance: random.Random) -> None:
    """Send a signal to the launcher, which passes it on to all ranks."""
    passed_on = {"horovod": (signal.SIGUSR1, signal.SIGUSR2), "torch": (signal.SIGTERM,)}
    job.process.send_signal(chance.choice(passed_on[job.start.engine]))


def send(job: Job, number: signal.Signals, chance: random.Random) -> None:
    """Send a signal to a rank, if one is still alive."""
    found = job.ranks()
    if found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(found), number)


def damage(folder: Path, chance: random.Random) -> bool:
    """Damage the newest checkpoint if there is an older one from which the run can resume."""
    found = checkpoint.newest_first(folder, "checkpoint-{epoch}.pth.tar")
    if len(found) < 2:
        return False
    newest = found[0][1]
    content = bytearray(newest.read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    newest.write_bytes(content)
    return True


def at_random(job: Job, folder: Path, chance: random.Random, span: float) -> None:
    """Wait until a random moment of the training."""
    job.training.wait()
    time.sleep(chance.random() * span / 2)


def at_start_up(job: Job, folder: Path, chance: random.Random, span: float) -> None:
    """Wait until a random moment of the start-up."""
    time.sleep(chance.random() * span / 2)


def in_checkpoint(job: Job, folder: Path, chance: random.Random, span: float) -> None:
    """Wait until a checkpoint is being written."""
    skip(chance.randrange(4), lambda: next(folder.glob(".tmp-checkpoint*"), None), job)


def in_validation(job: Job, folder: Path, chance: random.Random, span: float) -> None:
    """Wait until an epoch has been saved. Its validation comes next."""
    known = set(folder.glob("checkpoint-*"))
    skip(1, lambda: {p for p in set(folder.glob("checkpoint-*")) - known if "+" not in p.name}, job)
    time.sleep(chance.random() * 0.02)


def skip(times: int, happens: Callable[[], object], job: Job) -> None:
    """Wait until `happens` has been true `times` + 1 times, or the job has ended."""
    for _ in range(times + 1):
        while not happens() and job.running():
            time.sleep(0.0005)
        if times and job.running():
            time.sleep(0.05)


# The moments of attacks, with their relative frequency.
MOMENTS: dict[str, tuple[Callable[[Job, Path, random.Random, float], None], float]] = {
    "at a random moment": (at_random, 5),
    "at start-up": (at_start_up, 2),
    "in a checkpoint": (in_checkpoint, 2),
    "in a validation": (in_validation, 2),
}

# The attacks, with their relative frequency and the exit codes that they explain (0: the attack came too late).
ATTACKS: dict[str, tuple[Callable[[Job, random.Random], None], float, set[int]]] = {
    "kill a rank": (kill_a_rank, 6, {0, 137}),
    "kill the launcher": (kill_the_launcher, 3, {0, 137}),
    "ask a rank to stop": (ask_a_rank_to_stop, 3, {0, 75}),
    "ask all to stop": (ask_all_to_stop, 2, {0, 75}),
    "full disk": (lambda job, chance: None, 1, {0, 4}),
}
# Before the handlers are installed, a signal kills the process, which gives 128 + SIGTERM, SIGUSR1 or SIGUSR2.
UNHEARD = {1, 138, 140, 143}


class Chaos:
    """A series of attacked runs and its counts."""

    def __init__(self, folder: Path, seed: int, only: str, start: Ranks) -> None:
        self.start = start
        self.folder, self.chance = folder, random.Random(seed)
        self.names = [name for name in ATTACKS if only in name]
        self.counts: collections.Counter[str] = collections.Counter()
        self.runs = 0
        self.spans: dict[int, float] = {}

    def images(self) -> Path:
        """Create JPEG folders of noise: 92 images for training and 20 for validation."""
        images = self.folder / "images"
        if not images.exists():
            tool = [sys.executable, "-m", "data.synthetic", str(images), *NOISE]
            subprocess.run(tool, cwd=ROOT, env=environment(), check=True, capture_output=True)
        return images

    def clean(self, ranks: int) -> Path:
        """The run folder of an undisturbed run."""
        logs = self.folder / f"clean-{ranks}"
        if ranks not in self.spans:
            job = Job(self.start, self.images(), logs, ranks)
            job.training.wait()
            began = time.monotonic()
            assert job.wait(600) == 0, "".join(job.output)
            self.spans[ranks] = time.monotonic() - began
        return logs / "run"

    def attack(self, logs: Path, ranks: int) -> int:
        """Start the job, attack it at a random moment, and return its exit code."""
        weights = [ATTACKS[name][1] for name in self.names]
        name = self.chance.choices(self.names, weights)[0]
        damages = len(self.names) > 1 and self.chance.random() < 0.2
        damaged = damages and damage(logs / "run", self.chance)
        act, _, explained = ATTACKS[name]
        job = Job(self.start, self.images(), logs, ranks, full_disk=name == "full disk")
        weights = [weight for _, weight in MOMENTS.values()]
        moment = self.chance.choices(list(MOMENTS), weights)[0]
        MOMENTS[moment][0](job, logs / "run", self.chance, self.spans[ranks])
        act(job, self.chance)
        code = job.wait()
        output = "".join(job.output)
        allowed = explained | (UNHEARD if moment == "at start-up" else set())
        assert code in allowed, f"{name} {moment}: exit code {code}, not one of {allowed}\n{output}"
        if damaged and "tensorboard --logdir" in output:
            assert "cannot be used" in output, output
        self.counts[name] += 1
        self.counts[moment] += 1
        self.counts["damaged checkpoint"] += damaged
        self.counts[f"exit code {code}"] += 1
        return code

    def run(self, ranks: int, more: Callable[[], bool]) -> None:
        """Attack one run until it finishes or `more` returns false. Then let it finish, and compare it."""
        clean = self.clean(ranks)
        logs = self.folder / f"attacked-{self.runs}"
        code = 75
        while code != 0:
            if more():
                code = self.attack(logs, ranks)
            else:
                job = Job(self.start, self.images(), logs, ranks)
                code = job.wait()
                assert code == 0, "".join(job.output)
        same_end(logs / "run", clean, epochs=EPOCHS)
        self.runs += 1

    def summary(self) -> dict[str, Any]:
        """The numbers of runs, attacks, moments and exit codes."""
        return {
            "runs that ended with the clean run's bytes": self.runs,
            **sorted_counts(self.counts),
        }


def sorted_counts(counts: collections.Counter[str]) -> dict[str, int]:
    """The counts that are not zero, sorted by name."""
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Read the command line, attack, and return the summary."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no attack after this many minutes"
    )
    parser.add_argument("--attacks", type=int, default=10**9, help="total number of attacks")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2], help="numbers of ranks, used in turn (2)"
    )
    parser.add_argument("--only", default="", help="use only attacks whose name contains this text")
    parser.add_argument(
        "--backend",
        choices=("horovod", "torch"),
        default="horovod",
        help="horovod, started by mpirun, or torch, started by torchrun (horovod)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the attacks (0)")
    parser.add_argument(
        "--summary", type=Path, help="JSON file for the summary; written after a failure too"
    )
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), args.seed, args.only, Ranks(args.backend))
        attacks = 0

        def more() -> bool:
            nonlocal attacks
            attacks += 1
            return attacks <= args.attacks and time.monotonic() < end

        failure: dict[str, str] = {}
        try:
            while attacks < args.attacks and time.monotonic() < end:
                chaos.run(args.ranks[chaos.runs % len(args.ranks)], more)
                print(json.dumps(chaos.summary()), flush=True)
        except BaseException as error:
            failure["failure"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            summary = (
                chaos.summary()
                | {"backend": args.backend, "seed": args.seed, "ranks": args.ranks}
                | failure
            )
            if args.summary:
                args.summary.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    main()
