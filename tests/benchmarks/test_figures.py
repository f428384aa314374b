"""Calculations of the benchmarks, on made-up times and rows."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import efficiency
import latency
import memory
import numpy as np
import peers
import pytest
import scaling
from workers import peer

from echoquad_runtime.bench.live_source import LiveRun
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.reader import read_frame
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.quadrants import frame_quadrants

pytest.importorskip("torch")
import engines

CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)


# Peers


def times(**walls: list[float]) -> dict[str, peers.Times]:
    return {name.replace("_", "-"): peers.Times(wall, [2 * one for one in wall]) for name, wall in walls.items()}


def test_peer_figures_on_a_hand_computed_case() -> None:
    taken = times(
        reference=[8.0, 80.0, 8.0], ort_fp32=[4.0, 40.0, 4.0], torch=[5.0, 5.0, 5.0], echoquad_fp32=[2.0, 20.0, 2.0],
        ort_int8=[1.5, 15.0, 1.5], echoquad_int8=[1.0, 10.0, 1.0],
    )  # fmt: skip
    found = peers.figures(taken, 16, dict.fromkeys(taken, 0.001))
    own = found["echoquad-fp32"]
    assert (own["frames_per_second"], own["of_reference"], own["best_peer"]) == (8, 4, "ort-fp32")
    assert own["of_best_peer"] == 2
    assert own["cpu_ms_per_frame"] == 250
    assert found["echoquad-int8"]["best_peer"] == "ort-int8"  # of equal precision only
    assert found["echoquad-int8"]["of_best_peer"] == 1.5
    assert found["ort-int8"]["of_best_peer"] == 1
    assert found["reference"]["of_reference"] == 1
    first, second = peers.verdict("rgb-png", found)
    assert first == (
        "rgb-png, EchoQuad fp32: 4.00 times the reference pipeline (aim 2.2), "
        "2.00 of the best peer of its precision, ort-fp32 (aim 1)."
    )
    assert "int8: 8.00 times the reference pipeline (aim 6)" in second
    assert "(aim 2.2)" not in peers.verdict("grey-jpeg", found)[0]
    table = peers.table("rgb-png", found)
    assert {len(row) for row in table} == {7} and len(table) == 7


def test_no_ratio_without_a_peer_of_equal_precision() -> None:
    taken = times(reference=[8.0], echoquad_int8=[1.0])
    found = peers.figures(taken, 16, dict.fromkeys(taken, 0.0))
    assert found["echoquad-int8"]["of_best_peer"] is None
    assert peers.table("rgb-png", found)[2][4] == ""
    assert peers.verdict("rgb-png", found) == ["rgb-png, EchoQuad int8: 8.00 times the reference pipeline (aim 6)."]


def rows_of(tmp_path: Path, *frames: np.ndarray) -> dict[str, list[str]]:
    peer.write(tmp_path / "rows.csv", CONTRACT, ((Path(f"{i}.png"), one) for i, one in enumerate(frames)))
    return peers.read_rows(tmp_path / "rows.csv")


def test_disagreeing_peers_end_the_script(tmp_path: Path) -> None:
    sure = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
    expected = rows_of(tmp_path, sure, sure[::-1])
    assert peers.compare("torch", rows_of(tmp_path, sure, sure[::-1]), expected) == 0
    near = sure + np.array([0.0005, -0.0005])
    assert peers.compare("torch", rows_of(tmp_path, near, sure[::-1]), expected) == pytest.approx(5e-4, abs=1e-6)
    with pytest.raises(SystemExit, match=r"torch differs by 0\.0100 on a probability; expected at most 0\.001"):
        peers.compare("torch", rows_of(tmp_path, sure + np.array([0.01, -0.01]), sure[::-1]), expected)
    assert peers.compare("ort-int8", rows_of(tmp_path, sure + np.array([0.01, -0.01]), sure[::-1]), expected) > 0.009
    with pytest.raises(SystemExit, match=r"ort-int8 decides NORM for 0\.png; expected ASD"):
        peers.compare("ort-int8", rows_of(tmp_path, 1 - sure, sure[::-1]), expected)
    with pytest.raises(SystemExit, match="1 rows, the reference 2"):
        peers.compare("torch", rows_of(tmp_path, sure), expected)


def test_borderline_quadrants_may_differ(tmp_path: Path) -> None:
    edge = np.array([[0.5001, 0.4999], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
    other = np.array([[0.4999, 0.5001], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
    assert peers.compare("torch", rows_of(tmp_path, other), rows_of(tmp_path, edge)) == pytest.approx(2e-4, abs=1e-6)


def test_plain_pipelines_decide_as_echoquad(tiny_bundle: Path, frames_folder: Path, tmp_path: Path) -> None:
    """Compares cropping, voting and rows of the peers with EchoQuad."""
    setup = peer.Setup(tmp_path, tiny_bundle, 1)
    paths = sorted(path for path in frames_folder.rglob("*") if path.is_file())
    for path in paths:
        expected = frame_quadrants(read_frame(path), setup.contract)
        difference = peer.cut_small(path, setup.contract).astype(int) - expected
        assert np.abs(difference).max() <= 1
    for pool in (False, True):
        peer.ort_graph(setup, precision="fp32", pool=pool)(paths, tmp_path / f"{pool}.csv")
    peer.echoquad(setup, precision="fp32")(paths, tmp_path / "own.csv")
    rows = peers.read_rows(tmp_path / "own.csv")
    for pool in (False, True):
        assert peers.compare("ort-fp32", peers.read_rows(tmp_path / f"{pool}.csv"), rows) < 1e-3
    for result in Predictor(tiny_bundle, device="cpu").predict([frames_folder]):
        assert isinstance(result, Prediction)
        assert rows[Path(result.file).name][0] == result.label


def test_choose_depends_on_packages_and_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "openvino" else True)
    chosen, left_out = peers.choose(None, ("fp32",))
    assert chosen[0] == "reference" and "echoquad-fp32" in chosen and "torch-bf16" in chosen
    assert not [name for name in chosen if "int8" in name or "openvino" in name]
    assert "plain OpenVINO, fp32, loop (openvino is not installed)" in left_out
    assert "EchoQuad, int8 (the bundle holds no int8)" in left_out
    assert peers.choose("echoquad-fp32,reference", ("fp32",))[0] == ["reference", "echoquad-fp32"]
    with pytest.raises(SystemExit, match="no peer tensorrt; expected some of reference, "):
        peers.choose("tensorrt", ("fp32",))


def test_in_threads_keeps_order_and_limits_items_in_flight() -> None:
    taken: list[int] = []

    def items() -> range:
        for item in range(50):
            taken.append(item)
            yield item

    found = peer.in_threads(lambda item: item * item, items(), 3, ahead=5)
    assert next(found) == 0 and len(taken) <= 5
    assert list(found) == [item * item for item in range(1, 50)]


# Efficiency, scaling


def test_share_compares_times_of_the_same_round() -> None:
    assert efficiency.share_of([9.0, 90.0, 9.0], [10.0, 100.0, 18.0]) == pytest.approx(0.9)


def test_parallel_efficiency_on_a_hand_computed_case() -> None:
    one, two = scaling.parallel({1: [(0.02, 0.9), (0.02, 1.0)], 2: [(0.0125, 1.7), (0.0125, 1.9)]})
    assert (one["threads"], one["fps"], one["efficiency"], one["cores"]) == (1, 50, 1, 1.0)
    assert (two["fps"], two["efficiency"], two["cores"]) == (80, 0.8, 1.9)  # largest of the rounds


def test_compare_threads_subtracts_the_start() -> None:
    asked: list[tuple[int, int]] = []

    def predict(count: int, threads: int) -> scaling.Ran:
        asked.append((count, threads))
        seconds = 0.5 + (count - 1) * 0.02 / threads
        return scaling.Ran(seconds, threads * seconds / 2, 100.0, "", "")

    one, two = scaling.compare_threads(predict, 101, [1, 2], 2)
    assert (one["fps"], two["fps"]) == (pytest.approx(50), pytest.approx(100))
    assert two["efficiency"] == pytest.approx(1) and two["cores"] == pytest.approx(1)
    assert asked == [(1, 1), (101, 1), (1, 2), (101, 2), (1, 2), (101, 2), (1, 1), (101, 1)]


# Latency, memory


def test_latency_row_of_live_runs() -> None:
    paced = LiveRun(fps=30, latencies=tuple(i / 1000 for i in range(101)), missed=67, cpu_cores=0.5, idle_cpu=0.004)
    assert latency.row("x", latency.described([paced])) == [
        "x", "50.00", "95.00", "99.00", "100.00", "67 of 101", "0.50", "0.4"
    ]  # fmt: skip
    never = LiveRun(fps=30, latencies=(1.0,), missed=1, cpu_cores=1.0, idle_cpu=None)
    assert latency.row("x", latency.described([never]))[-1] == ""
    both = latency.described([paced, never])
    assert (both["max"], both["frames"], both["missed"]) == (1000, 102, 68)
    assert (both["cpu_cores"], both["idle_cpu_percent"]) == (0.75, pytest.approx(0.4))  # of the run that waited


def test_missing_rows_end_the_script(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("file\na\nb\n")
    memory.check_rows(tmp_path / "rows.csv", 2)
    with pytest.raises(SystemExit, match="holds 2 rows; expected 3"):
        memory.check_rows(tmp_path / "rows.csv", 3)
    assert memory.written(tmp_path) == 9


def test_unavailable_pipeline_reports_the_reason() -> None:
    """Checks the first answer of the worker process, and that it ends."""
    code = (
        "import sys\n"
        "from workers import peer\n"
        "def no(setup): raise peer.UnavailableError('this processor has no bfloat16')\n"
        "peer.PIPELINES['torch'] = peer.Pipeline('torch', 'bf16', no)\n"
        "peer.serve('torch', None)\n"
    )
    folder = Path(peers.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == "this processor has no bfloat16" != peer.READY


# Engines


def test_openvino_ratios_use_the_best_graph_within_rounds() -> None:
    found = engines.openvino_ratios({
        "EchoQuad, int8": [1.0, 1.0, 1.0],
        "EchoQuad, fp32, device openvino": [3.0, 30.0, 3.0],
        "OpenVINO, fp32": [2.0, 20.0, 2.0],
        "EchoQuad, int8, device openvino": [2.0, 40.0, 2.0],
        "OpenVINO, int8": [5.0, 50.0, 5.0],
        f"OpenVINO, {engines.AS_TRAINED}": [4.0, 20.0, 4.0],
    })  # fmt: skip
    assert found == {"fp32": 1.5, "int8": 0.5}


def test_python_without_openvino_ends_the_script(tiny_bundle: Path) -> None:
    if util.find_spec("openvino") is not None:
        pytest.skip("this Python has OpenVINO")
    bundle = Bundle(tiny_bundle)
    with engines.openvino_calls(bundle, None, 1) as found:
        assert found == ({}, {})
    with (
        pytest.raises(SystemExit, match="OpenVINO worker ended early"),
        engines.openvino_calls(bundle, sys.executable, 1),
    ):
        pass
