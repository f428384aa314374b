"""The live view: every newest frame is decided, counted and told, whatever fails around it."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import BundleError, ConfigError, FrameError, MissingExtraError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.results.row_formats import JSON_LINES
from echoquad_serve.config import LiveConfig
from echoquad_serve.inference.rows import row_of
from echoquad_serve.live.capture_loop import Patience
from echoquad_serve.live.live_view import LiveView

pytest.importorskip("av")
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at processes in /proc")

SOURCE = "lavfi:testsrc=size=80x60:rate=50"


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor(tiny_bundle, threads=1)


def to_row(predictor: Predictor, prediction: Prediction) -> dict[str, Any]:
    return row_of(prediction, predictor.contract, bundle_sha256="", provider="", abstain_unlike=False)


class Live:
    """A live view and what it tells."""

    def __init__(self, config: LiveConfig, predictor: Any, **options: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        self.states: list[str] = []
        self.view = LiveView(
            config,
            predictor if not isinstance(predictor, Predictor) else lambda: predictor,
            options.pop("on_decision", self.rows.append),
            options.pop("on_state", self.states.append),
            to_row=to_row,
            **options,
        )
        self.view.start()


@pytest.fixture
def go_live() -> Iterator[Callable[..., Live]]:
    made: list[Live] = []

    def make(config: LiveConfig, predictor: Any, **options: Any) -> Live:
        made.append(Live(config, predictor, **options))
        return made[-1]

    yield make
    for live in made:
        live.view.close()


def test_each_frame_becomes_a_row_with_its_age_and_state(
    go_live: Callable[..., Live], predictor: Predictor, wait_until: Callable[..., float]
) -> None:
    live = go_live(LiveConfig(SOURCE, max_fps=60), predictor)
    wait_until(lambda: len(live.rows) >= 30)
    row = live.rows[-1]
    assert row["device"] == "cpu"
    assert "uncropped" in row["flags"]
    assert 0 < row["age_ms"] < 5000
    assert abs(time.time() - row["captured"]) < 10
    assert row["smoothed_over"] == 1
    assert row["state"] == "ok"
    assert 0 < row["confidence"] <= 1
    assert json.loads(json.dumps(row)) == row
    captured = [one["captured"] for one in live.rows]
    assert captured == sorted(captured)


def test_row_of_a_live_frame_is_that_of_the_clip(
    go_live: Callable[..., Live],
    predictor: Predictor,
    tmp_path: Path,
    write_clip: Callable[..., Path],
    make_frame: Callable[..., np.ndarray],
    wait_until: Callable[..., float],
) -> None:
    pictures = [np.repeat(make_frame(seed)[..., None], 3, axis=2) for seed in range(5)]
    path = write_clip(tmp_path / "clip.mkv", pictures, "ffv1", "yuv420p10le", rate=10)
    files = [file for file in find_frames([path]) if isinstance(file, FrameFile)]
    expected = [json.loads(JSON_LINES.row(one)) for one in predictor.predict(files) if isinstance(one, Prediction)]
    live = go_live(LiveConfig(str(path)), predictor)
    wait_until(lambda: len(live.rows) >= 5)
    for row in live.rows[:5]:
        found = {key: row[key] for key in expected[0] if key != "file"}
        assert any(found == {key: one[key] for key in found} for one in expected)
    assert live.view.status()["failed"] == 0


def test_slow_worker_gets_the_newest_frame_and_every_other_is_counted(
    go_live: Callable[..., Live], predictor: Predictor, wait_until: Callable[..., float]
) -> None:
    rows: list[dict[str, Any]] = []

    def slow(row: dict[str, Any]) -> None:
        rows.append(row)
        time.sleep(0.1)

    live = go_live(LiveConfig(SOURCE, max_fps=60), predictor, on_decision=slow)
    wait_until(lambda: len(rows) >= 12)
    live.view.close()
    status = live.view.status()
    assert status["dropped"] > 20
    assert status["captured"] == status["decided"] + status["failed"] + status["dropped"]
    assert status["decided"] == len(rows)
    assert max(row["age_ms"] for row in rows[2:]) < 100  # the newest frame, not one that has waited
    numbers = [int(row["file"].partition("#")[2]) for row in rows]
    # Each number that is missing before a row was dropped before it, and each one is counted once.
    assert [number - 1 - index for index, number in enumerate(numbers)] == [row["dropped"] for row in rows]


def test_counts_are_exact_after_the_capture_process_was_killed(
    go_live: Callable[..., Live], predictor: Predictor, wait_until: Callable[..., float]
) -> None:
    live = go_live(LiveConfig(SOURCE, max_fps=60), predictor, patience=Patience(first_pause=0.05))
    for kills in range(3):
        count = len(live.rows)
        wait_until(lambda: len(live.rows) > count + 5)  # noqa: B023
        pid = live.view._capture.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: live.view.status()["restarts"] > kills)  # noqa: B023
    count = len(live.rows)
    wait_until(lambda: len(live.rows) > count)
    live.view.close()
    status = live.view.status()
    assert status["captured"] == status["decided"] + status["failed"] + status["dropped"]
    assert status["state"] == "stopped"


def test_bundle_is_swapped_between_two_frames(
    go_live: Callable[..., Live],
    predictor: Predictor,
    make_tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    wait_until: Callable[..., float],
) -> None:
    other = Predictor(make_tiny_bundle(tmp_path / "other", classes=("A", "B", "C")), threads=1)
    current = [predictor]
    live = go_live(LiveConfig(SOURCE, smoothing=10), lambda: current[0])
    wait_until(lambda: len(live.rows) >= 12)
    current[0] = other
    wait_until(lambda: "prob_A" in live.rows[-1])
    first = next(index for index, row in enumerate(live.rows) if "prob_A" in row)
    assert [row["smoothed_over"] for row in live.rows[:12]] == [*range(1, 11), 10, 10]
    assert live.rows[first]["smoothed_over"] == 1
    assert "prob_ASD" in live.rows[first - 1]


def test_smoothing_begins_anew_at_the_beginning_of_a_clip(
    go_live: Callable[..., Live],
    predictor: Predictor,
    tmp_path: Path,
    write_clip: Callable[..., Path],
    make_frame: Callable[..., np.ndarray],
    wait_until: Callable[..., float],
) -> None:
    pictures = [np.repeat(make_frame(seed)[..., None], 3, axis=2) for seed in range(4)]
    live = go_live(LiveConfig(str(write_clip(tmp_path / "clip.mkv", pictures, rate=10)), smoothing=8), predictor)
    wait_until(lambda: len(live.rows) >= 9)
    by_number = {int(row["file"].partition("#")[2]): row["smoothed_over"] for row in live.rows}
    assert all(smoothed <= 4 for smoothed in by_number.values())
    assert [by_number.get(number, 1) for number in (1, 5, 9)] == [1, 1, 1]


def test_blank_frames_are_not_smoothed(
    go_live: Callable[..., Live], predictor: Predictor, wait_until: Callable[..., float]
) -> None:
    live = go_live(LiveConfig("lavfi:color=black:size=80x60:rate=50", smoothing=8), predictor)
    wait_until(lambda: len(live.rows) >= 5)
    assert {row["smoothed_over"] for row in live.rows} == {1}
    assert live.rows[-1]["state"] == "no signal"
    assert live.states == ["no signal"]


@pytest.mark.parametrize("fault", [FrameError("x"), BundleError("x"), RuntimeError("Jane Doe")])
def test_frames_that_fail_are_counted_and_the_next_are_decided(
    fault: Exception,
    go_live: Callable[..., Live],
    predictor: Predictor,
    wait_until: Callable[..., float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = 0

    def faulty() -> Predictor:
        nonlocal calls
        calls += 1
        if 5 <= calls < 10:
            raise fault
        return predictor

    live = go_live(LiveConfig(SOURCE), faulty)
    wait_until(lambda: len(live.rows) >= 10)
    live.view.close()
    status = live.view.status()
    assert status["failed"] == 5
    assert status["captured"] == status["decided"] + status["failed"] + status["dropped"]
    assert len([record for record in caplog.records if record.name.endswith("live_view")]) == 1
    assert "Jane" not in caplog.text


def test_listener_that_fails_does_not_end_the_view(
    go_live: Callable[..., Live], predictor: Predictor, wait_until: Callable[..., float]
) -> None:
    rows: list[dict[str, Any]] = []

    def failing(row: dict[str, Any]) -> None:
        rows.append(row)
        raise RuntimeError

    live = go_live(LiveConfig(SOURCE), predictor, on_decision=failing)
    wait_until(lambda: len(rows) >= 5)
    live.view.close()
    assert live.view.status()["decided"] == len(rows)


def test_pictures_for_a_page_are_live_and_turn_black_with_the_signal(
    go_live: Callable[..., Live], predictor: Predictor, wait_until: Callable[..., float]
) -> None:
    live = go_live(LiveConfig(SOURCE), predictor, patience=Patience(silence=30.0))
    wait_until(lambda: live.states == ["ok"])
    frames = live.view.frames()
    seen = [next(frames) for _ in range(5)]
    image = Image.open(io.BytesIO(seen[-1]))
    assert (image.size, image.mode) == ((80, 60), "RGB")
    assert live.view.status()["watchers"] == 1
    pid = live.view._capture.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: live.states[-1] == "no signal")
    assert any(is_black(next(frames)) for _ in range(3))
    live.view.close()
    assert list(frames) == []
    assert live.view.status()["watchers"] == 0


def is_black(jpeg: bytes) -> bool:
    return not np.asarray(Image.open(io.BytesIO(jpeg))).any()


@pytest.mark.parametrize(
    "config",
    [LiveConfig("http://x"), LiveConfig(SOURCE, smoothing=0), LiveConfig(SOURCE, max_fps=0)],
)
def test_wrong_configuration_is_refused_before_anything_starts(config: LiveConfig, predictor: Predictor) -> None:
    with pytest.raises(ConfigError):
        LiveView(config, lambda: predictor, print, print, to_row=to_row)


def test_missing_package_is_told_before_anything_starts(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="video"):
        LiveView(LiveConfig(SOURCE), lambda: predictor, print, print, to_row=to_row)


def test_close_leaves_no_thread_process_or_descriptor(predictor: Predictor, wait_until: Callable[..., float]) -> None:
    def resources() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    before = resources()
    for _ in range(3):
        live = Live(LiveConfig(SOURCE), predictor)
        wait_until(lambda: len(live.rows) >= 2 and live.states)  # noqa: B023
        pid = live.view._capture.pid
        live.view.close()
        live.view.close()
        assert live.states == ["ok", "stopped"]
        assert not Path(f"/proc/{pid}").exists()
    assert resources() == before


def test_view_may_be_closed_by_its_own_listeners(predictor: Predictor, wait_until: Callable[..., float]) -> None:
    live = Live(LiveConfig(SOURCE), predictor, on_decision=lambda _: live.view.close())
    wait_until(lambda: live.view.status()["state"] == "stopped" and live.view.status()["decided"] == 1)
    other = Live(LiveConfig(SOURCE), predictor, on_state=lambda state: state == "ok" and other.view.close())
    wait_until(lambda: other.view.status()["state"] == "stopped")


def test_view_that_was_never_started_can_be_closed(predictor: Predictor) -> None:
    states: list[str] = []
    view = LiveView(LiveConfig(SOURCE), lambda: predictor, print, states.append, to_row=to_row)
    view.close()
    assert states == []
