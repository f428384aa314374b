"""Write the rows of ``echoquad predict`` to a result file, a pipe or a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from echoquad.cli.framework.console import STDOUT, print_status
from echoquad_runtime.storage.row_names import display_name

if TYPE_CHECKING:
    from echoquad_runtime.results.result_file import ResultFile
    from echoquad_runtime.results.row_formats import Writer

__all__ = ["print_resume_state", "row_writer"]

_MAX_BUFFERED = 1 << 24  # bytes of rows that wait in memory for the progress bar to end; the rest waits in a file


@contextmanager
def row_writer(out: Path | None, rows: ResultFile | None, classes: tuple[str, ...]) -> Iterator[Writer]:
    """Open the writer of the rows. A reader at the other end of a pipe receives each row at once.

    Raises
    ------
    OutputError
        If a row cannot be written.
    """
    from echoquad_runtime.results.row_formats import RowWriter, format_for
    from echoquad_runtime.storage.atomic import output_errors

    if rows is not None:
        yield rows
    elif out is not None:
        with output_errors(out), out.open("wb") as stream:
            yield RowWriter(_FlushedStream(stream), classes, format_for(out))
    elif not sys.stdout.isatty():
        with output_errors(STDOUT):
            yield RowWriter(_FlushedStream(sys.stdout.buffer), classes)
    else:
        from tempfile import SpooledTemporaryFile

        # The progress bar on the same terminal would tear the rows apart: print them after it.
        with output_errors(STDOUT), SpooledTemporaryFile(max_size=_MAX_BUFFERED) as buffer:
            try:
                yield RowWriter(buffer, classes)
            finally:
                buffer.seek(0)
                _print_rows(buffer)


def _print_rows(rows: IO[bytes]) -> None:
    """Print the rows of a CSV file to a terminal, with escapes for characters that are not printable."""
    import io

    text = io.TextIOWrapper(rows, encoding="utf-8", newline="\n")
    row = ""
    for line in text:
        row += line
        if row.count('"') % 2 == 0:  # else the line ends inside of a quoted name
            sys.stdout.buffer.write(display_name(row.removesuffix("\n")).encode() + b"\n")
            row = ""
    text.detach()
    sys.stdout.buffer.flush()


class _FlushedStream:
    """A binary stream that is flushed after each write."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, data: bytes) -> int:
        count = self._stream.write(data)
        self._stream.flush()
        return count


def print_resume_state(rows: ResultFile) -> None:
    """Print how many rows of an interrupted run are kept, and whether the file can be locked."""
    if not rows.certain:
        print_status(
            f"{rows.path.as_posix()}: its file system has no locks; make sure that no other process writes the file"
        )
    if rows.existing_rows:
        torn = f"; {rows.torn_bytes} bytes of an incomplete row after them are dropped" if rows.torn_bytes else ""
        print_status(f"{rows.existing_rows} rows are kept from before{torn}")
