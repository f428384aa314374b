"""Numeric matrices: frames as ``.txt``, ``.csv``, ``.tsv`` or ``.npy`` files, by one stated rule for each oddity.

Of text, a line is a row. Numbers stand between commas, semicolons, tabs, blanks, or a mixture of these. Lines before
the first row of numbers, blank ones and such as begin with ``#``, ``%`` or ``//`` are passed over, as is a line that
gives the matrix's own size, and what pandas puts before rows and columns. A comma is the decimal sign where no point is
in the row, blanks, tabs or semicolons part the numbers, and each comma stands between two digits, one to a number.
NaN, ``NA`` and an empty cell are black, and flagged.

How numbers become grey levels is in `decoded_frame.grey_of_numbers`; numpy's ``uint8`` are grey levels, its
``uint16`` are 16-bit ones and its ``bool`` black and white, whatever their extremes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.decoded_frame import ColourPixels, GreyPixels, Pixels, extremes, grey_of_numbers
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, MAX_FRAMES, MAX_PIXELS, NPY, Flip

__all__ = ["MAX_NAN", "NAN", "NpyFile", "flipped", "parse_text", "text_pixels"]

NAN: Final = "nan"
"""Flag of a frame some of whose numbers are NaN; they are black, as beyond a scan's sector."""

MAX_NAN: Final = 0.75
"""Share of NaN from which a matrix is refused: a sector of 75 degrees covers 54 % of the box around it."""

_MAX_HEADER_LINES: Final = 50

_NUMBER: Final = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CELL: Final = re.compile(rf"{_NUMBER}|[+-]?(?:nan|na|n/a|null|inf|infinity)|", re.IGNORECASE)
_MISSING: Final = frozenset({"", "na", "n/a", "null"})
_COMMENT: Final = ("#", "%", "//")
_DECIMAL_COMMA: Final = re.compile(r"[+-]?\d+(?:,\d+)?(?:e[+-]?\d+)?|nan|na|n/a|null|", re.IGNORECASE)
_CELLS: Final = re.compile(r"\s*[,;]\s*|\s+")
_CELLS_DECIMAL: Final = re.compile(r"\s*;\s*|\s+")


# ---------------------------------------------------------------------------------------------- text


def parse_text(data: bytes) -> npt.NDArray[np.float64]:
    """Read a matrix from a text file's bytes: float64 [H, W], NaN where a number is missing.

    Raises
    ------
    FrameFormatError
        If it is no matrix; the message has the number of the line where that shows.
    FrameTooLargeError
        If it has too many numbers.
    """
    lines = [(number, line.strip()) for number, line in enumerate(_text(data).splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith(_COMMENT)]
    decimal = _has_decimal_commas(lines)
    rows: list[npt.NDArray[np.float64]] = []
    numbers: list[int] = []
    count = 0
    for position, (number, line) in enumerate(lines):
        values = _values(line, decimal=decimal)
        if values is None:
            if rows:
                raise FrameFormatError(
                    f"line {number} holds something else than numbers; expected {len(rows[0])} numbers"
                )
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
    rows, numbers = _without_size(rows, numbers)
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(rows[0]):
            raise FrameFormatError(
                f"line {number} holds {len(row)} numbers; expected {len(rows[0])}, as in line {numbers[0]}"
            )
    return _without_labels(np.stack(rows))


def _text(data: bytes) -> str:
    for mark, codec in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig")):
        if data.startswith(mark):
            return data.decode(codec, "replace")
    if b"\0" in data:
        raise FrameFormatError("the file is no text; expected rows of numbers")
    return data.decode("utf-8", "replace")


def _has_decimal_commas(lines: list[tuple[int, str]]) -> bool:
    """Look at the rows of numbers; lines that are none in either reading do not count."""
    found = False
    for _, line in lines:
        if "," not in line:
            continue
        cells = _CELLS_DECIMAL.split(line.rstrip("; \t"))
        if not all(_DECIMAL_COMMA.fullmatch(cell) for cell in cells):
            if _values(line, decimal=False) is None:
                continue  # a header
            return False
        if len(cells) < 2:  # "1,2": two numbers, since a matrix has no row of one
            return False
        found = True
    return found


def _values(line: str, *, decimal: bool) -> npt.NDArray[np.float64] | None:
    """Read a line's numbers; None where it holds something else."""
    line = line.replace('"', "").strip()
    line = line.rstrip(" \t") if decimal else line
    last = line[-1:]
    cells = (_CELLS_DECIMAL if decimal else _CELLS).split(line)
    if last in ";," and cells[-1] == "":  # closes the row
        cells.pop()
    if decimal:
        cells = [cell.replace(",", ".", 1) for cell in cells]
    if not cells or not all(map(_CELL.fullmatch, cells)) or not any(cells):
        return None
    return np.array(["nan" if cell.lower() in _MISSING else cell for cell in cells], np.float64)


def _without_size(
    rows: list[npt.NDArray[np.float64]], numbers: list[int]
) -> tuple[list[npt.NDArray[np.float64]], list[int]]:
    """Leave out a first line that says how many rows and columns follow, in whatever order."""
    if len(rows) > 2 and len(rows[0]) == 2 != len(rows[1]):
        size = sorted([float(len(rows) - 1), float(len(rows[1]))])
        if sorted(rows[0].tolist()) == size:
            return rows[1:], numbers[1:]
    return rows, numbers


def _without_labels(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Leave out the columns' and the rows' numbers that pandas writes, and above the latter's column nothing."""
    if min(matrix.shape) > 2 and np.isnan(matrix[0, 0]):
        across, down = matrix[0, 1:], matrix[1:, 0]
        if np.array_equal(across, np.arange(across.size)) and np.array_equal(down, np.arange(down.size)):
            return matrix[1:, 1:]
    return matrix


# ---------------------------------------------------------------------------------------------- npy


class NpyFile:
    """A numpy file: [H, W]; [H, W, 3] in colour; [F, H, W] or [F, H, W, 3], a clip.

    Parameters
    ----------
    open_stream
        Opens its bytes.

    Attributes
    ----------
    count
        Frames.
    several
        Whether the array has an axis of frames.

    Raises
    ------
    FrameError
        If it is no numpy file, holds objects or no numbers, is cut, or has no shape of frames.
    """

    def __init__(self, open_stream: Callable[[], AbstractContextManager[IO[bytes]]]) -> None:
        self._open = open_stream
        with open_stream() as stream:
            shape, self._fortran, self._kind = _npy_header(stream)
            self._begin = stream.tell()
            size = stream.seek(0, io.SEEK_END) - self._begin
        colour = len(shape) > 2 and shape[-1] in (1, 3)
        self._frame = shape[-3:] if colour else shape[-2:]
        before = shape[: len(shape) - len(self._frame)]
        self.several, self.count = bool(before), math.prod(before)
        if len(self._frame) < 2 or len(before) > 1 or not self.count or min(self._frame) < 1:
            raise FrameFormatError(
                f"the array is {' x '.join(map(str, shape)) or 'a number'}; expected [rows, columns], "
                "[rows, columns, 3], or several of these"
            )
        if math.prod(self._frame[:2]) > MAX_PIXELS or self.count > MAX_FRAMES:
            raise FrameTooLargeError(
                f"the array is {' x '.join(map(str, shape))}; expected at most {MAX_PIXELS // 1_000_000} million "
                f"pixels and {MAX_FRAMES} frames"
            )
        expected = math.prod(shape) * self._kind.itemsize
        if size != expected:
            raise FrameDamagedError(
                f"the numbers come to {size} bytes; expected {expected}: the file is damaged; copy it again"
            )
        if self._fortran and (expected > MAX_FILE_BYTES) and self.several:
            raise FrameFormatError(
                "the array's first axis runs fastest, and it is too large to turn; save it in C order"
            )
        self._shape = shape
        self._rule: tuple[float, bool] | None = None

    def pixels(self, number: int, flip: Flip) -> Pixels:
        """Read a frame, counted from 1, and turn it over.

        Raises
        ------
        FrameError
            If it cannot be read, or holds numbers that no rule covers.
        """
        if self._rule is None:
            self._rule = self._choose()
        return _pixels(flipped(self._array(number), flip), *self._rule)

    def _array(self, number: int) -> npt.NDArray[Any]:
        items = math.prod(self._frame)
        size = items * self._kind.itemsize
        with self._open() as stream:
            if self._fortran:
                stream.seek(self._begin)
                data = stream.read(items * self.count * self._kind.itemsize)
                whole = np.frombuffer(data, self._kind).reshape(self._shape, order="F")
                return np.ascontiguousarray(whole[number - 1] if self.several else whole).reshape(self._frame)
            stream.seek(self._begin + (number - 1) * size)
            data = stream.read(size)
        if len(data) != size:
            raise FrameDamagedError("the file became shorter while it was read; wait until it is written")
        return np.frombuffer(data, self._kind).reshape(self._frame)

    def _choose(self) -> tuple[float, bool]:
        """Choose the scale by all frames, or a clip's dark one would be made bright; says whether NaN may be there."""
        if self._kind == np.bool_:
            return 255.0, False
        if self._kind == np.uint8:
            return 1.0, False
        if self._kind.kind == "u" and self._kind.itemsize == 2:
            return 1 / 257, False
        found = [extremes(self._array(number)) for number in range(1, self.count + 1)]
        low, high = min(low for low, _, _ in found), max(high for _, high, _ in found)
        return grey_of_numbers(low, high, all(whole for _, _, whole in found)), self._kind.kind == "f"


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if stream.read(len(NPY)) != NPY:
        raise FrameFormatError("the file is no numpy array, which its name says it is; expected one")
    stream.seek(0)
    fault = ""
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, kind = read[version](stream)
    except Exception as error:  # what it evaluates may be anything
        fault = type(error).__name__
    if fault:
        raise FrameDamagedError(f"the numpy file's header cannot be read ({fault}); save it again")
    if kind.kind not in "buif" or kind.subdtype is not None or kind.itemsize > 16:
        raise FrameFormatError("the numpy file holds objects, text or complex numbers; expected plain numbers")
    return tuple(int(side) for side in shape), bool(fortran), kind


# ---------------------------------------------------------------------------------------------- to pixels


def _pixels(values: npt.NDArray[Any], scale: float, may_be_nan: bool) -> Pixels:
    flags: tuple[str, ...] = ()
    if may_be_nan:
        missing = np.isnan(values)
        if share := float(missing.mean()):
            if share >= MAX_NAN:
                raise FrameFormatError(f"{share:.0%} of the numbers are NaN; expected less than {MAX_NAN:.0%}")
            values, flags = np.where(missing, 0, values), (NAN,)
    levels = np.asarray(values) if values.dtype == np.uint8 and scale == 1 else _scaled(values, scale)
    if levels.ndim == 3 and levels.shape[2] == 3:
        return ColourPixels(np.ascontiguousarray(levels), flags=flags)
    return GreyPixels(np.ascontiguousarray(levels.reshape(levels.shape[:2])), flags)


def _scaled(values: npt.NDArray[Any], scale: float) -> npt.NDArray[np.uint8]:
    return np.floor(values.astype(np.float64) * scale + 0.5).astype(np.uint8)


def text_pixels(data: bytes, flip: Flip) -> Pixels:
    """Read a text file's bytes as a frame, and turn it over.

    Raises
    ------
    FrameError
        As `parse_text`, or if it holds numbers that no rule covers.
    """
    matrix = parse_text(data)
    if min(matrix.shape) < 2:
        raise FrameFormatError(
            f"the file holds {matrix.shape[0]} rows of {matrix.shape[1]} numbers; expected a matrix, one row a line"
        )
    scale = grey_of_numbers(*extremes(matrix))
    return _pixels(flipped(matrix, flip), scale, may_be_nan=True)


def flipped(values: npt.NDArray[Any], flip: Flip) -> npt.NDArray[Any]:
    """Turn [H, W, ...] over: ``vertical`` swaps top and bottom, ``horizontal`` left and right."""
    if flip in ("vertical", "both"):
        values = values[::-1]
    if flip in ("horizontal", "both"):
        values = values[:, ::-1]
    return values
