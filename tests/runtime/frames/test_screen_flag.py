"""The quality flag ``screen``: pictures of whole screens with toolbars, against frames that only hold the image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.quality_flags import BLANK, MIN_SCREEN_SIDE, SCREEN, has_toolbar
from echoquad_runtime.frames.sources import cut_quadrants
from echoquad_runtime.quadrants import Grey

CONTRACT = Contract(classes=("A", "B"), input_size=64)
STYLES = {"white": (255, 20), "light": (240, 30), "grey": (192, 0), "blue": (90, 255), "dark": (43, 220)}
EDGES = {"top": ["top"], "bottom": ["bottom"], "left": ["left"], "right": ["right"], "two": ["top", "bottom"]}
SIZES = [(800, 600), (1024, 768), (1280, 1024), (1920, 1080)]


def echo(seed: int = 0, width: int = 400, height: int = 300) -> Image.Image:
    """Draw a sector of speckle on black."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    angle, depth = np.arctan2(x - width / 2, y + 1), np.hypot(x - width / 2, y) / height
    speckle = rng.gamma(2.0, 30.0, (height, width)) * (0.4 + 0.6 * np.sin(9 * depth + 3 * angle) ** 2)
    levels = np.clip(np.where((np.abs(angle) < 0.75) & (depth < 1), speckle, 0), 0, 255).astype(np.uint8)
    return Image.fromarray(levels).filter(ImageFilter.GaussianBlur(1))


def screen(style: str, place: str, seed: int) -> Grey:
    """Draw a screen with an echo frame and toolbars that hold text, menus or buttons."""
    rng = np.random.default_rng(seed)
    width, height = SIZES[seed % len(SIZES)]
    fill, ink = STYLES[style]
    image, thick = Image.new("L", (width, height)), int(rng.integers(26, 70))
    size = int(0.6 * height)
    image.paste(echo(seed).resize((size, size)), ((width - size) // 2, (height - size) // 2))
    draw = ImageDraw.Draw(image)
    for edge in EDGES[place]:
        box = {
            "top": (0, 0, width, thick),
            "bottom": (0, height - thick, width, height),
            "left": (0, 0, 2 * thick, height),
            "right": (width - 2 * thick, 0, width, height),
        }[edge]
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=fill)
        step = int(rng.integers(45, 90))
        if edge in ("top", "bottom"):
            for x in range(8, int(width * rng.uniform(0.2, 0.9)), step):
                if seed % 2:
                    draw.rectangle((x, box[1] + 6, x + 24, box[3] - 7), fill=int(rng.integers(256)), outline=ink)
                else:
                    draw.text((x, (box[1] + box[3]) // 2 - 8), "Image", fill=ink)
        else:
            for y in range(8, int(height * rng.uniform(0.4, 0.95)), step):
                draw.rectangle((box[0] + 8, y, box[2] - 9, y + 24), outline=ink)
                draw.text((box[0] + 12, y + 4), "Depth 16", fill=ink)
    if seed % 3 == 1:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(50, 95)))
        image = Image.open(stream).convert("L")
    elif seed % 3 == 2:
        image = image.resize((width // 2, height // 2), Image.Resampling.BILINEAR)
    return np.asarray(image)


@pytest.mark.parametrize("place", EDGES)
@pytest.mark.parametrize("style", STYLES)
def test_screen_with_toolbars_is_found(style: str, place: str) -> None:
    found = [has_toolbar(screen(style, place, seed)) for seed in range(12)]
    assert sum(found) >= 11


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_share_of_screens_that_are_found(style: str) -> None:
    """Over 300 screens of each style, the figure that docs/reference/flags.md states."""
    found = [has_toolbar(screen(style, place, seed)) for place in EDGES for seed in range(60)]
    assert sum(found) == 300


def test_page_margin_is_found() -> None:
    page = Image.new("L", (800, 600), 255)
    page.paste(echo(), (200, 150))
    assert has_toolbar(np.asarray(page))


def test_phantoms_are_not_screens() -> None:
    phantom = pytest.importorskip("echoquad_train.phantom.drawing")
    sizes = ((240, 320), (600, 800), (112, 112))
    frames = [phantom.phantom_frame(seed, phantom.LABELS[seed % 2], sizes[seed % 3]) for seed in range(30)]
    assert not any(map(has_toolbar, frames))


def outlined(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=255, width=2)
    return image


def captioned(image: Image.Image) -> Image.Image:
    draw = ImageDraw.Draw(image)
    for y in range(2, image.height - 12, 24):
        draw.text((2, y), "S5-1 MI 1.2 TIS 0.8 55 bpm", fill=220)
        draw.text((image.width - 90, y), "12 cm  60 Hz", fill=220)
    draw.text((2, 2), "HOSPITAL 2026-01-01 12:30:15  " * 4, fill=255)
    return image


FRAMES = {
    "plain": echo(),
    "large and smooth": echo().resize((1600, 1200), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(5)),
    "tight crop in tissue": echo(0, 800, 800).crop((300, 300, 500, 500)),
    "background of 16": echo().point(lambda level: 16 + level * 219 // 255),
    "gain of 3": echo().point(lambda level: min(255, 3 * level)),
    "outline": outlined(echo()),
    "captions": captioned(echo(0, 800, 600)),
    "rotated": echo().rotate(90, expand=True),
    "noise": Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400), np.uint8)),
    "gradient": Image.linear_gradient("L").resize((400, 300)).rotate(45),
    "black": Image.new("L", (400, 300)),
    "white": Image.new("L", (400, 300), 255),
    "small": Image.new("L", (MIN_SCREEN_SIDE - 1, 300), 90),
    "2 x 2": Image.new("L", (2, 2), 90),
    "1 x 5000": Image.new("L", (1, 5000), 90),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frame_without_toolbar_is_no_screen(name: str) -> None:
    assert not has_toolbar(np.asarray(FRAMES[name]))


@pytest.mark.parametrize("shape", [(MIN_SCREEN_SIDE, MIN_SCREEN_SIDE), (101, 4000), (4000, 101)])
def test_any_shape_is_examined(shape: tuple[int, int]) -> None:
    assert not has_toolbar(np.zeros(shape, np.uint8))


def test_flag_is_raised_for_the_whole_frame_and_not_for_a_blank_one() -> None:
    """The centre crop removes a toolbar of 5 % from the quadrants, but not from the file."""
    out = np.empty((4, 1, 64, 64), np.uint8)
    frame = np.asarray(echo(0, 800, 600)).copy()
    assert cut_quadrants(frame, CONTRACT, out) == ()
    frame[:28] = 240
    assert cut_quadrants(frame, CONTRACT, out) == (SCREEN,)
    flat = np.full((600, 800), 90, np.uint8)
    flat[:20] = 240
    assert has_toolbar(np.where(flat == 90, np.uint8(0), flat)) and cut_quadrants(flat, CONTRACT, out) == (BLANK,)
