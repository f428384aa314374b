"""The scripts of ``benchmarks/`` import one another by name, as they do where they are run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
