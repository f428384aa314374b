"""DICOM files, matrices and clips, damaged: each frame is read or is one line that says why not, and tells no name.

``pytest tests/fuzz/test_formats.py -m slow`` goes through 20 000; see ``formats.py``.
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

SECONDS = 20.0
"""What a file may take, on however busy a machine; most take a hundredth of one."""
KINDS = 23
"""Whole files, at most; the first numbers are these."""


def go_through(scratch: Path, first: int, last: int) -> list[tuple[str, list[str]]]:
    """Have files read in a process of its own; gives the kind and the outcomes of each."""
    program = Path(__file__).with_name("formats.py")
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
    wrong = [(what, found) for what, found in cases if found["faults"] or found["seconds"] > SECONDS]
    assert wrong == []
    return [(what["name"], found["outcomes"]) for what, found in cases]


def test_whole_files_are_frames(tmp_path: Path) -> None:
    found = go_through(tmp_path, 0, KINDS)[:19]
    assert {outcome for _, outcomes in found for outcome in outcomes} == {"frame"}


def test_damaged_files(tmp_path: Path) -> None:
    check(go_through(tmp_path, KINDS, 700))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_twenty_thousand_damaged_files(
    part: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    counts = check(go_through(tmp_path, 1000 + 2000 * part, 3000 + 2000 * part))
    record_property("outcomes", {kind: dict(count) for kind, count in counts.items()})


def check(found: list[tuple[str, list[str]]]) -> dict[str, collections.Counter[str]]:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, outcomes in found:
        counts[name.rpartition(".")[2]].update(set(outcomes))
    for kind, count in counts.items():
        # Neither is everything refused, as it would be if nothing worked, nor is damage passed over.
        assert count["frame"] and count.total() > count["frame"], (kind, count)
    return counts
