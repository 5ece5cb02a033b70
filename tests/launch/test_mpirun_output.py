"""What launch/mpirun.sh shows of mpirun's output: the reports that it hides, and progress bars."""

import os
import pty
import random
import signal
import subprocess
import sys
import time

import pytest
from launch_fixtures import clone_of_scripts, program
from tqdm import tqdm

from conftest import HEARING_SIGNALS, ROOT, environment, until
from lars.observe.console import bar_options
from launch.mpirun_output import BarPainter, ReportFilter

RULE = b"-" * 74 + b"\n"
EXIT_5 = RULE + (
    b"prterun detected that one or more processes exited with non-zero status,\n"
    b"thus causing the job to be terminated. The first process to do so was:\n\n"
    b"   Process name: [prterun-node-1-22338@1,0]\n   Exit code:    75\n"
) + RULE  # fmt: skip
EXIT_4 = (
    RULE + b"Primary job  terminated normally, but 1 process returned\n"
    b"a non-zero exit code. Per user-direction, the job has been aborted.\n" + RULE + RULE
    + b"mpirun detected that one or more processes exited with non-zero status, thus causing\n"
    b"the job to be terminated. The first process to do so was:\n\n"
    b"  Process name: [[14698,1],0]\n  Exit code:    75\n" + RULE
)  # fmt: skip
ABORT_5 = (
    RULE + b"MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n  Proc: [[57735,1],1]\n  Errorcode: 75\n\n"
    b"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.\n"
    b"You may or may not see output from other processes, depending on\n"
    b"exactly when Open MPI kills them.\n" + RULE
)  # fmt: skip
AFTER_ABORT_5 = (
    RULE + b"prterun has exited due to process rank 1 with PID 0 on node node-1 calling\n"
    b'"abort". This may have caused other processes in the application to be\n'
    b"terminated by signals sent by prterun (as reported here).\n" + RULE
)
ABORT_4 = ABORT_5.replace(b"  Proc: [[57735,1],1]\n  Errorcode: 75", b"with errorcode 75.")
REPORTS = {
    "exit 5": EXIT_5,
    "exit 4": EXIT_4,
    "abort 5": ABORT_5 + AFTER_ABORT_5 + b"\0",
    "abort 4": ABORT_4,
}


def shown(*pieces: bytes) -> bytes:
    """What passes of a stream that arrives in pieces, without pauses."""
    reports = ReportFilter()
    return b"".join([*map(reports.passed, pieces), reports.passed(b"", more=False)])


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_on_a_requested_stop_is_hidden_wherever_it_is_cut(report):
    before, after = b"epoch 1\nbar 10%\rbar 20%\n", b"the end"
    stream = before + report + after
    for cut in range(len(stream)):
        assert shown(stream[:cut], stream[cut:]) == before + after
    assert shown(*(stream[i : i + 1] for i in range(len(stream)))) == before + after


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize("code", [b"1", b"7", b"137", b"175", b"750"])
def test_a_report_on_any_other_exit_code_is_shown(report, code):
    report = report.replace(b"75\n", code + b"\n").replace(b"75.", code + b".").replace(b"\0", b"")
    assert shown(report) == report
    assert shown(report, EXIT_5) == report


def test_a_report_with_the_line_of_a_rank_in_it_is_shown():
    torn = EXIT_5.replace(b"\n\n", b"\nthe only line that says why\n\n")
    assert shown(torn) == torn


def test_no_byte_of_anything_else_is_lost():
    random.seed(0)
    words = [RULE, b"-" * 74, b"\n", b"-", b"a line\n", b"bar\r", EXIT_5[:200], EXIT_5[-90:], ABORT_5[:90],
             AFTER_ABORT_5, "ä█".encode()]  # fmt: skip
    for _ in range(3000):
        stream = b"".join(random.choices(words, k=8))
        cut = sorted(random.sample(range(len(stream) + 1), 3))
        pieces = [stream[a:b] for a, b in zip([0, *cut], [*cut, len(stream)], strict=True)]
        assert shown(*pieces) == stream


def test_only_what_may_be_a_report_waits():
    reports = ReportFilter()
    assert reports.passed(b"bar 1\rbar 2\r") == b"bar 1\rbar 2\r"
    assert reports.passed(b"bar 3\n---") == b"bar 3\n"
    assert reports.passed(b" table\n") == b"--- table\n"
    assert reports.passed(RULE + b"text") == b""
    assert reports.passed(b"", more=False) == RULE + b"text"


def screen(output: bytes) -> list[str]:
    """The lines of a terminal that got this output."""
    lines = [""]
    for part in output.decode().replace("\r\x1b[K", "\v").split("\n"):
        lines[-1] += part
        lines[-1] = lines[-1].rpartition("\v")[2] if "\v" in lines[-1] else lines[-1]
        lines.append("")
    return lines[:-1]


def test_the_bar_stays_below_the_lines():
    painter = BarPainter()
    seen = b""
    for piece, lines in (
        (b"first\n", ["first", ""]),
        (b"\x1ebar 1\n", ["first", "bar 1"]),
        (b"\x1ebar 2\n\x1ebar 3\n", ["first", "bar 3"]),
        (b"second\n", ["first", "second", "bar 3"]),
        (b"third, in", ["first", "second", "third, in"]),
        (b" pieces\n\x1eba", ["first", "second", "third, in pieces", "bar 3"]),
        (b"r 4\n", ["first", "second", "third, in pieces", "bar 4"]),
        (b"\x1e\n", ["first", "second", "third, in pieces", ""]),
        (b"last\n", ["first", "second", "third, in pieces", "last", ""]),
    ):
        seen += painter.painted(piece)
        assert screen(seen) == lines


def test_the_bar_of_the_trainer_arrives_as_lines_and_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("LARS_TERMINAL", "60")
    options = bar_options()
    assert options is not None
    with tqdm(total=4, leave=False, mininterval=0, desc="epoch 1", **options) as bar:
        bar.update(2)
        bar.set_postfix_str("loss 2.3")
        sent = capsys.readouterr()
        shown = screen(BarPainter().painted(sent.err.encode()))[-1]
        assert shown.startswith("epoch 1:  50%|")
        assert shown.endswith("loss 2.3]")
        assert len(shown) == 59
    assert sent.out == ""
    assert all(line.startswith("\x1e") for line in sent.err.split("\n")[:-1])
    painter = BarPainter()
    painter.painted(sent.err.encode())
    assert painter.painted(capsys.readouterr().err.encode()) == b"\r\x1b[K"


BAR = """
    [ "$1" = --version ] && { echo 'mpirun (Open MPI) 5.0.11'; exit; }
    echo "width $LARS_TERMINAL"
    echo "a warning" >&2
    printf '\\036bar of %s\\n' "$LARS_TERMINAL" >&2
    trap 'sleep 1; touch saved; exit 75' USR1
    touch started
    left=100
    while [ "$left" -gt 0 ]; do sleep 0.1; left=$((left - 1)); echo line; done
    exit 1
"""


@pytest.fixture
def in_terminal(tmp_path):
    """``in_terminal(stdout=None)`` starts mpirun.sh in a terminal of 33 columns; returns it and the terminal."""
    clone = clone_of_scripts(tmp_path)
    program(clone / ".venv/bin/mpirun", BAR)
    program(clone / ".venv/bin/python", f'exec {sys.executable} "$@"\n')

    def start(stdout: int | None = None) -> tuple[subprocess.Popen, int]:
        terminal, side = pty.openpty()
        subprocess.run(["stty", "columns", "33"], stdin=side, check=True)
        job = subprocess.Popen(
            [*HEARING_SIGNALS, clone / "launch/mpirun.sh", "-np", "2", "x.py"], cwd=tmp_path, stdin=side,
            stdout=side if stdout is None else stdout, stderr=side, start_new_session=True, env=environment(),
        )  # fmt: skip
        os.close(side)
        until((tmp_path / "started").exists, 10)
        time.sleep(0.5)  # until some lines are shown
        return job, terminal

    return start


def test_the_ranks_get_the_width_of_the_terminal_and_their_bar_is_drawn(in_terminal):
    job, terminal = in_terminal()
    output = os.read(terminal, 10_000)
    assert b"width 33\r\n" in output
    assert b"a warning\r\n" in output
    assert output.endswith(b"bar of 33")
    assert b"\x1e" not in output
    job.terminate()
    assert job.wait(10) == 75


def test_with_stdout_in_a_file_the_bar_is_drawn_and_the_lines_are_in_the_file(
    in_terminal, tmp_path
):
    with (tmp_path / "log").open("w") as log:
        job, terminal = in_terminal(log.fileno())
    output = os.read(terminal, 10_000)
    assert output.endswith(b"a warning\r\nbar of 33")
    job.terminate()
    assert job.wait(10) == 75
    assert (tmp_path / "log").read_text().startswith("width 33\nline\n")


def test_the_ranks_save_after_the_terminal_was_closed(in_terminal, tmp_path):
    job, terminal = in_terminal()
    os.close(terminal)
    os.killpg(job.pid, signal.SIGHUP)
    assert job.wait(10) == 75
    assert (tmp_path / "saved").exists()


def test_without_a_terminal_there_is_no_bar_and_the_start_is_reported_at_once(tmp_path):
    clone = clone_of_scripts(tmp_path)
    program(clone / ".venv/bin/mpirun", BAR)
    job = subprocess.Popen(
        [clone / "launch/mpirun.sh", "-np", "2", "a folder/x.py"], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(LARS_TERMINAL="80"),
    )  # fmt: skip
    assert job.stderr is not None
    started = job.stderr.readline()
    assert started == "mpirun.sh: starting 2 ranks of x.py with Open MPI 5.0.11\n"
    until((tmp_path / "started").exists, 10)
    job.terminate()
    output, errors = job.communicate(timeout=10)
    assert output.startswith("width \n")
    assert errors.endswith("mpirun.sh: the ranks stopped on request (exit code 75)\n")


@pytest.mark.mpi
def test_a_requested_stop_takes_one_line_of_mpirun_sh(tmp_path):
    script = tmp_path / "stop.py"
    script.write_text(
        "import sys, time\ntime.sleep(0.5)\nprint('saved', file=sys.stderr)\nsys.exit(75)\n"
    )
    job = subprocess.run(
        [ROOT / "launch/mpirun.sh", "-np", "2", script], capture_output=True, text=True, timeout=60, check=False,
        env=environment(),
    )  # fmt: skip
    assert job.returncode == 75
    lines = job.stderr.splitlines()
    assert lines[0].startswith("mpirun.sh: starting 2 ranks of stop.py with ")
    assert sorted(set(lines[1:-1])) == ["saved"]
    assert lines[-1] == "mpirun.sh: the ranks stopped on request (exit code 75)"
