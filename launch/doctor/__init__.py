"""Diagnose this machine, or all ranks that a launcher started: ``python -m launch.doctor``.

Each rank collects its `facts`. The `checks` are functions of the facts of all ranks. `main` meets the other ranks,
measures the network between them and prints the result.
"""
