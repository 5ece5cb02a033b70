"""launch/mpirun.sh and torchrun over two hosts: connected network namespaces, each with a host name and an sshd."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import end_of

from conftest import ROOT, TORCHRUN, Ranks, environment, long_flags, run, until

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
    """Two hosts; `environment` makes Open MPI reach them with the right ssh command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespaces = {name: f"{name}-{os.getpid()}" for name in ("node1", "node2")}
        self.hostfile = folder / "hosts"
        agent = str(folder / "ssh")
        self.environment = {"PRTE_MCA_plm_ssh_agent": agent, "OMPI_MCA_plm_rsh_agent": agent}

    def on(self, name: str, *command: str | Path) -> list[str]:
        """A command that runs another command on a host, as words."""
        enter = ["ip", "netns", "exec", self.namespaces[name], "unshare", "--uts"]
        named = f'hostname {name}; exec "$@"'
        return [*enter, "bash", "-c", named, "bash", *(str(word) for word in command)]

    def mpirun(self, *arguments: str | Path) -> list[str]:
        """A command that starts a rank on each host from the first host, as words."""
        line = ["-np", "2", "--hostfile", self.hostfile, "--interface", "eth0"]
        return self.on("node1", ROOT / "launch/mpirun.sh", *line, *arguments)

    def cable(self, state: str) -> None:
        """Connect ("up") or disconnect ("down") the second host."""
        subprocess.run(
            ["ip", "-n", self.namespaces["node2"], "link", "set", "eth0", state], check=True
        )

    def meet(self) -> None:
        """Wait until the first host reaches the second, which takes a moment after connecting it."""
        reach = self.on("node1", self.folder / "ssh", "10.77.0.2", "hostname")
        until(lambda: run(*reach).stdout == "node2\n", 10)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    os.environ["PATH"] += ":/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install openssh-server iproute2")
    if os.getuid() != 0:
        pytest.skip("only root can create network namespaces")
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    folder, (first, second) = hosts.folder, hosts.namespaces.values()
    made = run("ip", "netns", "add", first)
    if made.returncode:
        pytest.skip(f"cannot create network namespaces: {made.stderr}")
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
            config = folder / f"{name}.conf"
            config.write_text(SSHD.format(address=address, folder=folder, name=name))
            sshd = hosts.on(name, shutil.which("sshd"), "-D", "-e", "-f", config)
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
    done = run(*hosts.mpirun("-m", "launch.doctor", "--log-dir", hosts.folder), **hosts.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()[1:3]] == [
        ["0", "node1", "0"],
        ["1", "node2", "0"],
    ]
    assert "2 on 2 host(s)" in done.stdout
    assert "eth0 (10.77.0.1/24)" in done.stdout
    assert "GB/s of bus bandwidth" in done.stdout


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("seconds", "code", "cause"),
    [
        ("6", 6, "error (rank 0 of 2, node1): this rank has waited for the other ranks"),
        pytest.param("600", 7, "lost communication with a remote daemon", marks=pytest.mark.soak),
    ],
)
def test_a_lost_connection_ends_the_job_and_the_job_can_be_resumed(
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
    start = time.monotonic()
    try:
        output = cut.communicate(timeout=90)[0]
    finally:
        cut.kill()
        hosts.cable("up")
    assert cut.returncode == code, output
    assert time.monotonic() - start < 45
    assert cause in output
    assert "node2" in output or code == 6
    assert f"mpirun.sh: exit code {code}" in output
    until(lambda: run("pgrep", "-f", str(tmp_path)).returncode == 1, 30)
    hosts.meet()

    again = run(*job, **hosts.environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming after" in again.stdout
    assert end_of(tmp_path / "run") == unbroken


@pytest.mark.mpi
def test_a_lost_connection_ends_a_job_of_torchrun_with_its_cause(hosts, folders, tmp_path):
    """Each host runs one torchrun. The hosts' names need not be known, because addresses and interface are given."""
    jobs = []
    for number, name in enumerate(hosts.namespaces, start=1):
        words = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job"]
        words += ["--rdzv-endpoint=10.77.0.1:29400", f"--local-addr=10.77.0.{number}"]
        words += [f"--rdzv-conf=is_host={2 - number}", "train_imagenet.py"]
        training = [*long_flags(folders, tmp_path), "--stall-seconds", "25"]
        with (tmp_path / name).open("w") as log:
            jobs.append(
                subprocess.Popen(
                    hosts.on(name, *TORCHRUN, *words, *training),
                    cwd=ROOT,
                    env=environment(GLOO_SOCKET_IFNAME="eth0"),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        saved = tmp_path / "run/checkpoint-1.pth.tar"
        until(lambda: saved.exists() or jobs[0].poll() is not None, 120)
        hosts.cable("down")
        began = time.monotonic()
        code = jobs[0].wait(120)
        seconds = time.monotonic() - began
    finally:
        hosts.cable("up")
        for job in jobs:
            job.kill()
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=False)
    output = (tmp_path / "node1").read_text()
    assert Ranks("torch").code(code, output) == 6, output
    assert saved.exists(), output
    assert 25 < seconds < 90
    assert "error (rank 0 of 2, node1): this rank has waited for the other ranks" in output
