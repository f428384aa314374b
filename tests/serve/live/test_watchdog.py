"""The watch over a source: what is ok, frozen, and without a signal, with the noise of sensors and codecs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from echoquad_serve.live.watchdog import PATIENCE_S, Watchdog

RATE = 30


@pytest.fixture
def scene(make_frame: Callable[..., np.ndarray]) -> np.ndarray:
    """Return a grey frame, uint8 [240, 320], without noise of single pixels."""
    return np.asarray(Image.fromarray(make_frame(1)).resize((320, 240), Image.Resampling.BICUBIC))


def states(frames: Iterable[np.ndarray | None], rate: float = RATE) -> list[tuple[float, str]]:
    """Return the changes of the state, with their times in seconds; None is a frame that does not come."""
    watchdog, told = Watchdog(), list[tuple[float, str]]()
    watchdog.start(100.0)
    for index, frame in enumerate(frames):
        now = 100.0 + index / rate
        if frame is not None:
            watchdog.observe(frame, now)
        if not told or told[-1][1] != watchdog.state(now):
            told.append((now - 100, watchdog.state(now)))
    return told


def moving(scene: np.ndarray, seconds: float) -> list[np.ndarray]:
    return [np.roll(scene, 3 * index, axis=1) for index in range(round(RATE * seconds))]


def names(told: list[tuple[float, str]]) -> list[str]:
    return [state for _, state in told]


def test_patience_leaves_time_to_tell_a_change_within_two_seconds() -> None:
    assert PATIENCE_S <= 1.8


def test_moving_picture_is_ok_and_a_frozen_one_is_told_within_two_seconds(scene: np.ndarray) -> None:
    frames = [*moving(scene, 3), *[scene] * (4 * RATE), *moving(scene, 1)]
    told = states(frames)
    assert names(told) == ["ok", "frozen", "ok"]
    assert 3 + 1.5 < told[1][0] < 3 + 2
    assert 7 <= told[2][0] < 7.3


@pytest.mark.parametrize("level", [0, 29, 235])  # black, blue as grey, white
def test_single_colour_with_noise_is_no_signal_within_two_seconds(scene: np.ndarray, level: int) -> None:
    rng = np.random.default_rng(0)
    blank = [np.clip(level + rng.normal(0, 2, scene.shape), 0, 255).astype(np.uint8) for _ in range(4 * RATE)]
    told = states([*moving(scene, 3), *blank, *moving(scene, 1)])
    assert names(told) == ["ok", "no signal", "ok"]
    assert 3 + 1.5 < told[1][0] < 3 + 2


def test_dark_picture_with_captions_has_a_signal(scene: np.ndarray) -> None:
    def dark(index: int) -> np.ndarray:
        image = Image.new("L", (320, 240), 2)
        ImageDraw.Draw(image).text((10, 10), f"HR 72  {index // RATE:02d} s", fill=200)
        return np.asarray(image)

    assert names(states(map(dark, range(4 * RATE)))) == ["ok"]


def test_moment_of_black_is_no_change(scene: np.ndarray) -> None:
    black = [np.zeros_like(scene)] * RATE
    assert names(states([*moving(scene, 2), *black, *moving(scene, 2)])) == ["ok"]


def test_missing_frames_are_no_signal_within_two_seconds(scene: np.ndarray) -> None:
    told = states([*moving(scene, 2), *[None] * (4 * RATE), *moving(scene, 1)])
    assert names(told) == ["ok", "no signal", "ok"]
    assert 2 + 1.5 < told[1][0] < 2 + 2


def test_source_without_any_frame_is_stopped_and_then_without_signal() -> None:
    told = states([None] * (4 * RATE))
    assert names(told) == ["stopped", "no signal"]
    assert told[1][0] < 2


def test_still_picture_with_a_clock_or_sensor_noise_of_blocks_is_ok(scene: np.ndarray) -> None:
    def with_clock(index: int) -> np.ndarray:
        image = Image.fromarray(scene)
        draw = ImageDraw.Draw(image)
        draw.rectangle((250, 4, 318, 20), fill=0)
        draw.text((255, 6), f"10:32:{index // RATE:02d}", fill=220)
        return np.asarray(image)

    assert names(states(map(with_clock, range(6 * RATE)))) == ["ok"]


def test_noise_of_single_pixels_does_not_hide_a_frozen_picture(scene: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    noisy = [np.clip(scene + rng.normal(0, 3, scene.shape), 0, 255).astype(np.uint8) for _ in range(3 * RATE)]
    assert names(states(noisy)) == ["ok", "frozen"]


@pytest.mark.parametrize(
    ("codec", "pixels", "bit_rate", "suffix"),
    [
        ("libx264", "yuv420p", 300_000, ".mkv"),
        ("libx264", "yuv420p", 2_000_000, ".mkv"),
        ("mpeg4", "yuv420p", 500_000, ".avi"),
        ("mjpeg", "yuvj420p", 4_000_000, ".avi"),
    ],
)
def test_codec_does_not_hide_a_frozen_picture(
    scene: np.ndarray,
    codec: str,
    pixels: str,
    bit_rate: int,
    suffix: str,
    tmp_path: Path,
    write_clip: Callable[..., Path],
) -> None:
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip("not supported by this FFmpeg")
    frames = [np.repeat(frame[..., None], 3, axis=2) for frame in [*moving(scene, 2), *[scene] * (4 * RATE)]]
    path = write_clip(
        tmp_path / f"still{suffix}", frames, codec, pixels, bit_rate=bit_rate, options={"g": "30", "bf": "0"}
    )
    with av.open(str(path)) as clip:
        decoded = [frame.to_ndarray(format="gray") for frame in clip.decode(video=0)]
    told = states(decoded)
    assert names(told) == ["ok", "frozen"]
    assert told[1][0] < 2 + 2.5  # the first key frame may refine the picture once more


def test_slow_fade_is_a_change(scene: np.ndarray) -> None:
    fade = [(scene * (1 - index / 600)).astype(np.uint8) for index in range(8 * RATE)]
    assert "frozen" not in names(states(fade))


def test_size_may_change(scene: np.ndarray) -> None:
    frames = itertools.chain(moving(scene, 1), [frame[:100] for frame in moving(scene, 1)])
    assert names(states(frames)) == ["ok"]


def test_stop_ends_the_watch(scene: np.ndarray) -> None:
    watchdog = Watchdog()
    assert watchdog.state(0) == "stopped"
    watchdog.start(0)
    watchdog.observe(scene, 0.1)
    assert watchdog.state(0.1) == "ok"
    watchdog.stop()
    assert watchdog.state(10) == "stopped"


def test_frozen_for_counts_from_the_last_change(scene: np.ndarray) -> None:
    watchdog = Watchdog()
    watchdog.start(0)
    for index in range(50):
        watchdog.observe(scene, index / 10)
        watchdog.state(index / 10)
    assert watchdog.frozen_for(5.0) == pytest.approx(5.0)
    watchdog.observe(255 - scene, 5.1)
    assert watchdog.state(5.1) == "ok"
    assert watchdog.frozen_for(5.1) == 0
