"""Two hosts on this machine: network namespaces, connected by a link of a given rate and latency.

`tc` limits the rate (token bucket filter). It can also delay packets (netem), but many kernels are built without that.
A link with latency consists of two tun devices, and a process copies packets between them after a delay.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lars.errors import UsageError

PROGRAMS = ("ip", "tc")
ADDRESSES = ("10.78.0.1", "10.78.0.2")
_PORT = 29_517
# linux/if_tun.h: create a device, of the kind tun without a header before each packet.
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# Large packets, so that the copying process needs little CPU time.
_PACKET = 60_000


class Shape(NamedTuple):
    """A link between two hosts.

    Attributes:
        rate: Bytes per second in each direction. None: not limited.
        delay: Added time of a packet in each direction, in seconds.
    """

    rate: float | None
    delay: float

    def __str__(self) -> str:
        rate = "no limit" if self.rate is None else f"{self.rate * 8 / 1e9:g} Gbit/s"
        return f"{rate}, +{1000 * self.delay:g} ms"


def why_not() -> str | None:
    """Why this machine cannot have such hosts. None if it can."""
    os.environ["PATH"] += ":/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} are not installed (Debian: iproute2)"
    if os.getuid() != 0:
        return "only root can create network namespaces"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    name = f"scaling-test-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return made.stderr.strip()
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextlib.contextmanager
def hosts(shape: Shape) -> Iterator[tuple[str, str]]:
    """Create two hosts with a link, and yield the names of their namespaces.

    Raises:
        UsageError: A command failed, for example because the kernel has no token bucket filter.
    """
    names = (f"scaling1-{os.getpid()}", f"scaling2-{os.getpid()}")
    copier = None
    try:
        for name in names:
            _do(["ip", "netns", "add", name])
        if shape.delay:
            command = [sys.executable, "-m", __name__, *names, str(shape.delay)]
            copier = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert copier.stdout is not None
            if not copier.stdout.readline():
                raise UsageError("--check: the process that delays packets has failed; see above")
        else:
            pair = f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"
            _do(pair.split())
        for name, address in zip(names, ADDRESSES, strict=True):
            for change in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _do(["ip", "-n", name, *change.split()])
            if shape.rate:
                limit = f"tbf rate {8 * shape.rate:.0f}bit burst 128kb latency 200ms"
                _do(["tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *limit.split()])
        yield names
    finally:
        if copier:
            copier.terminate()
            copier.wait(10)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _do(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"--check: {' '.join(command)}: {done.stderr.strip()}")


def start(names: Sequence[str], command: Sequence[str]) -> list[subprocess.Popen[str]]:
    """Start a Python program with one rank on each host, as torchrun would. `command` begins after the python."""
    started = []
    for rank, name in enumerate(names):
        place = {
            "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": _PORT, "RANK": rank, "WORLD_SIZE": len(names),
            "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank, "TORCHELASTIC_RUN_ID": "scaling",
            "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *command, "--host", name],
                env=os.environ | {key: str(value) for key, value in place.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


# ------------------------------------------------------------------------- the process that delays


def copy_packets(names: Sequence[str], delay: float) -> None:
    """Create a device eth0 in both namespaces, and copy packets between them after `delay` seconds, until SIGTERM."""
    ends = [_device(number, name) for number, name in enumerate(names)]
    print("ready", flush=True)
    waiting: list[collections.deque[tuple[float, bytes]]] = [collections.deque() for _ in ends]
    while True:
        due = min((queue[0][0] for queue in waiting if queue), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        readable, _, _ = select.select(ends, [], [], timeout)
        for end in readable:
            packet = os.read(end, 2**16)
            waiting[1 - ends.index(end)].append((time.monotonic() + delay, packet))
        now = time.monotonic()
        for end, queue in zip(ends, waiting, strict=True):
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # the device is not up yet
                    os.write(end, queue.popleft()[1])


def _device(number: int, name: str) -> int:
    """Create a tun device here, and move it to a namespace. Packets can still be read and written here."""
    file, device = os.open("/dev/net/tun", os.O_RDWR), f"tun{number}-{os.getpid()}"[:15]
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    commands = (
        f"ip link set {device} mtu {_PACKET}",
        f"ip link set {device} netns {name}",
        f"ip -n {name} link set {device} name eth0",
    )
    for command in commands:
        subprocess.run(command.split(), check=True)
    return file


if __name__ == "__main__":
    copy_packets(sys.argv[1:3], float(sys.argv[3]))
