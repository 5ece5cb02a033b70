"""Predict how training scales: speed, time and cost on a number of hosts, and what limits them.

    python -m benchmarks.scaling --gpu h100 --network ib-ndr-8 --nodes 1 2 4 8 --batch-size 256
    python -m benchmarks.scaling --gpu a100 --bandwidth 12.5 --latency 30 --nodes 1 4 16 --out scaling.png
    python -m benchmarks.scaling --gpu h100 --minutes --out minutes.png  # which batch size is the fastest?
    python -m benchmarks.scaling --published                             # the model's error on MLPerf's results
    launch/mpirun.sh -np 2 -m benchmarks.scaling --calibrate here.json   # measure this machine
    python -m benchmarks.scaling --machine here.json --gpus-per-node 2 --bandwidth 1.1
    python -m benchmarks.scaling --check                                 # predicted against measured, on this machine

All values that it prints are predictions, except those of --calibrate, and those that are called measured or published.
docs/scaling.md explains the model and its limits.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.scaling import machine as machines
from benchmarks.scaling import presets, tables
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.predict import Job, predict
from data import DataError
from lars import launcher
from lars.errors import UsageError
from lars.names import BACKENDS


def positive(text: str) -> float:
    """Read a number above 0."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def count(text: str) -> int:
    """Read a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def parser() -> argparse.ArgumentParser:
    """All flags."""
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = made.add_argument_group("what to do").add_mutually_exclusive_group()
    what.add_argument(
        "--minutes",
        action="store_true",
        help="predict the time to 75.9 %% top-1 for 8 to 4096 GPUs and for each published batch size",
    )
    what.add_argument("--published", action="store_true", help="compare with published runs")
    what.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure this machine on the ranks of the launcher, and write FILE (JSON)",
    )
    what.add_argument(
        "--check",
        action="store_true",
        help="compare with real ranks on this machine, and with hosts of network namespaces (root only)",
    )
    hosts = made.add_argument_group("the machine")
    hosts.add_argument("--gpu", choices=sorted(presets.GPUS), help="a known GPU (h100)")
    hosts.add_argument(
        "--machine", type=Path, metavar="FILE", help="a file of --calibrate, instead of --gpu"
    )
    hosts.add_argument(
        "--network",
        choices=sorted(presets.NETWORKS),
        help="a known network between hosts (ib-ndr-8; with --machine: the measured one)",
    )
    hosts.add_argument(
        "--bandwidth",
        type=positive,
        metavar="GB/S",
        help="bandwidth of the network of a host in each direction, in GB/s",
    )
    hosts.add_argument(
        "--latency", type=positive, metavar="US", help="latency of the network in microseconds"
    )
    hosts.add_argument(
        "--input-rate",
        type=positive,
        metavar="IMAGES/S",
        help="images/s that the loaders of a host deliver (not a limit, or the measured rate)",
    )
    hosts.add_argument(
        "--cores", type=positive, help="CPU cores of a host, if CPUs compute (the measured number)"
    )
    job = made.add_argument_group("the job")
    job.add_argument(
        "--nodes", type=count, nargs="+", default=[1, 2, 4, 8, 16, 32], help="hosts (1 2 4 8 16 32)"
    )
    job.add_argument(
        "--gpus-per-node",
        type=count,
        help="ranks of each host (8; with --machine: the measured number)",
    )
    size = job.add_mutually_exclusive_group()
    size.add_argument(
        "--batch-size",
        type=count,
        help="samples of each rank in a step (256, or the measured size)",
    )
    size.add_argument("--effective-batch-size", type=count, help="samples of a step over all ranks")
    job.add_argument("--fp16-allreduce", action="store_true", help="send gradients of 2 bytes")
    job.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all ranks")
    job.add_argument(
        "--algorithm",
        choices=("auto", "ring", "tree"),
        default="auto",
        help="algorithm of the exchange between hosts (auto: the faster one)",
    )
    job.add_argument("--epochs", type=positive, default=90.0, help="epochs of the run (90)")
    out = made.add_argument_group("output")
    out.add_argument(
        "--out", type=Path, metavar="FIGURE", help="draw a figure (.png, .pdf or .svg)"
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    measuring = made.add_argument_group("--calibrate and --check")
    measuring.add_argument("--model", default="resnet18", help="network to measure (resnet18)")
    measuring.add_argument(
        "--image-size", type=count, default=64, help="side of the images in pixels (64)"
    )
    measuring.add_argument(
        "--batch-sizes",
        type=count,
        nargs="+",
        default=[4, 8, 16],
        help="samples per rank to measure (4 8 16)",
    )
    measuring.add_argument(
        "--rounds", type=count, default=10, help="measurements of each kind (10)"
    )
    measuring.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="as in the trainer (auto)"
    )
    measuring.add_argument(
        "--repeat", type=count, default=3, help="with --check: how often to run all jobs (3)"
    )
    measuring.add_argument("--name", help="name of the machine (that of the host)")
    measuring.add_argument(
        "--train-dir",
        metavar="DIR",
        help="with --calibrate: also measure how fast these images are loaded",
    )
    measuring.add_argument(
        "--workers", type=int, default=0, help="decoding processes of each rank for --train-dir (0)"
    )
    measuring.add_argument(
        "--host", help=argparse.SUPPRESS
    )  # instead of the host's name, for network namespaces
    measuring.add_argument("--turns", help=argparse.SUPPRESS)  # see `measure.wait_for_turn`
    return made


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine that the flags describe.

    Raises:
        UsageError: Two flags contradict each other.
    """
    if args.machine and args.gpu:
        raise UsageError("--machine and --gpu: use only one of the two flags")
    if args.machine:
        made = machines.load(args.machine)
        network = presets.NETWORKS[args.network] if args.network else made.network
    else:
        network = presets.NETWORKS[args.network or "ib-ndr-8"]
        made = presets.machine(args.gpu or "h100", network)
    if args.bandwidth:
        network = network._replace(bandwidth=args.bandwidth * 1e9)
    if args.latency:
        network = network._replace(latency=args.latency * 1e-6)
    made = made.replace(network=network)
    if args.input_rate:
        made = made.replace(input_rate=args.input_rate)
    if args.cores:
        made = made.replace(cores=args.cores)
    if args.fp16_allreduce:
        made = made.replace(sent=0.5)
    return made


def jobs_of(args: argparse.Namespace, machine: Machine) -> list[Job]:
    """The jobs that the flags describe.

    Raises:
        UsageError: A rank would have no samples.
    """
    per_node = args.gpus_per_node or machine.per_node
    made = []
    for nodes in sorted(set(args.nodes)):
        ranks = nodes * per_node
        batch = args.effective_batch_size or ranks * (args.batch_size or machine.usual_batch)
        if batch < ranks:
            raise UsageError(
                f"--effective-batch-size {batch}: {ranks} ranks need at least one sample each; use fewer --nodes"
            )
        made.append(Job(nodes, per_node, batch, ranks if args.sync_bn else 1, args.algorithm))
    return made


def run(args: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        UsageError: A file cannot be written, or the chosen action does not write it.
    """
    if args.out and (args.published or args.calibrate):
        raise UsageError("--out: --published and --calibrate draw no figure; leave out --out")
    if args.json and args.calibrate:
        raise UsageError("--json: --calibrate writes only its own FILE; leave out --json")
    if args.out:
        from lars.figures import format_of

        format_of(args.out)
    for path in (args.out, args.json, args.calibrate):
        if path and not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist")
    if args.calibrate:
        from benchmarks.scaling import calibrate

        calibrate.main(args)
    elif args.check:
        from benchmarks.scaling import check

        check.main(args)
    elif args.published:
        tables.show_published(args.json)
    elif args.minutes:
        tables.show_minutes(machine_of(args), args.gpus_per_node or 8, args.json, args.out)
    else:
        machine = machine_of(args)
        steps = [predict(machine, job) for job in jobs_of(args, machine)]
        tables.show_steps(machine, steps, args.epochs, args.json)
        if args.out:
            from benchmarks.scaling import draw

            draw.scaling(steps, args.out)


def main() -> None:
    """Read the flags and report errors in one line."""
    args = parser().parse_args()
    try:
        run(args)
    except (UsageError, DataError) as error:
        if launcher.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
