"""Benchmarks: each module runs alone, and ``python -m benchmarks`` runs all of them beside other packages."""
