"""The commands launch/test.sh, .ci/run and launch/quickstart.sh."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from launch_fixtures import OPEN_MPI_5, clone_of_scripts, program

from conftest import ROOT, environment, run


@pytest.fixture
def clone(tmp_path):
    return clone_of_scripts(tmp_path)


# test.sh and .ci/run


@pytest.fixture
def tested(clone):
    """A clone whose setup and checks only log their calls."""
    program(clone / "launch/setup.sh", 'echo "setup $*" >>calls\n')
    program(
        clone / ".venv/bin/python",
        'echo "$2 $OMP_NUM_THREADS $*" >>calls; [ "$2" != "$BROKEN" ] || exit 5\n',
    )
    return clone


def test_checks_run_after_setup_and_arguments_go_to_pytest(tested):
    result = run(tested / "launch/test.sh", "-k", "two words", BROKEN="none")
    assert result.returncode == 0, result.stderr
    calls = (tested / "calls").read_text().splitlines()
    assert calls[0] == "setup --dev --dali"
    assert [call.split()[0] for call in calls[1:]] == ["ruff", "ruff", "mypy", "pytest"]
    assert (
        calls[-1] == "pytest 1 -m pytest -n 2 --dist loadfile --no-loadscope-reorder -k two words"
    )


@pytest.mark.parametrize(("broken", "code"), [("ruff", 1), ("mypy", 1), ("pytest", 5)])
def test_a_failed_check_fails_the_command_after_all_have_run(tested, broken, code):
    result = run(tested / "launch/test.sh", BROKEN=broken)
    assert result.returncode == code
    assert f"failed: {broken}" in result.stderr
    assert "pytest" in (tested / "calls").read_text()


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_shown_without_a_setup(tested, option):
    result = run(tested / "launch/test.sh", option)
    assert result.returncode == 0
    assert "usage: launch/test.sh [PYTEST ARGUMENTS]" in result.stdout
    assert not (tested / "calls").exists()


def test_nothing_is_checked_if_the_setup_fails(tested):
    program(tested / "launch/setup.sh", "exit 3\n")
    assert run(tested / "launch/test.sh").returncode == 3
    assert not (tested / "calls").exists()


@pytest.fixture
def ci(clone):
    """``ci(**variables)`` runs .ci/run as root of a machine whose apt-get and dpkg only log their calls."""
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    program(clone / "launch/test.sh", "echo summary; exit 7\n")
    program(clone / ".venv/bin/id", "echo ${ID:-0}\n")
    program(clone / ".venv/bin/dpkg", "exit ${MISSING:-0}\n")
    program(clone / ".venv/bin/apt-get", 'echo "$*" >>calls; exit ${BROKEN:-0}\n')
    path = f"{clone / '.venv/bin'}:{os.environ['PATH']}"

    def call(**variables: str):
        (clone / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            [clone / ".ci/run"], cwd=clone, env=environment(PATH=path, **variables), capture_output=True, text=True,
            timeout=20, check=False,
        )  # fmt: skip
        calls = clone / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_ci_runs_the_users_test_command_and_returns_its_exit_code(ci):
    done, calls = ci()
    assert (done.returncode, done.stdout, calls) == (7, "summary\n", [])


def test_ci_installs_what_the_cluster_tests_need_and_continues_if_that_fails(ci):
    done, calls = ci(MISSING="1")
    assert (done.returncode, done.stderr) == (7, "")
    assert calls[0] == "update -qq"
    assert calls[1].endswith("slurm-wlm munge libpmix-dev openssh-server iproute2")
    done, calls = ci(MISSING="1", BROKEN="1")
    assert done.returncode == 7
    assert "are skipped" in done.stderr
    assert ci(MISSING="1", ID="1000")[1] == []


# quickstart.sh


@pytest.fixture
def trained(clone):
    """A clone whose training ends at once, with the accuracies in the environment variables LARS and SGD."""
    program(clone / "launch/setup.sh", "")
    program(clone / ".venv/bin/mpirun", OPEN_MPI_5)
    program(
        clone / ".venv/bin/python",
        f"""
        [ "$1" = - ] && exec {shlex.quote(sys.executable)} "$@"
        echo "python $*" >>calls
        """,
    )
    script = """
        while [ "$1" != --run-name ]; do
          [ "$1" != --dry-run ] || { echo THE COMMAND; exit; }
          shift
        done
        [ -z "$CRASH" ] || exit "$CRASH"
        case $2 in *lars*) top1=$LARS ;; *) top1=$SGD ;; esac
        mkdir -p "logs/quickstart/$2"
        printf '{"split": "val", "top1": 3.0}\\n{"split": "val", "top1": %s}\\n{"split": "train", "top1": 0}\\n' \
          "$top1" >"logs/quickstart/$2/metrics.jsonl"
    """
    program(clone / "launch/mpirun.sh", script)
    return clone


def test_the_quickstart_ends_with_the_accuracy_and_the_command_for_the_curves(trained):
    result = run(trained / "launch/quickstart.sh", LARS="98.61", SGD="")
    assert result.returncode == 0, result.stderr
    assert (trained / "calls").read_text() == "python -m data.digits logs/quickstart/digits\n"
    assert "quickstart: THE COMMAND" in result.stdout
    assert "LARS at batch size 1024: 98.6 %" in result.stdout
    assert "SGD" not in result.stdout
    folder = str(trained).replace(" ", "\\ ")
    assert f"{folder}/.venv/bin/tensorboard --logdir {folder}/logs/quickstart" in result.stdout


def test_compare_shows_both_accuracies(trained):
    result = run(trained / "launch/quickstart.sh", "--compare", LARS="98.0", SGD="14.42")
    assert result.returncode == 0, result.stderr
    assert "SGD  at batch size 1024: 14.4 %" in result.stdout


def test_a_quickstart_that_learns_too_little_fails(trained):
    result = run(trained / "launch/quickstart.sh", LARS="97.9", SGD="")
    assert result.returncode == 1
    assert "below 98 %" in result.stderr


def test_the_exit_code_of_the_trainer_is_returned(trained):
    assert run(trained / "launch/quickstart.sh", CRASH="75").returncode == 75


def test_unknown_options_are_refused_before_anything_is_done(trained):
    refused = run(trained / "launch/quickstart.sh", "--fast")
    assert refused.returncode == 2
    assert "--fast" in refused.stderr
    assert not (trained / "calls").exists()
