"""The acceptance run: does everything work on this machine, and how fast is it?

`main.py` has the flags and the order, `process.py` runs each part in a process of its own, and `report.py` and
`draw.py` show the rows. Each module in `parts/` has one function ``run(budget)``, which yields rows. The table `PARTS`
in `parts/__init__.py` lists them.
"""
