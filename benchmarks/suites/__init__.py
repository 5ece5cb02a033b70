"""The suites of ``python -m benchmarks``: what is measured, beside which packages.

Each suite reuses the functions of the benchmark that runs alone.
"""
