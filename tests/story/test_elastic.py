"""Elastic restarts of torchrun: a host dies, and the run continues on the ranks that are left."""

from __future__ import annotations

import socket
import subprocess
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

import pytest

from conftest import ROOT, TORCHRUN, environment
from data.loader.order import permutation

SCRIPT = ROOT / "tests" / "ranks" / "elastic.py"
TRAIN_SIZE, EFFECTIVE, SEED = 90, 24, 3
STEPS = 4  # of an epoch; the last step is short
DIES_AT = 6  # in the second epoch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def hosts(tmp_path: Path):
    """``hosts(sizes)`` starts an agent of torchrun per host, each with some ranks. The last host dies."""
    agents: list[subprocess.Popen[str]] = []
    address = f"127.0.0.1:{free_port()}"

    def start(sizes: list[int]) -> list[subprocess.Popen[str]]:
        for number, size in enumerate(sizes):
            last = number == len(sizes) - 1
            # The first host serves the others. A dead host is noticed after 10 s, while further hosts may still join.
            settings = f"is_host={int(number == 0)},keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=15"
            rendezvous = [
                f"--nnodes=1:{len(sizes)}", f"--nproc-per-node={size}", "--max-restarts=3", "--rdzv-backend=c10d",
                f"--rdzv-endpoint={address}", f"--rdzv-conf={settings}", "--rdzv-id=job",
            ]  # fmt: skip
            arguments = [tmp_path / "records", tmp_path, DIES_AT, TRAIN_SIZE, EFFECTIVE, SEED]
            agents.append(
                subprocess.Popen(
                    [str(word) for word in (*TORCHRUN, *rendezvous, SCRIPT, *arguments)],
                    cwd=ROOT,
                    env=environment(**({"DOOMED": "1"} if last else {})),
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        return agents

    yield start
    for agent in agents:
        agent.kill()
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=False)


@pytest.mark.parametrize(("sizes", "left"), [([2, 2], 2), ([1, 1, 1, 1], 3)])
def test_after_a_host_has_died_the_others_see_the_rest_of_the_epoch_once(
    hosts, tmp_path, sizes, left
):
    """Four ranks on several hosts, then those of the others. Each step has the samples of a single process."""
    first, *others = hosts(sizes)
    output = first.communicate(timeout=200)[0]
    assert first.returncode == 0, output + others[-1].communicate()[0]
    assert output.count("resuming after") == 1, "the first restart succeeds"
    assert "24 = 4 ranks x 3 micro-batches x 2 samples" in output
    assert f"from 4 ranks to {left}; the effective batch stays the same" in output
    assert f"24 = {left} ranks x {12 // left} micro-batches x 2 samples" in output

    batches: dict[tuple[int, int, int], list[list[int]]] = defaultdict(list)
    for line in (tmp_path / "records").read_text().splitlines():
        size, rank, step, *samples = map(int, line.split())
        batches[size, rank, step].append(samples)
    assert {size for size, _, _ in batches} == {4, left}
    assert {step for size, _, step in batches if size == 4} <= set(range(DIES_AT + 1))
    assert {step for size, _, step in batches if size == left} == {*range(DIES_AT, 2 * STEPS)}
    for step in range(2 * STEPS):
        size = 4 if step < DIES_AT else left
        of_ranks = [batches[size, rank, step] for rank in range(size)]
        # Micro-batch i of a step belongs to rank i % size.
        rounds = zip_longest(*of_ranks, fillvalue=[])
        seen = [sample for turn in rounds for batch in turn for sample in batch]
        first_sample = step % STEPS * EFFECTIVE
        order = permutation(TRAIN_SIZE, SEED, step // STEPS)
        assert seen == order[first_sample : first_sample + EFFECTIVE].tolist()
