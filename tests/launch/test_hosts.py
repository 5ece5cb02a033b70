"""launch/mpirun.sh over two hosts: network namespaces joined by a cable, with a name and an sshd each."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import end_of

from conftest import ROOT, environment, long_flags, run, until

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "unshare", "mpirun")
SSHD = """\
Port 22
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/{name}.pid
UsePAM no
StrictModes no
"""


class Hosts:
    """Two hosts; `environment` makes Open MPI's daemons use their ssh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespaces = {name: f"{name}-{os.getpid()}" for name in ("node1", "node2")}
        self.hostfile = folder / "hosts"
        agent = str(folder / "ssh")
        self.environment = {"PRTE_MCA_plm_ssh_agent": agent, "OMPI_MCA_plm_rsh_agent": agent}

    def on(self, name: str, *command: str | Path) -> list[str]:
        """The words of a command that runs on a host."""
        there = ["ip", "netns", "exec", self.namespaces[name], "unshare", "--uts"]
        named = f'hostname {name}; exec "$@"'
        return [*there, "bash", "-c", named, "bash", *(str(word) for word in command)]

    def mpirun(self, *arguments: str | Path) -> list[str]:
        """The words of a command that starts a rank on each host, from the first."""
        line = ["-np", "2", "--hostfile", self.hostfile, "--interface", "eth0"]
        return self.on("node1", ROOT / "launch/mpirun.sh", *line, *arguments)

    def cable(self, state: str) -> None:
        """Plug the second host in ("up") or out ("down")."""
        subprocess.run(
            ["ip", "-n", self.namespaces["node2"], "link", "set", "eth0", state], check=True
        )

    def meet(self) -> None:
        """Return when the first host reaches the second, which takes a moment after the cable is plugged in."""
        reach = self.on("node1", self.folder / "ssh", "10.77.0.2", "hostname")
        until(lambda: run(*reach).stdout == "node2\n", 10)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    os.environ["PATH"] += ":/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install openssh-server iproute2")
    if os.getuid() != 0:
        pytest.skip("only the superuser can make network namespaces")
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    folder, (first, second) = hosts.folder, hosts.namespaces.values()
    made = run("ip", "netns", "add", first)
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr}")
    daemons = []
    try:
        subprocess.run(["ip", "netns", "add", second], check=True)
        cable = f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}"
        subprocess.run(cable.split(), check=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
        options = f"-i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        (folder / "ssh").write_text(f'#!/bin/sh\nexec ssh -F none {options} "$@"\n')
        (folder / "ssh").chmod(0o755)
        hosts.hostfile.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        for number, (name, namespace) in enumerate(hosts.namespaces.items(), start=1):
            address = f"10.77.0.{number}"
            for change in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", namespace, *change.split()], check=True)
            said = folder / f"{name}.conf"
            said.write_text(SSHD.format(address=address, folder=folder, name=name))
            sshd = hosts.on(name, shutil.which("sshd"), "-D", "-e", "-f", said)
            daemons.append(subprocess.Popen(sshd, stderr=(folder / f"{name}.log").open("w")))
        hosts.meet()
        yield hosts
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(10)
        for namespace in (first, second):
            run("ip", "netns", "del", namespace)


@pytest.mark.mpi
def test_the_doctor_sees_both_hosts(hosts):
    told = run(*hosts.mpirun("-m", "launch.doctor", "--log-dir", hosts.folder), **hosts.environment)
    assert told.returncode == 0, told.stdout + told.stderr
    assert [line.split()[:3] for line in told.stdout.splitlines()[1:3]] == [
        ["0", "node1", "0"],
        ["1", "node2", "0"],
    ]
    assert "2 on 2 host(s)" in told.stdout
    assert "eth0 (10.77.0.1/24)" in told.stdout
    assert "GB/s of bus bandwidth" in told.stdout


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("seconds", "code", "cause"),
    [
        ("6", 6, "error (rank 0 of 2, node1): this rank has waited for the other ranks"),
        pytest.param("600", 7, "lost communication with a remote daemon", marks=pytest.mark.soak),
    ],
)
def test_a_cut_cable_ends_the_job_and_plugged_in_it_goes_on(
    hosts,
    folders,
    unbroken,
    tmp_path,
    seconds,
    code,
    cause,
):
    job = hosts.mpirun("train_imagenet.py", *long_flags(folders, tmp_path))
    stall = ["--stall-seconds", seconds]
    cut = subprocess.Popen(
        [*job, *stall], cwd=ROOT, env=environment(**hosts.environment), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until((tmp_path / "run/checkpoint-1.pth.tar").exists, 120)
    hosts.cable("down")
    began = time.monotonic()
    try:
        told = cut.communicate(timeout=90)[0]
    finally:
        cut.kill()
        hosts.cable("up")
    assert cut.returncode == code, told
    assert time.monotonic() - began < 45
    assert cause in told
    assert "node2" in told or code == 6
    assert f"mpirun.sh: exit code {code}" in told
    until(lambda: run("pgrep", "-f", str(tmp_path)).returncode == 1, 30)
    hosts.meet()

    again = run(*job, **hosts.environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on after" in again.stdout
    assert end_of(tmp_path / "run") == unbroken
