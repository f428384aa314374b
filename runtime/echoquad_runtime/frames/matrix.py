"""Numeric matrices: frames in ``.txt``, ``.csv``, ``.tsv`` or ``.npy`` files, by one rule for each variation.

In text, a line is a row. Numbers are separated by commas, semicolons, tabs, blanks, or a mixture of these. These lines
are skipped: lines before the first row of numbers, blank lines, lines that begin with ``#``, ``%`` or ``//``, and a
line that states the matrix's own size. The row and column labels of pandas are removed. A comma is the decimal
separator if the row has no point, blanks, tabs or semicolons separate the numbers, and each comma stands between two
digits, at most one per number. NaN, ``NA`` and an empty cell are black, and flagged.

`decoded_frame.grey_scale_factor` maps numbers to grey levels. numpy's ``uint8`` are grey levels, ``uint16`` are 16-bit
grey levels, and ``bool`` is black and white, whatever their range.

A text is read line by line, so that its lines and numbers are counted before there are lists of them. The largest
matrix that is accepted, 36 million numbers in 256 MB, takes 0.9 GB: the bytes of the file and twice 8 bytes per number.
A frame of a numpy file takes at most 0.4 GB.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.decoded_frame import ColourFrame, DecodedFrame, GreyFrame, grey_scale_factor, value_range
from echoquad_runtime.frames.file_access import OpenStream
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, MAX_FRAMES, MAX_PIXELS, NPY_SIGNATURE, Flip

__all__ = ["MAX_NAN", "NAN", "NpyFile", "decode_text", "parse_text"]

NAN: Final = "nan"
"""Flag of a frame with NaN among its numbers; they are black, as is the area beyond a scan's sector."""

MAX_NAN: Final = 0.75
"""Share of NaN from which a matrix is refused: a sector of 75 degrees covers 54 % of its bounding box."""

MAX_LINES: Final = 200_000
"""Lines of a text: those of 36 million numbers in rows of 180, and as few for the tallest frame ever seen."""

MAX_LINE_CHARACTERS: Final = 4 << 20
"""Of a row: 160 000 numbers of 25 characters."""

MAX_NPY_HEADER_BYTES: Final = 10_000
"""The limit of numpy itself, which reads a longer header before it refuses it."""

MAX_FRAME_BYTES: Final = 8 * MAX_PIXELS
"""Of a frame of a numpy file: MAX_PIXELS of float64."""

_MAX_HEADER_LINES: Final = 50
_BAND_VALUES: Final = 1 << 20

_MAX_CELL_CHARACTERS: Final = 400  # the smallest float64 without an exponent takes 330

# One way to match each number: otherwise a cell of many digits takes time by the square of their number.
_NUMBER: Final = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_CELL: Final = re.compile(rf"{_NUMBER}|[+-]?(?:nan|na|n/a|null|inf|infinity)|", re.IGNORECASE)
_MISSING: Final = frozenset({"", "na", "n/a", "null"})
_COMMENT: Final = ("#", "%", "//")
_DECIMAL_COMMA_CELL: Final = re.compile(r"[+-]?\d+(?:,\d+)?(?:e[+-]?\d+)?|nan|na|n/a|null|", re.IGNORECASE)
_SEPARATOR: Final = re.compile(r"\s*[,;]\s*|\s+")
_SEPARATOR_DECIMAL_COMMA: Final = re.compile(r"\s*;\s*|\s+")

_Line = tuple[int, str]
"""Number of a line, counted from 1, and its text."""
_Row = npt.NDArray[np.float64]


# ---------------------------------------------------------------------------------------------- text


def parse_text(data: bytes) -> npt.NDArray[np.float64]:
    """Parse a text file as a matrix: float64 [H, W], NaN where a number is missing.

    Raises
    ------
    FrameFormatError
        If it is not a matrix; the message states the number of the offending line.
    FrameTooLargeError
        If it has too many numbers or lines, or too long a line.
    """
    decimal_comma = _has_decimal_commas(_lines(data))
    rows: list[_Row] = []
    numbers: list[int] = []
    count = 0
    for position, (number, line) in enumerate(_lines(data)):
        values = _parse_row(line, decimal_comma=decimal_comma)
        if values is None:
            if rows:
                raise FrameFormatError(f"line {number} is not a row of numbers; expected {len(rows[0])} numbers")
            if position >= _MAX_HEADER_LINES:
                raise FrameFormatError(f"the first {_MAX_HEADER_LINES} lines hold no row of numbers; expected a matrix")
            continue
        count += len(values)
        if count > MAX_PIXELS:
            raise FrameTooLargeError(f"the file holds more than {MAX_PIXELS // 1_000_000} million numbers")
        rows.append(values)
        numbers.append(number)
    if not rows:
        raise FrameFormatError("the file holds no row of numbers; expected a matrix")
    rows, numbers = _remove_size_line(rows, numbers)
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(rows[0]):
            raise FrameFormatError(
                f"line {number} holds {len(row)} numbers; expected {len(rows[0])}, as in line {numbers[0]}"
            )
    return _remove_labels(np.stack(rows))


def _lines(data: bytes) -> Iterator[_Line]:
    """Yield the lines of a text that are neither blank nor comments, without white space around them."""
    marks = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
    codec = next((codec for mark, codec in marks.items() if data.startswith(mark)), "utf-8")
    if codec == "utf-8" and b"\0" in data:
        raise FrameFormatError("the file is not text; expected rows of numbers")
    number = 0
    with io.TextIOWrapper(io.BytesIO(data), codec, "replace") as stream:
        while text := stream.readline(MAX_LINE_CHARACTERS + 1):
            if len(text) > MAX_LINE_CHARACTERS:
                raise FrameTooLargeError(
                    f"line {number + 1} has more than {MAX_LINE_CHARACTERS} characters; expected one row per line"
                )
            for line in text.splitlines():  # also at the rarer characters that end a line
                number += 1
                if number > MAX_LINES:
                    raise FrameTooLargeError(f"the file has more than {MAX_LINES} lines; expected one row per line")
                if (line := line.strip()) and not line.startswith(_COMMENT):
                    yield number, line


def _has_decimal_commas(lines: Iterable[_Line]) -> bool:
    """Return whether commas are decimal separators in all rows of numbers."""
    found = False
    for _, line in lines:
        if "," not in line:
            continue
        cells = _SEPARATOR_DECIMAL_COMMA.split(line.rstrip("; \t"))
        if not all(_DECIMAL_COMMA_CELL.fullmatch(cell) for cell in cells):
            if _parse_row(line, decimal_comma=False) is None:
                continue  # a header
            return False
        if len(cells) < 2:  # "1,2" is two numbers, since no row of a matrix has a single one
            return False
        found = True
    return found


def _parse_row(line: str, *, decimal_comma: bool) -> _Row | None:
    """Return the numbers of a line; None if it holds anything else."""
    line = line.replace('"', "").strip()
    line = line.rstrip(" \t") if decimal_comma else line
    cells = (_SEPARATOR_DECIMAL_COMMA if decimal_comma else _SEPARATOR).split(line)
    if line[-1:] in ";," and cells[-1] == "":  # a separator at the end of the row
        cells.pop()
    if decimal_comma:
        cells = [cell.replace(",", ".", 1) for cell in cells]
    if not any(cells) or max(map(len, cells)) > _MAX_CELL_CHARACTERS or not all(map(_CELL.fullmatch, cells)):
        return None
    return np.array(["nan" if cell.lower() in _MISSING else cell for cell in cells], np.float64)


def _remove_size_line(rows: list[_Row], numbers: list[int]) -> tuple[list[_Row], list[int]]:
    """Remove a first line that states the numbers of rows and columns, in either order."""
    if len(rows) > 2 and len(rows[0]) == 2 != len(rows[1]):
        size = sorted([float(len(rows) - 1), float(len(rows[1]))])
        if sorted(rows[0].tolist()) == size:
            return rows[1:], numbers[1:]
    return rows, numbers


def _remove_labels(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Remove the row and column numbers that pandas writes; their common corner is empty."""
    if min(matrix.shape) > 2 and np.isnan(matrix[0, 0]):
        across, down = matrix[0, 1:], matrix[1:, 0]
        if np.array_equal(across, np.arange(across.size)) and np.array_equal(down, np.arange(down.size)):
            return matrix[1:, 1:]
    return matrix


# ---------------------------------------------------------------------------------------------- npy


class NpyFile:
    """A numpy file: [H, W] grey, [H, W, 3] RGB, or several frames, [F, H, W] or [F, H, W, 3].

    Parameters
    ----------
    open_stream
        Opens the bytes of the file.

    Attributes
    ----------
    frame_count, stated_frame_count
        Number of frames.
    multi_frame
        Whether the array has an axis of frames.
    in_memory
        False.

    Raises
    ------
    FrameError
        If it is not a numpy file, holds objects or no numbers, is truncated, or its shape is not one of the above.
    """

    in_memory = False

    def __init__(self, open_stream: OpenStream) -> None:
        self._open = open_stream
        with open_stream() as stream:
            self._shape, self._fortran_order, self._dtype = _read_npy_header(stream)
            self._begin = stream.tell()
            size = stream.seek(0, io.SEEK_END) - self._begin
        shape = self._shape
        shown_shape = " x ".join(map(str, shape))
        colour = len(shape) > 2 and shape[-1] in (1, 3)
        self._frame_shape = shape[-3:] if colour else shape[-2:]
        frame_axes = shape[: len(shape) - len(self._frame_shape)]
        self.multi_frame = bool(frame_axes)
        self.frame_count = self.stated_frame_count = math.prod(frame_axes)
        if len(self._frame_shape) < 2 or len(frame_axes) > 1 or not self.frame_count or min(self._frame_shape) < 1:
            raise FrameFormatError(
                f"the array is {shown_shape or 'a number'}; expected [rows, columns], [rows, columns, 3], or several "
                "of these"
            )
        if math.prod(self._frame_shape[:2]) > MAX_PIXELS or self.frame_count > MAX_FRAMES:
            raise FrameTooLargeError(
                f"the array is {shown_shape}; expected at most {MAX_PIXELS // 1_000_000} million pixels and "
                f"{MAX_FRAMES} frames"
            )
        if math.prod(self._frame_shape) * self._dtype.itemsize > MAX_FRAME_BYTES:
            raise FrameTooLargeError(
                f"the array is {shown_shape} of {self._dtype}; expected at most {MAX_FRAME_BYTES // 1_000_000} million "
                "bytes per frame; save it as uint8"
            )
        expected = math.prod(shape) * self._dtype.itemsize
        if size != expected:
            raise FrameDamagedError(
                f"the numbers have {size} bytes; expected {expected}: the file is damaged; copy it again"
            )
        if self._fortran_order and expected > MAX_FILE_BYTES and self.multi_frame:
            raise FrameFormatError("the array is in Fortran order and too large to reorder; save it in C order")
        self._conversion: tuple[float, bool] | None = None

    def decode(self, number: int, flip: Flip) -> DecodedFrame:
        """Decode a frame, counted from 1, and flip it.

        Raises
        ------
        FrameError
            If it cannot be read, or no rule covers its numbers.
        """
        with _memory_errors():
            if self._conversion is None:
                self._conversion = self._choose_conversion()
            return _to_frame(_flip(self._read(number), flip), *self._conversion)

    def _read(self, number: int) -> npt.NDArray[Any]:
        items = math.prod(self._frame_shape)
        size = items * self._dtype.itemsize
        with self._open() as stream:
            if self._fortran_order:
                stream.seek(self._begin)
                data = stream.read(size * self.frame_count)
                array = np.frombuffer(data, self._dtype).reshape(self._shape, order="F")
                frame = array[number - 1] if self.multi_frame else array
                return np.ascontiguousarray(frame).reshape(self._frame_shape)
            stream.seek(self._begin + (number - 1) * size)
            data = stream.read(size)
        if len(data) != size:
            raise FrameDamagedError("the file became shorter while it was read; wait until it is written")
        return np.frombuffer(data, self._dtype).reshape(self._frame_shape)

    def _choose_conversion(self) -> tuple[float, bool]:
        """Return the factor to grey levels and whether NaN is possible.

        The range of all frames decides, so that a clip's dark frame stays dark.
        """
        if self._dtype == np.bool_:
            return 255.0, False
        if self._dtype == np.uint8:
            return 1.0, False
        if self._dtype.kind == "u" and self._dtype.itemsize == 2:
            return 1 / 257, False
        ranges = [value_range(self._read(number)) for number in range(1, self.frame_count + 1)]
        low, high = min(low for low, _, _ in ranges), max(high for _, high, _ in ranges)
        return grey_scale_factor(low, high, all(integers for _, _, integers in ranges)), self._dtype.kind == "f"


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if stream.read(len(NPY_SIGNATURE)) != NPY_SIGNATURE:
        raise FrameFormatError("the file is named .npy but is not a numpy file; expected an array saved by numpy")
    begin = stream.read(6)  # the version, and the length of the header in 2 bytes, or in 4 from version 2 on
    length = int.from_bytes(begin[2:4] if begin[:1] == b"\1" else begin[2:6], "little")
    if length > MAX_NPY_HEADER_BYTES:
        raise FrameDamagedError(
            f"the numpy file's header has {length} bytes; expected at most {MAX_NPY_HEADER_BYTES}; save it again"
        )
    stream.seek(0)
    fault = ""
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read[version](stream)
    except Exception as error:  # numpy evaluates the header as a literal, which can raise anything
        fault = type(error).__name__
    if fault:
        raise FrameDamagedError(f"the numpy file's header cannot be read ({fault}); save it again")
    if dtype.kind not in "buif" or dtype.subdtype is not None or dtype.itemsize > 16:
        raise FrameFormatError("the numpy file holds objects, text or complex numbers; expected plain numbers")
    return tuple(int(side) for side in shape), bool(fortran_order), dtype


# ---------------------------------------------------------------------------------------------- conversion to frames


def decode_text(data: bytes, flip: Flip) -> DecodedFrame:
    """Decode the bytes of a text file as a frame, and flip it.

    Raises
    ------
    FrameError
        As `parse_text`, or if no rule covers its numbers.
    """
    with _memory_errors():
        matrix = parse_text(data)
        if min(matrix.shape) < 2:
            raise FrameFormatError(
                f"the file holds {matrix.shape[0]} rows of {matrix.shape[1]} numbers; expected a matrix, one row per "
                "line"
            )
        return _to_frame(_flip(matrix, flip), grey_scale_factor(*value_range(matrix)), may_be_nan=True)


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise FrameTooLargeError(
            "not enough memory for the matrix; expected a smaller one; save it as uint8"
        ) from error


def _to_frame(values: npt.NDArray[Any], factor: float, may_be_nan: bool) -> DecodedFrame:
    flags: tuple[str, ...] = ()
    levels = values
    if may_be_nan or values.dtype != np.uint8 or factor != 1:
        levels = np.empty(values.shape, np.uint8)
        missing = 0
        rows = max(1, _BAND_VALUES // values[0].size)  # in bands: copies of all numbers would take gigabytes
        for top in range(0, len(values), rows):
            band = values[top : top + rows].astype(np.float64)
            if may_be_nan:
                absent = np.isnan(band)
                missing += int(np.count_nonzero(absent))
                band[absent] = 0
            levels[top : top + rows] = np.floor(band * factor + 0.5)
        if missing:
            if missing >= MAX_NAN * values.size:
                share = missing / values.size
                raise FrameFormatError(f"{share:.0%} of the numbers are NaN; expected less than {MAX_NAN:.0%}")
            flags = (NAN,)
    if levels.ndim == 3 and levels.shape[2] == 3:
        return ColourFrame(np.ascontiguousarray(levels), flags=flags)
    return GreyFrame(np.ascontiguousarray(levels.reshape(levels.shape[:2])), flags)


def _flip(values: npt.NDArray[Any], flip: Flip) -> npt.NDArray[Any]:
    """Flip [H, W, ...]: ``vertical`` swaps top and bottom, ``horizontal`` left and right."""
    if flip in ("vertical", "both"):
        values = values[::-1]
    if flip in ("horizontal", "both"):
        values = values[:, ::-1]
    return values
