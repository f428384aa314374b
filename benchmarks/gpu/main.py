"""Measure EchoQuad on a GPU: tests, decisions, engine, provider options, files to CSV, CPU cores, training, start.

    python benchmarks/gpu.py RUN BUNDLE --frames DIR [--data DIR] [--device cuda|cpu] [--minutes 8]
                             [--sections engine,options] [--results FILE] [--out FILE.jsonl]

Each section has a share of the time and a separate process. What it cannot measure, because of time, a missing package,
missing CUDA or an error, is listed with the reason, and the other sections still run. Tables and JSON lines are written
as they grow, so an interrupted run keeps its results. `--device cpu` is a dry run without a GPU; what needs CUDA is
listed as not measured. See docs/how-to/gpu.md. Linux.

Environment variables of this program and its processes:
    PYTHONPATH            if EchoQuad is not installed: the checkout and its runtime, train and export folders
    LD_LIBRARY_PATH       CUDA and cuDNN, if onnxruntime does not find them
    CUDA_VISIBLE_DEVICES  the GPU; the first one is measured
    OMP_NUM_THREADS       CPU threads of torch and numpy
    TMPDIR                folder for frames and results, up to 2 GB, removed at the end
ECHOQUAD_CACHE_DIR and ECHOQUAD_CONFIG_DIR are replaced, so that earlier runs have no influence.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, run_facts

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.frames.discovery import walk
from gpu.report import OUT_OF_TIME, Report, Settings, run_section, visible_gpu

PROBE_TIME = 90.0  # seconds allowed for a first import of torch and a first use of CUDA


@dataclass(frozen=True)
class Section:
    """A section of the benchmark.

    Attributes
    ----------
    title
        Title in the report.
    target
        Its function, ``module:function``.
    share
        Share of the time, in seconds of eight minutes.
    on_cpu
        Whether it can run with `--device cuda` although CUDA does not work.
    """

    title: str
    target: str
    share: float
    on_cpu: bool = False


SECTIONS: dict[str, Section] = {
    "tests": Section("Tests", "gpu.commands:gpu_tests", 55),
    "truth": Section("Decisions", "gpu.commands:truth", 50),
    "engine": Section("Engine", "gpu.engine:engine", 70),
    "options": Section("Provider options", "gpu.options:options", 100),
    "files": Section("Files to CSV", "gpu.files:files", 110),
    "scaling": Section("CPU cores", "gpu.files:scaling", 25, on_cpu=True),
    "training": Section("Training", "gpu.commands:training", 35),
    "start": Section("Start", "gpu.commands:start", 35),
}

# Prints facts about the GPU as JSON, in a separate process, because this one must not hold a CUDA context.
_PROBE = """
import json, sys
found = {"unavailable_reason": ""}
try:
    import torch
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name(0)
        found["cuDNN"] = str(torch.backends.cudnn.version())
except Exception as error:
    found["torch"] = f"cannot be imported ({error})"
from echoquad_runtime.devices.cuda_probe import cuda_unavailable_reason
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
found["CUDA of onnxruntime"] = str(getattr(load_onnxruntime(), "cuda_version", "") or "none")
if sys.argv[1] == "cuda":
    found["unavailable_reason"] = cuda_unavailable_reason() or ""
print(json.dumps(found))
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raise SystemExit with code 2 if it is invalid."""
    parser = arguments(__doc__, run=True, rounds=20)
    parser.set_defaults(count=1600)
    parser.add_argument("--data", type=Path, help="data folder for the training section (default: section skipped)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all sections (default %(default)s)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of the training section (default %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write each measurement to, as a line of JSON")
    options = parser.parse_args(argv)
    options.sections = options.sections.split(",")
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}; expected some of {', '.join(SECTIONS)}")
    if options.frames is None or next(walk(options.frames), None) is None:
        parser.error("--frames needs a folder with frames")
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g} found; expected more than 0")
    if options.epochs < 2:
        parser.error(f"--epochs {options.epochs} found; expected at least 2, one of each phase")
    return options


def main() -> None:
    options = parse()
    Bundle(options.bundle)  # raises early if the bundle is damaged
    begin = time.time()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the processes, as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="echoquad-gpu-") as work:
        for name in ("cache", "config"):
            os.environ[f"ECHOQUAD_{name.upper()}_DIR"] = str(Path(work) / name)
        gpu = probe(options.device)
        facts = {**run_facts("GPU", options.threads), "gpu": describe(gpu), "probe": gpu}
        titles = {name: SECTIONS[name].title for name in options.sections}
        report = Report(titles, facts, options.device, options.results, options.out)
        print(f"{facts['gpu']}\n{facts['date']}; {facts['machine']}; {json.dumps(facts['versions'])}", flush=True)
        try:
            run_all(options, report, gpu["unavailable_reason"], begin + 60 * options.minutes, Path(work))
        finally:
            report.print_rest()
    print(f"{time.time() - begin:.0f} seconds")


def run_all(options: argparse.Namespace, report: Report, unavailable_reason: str, end: float, work: Path) -> None:
    """Run the sections in order; unused time goes to later sections."""
    for index, name in enumerate(options.sections):
        section = SECTIONS[name]
        if unavailable_reason and not section.on_cpu:
            report.take(name, ("missing", "all of it", unavailable_reason))
        elif (seconds := allot(options.sections[index:], end - time.time())) <= 0:
            report.take(name, ("missing", "all of it", OUT_OF_TIME))
        else:
            settings = Settings(
                options.run,
                options.bundle,
                options.frames,
                options.data,
                options.device,
                options.count,
                options.epochs,
                options.rounds,
                options.threads,
                work,
                time.time() + seconds,
            )
            run_section(section.target, settings, lambda message, name=name: report.take(name, message))  # type: ignore[misc]
        report.end(name)


def allot(names: Sequence[str], left: float) -> float:
    """Return the seconds for the first of the remaining sections, out of the seconds `left`."""
    return left * SECTIONS[names[0]].share / sum(SECTIONS[name].share for name in names)


def probe(device: str) -> dict[str, str]:
    """Return facts about the GPU by name; ``unavailable_reason`` is empty if CUDA works or is not requested."""
    found: dict[str, Any] = {"unavailable_reason": ""}
    try:
        command = [sys.executable, "-c", _PROBE, device]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIME, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        found["unavailable_reason"] = f"the GPU probe failed ({type(error).__name__})" if device == "cuda" else ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", f"--id={visible_gpu()}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        found["card"], found["driver"] = (cell.strip() for cell in done.stdout.strip().splitlines()[0].split(","))
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        found["driver"] = "unknown (no nvidia-smi)"
    return found


def describe(found: Mapping[str, str]) -> str:
    """Return the facts of `probe` as text."""
    parts = [found.get("card", "no NVIDIA card")]
    parts += [f"{name} {value}" for name, value in found.items() if name not in ("card", "unavailable_reason")]
    return ", ".join(parts) + (
        f"; CUDA cannot be used: {found['unavailable_reason']}" if found["unavailable_reason"] else ""
    )


if __name__ == "__main__":
    main()
