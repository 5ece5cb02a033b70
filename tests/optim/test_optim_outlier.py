"""benchmarks/outlier.py runs, and its figures are as docs/optimizers.md says."""

import re
import sys

import pytest

from benchmarks import outlier
from conftest import ROOT
from lars.names import LAMB_FORMS, LARS_FORMS


@pytest.fixture(scope="module")
def rows() -> dict[str, outlier.Row]:
    return {rule.name: outlier.measure(rule, 100.0) for rule in outlier.rules(momentum=0.9)}


def test_every_form_is_measured(rows: dict[str, outlier.Row]) -> None:
    assert {f"LARS {form}" for form in LARS_FORMS} <= rows.keys()
    assert {f"LAMB {form}" for form in LAMB_FORMS} <= rows.keys()


def test_one_outlier_moves_the_default_form_far(rows: dict[str, outlier.Row]) -> None:
    """The ratio of the next ordinary gradient multiplies the outlier in the momentum buffer."""
    assert rows["LARS nus"].largest > 30 * outlier.ORDINARY


@pytest.mark.parametrize("name", ["mlperf", "optax", "torchlars", "barlowtwins", "nus, clipped"])
def test_other_forms_and_clipping_prevent_that(rows: dict[str, outlier.Row], name: str) -> None:
    assert rows[f"LARS {name}"].largest < 1.5 * outlier.ORDINARY
    assert rows[f"LARS {name}"].displaced < 0.03


def test_the_table_of_the_documentation_is_that_of_the_script(rows: dict[str, outlier.Row]) -> None:
    page = (ROOT / "docs" / "optimizers.md").read_text()
    printed = re.findall(
        r"^\| `?([^|`]+?)`? \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) % \|$", page, re.M
    )
    assert [name for name, *_ in printed] == list(rows)
    for name, largest, times, displaced in printed:
        row = rows[name]
        assert float(largest) == pytest.approx(100 * row.largest, abs=0.06)
        assert float(times) == pytest.approx(row.largest / outlier.ORDINARY, abs=0.06)
        assert float(displaced) == pytest.approx(100 * row.displaced, abs=0.06)


def test_the_command_prints_a_row_for_every_rule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["outlier", "--factor", "10"])
    outlier.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "one gradient x 10, momentum 0.9; relative to ‖w‖"
    assert len(printed) == 2 + len(outlier.rules(momentum=0.9))
