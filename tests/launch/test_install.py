"""./launch/setup.sh: which Python it takes, which steps it runs, and what it does with an existing .venv."""

import re
import shutil
import sys
import venv
from pathlib import Path

import pytest
from launch_fixtures import only_path, program

from conftest import ROOT, run
from launch.install import environment, machine, main, packages
from launch.install.environment import Clone
from launch.install.machine import Mpi, SetupError


@pytest.fixture
def bin_folder(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


@pytest.fixture
def clone(tmp_path):
    """A clone whose path has a space."""
    clone = Clone(tmp_path / "a clone")
    clone.logs.mkdir(parents=True)
    return clone


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
    options = ("--gpu", "--cpu", "--no-horovod", "--dali", "--peers", "--dev", "--fresh")
    for option in (*options, "PYTHON="):
        assert option in help_text.stdout


def test_setup_needs_only_the_standard_library():
    """It runs before anything is installed."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import launch.install.main"
    done = run(sys.executable, "-I", "-S", "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [["--gpu", "--cpu"], ["--gpu", "--no-horovod"], ["--nonsense"]])
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


def test_setup_takes_the_next_python_if_the_first_is_too_old(tmp_path, bin_folder):
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
    assert "./launch/setup.sh --no-horovod needs no compiler" in refused.stderr
    assert not (root / ".venv").exists()
    assert not cache.exists()


def test_a_full_disk_is_reported_before_any_slow_step(clone, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.9e9))
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SetupError, match=r"a clone has 1.9 GB free, but 3.0 GB are needed"):
        environment.check_space(clone, tmp_path / "cache", dali=False)
    with pytest.raises(SetupError, match=r"5.2 GB are needed"):
        environment.check_space(clone, tmp_path / "cache", dali=True)
    clone.venv.mkdir()
    (tmp_path / "cache/wheels").mkdir()
    environment.check_space(clone, tmp_path / "cache", dali=True)  # everything is there already


def test_a_missing_network_is_distinguished_from_other_failures(tmp_path):
    log = tmp_path / "download.log"
    log.write_text(
        "Retrying: Failed to establish a new connection\nERROR: No matching distribution\n"
    )
    message = packages.pip_problem(log, tmp_path, ["torch==99"])
    assert f"no network, and the cache {tmp_path} lacks torch==99" in message
    log.write_text("ERROR: No matching distribution found for torch==99\nmore\n")
    message = packages.pip_problem(log, tmp_path, [])
    assert "torch==99" in message
    assert "no network," not in message
    assert str(log) in message


# .venv and its stamp


def wanted(stamp: dict, *options: str, mpi: Mpi | None = None, root: Path = ROOT) -> dict:
    return main.wanted_stamp(Clone(root), main.parse(list(options)), stamp, mpi)


def test_extras_that_were_installed_before_stay_wanted():
    full = wanted({}, "--dev", "--dali", "--peers", "--cpu")
    assert full["extras"] == ["dali", "dev", "horovod", "openmpi", "peers", "train"]
    assert wanted(full) == full, "a plain setup afterwards has nothing to do"
    assert wanted(full, "--gpu") == full | {"gpu": True}
    assert wanted(full | {"gpu": True, "complete": False})["gpu"] is None, "that --gpu failed"
    assert wanted(full, "--fresh") == full | {
        "extras": ["horovod", "openmpi", "train"],
        "gpu": None,
    }
    assert wanted({}, "--dev") != wanted({})


def test_horovod_stays_out_until_it_is_asked_for():
    without = wanted({}, "--no-horovod", "--dev")
    assert without["extras"] == ["dev", "train"]
    assert without["mpi"] == ""
    assert wanted(without) == without
    for option in ("--horovod", "--gpu", "--fresh"):
        assert "horovod" in wanted(without, option)["extras"]
    earlier = {"complete": True, "extras": ["openmpi", "train"]}  # before there was a choice
    assert wanted(earlier)["extras"] == ["horovod", "openmpi", "train"]


def test_another_mpi_or_changed_versions_make_setup_run_again(tmp_path):
    first = wanted({})
    system = wanted(first, mpi=Mpi(Path("/opt/mpi"), "Open MPI 4", libraries=("/opt/mpi/lib",)))
    assert system == first | {"extras": ["horovod", "train"], "mpi": "Open MPI 4"}
    root = copy_of_launch(tmp_path)
    unchanged = wanted(first, root=root)
    assert unchanged["sources"] == first["sources"]
    with open(root / "launch/constraints.txt", "a") as constraints:
        constraints.write("more==1\n")
    assert wanted(first, root=root)["sources"] != first["sources"]


@pytest.fixture
def steps(clone, monkeypatch):
    """The names of the steps that setup takes in `clone`; none of them does anything."""
    taken = []
    for module, name in (
        (environment, "check_space"), (environment, "make_venv"), (packages, "install_packages"),
        (packages, "install_horovod"), (environment, "fix_torchvision"), (environment, "compile_kernels"),
        (packages, "remove"), (main, "check_allreduce"), (main, "delete_everything"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *arguments, name=name: taken.append(name))
    monkeypatch.setattr(environment, "imports_work", lambda *arguments: True)
    monkeypatch.setattr(machine, "describe_compiler", lambda *arguments: "")
    monkeypatch.setattr(main, "Clone", lambda root: clone)
    clone.venv.mkdir()
    for source in (clone.constraints, clone.root / "setup.py"):
        source.parent.mkdir(exist_ok=True)
        source.touch()
    return taken


def test_a_second_run_does_nothing_and_an_unfinished_one_continues(steps, monkeypatch, capsys):
    def interrupted(*arguments):
        raise SetupError("the network failed")

    with monkeypatch.context() as broken:
        broken.setattr(packages, "install_packages", interrupted)
        assert main.main([]) == 1
    assert "setup: the network failed" in capsys.readouterr().err
    steps.clear()
    assert main.main([]) == 0
    assert steps[-3:] == ["fix_torchvision", "compile_kernels", "check_allreduce"]
    steps.clear()
    assert main.main([]) == 0
    assert steps == []
    assert "up to date" in capsys.readouterr().out
    works = iter([False, True])
    monkeypatch.setattr(environment, "imports_work", lambda *arguments: next(works))
    assert main.main([]) == 0
    assert "install_packages" in steps, "setup reinstalls packages that cannot be imported"


def test_if_horovod_cannot_be_built_the_rest_is_installed_and_the_other_way_is_named(
    steps, monkeypatch, capsys
):
    def fails(*arguments):
        raise SetupError("building Horovod failed: no such header")

    engines = []
    monkeypatch.setattr(main, "check_allreduce", lambda clone, horovod: engines.append(horovod))
    with monkeypatch.context() as broken:
        broken.setattr(packages, "install_horovod", fails)
        assert main.main([]) == 1
        refused = capsys.readouterr().err
        assert refused.startswith("\nsetup: building Horovod failed: no such header\n")
        assert "Everything else is installed" in refused
        assert "./launch/setup.sh --no-horovod" in refused
        assert steps[-3:] == ["remove", "fix_torchvision", "compile_kernels"]
        assert main.main(["--no-horovod"]) == 0
        assert main.main([]) == 0
        assert "up to date" in capsys.readouterr().out
        assert main.main(["--horovod"]) == 1, "setup tries to build Horovod again"
    assert main.main([]) == 0
    assert engines == [False, False, False, True]


def test_without_horovod_setup_needs_no_compiler_and_no_mpi(steps, monkeypatch):
    def missing(*arguments):
        raise SetupError("it is missing")

    for name in ("describe_compiler", "check_build_tools", "find_mpi"):
        monkeypatch.setattr(machine, name, missing)
    assert main.main(["--no-horovod"]) == 0
    assert "install_packages" in steps
    assert "install_horovod" not in steps


def test_fresh_deletes_everything_first(steps):
    assert main.main([]) == 0
    steps.clear()
    assert main.main(["--fresh"]) == 0
    assert steps[:3] == ["check_space", "delete_everything", "make_venv"]


@pytest.mark.parametrize("problem", ["", "there is no C compiler"])
def test_slow_optimizers_are_reported_and_setup_continues(clone, capsys, problem):
    program(clone.venv / "bin/python", f"echo {problem}\n")
    environment.compile_kernels(clone)
    message = f"setup: the optimizers will be slow on CPUs: {problem}\n" if problem else ""
    assert capsys.readouterr().out == message


def test_a_foreign_venv_is_left_alone(clone):
    precious = clone.venv / "precious"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(SetupError, match="was not made by setup"):
        environment.make_venv(clone, stamp={})
    assert precious.exists()


@pytest.mark.parametrize("version", ["another-1", sys.implementation.cache_tag])
def test_a_venv_of_another_python_or_place_is_replaced(clone, monkeypatch, version):
    program(clone.venv / "bin/python", f"echo {version}\n")
    made = []
    monkeypatch.setattr(venv, "create", lambda path, with_pip: made.append(path))
    prefix = str(clone.venv) if version == "another-1" else "/elsewhere/.venv"
    environment.make_venv(clone, {"prefix": prefix})
    assert made == [clone.venv]
    assert not (clone.venv / "bin").exists()


def test_a_good_venv_is_kept(clone, monkeypatch):
    program(clone.venv / "bin/python", f"echo {sys.implementation.cache_tag}\n")
    monkeypatch.setattr(venv, "create", lambda path, with_pip: pytest.fail("replaced"))
    environment.make_venv(clone, {"prefix": str(clone.venv)})
    environment.make_venv(clone, {})  # the user's own .venv, with the right Python


def test_every_requirement_is_pinned(monkeypatch):
    monkeypatch.setattr(Clone, "python", sys.executable)
    clone = Clone(ROOT)
    pins = re.findall(r"^([\w.-]+)==\S+$", clone.constraints.read_text(), re.MULTILINE)
    wanted = packages.requirements(clone, ["train", "horovod", "openmpi", "dali", "peers", "dev"])
    assert len(wanted) > 20
    for requirement in wanted:
        assert re.split(r"[<>=]", requirement)[0] in pins
