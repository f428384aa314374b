"""Where ``echoquad predict`` puts its rows: a result file, a pipe, or a terminal that a bar is drawn on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from echoquad.cli.console import STDOUT, note

if TYPE_CHECKING:
    from echoquad_runtime.results.result_file import ResultFile
    from echoquad_runtime.results.row_formats import Writer

__all__ = ["rows_writer", "tell_of"]

_MOST_HELD = 1 << 24  # bytes of rows that wait in memory for the bar to end; what is more waits in a file


@contextmanager
def rows_writer(out: Path | None, rows: ResultFile | None, classes: tuple[str, ...]) -> Iterator[Writer]:
    """Give what takes the rows; what reads them at the other end of a pipe has each as soon as it is there."""
    from echoquad_runtime.results.row_formats import CsvWriter, writer_for
    from echoquad_runtime.storage.atomic import output_errors

    if rows is not None:
        yield rows
    elif out is not None:
        with output_errors(out), out.open("wb") as stream:
            yield writer_for(out)(_Flushed(stream), classes)
    elif not sys.stdout.isatty():
        with output_errors(STDOUT):
            yield CsvWriter(_Flushed(sys.stdout.buffer), classes)
    else:
        import shutil
        from tempfile import SpooledTemporaryFile

        # Rows would be torn by the bar that is drawn on the same terminal: they follow it.
        with output_errors(STDOUT), SpooledTemporaryFile(max_size=_MOST_HELD) as held:
            try:
                yield CsvWriter(held, classes)
            finally:
                held.seek(0)
                shutil.copyfileobj(held, sys.stdout.buffer)
                sys.stdout.buffer.flush()


class _Flushed:
    """A stream whose reader does not wait for what lies in a buffer."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, data: bytes) -> int:
        count = self._stream.write(data)
        self._stream.flush()
        return count


def tell_of(rows: ResultFile) -> None:
    """Say what was found in place of an empty file."""
    if not rows.certain:
        note(f"{rows.path.as_posix()}: its disk knows no locks; see to it that no other process writes the file")
    if rows.existing_rows:
        torn = f"; {rows.torn_bytes} bytes behind them are torn, and dropped" if rows.torn_bytes else ""
        note(f"{rows.existing_rows} rows are there from before{torn}")
