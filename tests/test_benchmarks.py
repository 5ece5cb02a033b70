"""The benchmarks run. Their results are not checked."""

from __future__ import annotations

import sys

from benchmarks import short_side


def test_short_side_runs(monkeypatch, capsys):
    monkeypatch.setattr(short_side, "photographs", lambda: short_side.generated(1))
    flags = ["--images", "2", "--rounds", "1", "--short-side", "64"]
    monkeypatch.setattr(sys, "argv", ["short_side", *flags])
    short_side.main()
    printed = capsys.readouterr().out
    assert "generated    training" in printed
    assert printed.count("--short-side 64 --quality 90") == 2
