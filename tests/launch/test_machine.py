"""What setup finds on a machine, and what it reports as missing: compiler, make, headers, MPI, CUDA."""

import dataclasses
import os

import pytest
from launch_fixtures import program

from launch.install import horovod_wheel, machine
from launch.install.horovod_wheel import Torch
from launch.install.machine import Cuda, SetupError

CPU_TORCH = Torch("2.13.0+cpu", "20", None)
CUDA_TORCH = Torch("2.13.0", "20", "13.0")


@pytest.fixture
def bin_folder(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def test_a_compiler_that_is_too_old_is_named(bin_folder):
    old = program(bin_folder / "oldcxx", "echo 'unrecognized option -std=c++20' >&2; exit 1\n")
    with pytest.raises(SetupError, match=r"oldcxx cannot build a C\+\+20 .*unrecognized option"):
        machine.describe_compiler({"CXX": str(old), "PATH": os.environ["PATH"]}, "20")


def test_missing_make_and_headers_are_named(bin_folder, monkeypatch, tmp_path):
    with pytest.raises(SetupError, match="apt-get install make"):
        machine.check_build_tools({"PATH": str(bin_folder)})
    paths = {"include": str(tmp_path)}
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: paths)
    program(bin_folder / "make", "")
    with pytest.raises(SetupError, match=r"headers are missing .*apt-get install python3\.\d+-dev"):
        machine.check_build_tools({"PATH": str(bin_folder)})


def test_without_an_mpi_on_the_path_setup_takes_the_wheel(bin_folder, tmp_path):
    program(tmp_path / ".venv/bin/mpicc", "")
    path = f"{tmp_path}/.venv/bin:{bin_folder}"
    assert machine.find_mpi(tmp_path / ".venv", path) is None


def test_the_mpi_on_the_path_is_described(tmp_path, bin_folder):
    for name in ("mpicc", "mpicxx"):
        program(bin_folder / name, "echo c++ -I/opt/mpi/include -L/opt/mpi/lib -lmpi\n")
    mpirun = program(bin_folder / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'\n")
    found = machine.find_mpi(tmp_path / ".venv", str(bin_folder))
    assert found.libraries == ("/opt/mpi/lib",)
    assert "(Open MPI) 4.1.4" in found.identity
    program(mpirun, "echo 'mpirun (Open MPI) 4.1.6'\n")
    assert machine.find_mpi(tmp_path / ".venv", str(bin_folder)).identity != found.identity


def test_an_incomplete_mpi_is_refused(tmp_path, bin_folder):
    program(bin_folder / "mpicc", "")
    with pytest.raises(SetupError, match="mpicxx is not"):
        machine.find_mpi(tmp_path / ".venv", str(bin_folder))


@pytest.fixture
def toolkit(tmp_path, bin_folder):
    """A CUDA 13.0 toolkit; the nvcc on the PATH is a script in another folder."""
    home = tmp_path / "cuda-13.0"
    program(home / "bin/nvcc", f'echo "#$ TOP={home}/bin/.." >&2; echo "release 13.0, V13.0.88"\n')
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    program(bin_folder / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    return home


def test_nvcc_knows_where_the_toolkit_is(toolkit, bin_folder):
    path = f"{bin_folder}:{os.environ['PATH']}"
    assert machine.find_cuda({"PATH": path}) == Cuda(toolkit, "13.0")
    assert machine.find_cuda({"PATH": path, "CUDA_HOME": "/nowhere"}) == Cuda(toolkit, "13.0")


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (CPU_TORCH, "is a CPU build"),
        (dataclasses.replace(CUDA_TORCH, cuda="12.8"), "same major version"),
    ],
)
def test_the_gpu_option_reports_what_is_missing(toolkit, torch, message, monkeypatch, capsys):
    environ = {"CUDA_HOME": str(toolkit), "PATH": ""}
    with pytest.raises(SetupError, match=message):
        horovod_wheel.choose_cuda(True, torch, environ)
    monkeypatch.setattr(horovod_wheel, "has_driver", lambda: True)
    assert horovod_wheel.choose_cuda(None, torch, environ) is None
    assert message in capsys.readouterr().out


def test_cuda_is_used_if_there_is_a_driver_unless_an_option_decides(toolkit, monkeypatch):
    environ = {"CUDA_HOME": str(toolkit), "PATH": ""}
    for driver in (False, True):
        monkeypatch.setattr(horovod_wheel, "has_driver", lambda driver=driver: driver)
        assert horovod_wheel.choose_cuda(False, CUDA_TORCH, environ) is None
        assert horovod_wheel.choose_cuda(True, CUDA_TORCH, environ).home == toolkit
        chosen = horovod_wheel.choose_cuda(None, CUDA_TORCH, environ)
        assert (chosen is not None) == driver
