"""The arithmetic of the scripts, on fabricated times and rows."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import efficiency
import engines
import latency
import memory
import numpy as np
import peers
import pytest
import scaling
from workers import peer as peer_ways

from echoquad_runtime.bench.live_source import Paced
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.reader import read_frame
from echoquad_runtime.predict.predictor import Prediction, Predictor
from echoquad_runtime.quadrants import frame_quadrants

CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)


# ---------------------------------------------------------------------------------------------- peers


def times(**walls: list[float]) -> dict[str, peers.Times]:
    return {name.replace("_", "-"): peers.Times(wall, [2 * one for one in wall]) for name, wall in walls.items()}


def test_figures_of_peers() -> None:
    taken = times(
        document=[8.0, 80.0, 8.0], ort_fp32=[4.0, 40.0, 4.0], torch=[5.0, 5.0, 5.0], echoquad_fp32=[2.0, 20.0, 2.0],
        ort_int8=[1.5, 15.0, 1.5], echoquad_int8=[1.0, 10.0, 1.0],
    )  # fmt: skip
    found = peers.figures(taken, 16, dict.fromkeys(taken, 0.001))
    own = found["echoquad-fp32"]
    assert (own["frames_per_second"], own["of_document"], own["best_peer"]) == (8, 4, "ort-fp32")
    assert own["of_best_peer"] == 2
    assert own["cpu_ms_a_frame"] == 250
    assert found["echoquad-int8"]["best_peer"] == "ort-int8"  # of equal precision alone
    assert found["echoquad-int8"]["of_best_peer"] == 1.5
    assert found["ort-int8"]["of_best_peer"] == 1
    assert found["document"]["of_document"] == 1
    first, second = peers.verdict("rgb-png", found)
    assert first == (
        "rgb-png, EchoQuad fp32: 4.00 times the document's way (aim 2.2), "
        "2.00 of the best peer of its precision, ort-fp32 (aim 1)."
    )
    assert "int8: 8.00 times the document's way (aim 6)" in second
    assert "(aim 2.2)" not in peers.verdict("grey-jpeg", found)[0]
    table = peers.table("rgb-png", found)
    assert {len(row) for row in table} == {7} and len(table) == 7


def test_without_a_peer_of_its_precision_there_is_no_ratio() -> None:
    taken = times(document=[8.0], echoquad_int8=[1.0])
    found = peers.figures(taken, 16, dict.fromkeys(taken, 0.0))
    assert found["echoquad-int8"]["of_best_peer"] is None
    assert peers.table("rgb-png", found)[2][4] == ""
    assert peers.verdict("rgb-png", found) == ["rgb-png, EchoQuad int8: 8.00 times the document's way (aim 6)."]


def rows_of(tmp_path: Path, *frames: np.ndarray) -> dict[str, list[str]]:
    peer_ways.write(tmp_path / "rows.csv", CONTRACT, ((Path(f"{i}.png"), one) for i, one in enumerate(frames)))
    return peers.read_rows(tmp_path / "rows.csv")


def test_peers_must_agree(tmp_path: Path) -> None:
    sure = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
    expected = rows_of(tmp_path, sure, sure[::-1])
    assert peers.compare("torch", rows_of(tmp_path, sure, sure[::-1]), expected) == 0
    near = sure + np.array([0.0005, -0.0005])
    assert peers.compare("torch", rows_of(tmp_path, near, sure[::-1]), expected) == pytest.approx(5e-4, abs=1e-6)
    with pytest.raises(SystemExit, match=r"torch differs by 0\.0100 on a probability; expected at most 0\.001"):
        peers.compare("torch", rows_of(tmp_path, sure + np.array([0.01, -0.01]), sure[::-1]), expected)
    assert peers.compare("ort-int8", rows_of(tmp_path, sure + np.array([0.01, -0.01]), sure[::-1]), expected) > 0.009
    with pytest.raises(SystemExit, match=r"ort-int8 decides otherwise of 0\.png: NORM for ASD"):
        peers.compare("ort-int8", rows_of(tmp_path, 1 - sure, sure[::-1]), expected)
    with pytest.raises(SystemExit, match="judged 1 frames, the document's way 2"):
        peers.compare("torch", rows_of(tmp_path, sure), expected)


def test_a_quadrant_on_the_edge_may_fall_either_way(tmp_path: Path) -> None:
    edge = np.array([[0.5001, 0.4999], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
    other = np.array([[0.4999, 0.5001], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
    assert peers.compare("torch", rows_of(tmp_path, other), rows_of(tmp_path, edge)) == pytest.approx(2e-4, abs=1e-6)


def test_what_peers_write_is_what_echoquad_decides(tiny_bundle: Path, frames_folder: Path, tmp_path: Path) -> None:
    """The peers' own cutting, voting and rows, against the product's."""
    setting = peer_ways.Setting(tmp_path, tiny_bundle, 1)
    paths = sorted(path for path in frames_folder.rglob("*") if path.is_file())
    for path in paths:
        expected = frame_quadrants(read_frame(path), setting.contract)
        difference = peer_ways.cut_small(path, setting.contract).astype(int) - expected
        assert np.abs(difference).max() <= 1
    for pool in (False, True):
        peer_ways.ort_graph(setting, precision="fp32", pool=pool)(paths, tmp_path / f"{pool}.csv")
    peer_ways.echoquad(setting, precision="fp32")(paths, tmp_path / "own.csv")
    rows = peers.read_rows(tmp_path / "own.csv")
    for pool in (False, True):
        assert peers.compare("ort-fp32", peers.read_rows(tmp_path / f"{pool}.csv"), rows) < 1e-3
    for result in Predictor(tiny_bundle, device="cpu").predict([frames_folder]):
        assert isinstance(result, Prediction)
        assert rows[Path(result.file).name][0] == result.label


def test_a_peer_is_chosen_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "openvino" else True)
    chosen, left_out = peers.choose(None, ("fp32",))
    assert chosen[0] == "document" and "echoquad-fp32" in chosen and "torch-bf16" in chosen
    assert not [name for name in chosen if "int8" in name or "openvino" in name]
    assert "OpenVINO by hand, fp32, plain loop (openvino is not installed)" in left_out
    assert "EchoQuad, int8 (the bundle holds no int8)" in left_out
    assert peers.choose("echoquad-fp32,document", ("fp32",))[0] == ["document", "echoquad-fp32"]
    with pytest.raises(SystemExit, match="no peer tensorrt; expected some of document, "):
        peers.choose("tensorrt", ("fp32",))


def test_frames_in_threads_come_in_order_and_not_too_far_ahead() -> None:
    taken: list[int] = []

    def items() -> range:
        for item in range(50):
            taken.append(item)
            yield item

    found = peer_ways.in_threads(lambda item: item * item, items(), 3, ahead=5)
    assert next(found) == 0 and len(taken) <= 5
    assert list(found) == [item * item for item in range(1, 50)]


# ---------------------------------------------------------------------------------------------- efficiency, scaling


def test_a_share_is_of_the_same_round() -> None:
    assert efficiency.share_of([9.0, 90.0, 9.0], [10.0, 100.0, 18.0]) == pytest.approx(0.9)


def test_parallel_efficiency() -> None:
    one, two = scaling.parallel({1: [(0.02, 0.9), (0.02, 1.0)], 2: [(0.0125, 1.7), (0.0125, 1.9)]})
    assert (one["threads"], one["fps"], one["efficiency"], one["cores"]) == (1, 50, 1, 1.0)
    assert (two["fps"], two["efficiency"], two["cores"]) == (80, 0.8, 1.9)  # the worst of the rounds


def test_threads_are_compared_without_the_start() -> None:
    asked: list[tuple[int, int]] = []

    def predict(count: int, threads: int) -> scaling.Ran:
        asked.append((count, threads))
        seconds = 0.5 + (count - 1) * 0.02 / threads
        return scaling.Ran(seconds, threads * seconds / 2, 100.0, "", "")

    one, two = scaling.compare_threads(predict, 101, [1, 2], 2)
    assert (one["fps"], two["fps"]) == (pytest.approx(50), pytest.approx(100))
    assert two["efficiency"] == pytest.approx(1) and two["cores"] == pytest.approx(1)
    assert asked == [(1, 1), (101, 1), (1, 2), (101, 2), (1, 2), (101, 2), (1, 1), (101, 1)]


# ---------------------------------------------------------------------------------------------- latency, memory


def test_a_live_runs_row() -> None:
    paced = Paced(fps=30, latencies=tuple(i / 1000 for i in range(101)), missed=67, cpu_cores=0.5, idle_cpu=0.004)
    assert latency.row("x", latency.described([paced])) == [
        "x", "50.00", "95.00", "99.00", "100.00", "67 of 101", "0.50", "0.4"
    ]  # fmt: skip
    never = Paced(fps=30, latencies=(1.0,), missed=1, cpu_cores=1.0, idle_cpu=None)
    assert latency.row("x", latency.described([never]))[-1] == ""
    both = latency.described([paced, never])
    assert (both["max"], both["frames"], both["missed"]) == (1000, 102, 68)
    assert (both["cpu_cores"], both["idle_cpu_percent"]) == (0.75, pytest.approx(0.4))  # of the one that waited


def test_rows_that_are_missing_end_the_benchmark(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("file\na\nb\n")
    memory.check_rows(tmp_path / "rows.csv", 2)
    with pytest.raises(SystemExit, match="holds 2 rows; expected 3"):
        memory.check_rows(tmp_path / "rows.csv", 3)
    assert memory.written(tmp_path) == 9


def test_a_way_that_cannot_be_gone_says_why() -> None:
    """Through the process that serves it: what it says first, and that it ends."""
    code = (
        "import sys\n"
        "from workers import peer as ways\n"
        "def no(setting): raise ways.UnavailableError('this processor has no bfloat16')\n"
        "ways.WAYS['torch'] = ways.Way('torch', 'bf16', no)\n"
        "ways.serve('torch', None)\n"
    )
    folder = Path(peers.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == "this processor has no bfloat16" != peer_ways.READY


# ---------------------------------------------------------------------------------------------- engines


def test_openvino_is_compared_with_its_best_graph_round_by_round() -> None:
    found = engines.openvino_ratios({
        "EchoQuad, int8": [1.0, 1.0, 1.0],
        "EchoQuad, fp32, device openvino": [3.0, 30.0, 3.0],
        "OpenVINO, fp32": [2.0, 20.0, 2.0],
        "EchoQuad, int8, device openvino": [2.0, 40.0, 2.0],
        "OpenVINO, int8": [5.0, 50.0, 5.0],
        f"OpenVINO, {engines.AS_TRAINED}": [4.0, 20.0, 4.0],
    })  # fmt: skip
    assert found == {"fp32": 1.5, "int8": 0.5}


def test_a_python_without_openvino_is_refused(tiny_bundle: Path) -> None:
    if util.find_spec("openvino") is not None:
        pytest.skip("this Python has OpenVINO")
    bundle = Bundle(tiny_bundle)
    with engines.openvino_calls(bundle, None, 1) as found:
        assert found == ({}, {})
    with (
        pytest.raises(SystemExit, match="OpenVINO's worker ended early"),
        engines.openvino_calls(bundle, sys.executable, 1),
    ):
        pass
