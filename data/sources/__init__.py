"""What a training script names: each source is a frozen dataclass of flags (see `data`).

Importing a source loads neither torch nor NumPy, so that ``--help`` is fast.
"""
