"""Mutated files are read as PIL reads them or refused by name (see tests/fuzz_data.py)."""

from __future__ import annotations

import os
import time

import fuzz_data
import pytest


def test_some_hundred_mutated_files_are_read_as_pil_reads_them_or_refused():
    counts, failures = fuzz_data.fuzz(400, seed=0)
    assert failures == []
    assert sum(counts.values()) == 400
    assert counts["jpeg: read"] > 20
    assert counts["jpeg: refused, as by PIL"] > 20


def crash(*_):
    os.abort()


def hang(*_):
    time.sleep(60)


def raise_key_error(*_):
    raise KeyError(6)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(raise_key_error, "KeyError: 6"), (crash, "ended with -6"), (hang, "longer than 1 s")],
)
def test_each_kind_of_failure_is_counted(monkeypatch, fault, expected):
    monkeypatch.setattr(fuzz_data, "SECONDS", 1)
    monkeypatch.setattr(fuzz_data, "case", fault)
    counts, failures = fuzz_data.fuzz(2, seed=0)
    assert counts == {"FAILED": 2}
    assert [failure.split(":")[0] for failure in failures] == ["case 0", "case 1"]
    assert all(expected in failure for failure in failures)
