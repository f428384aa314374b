"""Console output: results to stdout; status lines, errors and progress to stderr.

Text that a file, a bundle or a file name provides may hold control characters, with which it could move the cursor,
rename the terminal or reorder a line. Every function here escapes them, so that none reaches a terminal. Files keep
the exact text.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.storage.atomic import output_errors
from echoquad_runtime.storage.row_names import display_name

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from echoquad_runtime.frames.frame_file import Failure
    from echoquad_runtime.storage.system_files import SkippedEntries

__all__ = [
    "EXIT_PARTIAL",
    "STDOUT",
    "Progress",
    "describe_failure",
    "format_command",
    "format_table",
    "log_to_stderr",
    "mute",
    "print_error",
    "print_failure",
    "print_failures",
    "print_result",
    "print_skipped",
    "print_status",
    "save_json",
]

EXIT_PARTIAL: Final = 5
"""Exit code: done, but some inputs failed."""

STDOUT: Final = Path("stdout")
"""The name of the standard output in error messages."""

_LOGGERS: Final = ("echoquad", "echoquad_deploy", "echoquad_export", "echoquad_train", "echoquad_runtime")
_PLAIN_SECONDS: Final = 10.0  # between two progress lines where no bar can be drawn

_muted = False
_bar: Bar | None = None  # the progress bar on the terminal; lines are printed above it


def mute(muted: bool = True) -> None:
    """Suppress status lines, errors and progress: of several processes under torchrun, one prints."""
    global _muted  # noqa: PLW0603 - a process has one stderr
    _muted = muted


def print_result(text: str) -> None:
    """Print a result to stdout: one or more lines, with escapes for all other characters that are not printable.

    Raises
    ------
    OutputError
        If it cannot be written, for example because the disk behind ``>`` is full.
    """
    with output_errors(STDOUT):
        _print("\n".join(map(display_name, text.split("\n"))), sys.stdout)


def print_status(line: str) -> None:
    """Print one line to stderr, above the progress bar if there is one. A line that cannot be written is dropped."""
    if _muted:
        return
    line = display_name(line)
    with contextlib.suppress(OSError):
        if _bar is not None:
            text = _printable(line, sys.stderr)
            _bar.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            _print(line, sys.stderr)


def print_error(error: EchoQuadError) -> int:
    """Print an error as one line with its code to stderr; return its exit code."""
    print_status(f"error[{error.code}]: {_one_line(error)}")
    return error.exit_code


def describe_failure(failure: Failure) -> str:
    """Return ``FILE: MESSAGE`` in printable characters, whatever the file name contains."""
    return f"{display_name(failure.file)}: {display_name(_one_line(failure.error))}"


def print_failure(failure: Failure) -> None:
    """Print a failed input as one line with the code of its error."""
    print_status(f"error[{failure.error.code}]: {describe_failure(failure)}")


def print_failures(failures: Sequence[Failure], done: int) -> int:
    """Print each failed input on a line of its own; return the exit code if `done` other inputs succeeded."""
    for failure in failures:
        print_failure(failure)
    if not failures:
        return 0
    return EXIT_PARTIAL if done else failures[0].error.exit_code


def print_skipped(skipped: SkippedEntries) -> None:
    """Print how many hidden and system entries a walk skipped, if there are any."""
    if skipped.total:
        print_status(skipped.summary)


def save_json(path: Path | None, content: Any) -> None:
    """Write a JSON file and report it; do nothing without a path.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    if path is not None:
        from echoquad_runtime.storage.atomic import write_json

        write_json(path, content)
        print_status(f"wrote {path.as_posix()}")


def format_command(*words: str) -> str:
    """Return ``echoquad WORDS...`` as a line that can be pasted into a shell: words with spaces or signs are quoted."""
    if os.name == "nt":
        import subprocess

        return subprocess.list2cmdline(["echoquad", *words])
    import shlex

    return shlex.join(["echoquad", *words])


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table as text, one line per row: the first column to the left, the others to the right."""
    rows = [[display_name(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def log_to_stderr() -> None:
    """Print what EchoQuad's packages log at level INFO or above as status lines."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _StatusHandler) for handler in logger.handlers):
            logger.addHandler(_StatusHandler())


class _StatusHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_status(record.getMessage())


class Progress:
    """A progress bar on a terminal; elsewhere a line every ten seconds, so that logs stay readable.

    Parameters
    ----------
    label
        What is being done.
    total
        Number of steps; None if it is not known.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self._label, self._total = display_name(label), total
        self._bar: Bar | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        global _bar  # noqa: PLW0603 - a terminal shows one bar
        if sys.stderr.isatty() and not _muted:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            description = TextColumn("{task.description}", markup=False)
            columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            # stdout carries results, which must not be redirected into the stream of the bar.
            self._bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
            _bar = self._bar
        return self

    def update(self, done: int, total: int | None = None) -> None:
        """Show that `done` steps are finished."""
        self._total = total or self._total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total)
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS:
            self._printed = time.monotonic()
            print_status(f"{self._label}: {done}{f' of {self._total}' if self._total else ''}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _bar  # noqa: PLW0603
        if self._bar is not None:
            self._bar.stop()
            _bar = None


def _print(text: str, stream: TextIO) -> None:
    print(_printable(text, stream), file=stream, flush=True)


def _printable(text: str, stream: TextIO) -> str:
    """Escape characters that the encoding of the stream does not have: Windows code pages, names that are not UTF-8."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
