"""Sections that run commands: GPU tests, decisions against the CPU, training, and start-up."""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from peers import read_rows
from workers.start_parts import PARTS

from echoquad_runtime.frames.discovery import walk
from gpu.report import NEEDS_CUDA, OUT_OF_TIME, Context, OutOfTimeError, aim, visible_gpu

ROOT = Path(__file__).parents[2]
TRAINING_AIM = 0.8  # seconds per epoch
TRAINING_FRAMES = 800  # training frames for which the aim is defined
TRUTH_FRAMES = 200  # largest number of frames whose decisions are compared
STARTS = 2  # timed runs of the command
MARKED = re.compile(r"^@pytest\.mark\.gpu\b", re.MULTILINE)


# Tests


def gpu_tests(context: Context) -> None:
    """Run the tests that are marked `gpu`."""
    if missing := [name for name in ("pytest", "hypothesis", "onnx") if find_spec(name) is None]:
        context.missing("tests marked gpu", f"not run: {', '.join(missing)} missing")
        return
    paths = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARKED.search(path.read_text("utf-8"))]
    line = ["-m", "pytest", "-m", "gpu", "-q", "-rsfE", "--tb=short", "-p", "no:cacheprovider", "--rootdir", ROOT]
    line += ["--confcutdir", ROOT]
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    if find_spec("pytest_timeout") is None:  # pytest rejects an option without its plugin
        settings = re.sub(r"(?m)^timeout = .*\n", "", settings)
    changed = context.settings.work / "pyproject.toml"
    changed.write_text(settings, "utf-8")
    finished = context.command(*line, "-c", changed, *paths)
    outcome = count_outcomes(finished.out)
    context.record(exit_code=finished.code, seconds=finished.seconds, **outcome)
    cells = [str(outcome[name]) for name in OUTCOMES]
    context.table("Tests marked gpu", [[*OUTCOMES, "seconds"], [*cells, f"{finished.seconds:.0f}"]])
    for text in finished.out.splitlines():
        if text.startswith(("FAILED ", "ERROR ")):
            context.note(text)
        elif text.startswith("SKIPPED "):
            context.missing("test", text.removeprefix("SKIPPED ").replace(f"{ROOT}/", ""))
    if finished.code not in (0, 1):  # an error of pytest itself
        print(finished.out, finished.err, file=sys.stderr)
        context.missing("tests marked gpu", f"pytest ended with {finished.code}")


OUTCOMES = ("passed", "failed", "skipped", "error")


def count_outcomes(output: str) -> dict[str, int]:
    """Parse the summary of pytest, such as ``1 failed, 3 passed, 2 skipped in 4.5s``."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r"\bin [\d.]+s", line)), "")
    found = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {name: found.get(name, 0) for name in OUTCOMES}


# Decisions


def truth(context: Context) -> None:
    """Compare decisions on the device with those on the CPU, then verify the bundle there."""
    bundle, device, work = context.peer.bundle, context.settings.device, context.settings.work
    frames = [path.resolve() for path in walk(context.settings.frames)]
    step = max(1, -(-len(frames) // TRUTH_FRAMES))
    chosen = work / "truth"
    chosen.mkdir()
    for index, path in enumerate(frames[::step]):  # spread over the class folders
        (chosen / f"{index:05}{path.suffix}").symlink_to(path)
    exact = "fp32" if "fp32" in bundle.precisions else bundle.default_precision
    expected = _decisions(context, chosen, "cpu", exact)
    rows = [["", "frames", "changed decisions", "different answers", "largest |dp|"]]
    wanted = [(precision, ()) for precision in bundle.precisions_on(device)]
    if context.cuda:
        wanted += [(precision, ("--cuda-graphs",)) for precision in bundle.precisions_on(device)]
    for precision, more in wanted:
        name = " ".join([precision, *more])
        try:
            found = compare(_decisions(context, chosen, device, precision, *more), expected)
        except RuntimeError as error:
            context.missing(name, error)
            continue
        context.record(way=name, device=device, **found)
        cells = [str(found[key]) for key in ("frames", "flips", "answers")]
        rows.append([name, *cells, f"{found['max_abs_dp']:.4f}"])
        context.table(f"Decisions of predict on {device} against {exact} on the CPU", rows)
        if found["answers"] == 1 < found["frames"]:
            context.note(f"WRONG: {name} gives the same answer for all frames.")
    record = work / "verify.json"
    finished = context.command(
        "-m", "echoquad", "verify", bundle.folder, "--device", device, "--precision", "all", "--json", record
    )
    if not record.exists():
        context.missing("verify", f"exit code {finished.code}: {finished.err.strip()[-200:]}")
        return
    content = json.loads(record.read_text("utf-8"))
    context.record(way="verify", verdict=content["verdict"], exit_code=finished.code)
    context.table(f"verify --device {device} --precision all", verify_rows(content["checks"]))
    context.note(f"verify: {content['verdict']}, exit code {finished.code}.")


def _decisions(context: Context, folder: Path, device: str, precision: str, *more: str) -> dict[str, list[str]]:
    out = context.settings.work / "truth.csv"
    out.unlink(missing_ok=True)
    line = ["-m", "echoquad", "predict", context.settings.bundle, folder, "--out", out, "--untuned"]
    context.checked(*line, "--device", device, "--precision", precision, *more)
    return read_rows(out)


def compare(found: Mapping[str, Sequence[str]], expected: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Compare rows by file, each from the decision to the last probability.

    Returns
    -------
    dict
        ``frames``; ``flips``, the number of changed decisions; ``answers``, the number of distinct rows;
        ``max_abs_dp``, the largest difference of a probability.

    Raises
    ------
    RuntimeError
        If the files differ.
    """
    if found.keys() != expected.keys():
        raise RuntimeError(f"{len(found)} rows found; expected {len(expected)}, of the same files")
    largest = 0.0
    for file, row in found.items():
        for own, other in zip(row, expected[file], strict=True):
            with suppress(ValueError):  # labels are not numbers
                largest = max(largest, abs(float(own) - float(other)))
    flips = sum(row[0] != expected[file][0] for file, row in found.items())
    return {
        "frames": len(found),
        "flips": flips,
        "answers": len(set(map(tuple, found.values()))),
        "max_abs_dp": largest,
    }


def verify_rows(checks: Sequence[Mapping[str, object]]) -> list[list[str]]:
    """Return table rows for the checks in a record of `echoquad verify`."""
    rows = [["precision", "passed", "golden frames", "changed decisions", "|dlogit|", "|dp|"]]
    for check in checks:
        numbers = [check.get(key) for key in ("max_abs_dlogit", "max_abs_dprobability")]
        cells = [f"{value:.1e}" if isinstance(value, float) else "" for value in numbers]
        counts = [str(check.get(key, "")) for key in ("frames", "frame_flips")]
        rows.append([str(check["precision"]), "yes" if check["passed"] else "no", *counts, *cells])
    return rows


# Training


def training(context: Context) -> None:
    """Time a few epochs of recipe scratch, half of them at reduced resolution."""
    if context.settings.data is None:
        context.missing("training", "no --data was given")
        return
    if find_spec("torch") is None:
        context.missing("training", "torch is not installed")
        return
    from echoquad_train.recipe import Recipe

    recipe, epochs = Recipe.load("scratch"), context.settings.epochs
    out, small = context.settings.work / "run", epochs // 2
    line = ["-m", "echoquad", "train", context.settings.data, "--out", out, "--recipe", "scratch"]
    line += ["--epochs", str(epochs), "--set", f"progressive_fraction={small / epochs}"]
    line += ["--device", context.settings.device]
    log = context.settings.work / "train.log"
    with sampled_utilisation(context, log) as utilisation:
        try:
            code = _train(context, line, log)
            if code:
                words = log.read_text("utf-8").strip().splitlines() or ["no message"]
                context.missing("training", f"exit code {code}: {words[-1]}")
        except OutOfTimeError:
            context.missing("training, the remaining epochs", OUT_OF_TIME)
    taken: list[float] = []
    with suppress(OSError), (out / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        taken = [float(row["seconds"]) for row in csv.DictReader(stream)]
    found = {"reduced resolution": taken[:small], "full size": taken[small:]}
    context.record(seconds=taken, reduced=small, utilisation=utilisation)
    rows = [["", "epochs", "first, s", "median of the others, s"]]
    for name, seconds in found.items():
        others = f"{statistics.median(seconds[1:]):.2f}" if seconds[1:] else ""
        rows.append([name, str(len(seconds)), f"{seconds[0]:.2f}" if seconds else "", others])
    context.table(f"Training, recipe scratch at {recipe.input_size}", rows)
    count = int(recipe.progressive_fraction * recipe.epochs)
    value = epoch_seconds(found["reduced resolution"], found["full size"], count, recipe.epochs)
    what = f"seconds per epoch over the {recipe.epochs} epochs of the recipe"
    frames = sum(1 for _ in walk(context.settings.data / "train"))
    if frames == TRAINING_FRAMES:
        context.aims([aim(what, value, TRAINING_AIM, at_most=True)])
    else:
        context.missing("the aim", f"defined for {TRAINING_FRAMES} training frames; found {frames}")
        if value is not None:
            context.note(f"{what}: {value:.2f}.")
    context.note(f"{frames} training frames; the slower first epoch of each phase counts once.")
    if utilisation:
        context.note(f"GPU {statistics.mean(utilisation):.0f} % busy on average of {len(utilisation)} samples.")
    elif context.cuda:
        context.missing("GPU utilisation", "no sample from nvidia-smi")


def _train(context: Context, line: Sequence[object], log: Path) -> int:
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, *map(str, line)], stdout=stream, stderr=subprocess.STDOUT)
        try:
            return process.wait(max(0.1, context.left()))
        except subprocess.TimeoutExpired:
            raise OutOfTimeError from None
        finally:
            process.kill()
            process.wait()


@contextmanager
def sampled_utilisation(context: Context, log: Path) -> Iterator[list[float]]:
    """Sample the GPU utilisation in percent, from the end of the first epoch in a log to that of the last."""
    samples: list[float] = []
    ended = threading.Event()
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--id={visible_gpu()}"]

    def sample() -> None:
        last = f"Epoch {context.settings.epochs:02d}/"
        while not ended.wait(0.2):
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                text = log.read_text("utf-8")
                if last in text:
                    return
                if "Epoch 01/" in text:
                    found = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
                    samples.append(float(found.stdout))

    thread = threading.Thread(target=sample, daemon=True)
    if context.cuda:
        thread.start()
    else:
        context.missing("GPU utilisation", NEEDS_CUDA)
    try:
        yield samples
    finally:
        ended.set()
        if context.cuda:
            thread.join()


def epoch_seconds(small: Sequence[float], full: Sequence[float], small_epochs: int, epochs: int) -> float | None:
    """Extrapolate the mean seconds per epoch of a whole run from a few epochs of both phases.

    Parameters
    ----------
    small, full
        Seconds of the measured epochs at reduced and at full resolution; the first of each includes start-up costs,
        which a run has once.
    small_epochs, epochs
        Epochs of the whole run: at reduced resolution, and in total.

    Returns
    -------
    float or None
        None if a phase has fewer than two epochs.
    """
    if len(small) < 2 or len(full) < 2:
        return None
    total = 0.0
    for seconds, number in ((small, small_epochs), (full, epochs - small_epochs)):
        total += seconds[0] + (number - 1) * statistics.median(seconds[1:])
    return total / epochs


# Start


def start(context: Context) -> None:
    """Time the command until its first row, and the parts of a start, including the self-test."""
    bundle, device = context.peer.bundle, context.settings.device
    frame = next(walk(context.settings.frames))
    many = {"cuda": 16, "cpu": 2}[device]  # frames per batch of `predict`
    rows = [["", "first row, s", *(f"{name}, s" for name in PARTS), f"self-test of a slot of {many}, s"]]
    for precision in (name for name in bundle.precisions_on(device) if name in bundle.precisions):  # one per graph
        try:
            first = [_first_row(context, frame, precision) for _ in range(STARTS)]
            single, batch = (_parts(context, precision, frames) for frames in (1, many))
        except (RuntimeError, ValueError) as error:
            context.missing(precision, error)
            continue
        median = statistics.median(first)
        context.record(way=precision, first_row_s=median, runs=first, single=single, batch=batch)
        cells = [f"{median:.2f}", *(f"{single[name]:.3f}" for name in PARTS), f"{batch['self-test']:.3f}"]
        rows.append([precision, *cells])
        context.table("Start of `predict` with one frame", rows)
        context.note(f"{precision}: the self-test is {single['self-test'] / median:.0%} of the time to the first row.")


def _first_row(context: Context, frame: Path, precision: str) -> float:
    """Return the seconds from the start of the command to its first row, without a cache."""
    line = ["-m", "echoquad", "predict", context.settings.bundle, frame, "--untuned"]
    line += ["--device", context.settings.device, "--precision", precision]
    with tempfile.TemporaryFile("w+") as err:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, line)],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env={**os.environ, **NO_CACHE},
        )
        assert process.stdout is not None
        with process, process.stdout as rows:
            found = [rows.readline() for _ in range(2)]  # header and row
            seconds = time.perf_counter() - begin
        if not found[1]:
            err.seek(0)
            raise RuntimeError(f"exit code {process.returncode}: {err.read().strip()[-200:]}")
        return seconds


NO_CACHE = {"ECHOQUAD_CACHE_DIR": ""}  # a cached self-test takes no time


def _parts(context: Context, precision: str, frames: int) -> dict[str, float]:
    line = [
        ROOT / "benchmarks" / "workers" / "start_parts.py",
        context.settings.bundle,
        context.settings.device,
        precision,
        frames,
    ]
    return dict(json.loads(context.checked(*line, environment=NO_CACHE).out))
