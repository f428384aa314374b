"""Frame readers: from a file to the quadrants that the network takes, with the frame's quality flags.

`read_quadrants` is the only implementation. A worker calls it in its own thread, or in a process of its own
(`echoquad_runtime.predict.reader_process.ReaderProcess`), so both give the same quadrants.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.quality_flags import quality_flags
from echoquad_runtime.frames.reader import load_checked
from echoquad_runtime.quadrants import Grey, frame_quadrants

__all__ = ["Flags", "FrameReader", "cut_quadrants", "read_quadrants"]

Flags = tuple[str, ...]
"""Quality flags of a frame, as `echoquad_runtime.frames.quality_flags` names them."""


class FrameReader(Protocol):
    """Reads frames for a worker, outside the worker's thread.

    Attributes
    ----------
    quadrants
        uint8 [B, 4, 1, S, S], grey levels 0 to 255: the memory that `read` writes to.
    """

    quadrants: npt.NDArray[np.uint8]

    def read(self, file: FrameFile, index: int) -> Flags:
        """Write the quadrants of a frame to ``quadrants[index]`` and return the frame's flags.

        Raises
        ------
        FrameError
            If the frame cannot be read, decoded or cut. The content of ``quadrants[index]`` is then undefined.
        """
        ...

    def start(self) -> None:
        """Start the reader without waiting until it is ready."""
        ...

    def kill(self) -> None:
        """Stop the current read at once, from any thread; `read` then raises."""
        ...

    def close(self) -> None:
        """Release the reader's resources."""
        ...


def read_quadrants(file: FrameFile, contract: Contract, out: Grey) -> Flags:
    """Read and decode a frame, cut it into quadrants and return its flags.

    Parameters
    ----------
    file
        The file, and the frame in it.
    contract
        Defines the kept fraction and the input size S.
    out
        uint8 [4, 1, S, S] to write LA, RA, LV, RV to, grey levels 0 to 255.

    Raises
    ------
    FrameError
        As `echoquad_runtime.frames.reader.load_checked` and `echoquad_runtime.quadrants.frame_quadrants`.
    """
    grey, flags = load_checked(file)
    return (*cut_quadrants(grey, contract, out), *flags)


def cut_quadrants(grey: Grey, contract: Contract, out: Grey) -> Flags:
    """Cut a decoded frame, uint8 [H, W], into quadrants and return the flags that its quadrants show.

    `out` is as in `read_quadrants`.

    Raises
    ------
    FrameTooSmallError
        If the frame is less than 2 pixels wide or high.
    """
    frame_quadrants(grey, contract, out=out)
    return quality_flags(out)
