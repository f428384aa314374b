"""Tests of tuning: on a real bundle, and on a simulated clock where the best candidate must be known."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bench.benchmark import read_encoded
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import IoBinding
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import (
    BundleError,
    BundleTamperedError,
    ConfigError,
    DeviceUnavailableError,
    InputNotFoundError,
    UsageError,
)
from echoquad_runtime.tuning import measurement
from echoquad_runtime.tuning import tune as tuning
from echoquad_runtime.tuning.racing import successive_elimination
from echoquad_runtime.tuning.saved_settings import RunConfig
from echoquad_runtime.tuning.tune import BATCH_SIZES, CandidateResult, TuningResult, candidates, tune

Make = Callable[..., Path]
Cost = Callable[[OnnxEngine, int], float]


@pytest.fixture(autouse=True)
def _two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "available_cpus", lambda: 2)


@pytest.fixture
def two_precisions(make_tiny_bundle: Make, tmp_path: Path) -> Path:
    """Return a bundle whose int8 graph is the fp32 graph, so that it passes its gate."""
    return make_tiny_bundle(tmp_path / "two", precisions=("fp32", "int8"))


@pytest.fixture
def cost_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cost], None]:
    """Return a function that sets the cost of a call, by engine and frames, on a simulated clock."""

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            return cls.now

        @classmethod
        def process_time(cls) -> float:
            return cls.now / 2

        @classmethod
        def sleep(cls, seconds: float) -> None:
            assert seconds >= 0
            cls.now += seconds

    def install(cost: Cost) -> None:
        def time_stages(slots: SlotPool, encoded: Sequence[bytes], batch: np.ndarray) -> list[float]:
            assert len(encoded) <= len(batch)
            Clock.now += (seconds := cost(slots.engine, len(encoded)))  # type: ignore[arg-type]
            return [seconds / 2, seconds / 2]

        def time_pool(predictor: Any, encoded: Sequence[bytes]) -> float:
            engine = SimpleNamespace(precision=predictor.engine.precision, threads=predictor.threads)
            batches = len(encoded) / (predictor.batch_size * predictor.threads)
            Clock.now += (seconds := batches * cost(engine, predictor.batch_size))  # type: ignore[arg-type]
            return seconds

        monkeypatch.setattr(measurement, "time_pool", time_pool)
        monkeypatch.setattr(measurement, "time", Clock)
        monkeypatch.setattr(tuning, "successive_elimination", partial(successive_elimination, clock=Clock.perf_counter))
        monkeypatch.setattr(measurement, "time_stages", time_stages)

    return install


quick = partial(tune, seconds=5.0)  # of the simulated clock


def named(found: TuningResult) -> dict[str, CandidateResult]:
    return {str(row.config): row for row in found.candidates}


# ---------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize(
    ("cpus", "threads"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_thread_counts(cpus: int, threads: list[int]) -> None:
    for device in ("cpu", "openvino"):
        found = candidates({device: ["fp32"]}, batch_sizes=[1], cpus=cpus)
        assert list(dict.fromkeys(choice.threads for choice in found)) == threads


def test_candidates() -> None:
    found = candidates({"cpu": ["fp32", "int8"], "openvino": ["bf16"], "cuda": ["fp32"]}, batch_sizes=[1, 4], cpus=4)
    assert len(set(found)) == len(found) == 2 * 5 * 2 + 3 * 2 + 2 * 2 * 4
    ways = {(choice.cuda_graphs, choice.nhwc) for choice in found if choice.device == "cuda"}
    assert ways == {(False, False), (False, True), (True, False), (True, True)}
    assert not any(choice.cuda_graphs or choice.nhwc for choice in found if choice.device != "cuda")
    on_cpu = [(choice.threads, choice.spinning) for choice in found if choice.device == "cpu"]
    assert set(on_cpu) == {(1, False), (2, False), (2, True), (4, False), (4, True)}
    assert not [choice for choice in found if choice.device != "cpu" and choice.spinning]
    assert {choice.threads for choice in found if choice.device == "cuda"} == {1, 4}
    still = candidates({"cpu": ["fp32"]}, batch_sizes=[1], cpus=4, may_spin=False)
    assert [(choice.threads, choice.spinning) for choice in still] == [(1, False), (2, False), (4, False)]
    assert {choice.threads for choice in candidates({"cpu": ["fp32"]}, batch_sizes=[1], cpus=4, threads=3)} == {3}
    assert candidates({}, batch_sizes=[1], cpus=4) == []


# ---------------------------------------------------------------------------------------------- real engines


def test_search_on_real_bundle(tiny_bundle: Path, frames_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echoquad_runtime.tuning")
    spent: list[float] = []
    frames, _ = read_encoded([frames_folder], 10)
    found = tune(
        tiny_bundle,
        frames,
        goal="throughput",
        threads=1,
        seconds=1.0,
        exhaustive=True,
        progress=spent.append,
    )
    assert caplog.messages == ["golden frames: fp32 on cpu, 1 thread: passed"]
    assert [row.config.batch_size for row in sorted(found.candidates, key=lambda row: row.config.batch_size)] == [
        *BATCH_SIZES
    ]
    assert {row.samples for row in found.candidates} == {found.rounds}
    assert found.rounds >= 3
    assert spent == sorted(spent)
    assert [row.cost for row in found.candidates] == sorted(row.cost for row in found.candidates if row.cost)
    for row in found.candidates:
        assert row.cost is not None and row.p50_ms and row.p99_ms and row.frames_per_second and row.cpu_ms
        assert row.cost >= 1
        assert 0 < row.p50_ms <= row.p99_ms
        assert row.calls >= row.samples
    (chosen,) = [row for row in found.candidates if row.verdict == "chosen"]
    assert chosen.config == found.choice
    assert chosen.cost <= 1.02
    # No bound on measured ratios, since the host may be busy: test_racing checks them on simulated hosts.
    (raced,) = [row for row in found.candidates if row.config == found.racing_choice]
    assert found.racing_cost == raced.cost
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["choice"] == dataclasses.asdict(found.choice)


def test_spinning_stops_between_frames(tiny_bundle: Path) -> None:
    """With a network of microseconds, nearly all CPU time would be spinning between frames."""
    found = tune(tiny_bundle, goal="power", threads=2, seconds=0.1)
    assert [row.config.spinning for row in found.candidates].count(True) == 1
    for row in found.candidates:
        assert row.cpu_ms is not None
        assert row.cpu_ms < 15  # a thread that spins through the pauses takes 33 ms


def test_no_frame_to_time_raises(tiny_bundle: Path, make_tiny_bundle: Make, tmp_path: Path) -> None:
    golden = Bundle(tiny_bundle).read_golden()
    renamed = dataclasses.replace(golden, names=tuple(f"frame-{index}" for index in range(len(golden.names))))
    with pytest.raises(InputNotFoundError, match="no golden frame can be timed; name frames"):
        tune(make_tiny_bundle(tmp_path, golden=renamed))


# ---------------------------------------------------------------------------------------------- the gate


def test_candidate_that_fails_golden_frames_is_refused(
    make_tiny_bundle: Make,
    make_tiny_graph: Callable[..., bytes],
    tmp_path: Path,
    cost_of: Callable[[Cost], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    contract = Contract(classes=("ASD", "NORM"), input_size=32)
    wrong = make_tiny_graph(contract, logit_scale=1.5)
    folder = make_tiny_bundle(tmp_path, precisions=("fp32", "fp16", "int8"), graphs={"fp16": wrong, "int8": b"none"})
    cost_of(lambda engine, count: 0.1 if engine.precision == "fp32" else 0.001)
    caplog.set_level(logging.INFO, "echoquad_runtime.tuning")
    found = quick(folder)
    assert found.choice == RunConfig("cpu", "fp32", 1, False, 1)
    refused = {row.config.precision: row for row in found.candidates if row.verdict == "refused"}
    assert set(refused) == {"fp16", "int8"}
    assert "worst |dprobability| " in refused["fp16"].reason
    assert "allowed: max_abs_dlogit 0.0001" in refused["fp16"].reason
    assert "int8 graph" in refused["int8"].reason
    assert all(row.cost is None and row.samples == 0 for row in refused.values())
    assert set(caplog.messages[:3]) == {
        f"golden frames: {name} on cpu, 2 threads: {how}"
        for name, how in [("fp32", "passed"), ("fp16", "failed"), ("int8", "failed")]
    }


def test_no_candidate_passes(make_tiny_bundle: Make, tmp_path: Path) -> None:
    found = tune(make_tiny_bundle(tmp_path, graph={"logit_scale": 1.5}), seconds=0.1)
    assert (found.choice, found.closest, found.rounds, found.racing_choice, found.racing_cost) == (
        None,
        None,
        0,
        None,
        None,
    )
    (row,) = found.candidates
    assert row.verdict == "refused"


def test_choice_passes_golden_frames_with_its_own_threads(
    two_precisions: Path, cost_of: Callable[[Cost], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = []

    def verify(folder: Path, **options: Any) -> Any:
        replayed.append((options["precision"], options["threads"]))
        found = real(folder, **options)
        return dataclasses.replace(found, passed=replayed[-1] != ("int8", 1))

    real = measurement.verify
    monkeypatch.setattr(measurement, "verify", verify)
    cost_of(lambda engine, count: {"int8": 0.01, "fp32": 0.022}[engine.precision] * engine.threads)
    found = quick(two_precisions)
    assert replayed == [("fp32", 2), ("int8", 2), ("int8", 1)]
    assert found.choice == RunConfig("cpu", "int8", 2, False, 1)
    assert named(found)["int8 on cpu, 1 thread, one frame at a time"].verdict == "refused"
    assert named(found)["fp32 on cpu, 1 thread, one frame at a time"].verdict == "contender"


def test_changed_bundle_raises(make_tiny_bundle: Make, tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("fp32", "int8"))
    with (folder / "model.int8.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleTamperedError):
        tune(folder, seconds=0.1)


# ---------------------------------------------------------------------------------------------- the choice


def test_latency_selects_fastest_frame(two_precisions: Path, cost_of: Callable[[Cost], None]) -> None:
    cost_of(lambda engine, count: 0.01 * (engine.precision == "fp32") + 0.02 / engine.threads - 0.001 * engine.spinning)
    found = quick(two_precisions, goal="latency")
    assert found.choice == RunConfig("cpu", "int8", 2, True, 1)
    row = named(found)[str(found.choice)]
    assert (row.p50_ms, row.p99_ms) == (pytest.approx(9.0), pytest.approx(9.0))
    assert row.frames_per_second == pytest.approx(1 / 0.009)
    assert {row.config.batch_size for row in found.candidates} == {1}
    assert named(found)["fp32 on cpu, 1 thread, one frame at a time"].verdict == "dropped"
    assert named(found)["fp32 on cpu, 1 thread, one frame at a time"].cost == pytest.approx(0.03 / 0.009)
    assert found.racing_cost is None


def test_throughput_selects_best_batch_size(tiny_bundle: Path, cost_of: Callable[[Cost], None]) -> None:
    cost_of(lambda engine, count: 0.01 + 0.01 * count + 0.0005 * count**2)
    found = quick(tiny_bundle, goal="throughput")
    assert found.choice == RunConfig("cpu", "fp32", 2, False, 4)
    row = named(found)[str(found.choice)]
    assert row.frames_per_second == pytest.approx(2 * 4 / 0.058)  # one batch per thread
    assert row.p50_ms == pytest.approx(58.0)


def test_power_is_cpu_time_at_frame_rate(tiny_bundle: Path, cost_of: Callable[[Cost], None]) -> None:
    """The simulated process keeps half a core busy, also in pauses; a late call waits for the next frame."""
    cost_of(lambda engine, count: 0.010 if engine.threads == 2 else 0.040)
    found = quick(tiny_bundle, goal="power")
    burnt = {(row.config.threads, row.config.spinning): row.cpu_ms for row in found.candidates}
    assert burnt[1, False] == pytest.approx(1e3 / 30)
    assert burnt[2, False] == pytest.approx(1e3 / 60)
    assert burnt[2, True] == pytest.approx(1e3 / 60)
    assert found.choice == RunConfig("cpu", "fp32", 2, False, 1)


def test_tie_break_prefers_fewer_threads_then_no_spinning_then_precision(
    two_precisions: Path, cost_of: Callable[[Cost], None]
) -> None:
    cost_of(lambda engine, count: 0.0101 - 0.0001 * (engine.precision == "int8"))
    assert quick(two_precisions).choice == RunConfig("cpu", "fp32", 1, False, 1)
    cost_of(lambda engine, count: 0.02 / engine.threads)
    assert quick(two_precisions).choice == RunConfig("cpu", "fp32", 2, False, 1)
    cost_of(lambda engine, count: 0.01 if engine.precision == "int8" else 0.0099 / (engine.threads / 2))
    assert quick(two_precisions).choice == RunConfig("cpu", "int8", 1, False, 1)


def test_p99_limit(tiny_bundle: Path, cost_of: Callable[[Cost], None]) -> None:
    cost_of(lambda engine, count: 0.02 + 0.01 * count)
    options: dict[str, Any] = {"goal": "throughput", "threads": 1}
    found = quick(tiny_bundle, **options, max_p99_ms=65.0)
    assert found.choice == RunConfig("cpu", "fp32", 1, False, 4)
    assert {row.config.batch_size: row.verdict for row in found.candidates} == {
        16: "too slow",
        8: "too slow",
        4: "chosen",
        2: "dropped",
        1: "dropped",
    }
    assert found.candidates[0].cost < 1  # faster than the choice, but above the limit
    found = quick(tiny_bundle, **options, max_p99_ms=25.0)
    assert found.choice is None
    assert found.closest == (pytest.approx(30.0), RunConfig("cpu", "fp32", 1, False, 1))
    assert {row.verdict for row in found.candidates} == {"too slow"}


def test_exhaustive_search_reports_cost_of_racing(tiny_bundle: Path, cost_of: Callable[[Cost], None]) -> None:
    turns: dict[int, int] = {}

    def cost(engine: OnnxEngine, count: int) -> float:
        """Make batches of four slow at first, so that elimination drops them."""
        turns[count] = turns.get(count, 0) + 1
        slow = 4.0 if count == 4 and turns[count] < 12 else 1.0
        return slow * count * (1.0 if count == 4 else 1.04)

    cost_of(cost)
    found = tune(tiny_bundle, goal="throughput", threads=1, seconds=6000, exhaustive=True)
    assert found.choice.batch_size == 4
    assert found.racing_choice.batch_size == 1
    assert found.racing_cost == pytest.approx(1.04)
    assert {row.config.batch_size: row.verdict for row in found.candidates}[1] == "contender"


def test_candidate_that_does_not_run_is_refused(
    two_precisions: Path, cost_of: Callable[[Cost], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(engine: OnnxEngine, count: int) -> float:
        if count > 4:
            raise RuntimeError("out of\n  memory")
        return 0.01

    cost_of(cost)
    found = quick(two_precisions, goal="throughput", precision="int8", threads=1)
    assert found.choice == RunConfig("cpu", "int8", 1, False, 4)
    assert [(row.config.batch_size, row.reason) for row in found.candidates if row.verdict == "refused"] == [
        (8, "out of memory"),
        (16, "out of memory"),
    ]


def test_candidates_cycle_through_all_frames(
    tiny_bundle: Path, cost_of: Callable[[Cost], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cost_of(lambda engine, count: 0.3)
    had: list[bytes] = []
    inner = measurement.time_stages
    monkeypatch.setattr(measurement, "time_stages", lambda *given: had.extend(given[1]) or inner(*given))
    quick(tiny_bundle, [(str(index), bytes([index])) for index in range(5)], threads=1)
    assert had == [bytes([index % 5]) for index in range(len(had))]
    assert len(had) > 10


def test_engines_of_eliminated_candidates_are_closed(
    two_precisions: Path, cost_of: Callable[[Cost], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_now: list[int] = []
    close_others = measurement.CandidateTimer.close_others

    def close(self: measurement.CandidateTimer, running: Sequence[int]) -> None:
        close_others(self, running)
        open_now.append(len(self._engines))

    monkeypatch.setattr(measurement.CandidateTimer, "close_others", close)
    cost_of(lambda engine, count: 0.01 if engine.precision == "int8" and engine.threads == 1 else 0.1)
    quick(two_precisions)
    assert open_now[0] == 0
    assert set(open_now[1:-1]) == {1}
    assert open_now[-1] == 0


# ---------------------------------------------------------------------------------------------- given options


def test_given_options_are_fixed(two_precisions: Path, cost_of: Callable[[Cost], None]) -> None:
    cost_of(lambda engine, count: 0.01)
    found = quick(two_precisions, device="cpu", precision="int8", threads=3, batch_size=5)
    assert {row.config for row in found.candidates} == {
        RunConfig("cpu", "int8", 3, spins, 5) for spins in (False, True)
    }


def test_devices_and_precisions(
    tiny_bundle: Path, two_precisions: Path, cost_of: Callable[[Cost], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cost_of(lambda engine, count: 0.01)
    asked: list[tuple[str, str]] = []

    def verify(folder: Path, **options: Any) -> Any:
        asked.append((options["device"], options["precision"]))
        return real(folder, **{**options, "device": "cpu", "precision": "fp32"})

    real = measurement.verify
    monkeypatch.setattr(measurement, "verify", verify)
    monkeypatch.setattr(
        measurement, "OnnxEngine", lambda bundle, **options: OnnxEngine(bundle, threads=options["threads"])
    )
    works = {"cpu": None, "cuda": None, "openvino": None}
    monkeypatch.setattr(tuning, "probe_devices", lambda: works)
    found = quick(two_precisions)
    assert asked[:7] == [
        *(("cpu", one) for one in ("fp32", "int8")),
        *(("cuda", one) for one in ("fp32", "tf32")),  # int8 is slower than fp32 on CUDA, and refused
        *(("openvino", one) for one in ("fp32", "int8", "bf16")),
    ]
    assert {row.config.device for row in found.candidates} == {"cpu", "cuda", "openvino"}
    assert found.left_out == {}
    # CPU time does not measure a GPU, so it would always win.
    found = quick(tiny_bundle, goal="power")
    assert {row.config.device for row in found.candidates} == {"cpu", "openvino"}
    assert "compare its settings by --device cuda" in found.left_out["cuda"]
    assert {row.config.device for row in quick(tiny_bundle, goal="power", device="cuda").candidates} == {"cuda"}
    monkeypatch.setattr(tuning, "probe_devices", lambda: {"cpu": None, "cuda": "no driver"})
    found = quick(tiny_bundle)
    assert {row.config.device for row in found.candidates} == {"cpu"}
    assert found.left_out == {"cuda": "no driver"}


def test_unavailable_device_raises(tiny_bundle: Path) -> None:
    from echoquad_runtime.devices.session_factory import probe_devices

    if "openvino" in probe_devices():
        pytest.skip("this onnxruntime has OpenVINO")
    with pytest.raises(DeviceUnavailableError, match="device openvino cannot be used"):
        tune(tiny_bundle, device="openvino")


def test_failed_gate_is_not_an_unavailable_device(two_precisions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(folder: Path, **options: Any) -> Any:
        if options["precision"] == "int8":
            raise DeviceUnavailableError("no int8 here")
        return dataclasses.replace(real(folder, **options), passed=False)

    real = measurement.verify
    monkeypatch.setattr(measurement, "verify", verify)
    found = tune(two_precisions, device="cpu")
    assert found.choice is None
    assert {row.config.precision: row.reason for row in found.candidates}["int8"] == "no int8 here"
    with pytest.raises(DeviceUnavailableError, match="no int8 here"):
        tune(two_precisions, device="cpu", precision="int8")


def test_unavailable_precision_raises(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="it holds no int8 graph"):
        tune(tiny_bundle, precision="int8")
    with pytest.raises(UsageError, match="bf16 requires device openvino"):
        tune(tiny_bundle, device="cpu", precision="bf16")


@pytest.mark.parametrize(
    "options",
    [{"seconds": 0}, {"seconds": -1}, {"seconds": float("nan")}, {"max_p99_ms": 0}, {"threads": 0}, {"batch_size": -2}],
    ids=str,
)
def test_numbers_out_of_range_raise(tiny_bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected a number above 0"):
        tune(tiny_bundle, **options)


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_batch_size_with_wrong_answers_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, goal: Any
) -> None:
    """`verify` replays batches of two frames on the CPU; only the self-test runs the candidate's batches of eight."""
    monkeypatch.setenv("ECHOQUAD_CACHE_DIR", str(tmp_path))
    run = IoBinding.run

    def wrong(slot: IoBinding, batch: np.ndarray, frames: int) -> Any:
        found = run(slot, batch, frames)
        return found if frames < 8 else found._replace(probabilities=found.probabilities[..., ::-1])

    monkeypatch.setattr(IoBinding, "run", wrong)
    found = tune(tiny_bundle, goal=goal, device="cpu", batch_size=8, threads=1, seconds=0.3)
    assert found.choice is None
    assert {row.verdict for row in found.candidates} == {"refused"}
    assert all("the self-test failed on cpu in fp32, in batches of 8" in row.reason for row in found.candidates)
