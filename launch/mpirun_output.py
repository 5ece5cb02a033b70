"""Shows what mpirun prints: draws progress bars, and hides Open MPI's reports on ranks that stopped on request.

Copies stdin to stdout, in order. Two things change:

* mpirun passes on complete lines only. A rank therefore sends each state of its progress bar as a line that begins with
  the character RS. This program draws it at the bottom of the terminal.
* Open MPI reports every exit code other than 0 as a failure, but code 75 is what was asked for. Complete reports that
  name this code are left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import time

BAR_MARK = b"\x1e"
_CLEAR_LINE = b"\r\x1b[K"

_RULE = b"-" * 74 + b"\n"  # the first and the last line of a report


def _report(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern.replace(b"RULE", rb"-{74}\n"), re.VERBOSE)


_STOP = _report(
    rb"""
    (?: RULE Primary\ job\ +terminated\ normally,.*\n .*\n RULE )?   # Open MPI 4
    RULE \w+\ detected\ that\ one\ or\ more\ processes\ exited\ with\ non-zero\ status,.*\n
    .*\n \n \ *Process\ name:.*\n \ *Exit\ code:\ +75\n RULE
    """
)
_ABORT = _report(
    rb"RULE MPI_ABORT\ was\ invoked.*\n (?:\ *Proc:.*\n)? .*[Ee]rrorcode:?\ +75\b.*\n [^-]* RULE"
)
_AFTER_ABORT = _report(rb'RULE \w+\ has\ exited\ due\ to\ process\ rank.*\n "abort"\. [^-]* RULE')
_END = b"\0"  # Open MPI 5 may write this after a report

# mpirun writes a report in one or two pieces. A line of dashes waits this long for the rest.
_HOLD_SECONDS = 0.3


class ReportFilter:
    """Removes the reports from a stream that arrives in pieces.

    Attributes:
        held: What may be the beginning of a report.
    """

    def __init__(self) -> None:
        """Start at the beginning of a line."""
        self.held = b""
        self._in_line = False
        self._aborted = False

    def passed(self, piece: bytes, *, more: bool = True) -> bytes:
        """Return what can be shown now.

        Args:
            piece: The next bytes of the stream.
            more: Whether to wait for the rest of a report. If not, nothing is held.
        """
        rest, out = self.held + piece, b""
        while rest:
            if not self._in_line:
                end = self._end_of_report(rest)
                if end:
                    rest = rest[end:]
                    continue
                if more and (rest.startswith(_RULE) or _RULE.startswith(rest)):
                    break
            end = rest.find(b"\n") + 1 or len(rest)
            out += rest[:end]
            self._in_line = not out.endswith(b"\n")
            rest = rest[end:]
        self.held = rest
        return out

    def _end_of_report(self, text: bytes) -> int:
        """Where a report ends that `text` begins with; 0: it does not begin with one."""
        if text.startswith(_END):
            return len(_END)
        found = _STOP.match(text)
        if not found:
            found = (_AFTER_ABORT if self._aborted else _ABORT).match(text)
            self._aborted = self._aborted or found is not None
        return found.end() if found else 0


class BarPainter:
    """Keeps a progress bar below the lines of a stream that arrives in pieces."""

    def __init__(self) -> None:
        """Start without a bar."""
        self._bar = self._held = b""
        self._in_line = self._drawn = False

    def painted(self, piece: bytes) -> bytes:
        """Return what the terminal has to receive next."""
        out, piece, self._held = self.cleared(), self._held + piece, b""
        for line in re.findall(rb"[^\n]*\n|[^\n]+", piece):
            complete = line.endswith(b"\n")
            if self._in_line or not line.startswith(BAR_MARK):
                out += line
                self._in_line = not complete
            elif complete:
                self._bar = line[len(BAR_MARK) : -1]
            else:
                self._held = line
        bar = b"" if self._in_line else fitting(self._bar)
        self._drawn = bool(bar)
        return out + bar

    def cleared(self) -> bytes:
        """Return what removes the bar from the terminal."""
        return _CLEAR_LINE if self._drawn else b""


def fitting(bar: bytes) -> bytes:
    """The part of the bar that fits into one line of the terminal, whose size may have changed."""
    try:
        columns = os.get_terminal_size(1).columns
    except OSError:
        return bar
    return bar.decode(errors="replace")[: max(columns - 1, 0)].encode()


def write(data: bytes) -> None:
    """Write to stdout. After the terminal was closed, the ranks still need a reader while they save."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(1, data) :]


def main() -> None:
    """Copy until the end of stdin."""
    reports, painter = ReportFilter(), BarPainter()
    deadline, piece = 0.0, b"..."
    while piece:
        held = bool(reports.held)
        wait = max(0.0, deadline - time.monotonic()) if held else None
        arrived = bool(select.select([0], [], [], wait)[0])
        now = time.monotonic()
        if not held:
            deadline = now + _HOLD_SECONDS
        piece = os.read(0, 1 << 16) if arrived else piece
        shown = reports.passed(piece if arrived else b"", more=now < deadline and bool(piece))
        if shown:
            write(painter.painted(shown))
    write(painter.cleared())


if __name__ == "__main__":
    main()
