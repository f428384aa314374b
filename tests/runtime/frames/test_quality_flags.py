"""Quality flags: signal per quadrant, saturation, and colour, with their thresholds."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.frames.quality_flags import (
    BLANK,
    COLOUR,
    MAX_COLOURED,
    MAX_WHITE,
    MIN_CHROMA,
    MIN_CONTRAST,
    NO_SIGNAL,
    SATURATED,
    WHITE,
    is_coloured,
    quality_flags,
)
from echoquad_runtime.frames.reader import decode_grey, decode_grey_and_flags, read_grey_and_flags
from echoquad_runtime.quadrants import Grey, frame_quadrants, quadrant_boxes

CONTRACT = Contract(classes=("A", "B"), input_size=224)
RNG = np.random.default_rng(0)


def sector(height: int = 300, width: int = 400, gain: float = 1.0) -> Grey:
    """Return a sector of speckle on black, uint8 [height, width], which resembles an echo frame."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:height, 0:width]
    angle, depth = np.arctan2(x - width / 2, y + 1), np.hypot(x - width / 2, y) / height
    speckle = rng.gamma(2.0, 30.0, (height, width)) * (0.4 + 0.6 * np.sin(9 * depth + 3 * angle) ** 2)
    return np.clip(np.where((np.abs(angle) < 0.75) & (depth < 1), gain * speckle, 0), 0, 255).astype(np.uint8)


def flags(frame: Any, contract: Contract = CONTRACT) -> tuple[str, ...]:
    return quality_flags(frame_quadrants(np.asarray(frame, np.uint8), contract))


# ---------------------------------------------------------------------------------------------- signal


@pytest.mark.parametrize("size", [8, 33, 64, 112, 224])
def test_frame_with_signal_has_no_flag(size: int) -> None:
    contract = Contract(classes=("A", "B"), input_size=size)
    assert flags(sector(), contract) == ()
    assert flags(sector(151, 97), contract) == ()


def test_phantoms_have_no_flag() -> None:
    phantom = pytest.importorskip("echoquad_train.phantom.drawing")
    for seed in range(6):
        assert flags(phantom.phantom_frame(seed, phantom.LABELS[seed % 2])) == ()


@pytest.mark.parametrize("level", [0, 1, 60, 128, 200])
@pytest.mark.parametrize("size", [8, 64, 224])
def test_uniform_frame_is_blank(level: int, size: int) -> None:
    assert flags(np.full((300, 400), level), Contract(classes=("A", "B"), input_size=size)) == (BLANK,)


def test_white_frame_is_blank_and_saturated() -> None:
    assert flags(np.full((300, 400), 255)) == (BLANK, SATURATED)


@pytest.mark.parametrize("sigma", [1, 3, 6])
@pytest.mark.parametrize("shape", [(600, 800), (200, 250)])
def test_noise_on_black_is_blank(sigma: float, shape: tuple[int, int]) -> None:
    assert flags(np.clip(RNG.normal(4, sigma, shape), 0, 255)) == (BLANK,)


def test_flat_quadrants_of_different_levels_are_blank() -> None:
    frame = np.zeros((300, 400), np.uint8)
    for (left, top, right, bottom), level in zip(quadrant_boxes(400, 300, 1.0), (0, 80, 160, 240), strict=True):
        frame[top:bottom, left:right] = level
    assert flags(frame) == (BLANK,)


def test_caption_on_black_is_not_a_signal() -> None:
    frame = np.zeros((600, 800), np.uint8)
    for left, top, _, _ in quadrant_boxes(800, 600, 0.9):
        frame[top + 40 : top + 60, left + 40 : left + 130] = 255  # 90 x 20 of 360 x 270 pixels: 1.9 %
    assert flags(frame) == (BLANK,)


@given(st.sets(st.integers(0, 3), max_size=3), st.booleans())
def test_quadrants_without_signal_are_named(which: set[int], even: bool) -> None:
    frame = sector(300, 400) if even else sector(301, 399)
    boxes = quadrant_boxes(frame.shape[1], frame.shape[0], 1.0)
    for index in which:
        left, top, right, bottom = boxes[index]
        frame[top:bottom, left:right] = 0
    assert flags(frame) == tuple(f"no-signal-{QUADRANTS[index]}" for index in sorted(which))


def test_flag_names_are_fixed() -> None:
    assert NO_SIGNAL == ("no-signal-LA", "no-signal-RA", "no-signal-LV", "no-signal-RV")
    assert (BLANK, SATURATED, COLOUR) == ("blank", "saturated", "colour")


@given(st.integers(0, 255 - MIN_CONTRAST), st.integers(0, 3 * MIN_CONTRAST), st.integers(1, 99))
def test_contrast_threshold(low: int, contrast: int, percent: int) -> None:
    # Two levels side by side: the contrast counts if each level has more than the tail of 2 %.
    high = min(255, low + contrast)
    plane = np.full(64 * 64, low, np.uint8)
    plane[: 64 * 64 * percent // 100] = high
    found = quality_flags(np.broadcast_to(plane.reshape(64, 64), (4, 1, 64, 64)).copy())
    if percent not in (2, 98):
        assert (BLANK in found) == (high - low < MIN_CONTRAST or percent < 2 or percent > 98)


def test_quality_flags_does_not_modify_its_input() -> None:
    quadrants = frame_quadrants(sector(), CONTRACT)
    before = quadrants.copy()
    quality_flags(quadrants)
    np.testing.assert_array_equal(quadrants, before)


# ---------------------------------------------------------------------------------------------- saturated


@pytest.mark.parametrize(("gain", "expected"), [(1.0, ()), (1.5, ()), (10.0, (SATURATED,)), (20.0, (SATURATED,))])
def test_frame_with_too_much_gain_is_saturated(gain: float, expected: tuple[str, ...]) -> None:
    assert flags(sector(gain=gain)) == expected


@given(st.integers(WHITE - 2, 255), st.integers(0, 100))
def test_white_share_threshold(level: int, percent: int) -> None:
    planes = np.tile(np.arange(100, dtype=np.uint8), (4, 1, 100, 1))  # enough contrast and no white
    planes[:, :, :, :percent] = level
    planes = planes[:, :, :, np.arange(100) * 37 % 100]
    # Every other pixel is sampled, so that the share is measured to a few percent.
    if abs(percent / 100 - MAX_WHITE) > 0.05:
        assert (SATURATED in quality_flags(planes)) == (level >= WHITE and percent / 100 > MAX_WHITE)


def test_white_quadrant_has_no_signal_and_saturates_frame() -> None:
    frame = sector()
    frame[150:, 200:] = 255
    assert flags(frame) == ("no-signal-RV", SATURATED)


# ---------------------------------------------------------------------------------------------- colour


def photograph(height: int = 300, width: int = 400) -> np.ndarray:
    """Return a picture like a photograph: sky, meadow, a wall; noisy, smoothly lit, of medium saturation."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[0:height, 0:width]
    hue = np.where(y < 0.4 * height, 0.58, np.where(x < 0.6 * width, 0.27, 0.06))
    light = 0.55 + 0.25 * np.sin(x / 60) * np.cos(y / 45) + rng.normal(0, 0.04, hue.shape)
    picture = [
        [colorsys.hsv_to_rgb(h, 0.4, v) for h, v in zip(*rows, strict=True)]
        for rows in zip(hue, light.clip(0, 1), strict=True)
    ]
    return (np.array(picture) * 255).astype(np.uint8)


PHOTOGRAPH = photograph()


def doppler(share: float) -> np.ndarray:
    """Return a frame with a depth scale, an ECG trace, and a Doppler box over a share of it, half of it flow."""
    frame = np.dstack([sector()] * 3)
    frame[:, 390:394] = (255, 220, 0)
    frame[280:284, :] = (0, 255, 0)
    height, width = (round(side * share**0.5) for side in frame.shape[:2])
    box = frame[60 : 60 + height, 90 : 90 + width]
    box[: height // 2, : width // 2] = (230, 30, 20)
    box[height // 2 :, width // 2 :] = (20, 60, 240)
    return frame


def encode(picture: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


ENCODINGS: dict[str, Callable[[np.ndarray], bytes]] = {
    "png": lambda picture: encode(picture, "PNG"),
    "png palette": lambda picture: encode(Image.fromarray(picture).quantize(64), "PNG"),
    "png alpha": lambda picture: encode(np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)]), "PNG"),
    "bmp": lambda picture: encode(picture, "BMP"),
    "tiff": lambda picture: encode(picture, "TIFF", compression="tiff_lzw"),
    "tiff cmyk": lambda picture: encode(Image.fromarray(picture).convert("CMYK"), "TIFF"),
    "jpeg 4:2:0": lambda picture: encode(picture, "JPEG", subsampling=2),
    "jpeg 4:4:4": lambda picture: encode(picture, "JPEG", subsampling=0),
    "jpeg poor": lambda picture: encode(picture, "JPEG", quality=20),
    "jpeg progressive": lambda picture: encode(picture, "JPEG", progressive=True),
    "jpeg rgb": lambda picture: encode(picture, "JPEG", keep_rgb=True),
    "jpeg cmyk": lambda picture: encode(Image.fromarray(picture).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_colour_is_detected_in_every_encoding(encoding: str, tmp_path: Any) -> None:
    write = ENCODINGS[encoding]
    cases = {
        "photograph": (PHOTOGRAPH, (COLOUR,)),
        "screen": (np.where(sector()[..., None] > 0, PHOTOGRAPH, (20, 40, 90)).astype(np.uint8), (COLOUR,)),
        "grey": (np.dstack([sector()] * 3), ()),
        "doppler": (doppler(0.33), ()),
    }
    for name, (picture, expected) in cases.items():
        data = write(picture)
        grey, found = decode_grey_and_flags(data)
        assert (name, found) == (name, expected)
        np.testing.assert_array_equal(grey, decode_grey(data))
    (tmp_path / "frame").write_bytes(write(PHOTOGRAPH))
    assert read_grey_and_flags(tmp_path / "frame")[1] == (COLOUR,)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 500), (500, 3), (7, 9), (8, 8), (9, 17)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_colour_is_detected_in_small_and_narrow_pictures(shape: tuple[int, int], kind: str) -> None:
    red = np.full((*shape, 3), (200, 30, 30), np.uint8)
    assert decode_grey_and_flags(encode(red, kind))[1] == (COLOUR,)
    assert decode_grey_and_flags(encode(np.full((*shape, 3), 77, np.uint8), kind))[1] == ()


def test_colour_is_detected_in_rotated_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG"):
        grey, found = decode_grey_and_flags(encode(Image.fromarray(PHOTOGRAPH), kind, exif=exif))
        assert (grey.shape, found) == ((400, 300), (COLOUR,))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "I", "F"])
def test_grey_modes_are_not_sampled_for_colour(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(sector()).convert("L").convert(mode if mode != "I;16" else "I")
    data = encode(image.convert(mode), "PNG" if mode in ("1", "L", "LA", "I;16") else "TIFF")
    monkeypatch.setattr("echoquad_runtime.frames.images.image.is_coloured", lambda _: pytest.fail("sampled"))
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("sampled"))
    assert decode_grey_and_flags(data)[1] == ()


def test_transparent_colour_is_not_coloured() -> None:
    hidden = np.dstack([PHOTOGRAPH, np.zeros(PHOTOGRAPH.shape[:2], np.uint8)])
    assert decode_grey_and_flags(encode(hidden, "PNG"))[1] == ()


@given(st.integers(0, 60), st.integers(0, 100))
def test_colour_share_and_chroma_thresholds(chroma: int, percent: int) -> None:
    pixels = np.full((100, 3), 100, np.uint8)
    pixels[:percent, 1] += chroma
    assert is_coloured(pixels) == (chroma >= MIN_CHROMA and percent >= 100 * MAX_COLOURED)
