"""A report of finished or running runs as one HTML page: ``python -m lars.report RUN --out report.html``."""
