"""Compare the speed of the trainer with loops that run only forward, backward and the optimizer's step.

    python -m benchmarks.training                      # the whole table, ResNet-50 at 128 px
    python -m benchmarks.training --rounds 3 --steps 6

A bare loop runs the same network in the same layout with torch's fused SGD on tensors that are already in memory.
The first figure comes from one process in which steps of the bare loop and of the trainer alternate. So does the cost
of observing, from two trainers of which one has all observers of a run. The other figures come from separate processes
with one thread per rank. They run one after the other, round by round, so that
a slow moment of the machine affects all of them alike. The table shows medians of images/s and of the ratios of each
round, with the range of single rounds. `two bare loops` are two such processes at the same time. They share the
machine's memory bus as two ranks do, but exchange nothing. The other figures of 2 ranks use Horovod over MPI, Horovod
over Gloo (started by horovodrun), or torch.distributed with Gloo. Rows of Horovod are left out if it is not installed.

The last part reproduces the style of the published trainer on a small network: two scalar allreduces per micro-batch
for its metrics, Horovod's optimizer wrapper, and a LARS that reads every norm back to the host. Horovod's fusion buffer
has its default size in this part.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.observing import observed_steps
from benchmarks.processes import ROOT, TORCHRUN, mpirun
from benchmarks.rounds import alone, in_turn, timed

ACCUMULATION = 4  # micro-batches per step of the small network


def small_net() -> nn.Module:
    """Build a small convolutional network for images of 32 px."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, 10))


# ------------------------------------------------------------------------------------- processes


def bare_loop(args: argparse.Namespace) -> None:
    """Run forward, backward and step in this process, and print the speed."""
    from lars.learner.device import keep_freed_memory

    if args.allocator == "tuned":
        keep_freed_memory()
    print_speed(bare_step(args), args.steps, args.batch_size)


def trainer_step(args: argparse.Namespace) -> Callable[[], object]:
    """Return a step of the trainer on images that are already in memory."""
    from lars import benchmark
    from lars.comm.world import World
    from lars.config import Config
    from lars.config.plan import make_plan
    from lars.learner.build import build_model, make_learner
    from lars.learner.classification import Classification

    config = Config(model=args.model, batch_size=args.batch_size)
    plan = make_plan(config, size=1, train_size=args.batch_size)
    task = Classification(mean=(127.5,) * 3, std=(64.0,) * 3)
    learner = make_learner(
        config, plan, task, build_model(config, 1000), World(), torch.device("cpu")
    )
    batch = benchmark.noise(args.batch_size, args.image_size, 1000)
    return lambda: learner.step(learner.prepared([batch]), 0, count=1, samples=args.batch_size)


def pair(args: argparse.Namespace) -> None:
    """Alternate steps of a bare loop and of the trainer, and print the median ratio of their times."""
    from lars.learner.device import keep_freed_memory

    keep_freed_memory()
    steps = {"bare": bare_step(args), "trainer": trainer_step(args)}
    turns = [alone(name, timed(step)) for name, step in steps.items()]
    found = in_turn(turns, args.steps + 1)
    ratios = [bare / own for bare, own in zip(found["bare"], found["trainer"], strict=True)][1:]
    print(f"images/s {statistics.median(ratios):.4f}")  # not a speed, but `speeds` reads this line


def observed(args: argparse.Namespace) -> None:
    """Alternate steps with and without observers, and print the ratio of their times.

    The first 10 steps do not count, because the layers are read more often in them.
    """
    from lars.learner.device import keep_freed_memory

    keep_freed_memory()
    with observed_steps(args) as ten_steps:
        ten_steps()
        times = [ten_steps() for _ in range(max(args.steps * 4 // 10, 1))]
    bare, watched = (sum(seconds[which] for seconds in times) for which in (False, True))
    print(f"images/s {bare / watched:.4f}")  # not a speed, as in `pair`


def fused_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the bare loop."""
    return torch.optim.SGD(params, 0.01, 0.9, weight_decay=1e-4, fused=True)


def bare_step(
    args: argparse.Namespace,
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = fused_sgd,
) -> Callable[[], None]:
    """Return a step (forward, backward, update) on tensors that are already in memory."""
    from lars.models import build

    model = build(args.model, 1000).to(memory_format=torch.channels_last).train()
    optimizer = optimizer_of(list(model.parameters()))
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (args.batch_size,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def small_loop(args: argparse.Namespace) -> None:
    """Take steps of several micro-batches with a small network, in the style of this or the published trainer."""
    from lars.comm import start

    world = start.join(on_cpu=args.style == "ours")
    torch.manual_seed(0)
    model = small_net()
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    step = {"ours": our_step, "published": published_step}[args.style](world, model, images, labels)
    print_speed(step, args.steps, 1, show=world.is_root)


def our_step(
    world: object, model: nn.Module, images: Tensor, labels: Tensor
) -> Callable[[], object]:
    """Return a step of this trainer."""
    from lars.comm.gradients import make_gradients
    from lars.comm.world import World
    from lars.learner.classification import Classification
    from lars.learner.learner import Learner
    from lars.optim import create_optimizer

    assert isinstance(world, World)
    optimizer = create_optimizer("lars", model, lr=0.01, weight_decay=1e-4)
    gradients = make_gradients(model.parameters(), world)
    learner = Learner(model, optimizer, gradients, Classification(), lr_at=lambda _: 0.01)
    samples = len(labels) * ACCUMULATION * world.size
    batches = [(images, labels)] * ACCUMULATION
    return lambda: learner.step(batches, 0, count=ACCUMULATION, samples=samples)


def published_step(
    world: object, model: nn.Module, images: Tensor, labels: Tensor
) -> Callable[[], object]:
    """Return a step in the style of the published trainer."""
    import horovod.torch as hvd

    from benchmarks.optimizer import NusLars, parameter_groups

    class FromGroups(NusLars):
        """An optimizer that Horovod's wrapper can rebuild from its groups alone."""

        def __init__(self, groups: list[dict[str, object]]) -> None:
            super().__init__(groups, {"lr": 0.01})

    optimizer = hvd.DistributedOptimizer(
        FromGroups(parameter_groups(list(model.parameters()))),
        named_parameters=model.named_parameters(),
        backward_passes_per_step=ACCUMULATION,
        op=hvd.Average,
    )

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(ACCUMULATION):
            output = model(images)
            loss = nn.functional.cross_entropy(output, labels)
            hits = output.argmax(1).eq(labels).float().mean()
            for name, value in (("loss", loss), ("accuracy", hits)):
                hvd.allreduce(value.detach().cpu(), name=name).item()
            (loss / ACCUMULATION).backward()
        optimizer.step()

    return step


def print_speed(step: Callable[[], object], steps: int, samples: int, *, show: bool = True) -> None:
    """Take steps and print the samples per second."""
    times = []
    for number in range(steps + 3):
        start = time.perf_counter()
        step()
        if number >= 3:
            times.append(time.perf_counter() - start)
    if show:
        print(f"images/s {samples / statistics.mean(times):.4f}")


# ------------------------------------------------------------------------------------ measurement


def speeds(*commands: list[str]) -> float:
    """Run commands at the same time, and return the sum of their images/s."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit("a part of the benchmark failed: see its message above")
    return sum(float(re.findall(r"images/s +([\d.]+)", output)[0]) for output in outputs)


def measure(args: argparse.Namespace) -> None:
    """Run all parts in rounds, and print the table."""
    shape = [f"--model={args.model}", f"--image-size={args.image_size}"]
    shape += [f"--batch-size={args.batch_size}"]
    module = [sys.executable, "-m", "benchmarks.training"]
    bare = [*module, "--part=bare", f"--steps={args.steps}", *shape]
    trainer = [sys.executable, "train_imagenet.py", "--benchmark=noise", "--no-cuda", *shape]
    trainer += [f"--max-steps={args.steps}"]
    small = [*module, "--part=small", f"--steps={20 * args.steps}"]
    two, torchrun = mpirun(2), [*TORCHRUN, "2"]
    over_gloo = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", "2"]
    parts: dict[str, list[list[str]]] = {
        "bare loop": [bare],
        "trainer's step / bare loop's, in turn": [
            [*module, "--part=pair", f"--steps={args.steps}", *shape]
        ],
        "step without observers / step with, in turn": [
            [*module, "--part=observed", f"--steps={args.steps}", *shape]
        ],
        "bare loop, torch's allocator as it starts": [[*bare, "--allocator=default"]],
        "trainer": [trainer],
        "two bare loops": [bare, bare],
        "trainer, 2 ranks": [[*two, *trainer[1:]]],
        "trainer, 2 ranks, Horovod over Gloo": [[*over_gloo, *trainer]],
        "trainer, 2 ranks, torch.distributed": [[*torchrun, *trainer[1:]]],
        "small net, 2 ranks, published style": [[*two, *small[1:], "--style=published"]],
        "small net, 2 ranks": [[*two, *small[1:]]],
        "small net, 2 ranks, torch.distributed": [[*torchrun, *small[1:]]],
    }
    ratios = {
        "bare loop, torch's allocator as it starts": "bare loop",
        "trainer": "bare loop, torch's allocator as it starts",
        "trainer, 2 ranks": "two bare loops",
        "trainer, 2 ranks, Horovod over Gloo": "two bare loops",
        "trainer, 2 ranks, torch.distributed": "two bare loops",
        "small net, 2 ranks": "small net, 2 ranks, published style",
        "small net, 2 ranks, torch.distributed": "small net, 2 ranks",
    }
    if not two:
        print("Horovod or its mpirun is not installed, so the rows of Horovod are left out.")
        parts = {n: c for n, c in parts.items() if "2 ranks" not in n or "torch" in n}
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.rounds):
        for name, commands in parts.items():
            found[name].append(speeds(*commands))
    size = f"{args.image_size} px, micro-batches of {args.batch_size}"
    print(f"torch {torch.__version__}, {args.model}, {size}, {args.rounds} rounds\n")
    for name, values in found.items():
        unit = "steps/s" if name.startswith("small") else "images/s" if "/" not in name else ""
        line = f"{name:44}{statistics.median(values):9.3f} {unit:8}"
        if ratios.get(name) in found:
            pairs = [a / b for a, b in zip(values, found[ratios[name]], strict=True)]
            line += f"  {statistics.median(pairs):.3f} ({min(pairs):.2f} to {max(pairs):.2f}) x {ratios[name]}"
        print(line)


def main() -> None:
    """Read the flags, then measure, or run one of the measured parts."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of rounds; each times every candidate (5)"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps per round (10)")
    parser.add_argument("--model", default="resnet50", help="network (resnet50)")
    parser.add_argument(
        "--image-size", type=int, default=128, help="side of the images in pixels (128)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="samples per micro-batch (16)")
    parser.add_argument(
        "--part", choices=("bare", "pair", "observed", "small"), help=argparse.SUPPRESS
    )
    parser.add_argument("--allocator", default="tuned", help=argparse.SUPPRESS)
    parser.add_argument("--style", default="ours", help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = {"bare": bare_loop, "pair": pair, "observed": observed, "small": small_loop}
    parts.get(args.part, measure)(args)


if __name__ == "__main__":
    main()
