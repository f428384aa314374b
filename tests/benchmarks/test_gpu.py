"""The GPU benchmark on the CPU and made-up figures: arguments, time, isolation of sections, report and aims."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
import pytest
from gpu import commands as gpu_commands
from gpu import engine as gpu_engine
from gpu import files as gpu_files
from gpu import main as gpu
from gpu import options as gpu_options
from gpu import report as gpu_report

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, create_session
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.engine.onnx_engine import OnnxEngine

SECTIONS = """
import os
import time

def measure(context):
    context.record(way="a", ms=1.5)
    context.table("Times", [["", "ms"], ["a", "1.5"]])
    context.note(f"On {context.settings.device}.")
    context.missing("b", "there is none")

def fail(context):
    context.table("Half", [["x"], ["1"]])
    raise RuntimeError("the device is lost")

def crash(context):
    context.record(way="before the crash")
    os._exit(9)

def hang(context):
    context.record(way="before the end")
    time.sleep(600)

def slow_command(context):
    context.command("-c", "import time; time.sleep(600)")
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module of sections on the import path, which the processes of the sections inherit."""
    (tmp_path / "made_up_sections.py").write_text(SECTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("measure", "fail", "crash", "measure_again")
    targets = {name: f"made_up_sections:{name.removesuffix('_again')}" for name in names}
    monkeypatch.setattr(
        gpu, "SECTIONS", {name: gpu.Section(name.title(), target, 10) for name, target in targets.items()}
    )


def settings(tmp_path: Path, bundle: Path, frames: Path, seconds: float = 60, **changes: Any) -> gpu_report.Settings:
    given: dict[str, Any] = {"run": tmp_path / "run", "bundle": bundle, "frames": frames, "data": None, "device": "cpu"}
    given |= {"count": 20, "epochs": 2, "rounds": 1, "threads": 1, "work": tmp_path, "deadline": time.time() + seconds}
    return gpu_report.Settings(**given | changes)


class Sent:
    """Collects the messages of a section that runs in this process."""

    def __init__(self, given: gpu_report.Settings) -> None:
        self.messages: list[tuple[Any, ...]] = []
        self.context = gpu_report.Context(given, self.messages.append)

    def of(self, kind: str) -> list[Any]:
        return [message[1:] if len(message) > 2 else message[1] for message in self.messages if message[0] == kind]


# Arguments and time


def test_default_arguments(frames_folder: Path) -> None:
    options = gpu.parse(["run", "bundle", "--frames", str(frames_folder)])
    assert options.sections == ["tests", "truth", "engine", "options", "files", "scaling", "training", "start"]
    assert (options.device, options.minutes, options.count, options.data) == ("cuda", 8, 1600, None)
    options = gpu.parse(
        ["run", "bundle", "--frames", str(frames_folder), "--sections", "engine,start", "--device", "cpu"]
    )
    assert (options.sections, options.device) == (["engine", "start"], "cpu")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--sections", "engine,tensorrt"], "no section tensorrt; expected some of tests, truth, "),
        (["--minutes", "0"], "--minutes 0 found; expected more than 0"),
        (["--epochs", "1"], "--epochs 1 found; expected at least 2"),
        (["--device", "tpu"], "invalid choice"),
        (["--frames", "/there/is/none"], "--frames needs a folder with frames"),
    ],
)
def test_invalid_arguments_exit_with_2(
    line: list[str], message: str, frames_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.parse(["run", "bundle", "--frames", str(frames_folder), *line])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_unused_time_goes_to_later_sections() -> None:
    names = list(gpu.SECTIONS)
    total = sum(section.share for section in gpu.SECTIONS.values())
    assert total == 8 * 60
    assert gpu.allot(names, 480) == gpu.SECTIONS["tests"].share
    assert gpu.allot(["files", "start"], 13) == pytest.approx(13 * 110 / 145)  # unused time of earlier sections
    assert gpu.allot(["start"], 7) == 7
    assert gpu.allot(["start"], -1) < 0


# Sections and report


def run_all(
    tmp_path: Path, bundle: Path, frames: Path, *line: str, unavailable_reason: str = "", seconds: float = 60
) -> Any:
    given = ["run", str(bundle), "--frames", str(frames), "--device", "cpu", *line]
    options = gpu.parse(given)
    titles = {name: gpu.SECTIONS[name].title for name in options.sections}
    facts = {
        "command": "python benchmarks/gpu.py",
        "date": "2026-01-01",
        "machine": "a machine",
        "versions": {"torch": "2"},
    }
    report = gpu_report.Report(titles, {**facts, "gpu": "a card"}, "cpu", tmp_path / "R.md", tmp_path / "out.jsonl")
    gpu.run_all(options, report, unavailable_reason, time.time() + seconds, tmp_path)
    return report


def test_failed_or_crashed_section_does_not_stop_the_others(
    tmp_path: Path, tiny_bundle: Path, frames_folder: Path, made_up: None, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_all(tmp_path, tiny_bundle, frames_folder)
    assert report.not_measured() == [
        "measure: b: there is none",
        "fail: the rest of the section: RuntimeError: the device is lost",
        "crash: the rest of the section: its process ended with 9",
        "measure_again: b: there is none",
    ]
    text = (tmp_path / "R.md").read_text("utf-8")
    assert text.count("| a | 1.5 |") == 2 and "**Half**\n\n| x |" in text and "On cpu." in text
    assert gpu_report.DRY_RUN in text and "a card" not in text
    assert "### Not measured\n\n- measure: b: there is none\n- fail: " in text
    assert text.endswith("2026-01-01; a machine; torch 2.\n<!-- end GPU -->\n")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {"section": "measure", "way": "a", "ms": 1.5} in lines
    assert {"section": "crash", "way": "before the crash"} in lines
    assert {"section": "measure", "not_measured": "b", "why": "there is none"} in lines
    assert "Times\n    ms\na  1.5" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hang", "slow_command"])
def test_section_is_stopped_at_its_deadline(
    name: str,
    tmp_path: Path,
    tiny_bundle: Path,
    frames_folder: Path,
    made_up: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_report, "GRACE", 1.0)
    taken: list[Any] = []
    begin = time.time()
    given = settings(tmp_path, tiny_bundle, frames_folder, seconds=3)
    gpu_report.run_section(f"made_up_sections:{name}", given, taken.append)
    assert time.time() - begin < 30
    why = {"hang": "out of time; its process was stopped", "slow_command": "out of time"}[name]
    assert taken[-1] == ("missing", "the rest of the section", why)
    assert len(taken) == {"hang": 2, "slow_command": 1}[name]


def test_nothing_runs_without_cuda_or_time(
    tmp_path: Path, tiny_bundle: Path, frames_folder: Path, made_up: None
) -> None:
    report = run_all(tmp_path, tiny_bundle, frames_folder, "--sections", "measure", unavailable_reason="no driver")
    assert report.not_measured() == ["measure: all of it: no driver"]
    report = run_all(tmp_path, tiny_bundle, frames_folder, "--sections", "measure", seconds=-1)
    assert report.not_measured() == ["measure: all of it: out of time"]


def test_interrupted_run_keeps_its_tables(tmp_path: Path) -> None:
    facts = {"command": "c", "date": "d", "machine": "m", "versions": {}, "gpu": "NVIDIA X, driver 1"}
    report = gpu_report.Report({"engine": "Engine", "files": "Files"}, facts, "cuda", tmp_path / "R.md", None)
    report.take("engine", ("table", "Times", [["", "ms"], ["a", "2"]]))
    report.take("engine", ("table", "Times", [["", "ms"], ["a", "3"]]))
    text = (tmp_path / "R.md").read_text("utf-8")
    assert "| a | 3 |" in text and "| a | 2 |" not in text and "NVIDIA X, driver 1" in text
    assert gpu_report.DRY_RUN not in text
    assert [line for line in text.splitlines() if "incomplete" in line] == [
        f"- {name}: incomplete: the benchmark ended before the section" for name in ("engine", "files")
    ]


def test_probe_reports_why_cuda_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if command[0] == "nvidia-smi":
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout='{"unavailable_reason": "no driver", "cuDNN": "91000"}\n')

    monkeypatch.setattr(gpu.subprocess, "run", run)
    found = gpu.probe("cuda")
    assert gpu.describe(found) == (
        "no NVIDIA card, cuDNN 91000, driver unknown (no nvidia-smi); CUDA cannot be used: no driver"
    )


# Aims


def test_aim_compares_a_value_with_its_bound() -> None:
    assert gpu_report.aim("a", 1.1, 1.10, at_most=True) == "a: 1.10 (aim: at most 1.1; reached)."
    assert gpu_report.aim("a", 1.2, 1.10, at_most=True).endswith("missed).")
    assert gpu_report.aim("a", 0.9, 0.85, at_most=False).endswith("reached).")
    assert gpu_report.aim("a", 0.8, 0.85, at_most=False).endswith("missed).")
    assert gpu_report.aim("a", None, 0.85, at_most=False) == "a: not measured (aim: at least 0.85)."
    assert gpu_report.ratio({"a": 3.0, "b": 2.0}, "a", "b") == 1.5
    assert gpu_report.ratio({"a": 3.0}, "a", "b") is None


def test_engine_aims_and_rows() -> None:
    medians = {
        1: {gpu_engine.GRAPHS: 0.6, gpu_engine.DEVICE_TIME: 0.4},
        8: {gpu_engine.OWN: 2.0, gpu_engine.GRAPHS: 2.4, gpu_engine.HALF: 2.0},
    }
    lines = gpu_engine.engine_aims(medians)
    measured = [line for line in lines if "not measured" not in line]
    assert [line.rpartition(": ")[0].rpartition(": ")[2] for line in measured][:2] == ["1.00 (aim", "1.20 (aim"]
    assert ["reached" in line for line in measured] == [True, False, True]
    assert len(lines) == 2 * 4 + 2
    rows = gpu_engine.engine_rows(medians, {gpu_engine.OWN: 1e-3})
    assert rows[0] == ["", "1 frame", "8 frames", "|dp|"]
    assert [gpu_engine.OWN, "", "2.000", "1.0e-03"] in rows and [gpu_engine.DEVICE_TIME, "0.400", "", ""] in rows


def test_best_options_skip_wrong_answers() -> None:
    medians = {
        "baseline": 2.0,
        "prefer_nhwc": 1.0,
        "search DEFAULT": 0.5,
        "fuse_conv_bias": 3.0,
        "max_workspace 0": 2.5,
    }
    worst = dict.fromkeys(medians, 0.001) | {"search DEFAULT": 0.4}
    line = gpu_options.best_options("fp16", 8, medians, worst, 0.05)
    assert line == (
        "fp16, 8 frames, fastest first, over the baseline: prefer_nhwc 1.000 ms (0.50), baseline 2.000 ms (1.00), "
        "max_workspace 0 2.500 ms (1.25). Wrong answers: search DEFAULT."
    )


def test_provider_options_are_distinct() -> None:
    sets = gpu_options.provider_options()
    assert sets["baseline"] == {}
    assert len({tuple(sorted(chosen.items())) for chosen in sets.values()}) == len(sets) == 13
    assert sets["prefer_nhwc, search HEURISTIC"] == {"prefer_nhwc": "1", "cudnn_conv_algo_search": "HEURISTIC"}


def test_rates_exclude_the_start() -> None:
    own, hand = "EchoQuad fp16", "plain onnxruntime fp16"
    seconds = {
        ("rgb-png", own): [6.0, 7.0, 70.0],
        ("rgb-png", hand): [8.0],
        ("rgb-png", "reading alone, threads"): [8.0],
        ("rgb-png", "reading alone, processes"): [4.0],
        ("rgb-jpeg", own): [2.0],
    }
    found = gpu_files.rates(seconds, {("rgb-png", own): [3.0], ("rgb-jpeg", own): [2.5]}, 1600, 160)
    assert found["rgb-png"][own] == 360 and found["rgb-png"][hand] == 200
    assert found["rgb-jpeg"] == {}  # no longer than the start
    first, second = gpu_files.file_aims("rgb-png", "fp16", found["rgb-png"])
    assert "1.80 (aim: at least 1.5; reached)" in first and "0.90 (aim: at least 0.85; reached)" in second
    assert "not measured" in gpu_files.file_aims("rgb-jpeg", "fp16", {})[0]
    rows = gpu_files.file_rows(found, seconds, 1600)
    assert rows[1] == [own, "rgb-png", "360", "3", "229"]
    assert rows[-1] == [own, "rgb-jpeg", "", "1", "800"]


def test_share_of_linear_scaling() -> None:
    assert gpu_files.shares({2: 70.0, 4: 140.0, 16: 280.0}) == {2: 1, 4: 1, 16: 0.5}
    assert gpu_files.scaling_aim({2: 70.0, 16: 280.0}) == (
        "16 cores, share of linear from 2: 0.50 (aim: at least 0.8; missed)."
    )
    assert "not measured" in gpu_files.scaling_aim({2: 70.0})
    assert "not measured" in gpu_files.scaling_aim({4: 70.0})
    assert gpu_files.scaling_rows({4: 70.0})[1] == ["4", "70.0", ""]


def test_epoch_seconds_extrapolate_to_the_whole_recipe() -> None:
    # 16 epochs at reduced, 11 at full resolution; the first of each phase is slower.
    found = gpu_commands.epoch_seconds([2.0, 0.5, 0.5], [3.0, 1.0, 1.0], 16, 27)
    assert found == pytest.approx((2 + 15 * 0.5 + 3 + 10 * 1.0) / 27)
    assert gpu_commands.epoch_seconds([2.0], [3.0, 1.0], 16, 27) is None


def test_count_outcomes_parses_the_summary_of_pytest() -> None:
    summary = "=== short test summary info ===\nFAILED tests/a.py::b - 3 failed in all\n"
    output = f"F.s\n{summary}1 failed, 3 passed, 2 skipped in 4.50s\n"
    assert gpu_commands.count_outcomes(output) == {"passed": 3, "failed": 1, "skipped": 2, "error": 0}
    assert gpu_commands.count_outcomes("1 skipped, 2 errors in 0.1s")["error"] == 2
    assert gpu_commands.count_outcomes("") == dict.fromkeys(gpu_commands.OUTCOMES, 0)


def test_all_files_with_gpu_tests_are_found() -> None:
    marked = [
        path.name
        for path in (gpu_commands.ROOT / "tests").rglob("test_*.py")
        if gpu_commands.MARKED.search(path.read_text("utf-8"))
    ]
    assert {"test_session_factory.py", "test_io_binding.py", "test_devices.py", "test_loop.py"} <= set(marked)
    assert "test_gpu.py" not in marked


def test_compare_counts_changed_decisions_and_distinct_answers() -> None:
    expected = {"a": ["ED", "0.9", "0.1"], "b": ["ES", "0.2", "0.8"]}
    assert gpu_commands.compare(expected, expected) == {"frames": 2, "flips": 0, "answers": 2, "max_abs_dp": 0}
    stuck = {"a": ["ED", "0.6", "0.4"], "b": ["ED", "0.6", "0.4"]}
    found = gpu_commands.compare(stuck, expected)
    assert (found["flips"], found["answers"], found["max_abs_dp"]) == (1, 1, pytest.approx(0.4))
    with pytest.raises(RuntimeError, match="1 rows found; expected 2"):
        gpu_commands.compare({"a": expected["a"]}, expected)


# On the tiny bundle


def test_stale_answers_of_an_engine_are_detected(tmp_path: Path, tiny_bundle: Path, frames_folder: Path) -> None:
    sample = gpu_engine.Sample(Sent(settings(tmp_path, tiny_bundle, frames_folder)).context, 8)
    engine = OnnxEngine(Bundle(tiny_bundle), device="cpu")

    def right(batch: np.ndarray) -> np.ndarray:
        return engine.infer(batch.reshape(-1, *batch.shape[2:]))[1].reshape(len(batch), 4, -1)

    first = right(sample.batch(2)[0])
    assert sample.difference(right, 2) < 1e-5
    assert sample.difference(lambda batch: first, 2) > 0.01
    assert sample.difference(lambda batch: np.full_like(first, np.nan), 2) == np.inf


@pytest.mark.parametrize("channels", [3, 4, 8])
def test_widened_graph_gives_the_same_answers(channels: int, tiny_bundle: Path) -> None:
    model = Bundle(tiny_bundle).read_model("fp32")
    quadrants = np.random.default_rng(0).integers(0, 256, (4, 1, 32, 32), np.uint8)
    expected, found = (
        create_session(load_onnxruntime(), graph, CPU_PROVIDER, threads=1).run(
            ["probabilities"], {"quadrants": quadrants}
        )[0]
        for graph in (model, gpu_options.widened(model, channels))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"has {channels} input channels; expected 1"):
        gpu_options.widened(gpu_options.widened(model, channels), 3)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace CUDA by the CPU in onnxruntime and torch, so that code for CUDA runs here."""
    torch = pytest.importorskip("torch")
    cpu, network = torch.device("cpu"), torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1))
    network = torch.nn.Sequential(network, torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()

    def on_cpu(bundle: Bundle, **options: Any) -> OnnxEngine:
        options |= {"device": "cpu", "precision": "fp32" if options["precision"] == "tf32" else options["precision"]}
        return OnnxEngine(bundle, **options)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    @contextlib.contextmanager
    def nothing(_: object) -> Iterator[None]:
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nothing,
        "graph": nothing,
        "Event": Event,
    }
    cuda |= {"CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "synchronize": lambda: None}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "device", lambda name: cpu)
    monkeypatch.setattr(gpu_engine, "trained", lambda setting: copy.deepcopy(network))
    monkeypatch.setattr(gpu_engine, "OnnxEngine", on_cpu)
    monkeypatch.setattr(gpu_engine, "CUDA_PROVIDER", CPU_PROVIDER)
    monkeypatch.setattr(common, "WARM_UP", 0)  # times do not matter here


def test_engine_and_options_sections_on_a_stand_in_for_cuda(
    tmp_path: Path,
    make_tiny_bundle: Any,
    frames_folder: Path,
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_tiny_bundle(tmp_path / "both", precisions=("fp32", "fp16"))
    sent = Sent(settings(tmp_path, bundle, frames_folder, device="cuda"))
    gpu_engine.engine(sent.context)
    title, rows = sent.of("table")[-1]
    assert title == "Milliseconds per batch" and rows[0] == [
        "",
        *(f"{n} frame{'s' * (n > 1)}" for n in (1, 2, 8, 32, 64)),
        "|dp|",
    ]
    ways = {row[0] for row in rows[1:]}
    assert {gpu_engine.OWN, gpu_engine.GRAPHS, gpu_engine.HALF, gpu_engine.DEVICE_TIME, "torch tf32"} <= ways
    assert {"EchoQuad tf32", gpu_engine.NHWC, gpu_engine.NHWC_GRAPHS, "session.run fp32"} <= ways
    assert all(all(row[1:6]) for row in rows)
    assert sum("aim: at most" in note and "not measured" not in note for note in sent.of("note")) == 10
    assert sent.of("missing") == []

    sent = Sent(settings(tmp_path, bundle, frames_folder, device="cuda"))
    monkeypatch.setattr(gpu_options, "OVERLAP", 0.01)
    gpu_options.options(sent.context)
    tables = dict(sent.of("table"))
    assert set(tables) == {
        "Two concurrent slots",
        *(f"{p}: milliseconds per batch by provider options" for p in ("fp16", "fp32", "tf32")),
    }
    assert len(tables["Two concurrent slots"]) == 1 + 3 * 2
    ways = {row[0] for row in tables["fp16: milliseconds per batch by provider options"]}
    assert {*gpu_options.provider_options(), "3 input channels", "8 input channels, prefer_nhwc"} <= ways
    assert len(sent.of("note")) == 9 and sent.of("missing") == []


def test_failing_engines_are_listed_and_the_others_measured(
    tmp_path: Path, tiny_bundle: Path, frames_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_engine, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_engine, "OnnxEngine", OnnxEngine)

    def broken(context: gpu_report.Context, most: int, **options: Any) -> Any:
        def call(batch: np.ndarray) -> np.ndarray:
            raise RuntimeError(f"no kernel for {len(batch)} frames")

        return call

    monkeypatch.setattr(gpu_engine, "slots", broken)
    sent = Sent(settings(tmp_path, tiny_bundle, frames_folder))
    gpu_engine.engine(sent.context)
    assert ("torch", "torch is not installed") in sent.of("missing")
    assert ("EchoQuad fp32, 2 frames", "no kernel for 2 frames") in sent.of("missing")
    (_, rows), *_ = reversed(sent.of("table"))
    assert [row[0] for row in rows[1:]] == ["session.run fp32"]


def test_dry_run_on_the_cpu(
    tmp_path: Path,
    tiny_bundle: Path,
    frames_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "probe", lambda device: {"unavailable_reason": "", "driver": "unknown"})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)  # keeps the handler of pytest
    for name in ("ECHOQUAD_CACHE_DIR", "ECHOQUAD_CONFIG_DIR"):
        monkeypatch.setenv(name, os.environ[name])  # the script replaces them
    results, out = tmp_path / "R.md", tmp_path / "out.jsonl"
    line = ["gpu.py", tmp_path / "run", tiny_bundle, "--frames", frames_folder, "--device", "cpu"]
    line += ["--sections", "truth,start,training", "--minutes", "2", "--results", results, "--out", out]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    gpu.main()
    text = results.read_text("utf-8")
    assert "## GPU\n\n`python benchmarks/gpu.py run " in text and gpu_report.DRY_RUN in text
    assert "| fp32 | 6 | 0 | 6 | 0.0000 |" in text and "| fp32 | yes | 6 | 0 |" in text
    assert "verify: passed, exit code 0." in text and "**Start of `predict` with one frame**" in text
    assert "- training: training: no --data was given" in text
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    (start,) = [record for record in records if record.get("section") == "start"]
    assert 0 < start["single"]["self-test"] < start["first_row_s"]
    assert "Not measured\n- training: training: no --data was given\n" in capsys.readouterr().out


@pytest.mark.parametrize("frames", [800, 10])
def test_training_section_compares_with_its_aim(
    frames: int, tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[Any] = []

    def train(context: gpu_report.Context, line: list[Any], log: Path) -> int:
        lines.append(line)
        (tmp_path / "run").mkdir()
        seconds = [2.0, 0.5, 0.5, 3.0, 1.0, 1.0]
        rows = ["epoch,seconds", *(f"{epoch},{value}" for epoch, value in enumerate(seconds, 1))]
        (tmp_path / "run" / "metrics.csv").write_text("\n".join(rows))
        return 0

    @contextlib.contextmanager
    def sampled(context: gpu_report.Context, log: Path) -> Iterator[list[float]]:
        yield [40.0, 60.0]

    monkeypatch.setattr(gpu_commands, "_train", train)
    monkeypatch.setattr(gpu_commands, "sampled_utilisation", sampled)
    monkeypatch.setattr(gpu_commands, "walk", lambda folder: iter(range(frames)))
    sent = Sent(settings(tmp_path, tiny_bundle, tmp_path, device="cuda", epochs=6, data=tmp_path / "data"))
    gpu_commands.training(sent.context)
    assert "progressive_fraction=0.5" in lines[0] and lines[0][-1] == "cuda"
    assert sent.of("table") == [
        (
            "Training, recipe scratch at 112",
            [
                ["", "epochs", "first, s", "median of the others, s"],
                ["reduced resolution", "3", "2.00", "0.50"],
                ["full size", "3", "3.00", "1.00"],
            ],
        )
    ]
    words = "seconds per epoch over the 27 epochs of the recipe: 0.83"
    if frames == 800:
        assert sent.of("note")[0] == f"{words} (aim: at most 0.8; missed)." and sent.of("missing") == []
    else:
        assert sent.of("note")[0] == f"{words}."
        assert sent.of("missing") == [("the aim", "defined for 800 training frames; found 10")]
    assert sent.of("note")[-1] == "GPU 50 % busy on average of 2 samples."


def test_tests_section_runs_pytest_or_reports_what_is_missing(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Sent(settings(tmp_path, tiny_bundle, tmp_path))
    monkeypatch.setattr(gpu_commands, "find_spec", lambda name: None if name == "hypothesis" else True)
    gpu_commands.gpu_tests(sent.context)
    assert sent.of("missing") == [("tests marked gpu", "not run: hypothesis missing")] and sent.of("table") == []

    def command(self: Any, *line: Any) -> gpu_report.Finished:
        assert "timeout = " not in (tmp_path / "pyproject.toml").read_text("utf-8")
        assert any(Path(word).name == "test_session_factory.py" for word in line)
        skipped = f"SKIPPED [1] {gpu_commands.ROOT}/tests/a.py:3: no CUDA"
        return gpu_report.Finished(1, 2.0, f"{skipped}\nFAILED tests/b.py::c\n1 failed, 1 skipped in 2.0s\n", "")

    sent = Sent(settings(tmp_path, tiny_bundle, tmp_path))
    monkeypatch.setattr(gpu_commands, "find_spec", lambda name: None if name == "pytest_timeout" else True)
    monkeypatch.setattr(gpu_report.Context, "command", command)
    gpu_commands.gpu_tests(sent.context)
    assert sent.of("table")[0][1][1] == ["0", "1", "1", "0", "2"]
    assert sent.of("note") == ["FAILED tests/b.py::c"]
    assert sent.of("missing") == [("test", "[1] tests/a.py:3: no CUDA")]


@pytest.mark.slow
def test_files_and_scaling_sections(
    tmp_path: Path, tiny_bundle: Path, frames_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_files, "FRAME_SIZE", (80, 60))
    monkeypatch.setattr(gpu_files, "ROUNDS", 1)
    monkeypatch.setattr(gpu_files, "CORES", (1, 2, 4))
    sent = Sent(settings(tmp_path, tiny_bundle, frames_folder, count=2000, threads=1))
    gpu_files.files(sent.context)
    _, rows = sent.of("table")[-1]
    ways = {tuple(row[:2]) for row in rows[1:]}
    assert {("EchoQuad fp32", kind) for kind in ("rgb-png", "rgb-jpeg")} <= ways
    assert {("reading alone, processes", "rgb-png"), ("plain onnxruntime fp32", "rgb-jpeg")} <= ways
    assert [what for what, _ in sent.of("missing")] == ["plain torch fp32", "the aims"]  # no run is given
    assert len(list((tmp_path / "rgb-png-2000").rglob("*.png"))) == 2000
    assert len(list((tmp_path / "rgb-png").iterdir())) == gpu_files.DISTINCT
    gpu_files.scaling(sent.context)
    assert [row[0] for row in sent.of("table")[-1][1]] == ["cores", "1"]
    assert sent.of("missing")[-1] == ("2, 4 cores", "this process may use 1")
    monkeypatch.setattr(gpu_files, "available_cpus", lambda: 1)  # more threads than cores
    sent = Sent(settings(tmp_path, tiny_bundle, frames_folder, count=2000, threads=4))
    gpu_files.scaling(sent.context)
    assert sent.of("missing") == [("2, 4 cores", "this process may use 1")]
