"""Worker of the image fuzzing: reads valid and damaged image files in its own process.

It reads one JSON line per file and answers each with a JSON line. ``test_image_fuzzing.py`` runs it.
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

import image_corpus
import numpy as np

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.reader import decode_grey, read_grey_and_flags

with contextlib.suppress(ImportError):  # Windows
    import resource

    # Of this process alone: a larger allocation fails. Reader processes have limits of their own.
    resource.setrlimit(resource.RLIMIT_AS, (1500 << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))

warnings.filterwarnings("ignore", module="PIL")  # as the command line does

EXTENSIONS = (".png", ".jpg", ".bmp", ".tif", ".PNG", "")
MEMORY = Path("/proc/self/status")


def memory_bytes(field: str) -> int | None:
    """Return a figure of this process's memory in bytes; None if the system does not report it."""
    if not MEMORY.exists():
        return None
    return next(int(line.split()[1]) << 10 for line in MEMORY.read_text().splitlines() if line.startswith(field))


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def make_file(what: dict[str, Any]) -> tuple[str, bytes, bytes | None]:
    """Return name and bytes of the file that `what` identifies, and the bytes before the damage, if any."""
    if "bomb" in what:
        return what["bomb"], {**image_corpus.BOMBS, **image_corpus.LARGEST}[what["bomb"]](), None
    number = what["number"]
    names = list(image_corpus.SEEDS)
    name, rng = names[number % len(names)], random.Random(number)
    data = original = image_corpus.SEEDS[name]
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data, how = image_corpus.damage(data or b"?", rng)
        done.append(how)
    return f"{name}: {', '.join(done)}", data, original


def read(path: Path) -> tuple[np.ndarray | None, str, list[str]]:
    """Read a file as a frame; return the frame, the outcome, and the faults."""
    faults = []
    try:
        frame, flags = read_grey_and_flags(path)
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


def check(what: dict[str, Any], scratch: Path) -> dict[str, Any]:
    name, data, original = make_file(what)
    number = what.get("number", 0)
    path = scratch / f"frame{EXTENSIONS[number // 7 % len(EXTENSIONS)]}"
    path.write_bytes(data)
    size = len(data)
    del data
    reset_peak()
    before, begun = memory_bytes("VmRSS"), time.perf_counter()
    frame, outcome, faults = read(path)
    seconds, peak = time.perf_counter() - begun, memory_bytes("VmHWM")
    if frame is not None and original is not None:
        same = np.array_equal(frame, decode_grey(original))
        outcome = "the same pixels" if same else "other pixels"
        if not same and name.startswith("PNG"):
            faults.append("a PNG has other pixels")
    path.unlink()
    grown = max(0, peak - before) if peak is not None and before is not None else None
    return {"name": name, "outcome": outcome, "faults": faults, "seconds": seconds, "grown": grown, "bytes": size}


def main() -> None:
    scratch = Path(json.loads(sys.stdin.readline())["scratch"])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(check(json.loads(line), scratch)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
