"""The checks of the doctor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lars.comm.world import World
from launch.acceptance.budget import Budget
from launch.acceptance.rows import FAILED, OK, Row
from launch.doctor.checks import CHECKS, WRONG
from launch.doctor.facts import collect


def run(budget: Budget) -> Iterator[Row]:
    """Check this host."""
    yield from rows_of(World())


def rows_of(world: World) -> Iterator[Row]:
    """Check all ranks. A warning of the doctor is a note of a row that is ok."""
    ranks = world.all_gather_object(collect(world, Path("logs"), None), "acceptance.facts")
    for check in CHECKS:
        found = check(ranks)
        note = f"{found.found}; {found.state}: {found.fix}" if found.fix else found.found
        yield Row(found.what, FAILED if found.state == WRONG else OK, note=note)
