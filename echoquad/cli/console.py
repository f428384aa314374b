"""What the commands print with: errors and progress to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.storage.atomic import output_errors

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from echoquad_runtime.frames.frame_file import Failure

__all__ = ["PARTIAL", "STDOUT", "Progress", "fail", "failure_line", "list_failures", "mute", "note", "say", "table"]

PARTIAL = 5
"""Exit code: done, but some inputs failed."""

STDOUT = Path("stdout")
"""What errors call the standard output."""

_PLAIN_SECONDS = 10.0  # between two lines where no bar can be drawn


_muted = False


def mute(muted: bool = True) -> None:
    """Have `note`, and with it errors and progress, say nothing: one of several processes speaks for all."""
    global _muted  # noqa: PLW0603 - a process has one stderr
    _muted = muted


def say(message: str) -> None:
    """Print a result to stdout.

    Raises
    ------
    OutputError
        If the system refuses: a full disk behind ``>``.
    """
    with output_errors(STDOUT):
        _print(message, sys.stdout)


def note(message: str) -> None:
    """Print a line to stderr; one that cannot be printed stops no work."""
    if _muted:
        return
    with contextlib.suppress(OSError):
        _print(message, sys.stderr)


def fail(error: EchoQuadError) -> int:
    """Print an error as one line to stderr; gives its exit code."""
    note(f"error: {' '.join(str(error).split())}")
    return error.exit_code


def failure_line(failure: Failure) -> str:
    """Say in one line which input failed, and why, whatever signs its name has."""
    from echoquad_runtime.storage.row_names import display_name

    return f"error: {display_name(failure.file)}: {display_name(' '.join(str(failure.error).split()))}"


def list_failures(failures: Sequence[Failure], done: int) -> int:
    """Print each failed input on a line of its own; gives the exit code of a command that did `done` others."""
    for failure in failures:
        note(failure_line(failure))
    if not failures:
        return 0
    return PARTIAL if done else failures[0].error.exit_code


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table as text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then, so that a log stays readable.

    Parameters
    ----------
    label
        What is being done.
    total
        Steps in all; None where it is not known.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self._label, self._total = label, total
        self._bar: Bar | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            # What goes to stdout is a result and must not be drawn into the bar's stream.
            self._bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        return self

    def update(self, done: int, total: int | None = None) -> None:
        """Show that `done` steps are done."""
        self._total = total or self._total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total)
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS:
            self._printed = time.monotonic()
            note(f"{self._label}: {done}{f' of {self._total}' if self._total else ''}")

    def print(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        if self._bar is not None:
            self._bar.console.print(_printable(line, sys.stderr), markup=False, highlight=False, soft_wrap=True)
        else:
            note(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _print(text: str, stream: TextIO) -> None:
    print(_printable(text, stream), file=stream, flush=True)


def _printable(text: str, stream: TextIO) -> str:
    """Give what the stream's encoding has no sign for as an escape: Windows' code pages, names that are not UTF-8."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
