"""Imports between the folders of `data` go down only."""

from __future__ import annotations

import ast

from conftest import ROOT

# A folder may import the folders in its row, and what `data` itself defines. The tools (check,
# make_tfrecords, prepare, digits, synthetic) lie above all of these.
MAY_IMPORT = {
    "sources": {"layouts", "loader", "samples", "pixels", "digits"},
    "layouts": {"samples"},
    "loader": {"samples", "pixels", "tooling"},
    "samples": {"pixels", "tooling"},
    "pixels": set(),
    "tooling": set(),
}


def imported_folders(path) -> set[str]:
    """Return the folders and tools of `data` that a file imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = [name.split(".")[1] for name in found if name.startswith("data.")]
    return {name for name in names if name[0].islower()}  # names of `data` itself are capitalised


def test_imports_between_the_folders_go_down_only():
    for folder, allowed in MAY_IMPORT.items():
        files = list((ROOT / "data" / folder).glob("*.py"))
        assert files
        for path in files:
            assert imported_folders(path) <= allowed | {folder}, path
