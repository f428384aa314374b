"""Commands over folders with files whose decoder crashes, exhausts memory or never returns."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals and limits")

CRASHES = 6


@pytest.fixture
def decoders(tmp_path: Path) -> str:
    """Return a statement that lets the decoder of clips crash, and limits the memory of the command to 4 GB."""
    folder = tmp_path / "decoders"
    folder.mkdir()
    (folder / "av.py").write_text("import os; os.abort()")  # reader processes have the import path of the command
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4_000_000 << 10, resource.RLIM_INFINITY))"
    return f"sys.path.insert(0, {str(folder)!r}); {limit}"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return a folder of good frames, and between them clips that crash."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for number in range(CRASHES):
        levels = np.random.default_rng(number).integers(0, 256, (60, 80), np.uint8)
        Image.fromarray(levels).save(folder / f"{number:02}-good.{'tif' if number % 3 else 'png'}")
        (folder / f"{number:02}-crash.avi").write_bytes(b"RIFF\0\0\0\0AVI ")
    return folder


def files_of(out: Path) -> list[str]:
    return [row["file"] for row in csv.DictReader(io.StringIO(out.read_text("utf-8")))]


def add_matrix(folder: Path) -> None:
    """Add a matrix that takes 2.5 GB of memory."""
    with (folder / "03-memory.npy").open("wb") as stream:
        shape = (6000, 6000, 3)
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
        stream.truncate(stream.tell() + 8 * 6000 * 6000 * 3)  # sparse


@pytest.mark.parametrize("options", [(), pytest.param(("--workers", "2"), marks=pytest.mark.slow)])
def test_each_is_one_failure_and_resume_goes_on(
    options: tuple[str, ...],
    hostile: Path,
    decoders: str,
    tiny_bundle: Path,
    tmp_path: Path,
    echoquad: Callable[..., Any],
) -> None:
    out, large = tmp_path / "rows.csv", int(bool(options))
    if large:  # which takes seconds
        add_matrix(hostile)
    command = ("predict", tiny_bundle, hostile, "--out", out, "--device", "cpu", "--matrices", *options)
    ran = echoquad(*command, code=5, driver=decoders)
    good = sorted(path.name for path in hostile.iterdir() if "good" in path.name)
    assert files_of(out) == good
    assert ran.err.count("error[E_FRAME_CRASH]") == CRASHES and ran.err.count("error[E_FRAME_TOO_LARGE]") == large

    # As if the run had been killed after five rows.
    lines = out.read_bytes().splitlines(keepends=True)
    out.with_name("rows.csv.partial").write_bytes(b"".join(lines[:6]))
    out.with_name("rows.csv.run.json").rename(out.with_name("rows.csv.partial.json"))
    out.unlink()
    again = echoquad(*command, "--resume", code=5, driver=decoders)
    assert out.read_bytes().splitlines(keepends=True) == lines
    assert again.err.count("error[") == CRASHES + large


def test_audit_and_overlays_survive_them(
    hostile: Path, decoders: str, tiny_bundle: Path, tmp_path: Path, echoquad: Callable[..., Any]
) -> None:
    pictures = tmp_path / "pictures"
    echoquad("predict", tiny_bundle, hostile, "--device", "cpu", "--overlay", pictures, code=5, driver=decoders)
    assert len(list(pictures.iterdir())) == CRASHES
    for label in ("ASD", "NORM"):
        target = tmp_path / "data" / "train" / label
        target.mkdir(parents=True)
        for path in hostile.glob("0[0-2]*"):
            (target / f"{label}-{path.name}").write_bytes(path.read_bytes())
    echoquad("data", "audit", tmp_path / "data", "--out", tmp_path / "audit", driver=decoders)
    text = (tmp_path / "audit" / "audit.json").read_text("utf-8")
    assert text.count("its reader process ended with SIGABRT") >= 6
