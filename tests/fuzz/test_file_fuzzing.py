"""Fuzzing of the files that EchoQuad reads back: a damaged one is refused in one line, or does no harm.

Recipes, run records, weights, saved states, result files and tuned settings are damaged as bytes and as values. No
command ends with a traceback, a warning of a library, or a report of a fault in EchoQuad. See ``file_worker.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")


@pytest.mark.parametrize(
    "seeds", [range(22), pytest.param(range(22, 900), marks=pytest.mark.slow)], ids=["everyday", "slow"]
)
@pytest.mark.timeout(1200)
def test_damaged_files_end_in_one_line(seeds: range, tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    environment = {
        **os.environ,
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
        "ECHOQUAD_CONFIG_DIR": str(tmp_path / "configuration"),
        "ECHOQUAD_TRACEBACK": "",
    }
    worker = [sys.executable, str(Path(__file__).with_name("file_worker.py"))]
    ended = subprocess.run(
        [*worker, str(tmp_path), str(seeds.start), str(seeds.stop)],
        check=False,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    faults = [json.loads(line) for line in ended.stdout.splitlines()]
    assert faults == [], "\n".join(f"{seed}: {fault}" for seed, fault in faults)
