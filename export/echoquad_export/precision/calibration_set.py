"""Calibration: which frames the integers' ranges are taken from, and what ranges these frames show.

The frames are of the training split, never ones that anything is measured on: a range that was fitted to the frames of
a test would flatter it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from echoquad_export.graph.memory_session import open_in_memory
from echoquad_runtime.bundle.onnx_header import INPUT
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.errors import DatasetError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_train.data.dataset import LabelledFrame, Split, load_quadrants, read_split

if TYPE_CHECKING:
    pass

__all__ = ["CALIBRATION_FRAMES", "CalibrationSet", "Ranges", "draw_calibration_set"]

CALIBRATION_FRAMES: Final = 64
"""Frames, of four quadrants each, that calibrate by default."""

SOURCE: Final = "train"
HELD_OUT: Final = ("validation", "test")

BINS: Final = 4096  # of a tensor's histogram, between its extremes


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Frames that integer ranges are taken from.

    Attributes
    ----------
    quadrants
        uint8 [F, 4, S, S], F frames.
    seed
        What they were drawn with.
    sha256
        Of the quadrants' bytes, frame after frame: two exports with the same hash were calibrated on the same frames.
    left_out
        Frames of the training split that are also in a split that is measured on, byte for byte, and were passed over.
    """

    quadrants: npt.NDArray[np.uint8]
    seed: int
    sha256: str
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        """Give what the manifest says of it."""
        return {
            "split": SOURCE,
            "frames": len(self.quadrants),
            "seed": self.seed,
            "sha256": self.sha256,
            "left_out": self.left_out,
        }


def draw_calibration_set(
    data: Path,
    contract: Contract,
    *,
    frames: int = CALIBRATION_FRAMES,
    seed: int = 0,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
) -> CalibrationSet:
    """Draw frames of ``DATA/train``, as many of each class as of another where there are enough.

    Parameters
    ----------
    data
        A data folder. Its other splits are looked at too: a frame that lies in one of them does not calibrate.
    contract
        Gives the classes, the crop and the input size.
    frames
        How many; all there are where there are fewer.
    seed
        Of the draw.
    reading
        How the data's files are read.

    Raises
    ------
    DatasetError
        If there is no training split, or no frame in it that is not also held out.
    """
    label = data.as_posix()
    if not (data / SOURCE).is_dir():
        raise DatasetError(
            f"{label}: no {SOURCE}/ folder found; calibration takes frames of a training split alone (those of a test "
            f"would flatter it); expected a data folder with {SOURCE}/CLASS/ in it"
        )
    split = read_split(data, SOURCE, contract.classes, reading)
    held_out = _contents(data, [frame.path.stat().st_size for frame in split.frames if frame.path.is_file()])
    generator = np.random.default_rng(seed)
    queues: list[list[LabelledFrame]] = []
    for index in range(len(split.classes)):
        members = [frame for frame in split.frames if frame.label == index]
        queues.append([members[i] for i in generator.permutation(len(members))])
    chosen: list[LabelledFrame] = []
    left_out = 0
    while len(chosen) < frames and any(queues):
        for queue in queues:
            while queue and len(chosen) < frames:
                frame = queue.pop()
                if _content(frame.path) in held_out:
                    left_out += 1
                    continue
                chosen.append(frame)
                break
    if not chosen:
        raise DatasetError(
            f"{label}: all {left_out} frames of {SOURCE}/ are also in {' or '.join(f'{name}/' for name in HELD_OUT)}; "
            "calibration needs "
            "frames that nothing is measured on"
        )
    # One class may have no frame left; the ranges are of all frames together.
    present = sorted({frame.label for frame in chosen})
    subset = Split(
        SOURCE,
        tuple(split.classes[index] for index in present),
        tuple(replace(frame, label=present.index(frame.label)) for frame in chosen),
    )
    quadrants = load_quadrants(subset, contract).quadrants
    digest = hashlib.sha256(np.ascontiguousarray(quadrants).tobytes()).hexdigest()
    return CalibrationSet(quadrants, seed, digest, left_out)


def _contents(data: Path, sizes: Sequence[int]) -> set[str]:
    """Give the hashes of all files in the splits that are measured on, as far as a file of `sizes` could equal one."""
    wanted = set(sizes)
    found: set[str] = set()
    for split in HELD_OUT:
        for path in sorted((data / split).rglob("*")):
            if path.is_file() and path.stat().st_size in wanted and (content := _content(path)):
                found.add(content)
    return found


def _content(path: Path) -> str:
    """Hash a file; nothing where it cannot be read: decoding will say so."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


class Ranges:
    """The ranges that a float graph's tensors take on a calibration set; looked for when first asked for.

    Parameters
    ----------
    graph
        A graph that takes `INPUT`.
    quadrants
        uint8 [F, 4, S, S].
    tensors
        Names of float tensors.
    """

    def __init__(self, graph: onnx.ModelProto, quadrants: npt.NDArray[np.uint8], tensors: Sequence[str]) -> None:
        probe = onnx.ModelProto()
        probe.CopyFrom(graph)
        present = {output.name for output in probe.graph.output}
        for name in tensors:
            if name not in present:
                probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        self._session = open_in_memory(probe.SerializeToString())
        self._quadrants, self._tensors = quadrants, list(tensors)

    def range(self, tensor: str, percentile: float | None = None) -> tuple[float, float]:
        """Give a tensor's range, stretched to hold 0, which padding and ReLU need to be exact.

        Parameters
        ----------
        tensor
            Its name.
        percentile
            The share of values, in per cent, that each side keeps: 99.9 gives up the outermost 0.1 %. None keeps all.
        """
        low, high = self._extremes[tensor]
        if percentile is not None and high > low:
            counts = np.cumsum(self._histograms[tensor])
            kept, width = percentile / 100 * counts[-1], (high - low) / BINS
            upper = low + width * (int(np.searchsorted(counts, kept)) + 1)
            lower = low + width * int(np.searchsorted(counts, counts[-1] - kept, side="right"))
            low, high = lower, upper
        return min(low, 0.0), max(high, 0.0)

    @cached_property
    def _extremes(self) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        for name, value in self._values():
            low, high = found.get(name, (np.inf, -np.inf))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
        return found

    @cached_property
    def _histograms(self) -> dict[str, npt.NDArray[np.int64]]:
        """Count values in `BINS` equal bins between a tensor's extremes: a second pass, since it needs these first."""
        found = {name: np.zeros(BINS, np.int64) for name in self._tensors}
        for name, value in self._values():
            low, high = self._extremes[name]
            if high > low:
                found[name] += np.histogram(value, BINS, (low, high))[0]
        return found

    def _values(self) -> Iterator[tuple[str, FloatArray]]:
        for frame in self._quadrants:
            yield from zip(self._tensors, self._session.run(self._tensors, {INPUT: frame[:, None]}), strict=True)
