"""Set up .venv for training: ``./launch/setup.sh``, which runs ``python -m launch.install``.

Everything here except `check_allreduce` and `torchvision_on_cpu` runs on a bare Python 3.11, before any package is
installed, and so uses the standard library only.
"""
