"""Reading frames: from a file to the quadrants that the network takes, with the frame's quality flags.

`read_quadrants` is the only implementation. A worker calls it in its own thread, or in a process of its own
(`echoquad_runtime.predict.reader_process.ReaderProcess`), so both give the same quadrants.
"""

from __future__ import annotations

from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.quality_flags import quality_flags
from echoquad_runtime.frames.reader import load_grey_and_flags
from echoquad_runtime.quadrants import Grey, frame_quadrants

__all__ = ["Flags", "cut_quadrants", "read_quadrants"]

Flags = tuple[str, ...]
"""Quality flags of a frame, as `echoquad_runtime.frames.quality_flags` names them."""


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
        As `echoquad_runtime.frames.reader.load_grey_and_flags` and `echoquad_runtime.quadrants.frame_quadrants`.
    """
    grey, flags = load_grey_and_flags(file)
    return (*cut_quadrants(grey, contract, out), *flags)


def cut_quadrants(grey: Grey, contract: Contract, out: Grey) -> Flags:
    """Cut a decoded frame, uint8 [H, W], into quadrants and return the flags that its pixels show.

    `out` is as in `read_quadrants`.

    Raises
    ------
    FrameTooSmallError
        If the frame is less than 2 pixels wide or high.
    """
    frame_quadrants(grey, contract, out=out)
    return quality_flags(out, grey)
