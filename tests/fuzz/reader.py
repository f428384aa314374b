"""Reads image files, whole and broken, in a process of its own, whose death or silence its parent can see.

Reads what to do, a JSON line each, and answers each with a JSON line. Run by ``test_images.py``.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pictures

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.reader import decode_frame, read_checked

with contextlib.suppress(ImportError):  # Windows
    import resource

    # What asks for more is told so, and does not take the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

warnings.filterwarnings("ignore", module="PIL")  # as the command line does

ENDINGS = (".png", ".jpg", ".bmp", ".tif", ".PNG", "")
MEMORY = Path("/proc/self/status")


def memory(field: str) -> int | None:
    """Give a figure of this process's memory in bytes; None where the system does not tell."""
    if not MEMORY.exists():
        return None
    return next(int(line.split()[1]) << 10 for line in MEMORY.read_text().splitlines() if line.startswith(field))


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def case(what: dict[str, Any]) -> tuple[str, bytes, bytes | None]:
    """Make the file that `what` stands for; gives its name, its bytes, and the whole file that it was."""
    if "bomb" in what:
        return what["bomb"], {**pictures.BOMBS, **pictures.HEAVY}[what["bomb"]](), None
    number = what["number"]
    names = list(pictures.SEEDS)
    name, rng = names[number % len(names)], random.Random(number)
    data = whole = pictures.SEEDS[name]
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data, how = pictures.damage(data or b"?", rng)
        done.append(how)
    return f"{name}: {', '.join(done)}", data, whole


def read(path: Path) -> tuple[np.ndarray | None, str, list[str]]:
    """Read a file as a frame; gives the frame, the outcome, and what must not be."""
    faults = []
    try:
        frame, flags = read_checked(path)
    except FrameError as error:
        text = str(error)
        if not text or len(text.splitlines()) != 1 or len(text) > 300 or not text.isprintable():
            faults.append(f"the message {text!r}")
        return None, type(error).__name__, faults
    except BaseException as error:
        return None, "failed", [f"{type(error).__name__}: {error}"]
    if frame.dtype != np.uint8 or frame.ndim != 2 or not set(flags) <= {"colour"}:
        faults.append(f"{frame.dtype} {frame.shape} {flags}")
    return frame, "accepted", faults


def judge(what: dict[str, Any], scratch: Path) -> dict[str, Any]:
    name, data, whole = case(what)
    number = what.get("number", 0)
    path = scratch / f"frame{ENDINGS[number // 7 % len(ENDINGS)]}"
    path.write_bytes(data)
    size = len(data)
    del data
    forget_peak()
    before, begun = memory("VmRSS"), time.perf_counter()
    frame, outcome, faults = read(path)
    seconds, peak = time.perf_counter() - begun, memory("VmHWM")
    if frame is not None and whole is not None:
        original = decode_frame(whole)
        same = np.array_equal(frame, original)
        outcome = "the same pixels" if same else "other pixels"
        if not same and name.startswith("PNG"):
            faults.append("a PNG's pixels are not as they were")
    path.unlink()
    grown = max(0, peak - before) if peak is not None and before is not None else None
    return {"name": name, "outcome": outcome, "faults": faults, "seconds": seconds, "grown": grown, "bytes": size}


def main() -> None:
    scratch = Path(json.loads(sys.stdin.readline())["scratch"])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(judge(json.loads(line), scratch)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
