"""Fuzzing of DICOM, matrix, TIFF and video files: each frame is read or yields a one-line error without patient data.

``pytest tests/fuzz/test_format_fuzzing.py -m slow`` reads 20 000 files; see ``format_worker.py``. The process that asks
for them has 1.5 GB of memory and must survive them all; each outcome is on a line of its own.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for package in ("pydicom", "openjpeg", "gdcm"):
    pytest.importorskip(package)

MAX_SECONDS = 20.0
"""Limit per file, even on a busy machine; most take a hundredth of a second."""
VALID_FILES = 27
"""Largest number of valid files; they have the first numbers."""


def read_all(scratch: Path, first: int, last: int) -> list[tuple[str, list[str]]]:
    """Read files in another process; return the name and the outcomes of each."""
    program = Path(__file__).with_name("format_worker.py")
    ended = subprocess.run(
        [sys.executable, program, scratch, str(first), str(last)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=280,
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, (lines[-1], ended.stderr[-2000:])
    assert ended.stderr == ""
    cases = list(zip(lines[::2], lines[1::2], strict=True))
    wrong = [(what, found) for what, found in cases if found["faults"] or found["seconds"] > MAX_SECONDS]
    assert wrong == []
    return [(what["name"], found["outcomes"]) for what, found in cases]


def test_valid_files_are_frames(tmp_path: Path) -> None:
    found = read_all(tmp_path, 0, VALID_FILES)[:23]
    assert {outcome for _, outcomes in found for outcome in outcomes} == {"frame"}


def test_damaged_files_yield_frames_or_one_line_errors(tmp_path: Path) -> None:
    check(read_all(tmp_path, VALID_FILES, 400))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_twenty_thousand_damaged_files(
    part: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    counts = check(read_all(tmp_path, 1000 + 2000 * part, 3000 + 2000 * part))
    record_property("outcomes", {kind: dict(count) for kind, count in counts.items()})


def check(found: list[tuple[str, list[str]]]) -> dict[str, collections.Counter[str]]:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, outcomes in found:
        counts[name.rpartition(".")[2]].update(set(outcomes))
    for kind, count in counts.items():
        # Some files are accepted, as they would not be if nothing worked; damage is detected in others.
        assert count["frame"] and count.total() > count["frame"], (kind, count)
    return counts
