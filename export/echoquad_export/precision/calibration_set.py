"""The calibration set of int8: training frames, and the ranges that activations take on them.

Frames that a metric is measured on are excluded: ranges fitted to test frames would make the test too favourable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_runtime.bundle.onnx_header import INPUT
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.errors import DatasetError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_train.data.dataset import LabelledFrame, Split, load_quadrants, read_split
from echoquad_train.data.split_folders import split_folders

__all__ = ["CALIBRATION_FRAMES", "CalibrationSet", "Ranges", "draw_calibration_set"]

CALIBRATION_FRAMES: Final = 64
"""Default number of calibration frames, of four quadrants each."""

SOURCE: Final = "train"
HELD_OUT: Final = ("validation", "test")

BINS: Final = 4096  # histogram bins between a tensor's extremes


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Frames that integer ranges are computed from.

    Attributes
    ----------
    quadrants
        uint8 [F, 4, S, S].
    seed
        Seed of the random draw.
    sha256
        Hash of the quadrants' bytes: two exports with the same hash used the same frames.
    left_out
        Number of training frames that were skipped because a held-out split contains the same file.
    """

    quadrants: npt.NDArray[np.uint8]
    seed: int
    sha256: str
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's entry."""
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
    """Draw frames from ``DATA/train``, balanced over the classes as far as the frames allow.

    Parameters
    ----------
    data
        A data folder. Its other splits are read too: a frame that is in one of them is skipped.
    contract
        Supplies classes, crop and input size.
    frames
        Number of frames; all frames if there are fewer.
    seed
        Seed of the random draw.
    reading
        Options for reading the files.

    Raises
    ------
    DatasetError
        If there is no training split, or all its frames are held out too.
    """
    label = data.as_posix()
    folders = split_folders(data)
    if SOURCE not in folders:
        raise DatasetError(
            f"{label}: no {SOURCE}/ folder found; calibration needs training frames, because test frames would make "
            f"the test too favourable; expected a data folder with {SOURCE}/CLASS/"
        )
    split = read_split(data, SOURCE, contract.classes, reading)
    others = [data / folders[name] for name in HELD_OUT if name in folders]
    held_out = _contents(others, [frame.path.stat().st_size for frame in split.frames if frame.path.is_file()])
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
            "calibration needs frames that no metric is measured on; add training frames"
        )
    # A class may have no frame left; ranges are computed over all frames together.
    present = sorted({frame.label for frame in chosen})
    subset = Split(
        SOURCE,
        tuple(split.classes[index] for index in present),
        tuple(replace(frame, label=present.index(frame.label)) for frame in chosen),
    )
    quadrants = load_quadrants(subset, contract).quadrants
    digest = hashlib.sha256(np.ascontiguousarray(quadrants).tobytes()).hexdigest()
    return CalibrationSet(quadrants, seed, digest, left_out)


def _contents(folders: Sequence[Path], sizes: Sequence[int]) -> set[str]:
    """Return the hashes of the files in `folders`; files of other sizes than `sizes` are not read."""
    wanted = set(sizes)
    return {
        _content(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size in wanted
    } - {""}


def _content(path: Path) -> str:
    """Return the SHA-256 of a file, or "" if it cannot be read; decoding reports the error."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


class Ranges:
    """The ranges of a float graph's tensors on a calibration set, computed on first use.

    Frames run one at a time, so memory holds the activations of one frame.

    Parameters
    ----------
    graph
        A graph with the input `INPUT`.
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
        """Return the lowest and the highest value of a tensor, extended to include 0.

        Padding and ReLU are exact only if 0 is in the range.

        Parameters
        ----------
        tensor
            Name of the tensor.
        percentile
            Percentage of the values to keep on each side: 99.9 cuts off the outermost 0.1 %. None keeps all.
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
        """Histograms with `BINS` equal bins between a tensor's extremes; they need a second pass."""
        found = {name: np.zeros(BINS, np.int64) for name in self._tensors}
        for name, value in self._values():
            low, high = self._extremes[name]
            if high > low:
                found[name] += np.histogram(value, BINS, (low, high))[0]
        return found

    def _values(self) -> Iterator[tuple[str, FloatArray]]:
        for frame in self._quadrants:
            yield from zip(self._tensors, self._session.run(self._tensors, {INPUT: frame[:, None]}), strict=True)
