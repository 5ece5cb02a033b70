"""The mathematics of a training step on many ranks, as functions of plain numbers.

The model has four parts:

* The cost of an allreduce by ring or tree, from the latency of a message and the bandwidth of a link (the alpha-beta
  model: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH").
* Two levels of links: inside a host, and between hosts.
* The exchange of gradients in buckets while the backward pass still runs. On a CPU, the exchange also uses cores that
  the backward pass needs.
* The expected time of the slowest rank.

Times are seconds, sizes are bytes, and bandwidths are bytes per second, unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Link(NamedTuple):
    """A connection between two ranks, or between two hosts.

    Attributes:
        latency: Time of one message without content.
        bandwidth: Bytes per second in each direction. Infinity: a link that costs no time.
        launch: Time to start one collective.
        in_flight: Collectives whose latencies overlap, if several are waiting.
        cpu_latency: CPU time of one message without content. It is 0 if GPUs exchange without the host.
        cpu_per_byte: CPU time per byte that a rank sends, which includes receiving and adding a byte.
    """

    latency: float
    bandwidth: float
    launch: float = 0.0
    in_flight: float = 1.0
    cpu_latency: float = 0.0
    cpu_per_byte: float = 0.0


FREE = Link(0.0, math.inf)


class Cores(NamedTuple):
    """The cores of a host, which its processes share equally.

    Attributes:
        cores: Number of cores. Infinity: nothing competes for them, as on a GPU.
        ranks: Ranks of the host.
        others: Other busy processes of the host. A process with a lower priority counts as a part of one.
    """

    cores: float = math.inf
    ranks: int = 1
    others: float = 0.0

    def speeds(self, load: float, *, computing: bool = True) -> tuple[float, float]:
        """The speed of each rank's computation and of its exchange, relative to enough cores.

        The computation wants one core, and the exchange `load` cores. All processes get equal parts, and a process that
        wants less than its part gets what it wants (max-min fairness).

        Example:
            >>> Cores(2, ranks=4).speeds(0.0)
            (0.5, 1.0)
        """
        hungry = self.ranks * computing + self.others
        if self.ranks * load + hungry <= self.cores:
            return 1.0, 1.0
        part = (self.cores - self.ranks * load) / hungry if hungry else 0.0
        if part < load:
            part = self.cores / (self.ranks + hungry)
        return min(1.0, part), min(1.0, part / load) if load else 1.0


UNSHARED = Cores()


class Cost(NamedTuple):
    """What one collective costs.

    Attributes:
        alone: Time from start to end, if no other collective is waiting.
        queued: Time that it adds if others are waiting before it. Latencies of neighbours may overlap.
        busy: CPU time on each rank.
    """

    alone: float
    queued: float
    busy: float

    def __add__(self, other: object) -> Cost:
        """The cost of two parts of a collective that follow each other."""
        assert isinstance(other, Cost)
        return Cost(self.alone + other.alone, self.queued + other.queued, self.busy + other.busy)


NOTHING = Cost(0.0, 0.0, 0.0)


def transfer(link: Link, messages: float, sent: float) -> Cost:
    """The cost of `messages` messages in a row that carry `sent` bytes in all."""
    wait, wire = messages * link.latency, sent / link.bandwidth
    busy = messages * link.cpu_latency + sent * link.cpu_per_byte
    return Cost(wait + wire, wait / link.in_flight + wire, busy)


def ring(ranks: int, size: float, link: Link) -> Cost:
    """An allreduce by ring: 2 (n - 1) messages, of size / n bytes each.

    Example:
        >>> ring(4, 4e6, Link(latency=0.0, bandwidth=1e9)).alone
        0.006
    """
    return transfer(link, 2 * (ranks - 1), 2 * (ranks - 1) / ranks * size)


def tree(ranks: int, size: float, link: Link) -> Cost:
    """An allreduce by two pipelined binary trees, up and down: 2 log2(n) messages deep, 2 size bytes per rank.

    Source: Sanders, Speck and Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan".
    """
    if ranks == 1:
        return NOTHING
    return transfer(link, 2 * math.ceil(math.log2(ranks)), 2 * size)


def allreduce(ranks: int, size: float, link: Link, algorithm: str = "auto") -> Cost:
    """An allreduce on one level. `algorithm` is ring, tree, or auto: the faster one for this size."""
    if ranks == 1:
        return NOTHING
    choices = {"ring": ring, "tree": tree}
    used = choices.values() if algorithm == "auto" else [choices[algorithm]]
    best = min((function(ranks, size, link) for function in used), key=lambda cost: cost.alone)
    return best + Cost(link.launch, link.launch, 0.0)


def hierarchical(
    nodes: int, per_node: int, size: float, inside: Link, network: Link, algorithm: str = "auto"
) -> Cost:
    """An allreduce on two levels: reduce-scatter in each host, allreduce between hosts, all-gather in each host.

    Every rank exchanges its part of size / `per_node` bytes with other hosts at the same time. All of them share the
    network of the host, so `network.bandwidth` is that of the whole host.
    """
    half = transfer(inside, per_node - 1, (per_node - 1) / per_node * size)
    between = allreduce(nodes, size, network, algorithm)
    between = between._replace(busy=between.busy / per_node)  # each rank handles its part
    launch = inside.launch if per_node > 1 and nodes == 1 else 0.0
    return half + half + between + Cost(launch, launch, 0.0)


def overlap(
    backward: float, ready: Sequence[float], costs: Sequence[Cost], cores: Cores = UNSHARED
) -> float:
    """The time of a backward pass and the exchange of its buckets, one bucket after the other.

    Args:
        backward: Time of the backward pass on a core of its own.
        ready: When each bucket is complete, as a share of the backward pass, in rising order.
        costs: The cost of each bucket.
        cores: The cores. The backward pass needs one, and the exchange a part of one. If there are too few, both take
            longer.
    """
    clock = done = 0.0
    alone, _ = cores.speeds(0.0)
    last = NOTHING
    for share, last in zip(ready, costs, strict=True):
        needed = max(0.0, share * backward - done)
        clock, done = clock + needed / alone, done + needed
        # Exchange one bucket while the backward pass goes on.
        left = last.queued
        load = last.busy / left if left else 0.0
        computing, exchanging = cores.speeds(load)
        both = min(
            left / exchanging, (backward - done) / computing
        )  # until one of the two has ended
        clock, done, left = clock + both, done + both * computing, left - both * exchanging
        clock += max(0.0, left) / cores.speeds(load, computing=False)[1]
    return max(clock + (backward - done) / alone, clock + last.alone - last.queued)


def buckets(
    sizes: Sequence[float], ready: Sequence[float], most_bytes: float
) -> tuple[list[float], list[float]]:
    """Group gradients into buckets of at most `most_bytes` (or of one gradient), as `lars.comm.gradients` does.

    Args:
        sizes: Bytes of each gradient, in the order of the backward pass.
        ready: When each gradient is complete, as a share of the backward pass.
        most_bytes: The size of a bucket.

    Returns:
        The bytes of each bucket, and when it is complete.
    """
    held, complete = [0.0], [0.0]
    for size, share in zip(sizes, ready, strict=True):
        if held[-1] and held[-1] + size > most_bytes:
            held.append(0.0)
            complete.append(complete[-1])
        held[-1] += size
        complete[-1] = max(complete[-1], share)
    return held, complete


def expected_maximum(sample: Sequence[float], draws: int) -> float:
    """The expected maximum of `draws` independent draws from a measured sample.

    It never exceeds the largest value of the sample.

    Example:
        >>> expected_maximum([0.0, 1.0], 2)
        0.75
    """
    ordered, size = sorted(sample), len(sample)
    return sum(
        value * ((place / size) ** draws - ((place - 1) / size) ** draws)
        for place, value in enumerate(ordered, start=1)
    )


def interpolate(x: float, points: Sequence[tuple[float, float]]) -> float:
    """A line through neighbouring points (x, y), in rising order. Beyond the ends, the last line goes on.

    A single point gives a line through the origin.
    """
    if len(points) == 1:
        return points[0][1] * x / points[0][0]
    last = len(points) - 2
    place = max((i for i in range(last + 1) if points[i][0] <= x), default=0)
    (x0, y0), (x1, y1) = points[place], points[place + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
