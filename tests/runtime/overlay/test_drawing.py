"""Tests of overlays: layout, colours, long names, image modes, file names and errors."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageDraw

from echoquad_runtime.contract import QUADRANTS, Contract, parse_layout
from echoquad_runtime.errors import FrameReadError, OutputError
from echoquad_runtime.frames.discovery import OVERLAY_SUFFIX
from echoquad_runtime.overlay import drawing as overlay
from echoquad_runtime.overlay import palette
from echoquad_runtime.overlay.drawing import draw_overlay, overlay_path, save_overlay
from echoquad_runtime.overlay.palette import CLASS_COLOURS
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.quadrants import quadrant_boxes
from echoquad_runtime.storage.atomic import make_folder, write_bytes

CONTRACT = Contract(classes=("ASD", "NORM"))
ASD, NORM = (ImageColor.getrgb(CLASS_COLOURS[index]) for index in (0, 1))
BAND = ImageColor.getrgb(palette.BAND)
SIZES = [(320, 240), (1920, 1080), (17, 400), (400, 17), (2, 2), (3, 2), (639, 481), (800, 200)]


def prediction(**changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "file": "test/ASD/ASD3-0.png",
        "classes": CONTRACT.classes,
        "method": "majority",
        "label": "ASD",
        "probabilities": (0.54, 0.46),
        "quadrant_labels": ("NORM", "ASD", "ASD", "NORM"),
        "quadrant_probabilities": ((0.41, 0.59), (0.7, 0.3), (0.9, 0.1), (0.3, 0.7)),
        "flags": ("tie",),
        "device": "cpu",
        "precision": "fp32",
    }
    return Prediction(**{**values, **changes})


def draw(size: tuple[int, int], level: int = 0, contract: Contract = CONTRACT, **changes: Any) -> np.ndarray:
    return np.asarray(draw_overlay(Image.new("L", size, level), prediction(**changes), contract))


def scale(picture: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """Return the enlargement factor of the frame, and the height of the band above it."""
    factor = picture.shape[1] // size[0]
    assert picture.shape[1] == factor * size[0]
    return factor, picture.shape[0] - factor * size[1]


# ---------------------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("size", SIZES)
def test_frame_is_complete_below_the_band(size: tuple[int, int]) -> None:
    picture = draw(size, 77)
    factor, band = scale(picture, size)
    assert 1 <= factor <= 8
    assert band > 0
    assert (picture[band:, 0] == 77).all() or min(size) < 10  # the border is kept
    assert (picture[: band // 8, 0] == BAND).all()


@pytest.mark.parametrize("size", [(320, 240), (1920, 1080), (639, 481), (800, 200)])
def test_boxes_have_label_colour_and_quadrant_position(size: tuple[int, int]) -> None:
    picture = draw(size)
    factor, band = scale(picture, size)
    colours = (NORM, ASD, ASD, NORM)
    for (left, top, right, bottom), colour in zip(quadrant_boxes(*size, CONTRACT.keep), colours, strict=True):
        x, y = (left + right) // 2 * factor, (top + bottom) // 2 * factor + band
        inside = picture[top * factor + band : bottom * factor + band, left * factor : right * factor]
        for edge in (inside[:4, x - left * factor], inside[-4:, x - left * factor]):
            assert (edge == colour).all(axis=1).any()
        for edge in (inside[y - band - top * factor, :4], inside[y - band - top * factor, -4:]):
            assert (edge == colour).all(axis=1).any()
        other = ASD if colour == NORM else NORM
        assert not (inside == other).all(axis=2).any()
        # The number is inside the box, in the same colour.
        lettering = inside[6 : inside.shape[0] // 2, 6 : inside.shape[1] * 3 // 4]
        assert (lettering == colour).all(axis=2).sum() > 20


@pytest.mark.parametrize(
    ("flags", "begin"),
    [
        ((), "2 of 4 quadrants  ·  "),
        (("tie",), "2 of 4 quadrants, tie broken by the mean  ·  "),
        (("blank", "saturated", "tie"), "flagged blank, saturated  ·  2 of 4 quadrants, tie broken by the mean  ·  "),
        (("no-signal-RV", "colour"), "flagged no-signal-RV, colour  ·  2 of 4 quadrants  ·  "),
    ],
)
def test_flags_come_first_in_the_detail_line(
    flags: tuple[str, ...], begin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"{begin}test/ASD/ASD3-0.png" in written_on(monkeypatch, (640, 480), flags=flags)


def written_on(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], **changes: Any) -> list[str]:
    """Draw an overlay; return the texts on it: footnote (if any), headline, caption and the four quadrants."""
    written: list[str] = []
    with monkeypatch.context() as patch:
        real = ImageDraw.ImageDraw.text
        patch.setattr(
            ImageDraw.ImageDraw, "text", lambda *given, **rest: written.append(given[2]) or real(*given, **rest)
        )
        draw(size, **changes)
    return written


LONG = "archive/" * 40 + "patient0001/4CH/1.2.840.113619.2.5.1762583153.dcm#127"


@pytest.mark.parametrize("size", [(320, 240), (1920, 1080), (120, 90), (17, 400), (400, 17), (60, 60)])
@pytest.mark.parametrize("flags", [(), ("blank", "saturated", "colour", "uncropped", "tie")])
def test_caption_keeps_the_end_of_a_long_path(
    size: tuple[int, int], flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    caption = written_on(monkeypatch, size, file=LONG, flags=flags)[-5]
    assert caption.endswith("#127")
    assert size == (17, 400) or caption.endswith("2583153.dcm#127")
    assert caption.startswith("flagged bl" if flags else "2 of 4") or size == (17, 400)


def test_caption_of_a_wide_picture_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written_on(monkeypatch, (1920, 1080), file="a/b.dcm#12", flags=())[-5] == "2 of 4 quadrants  ·  a/b.dcm#12"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["", "#1", "漢字/心臟" * 60 + "#7", "❤️🫀👩‍⚕️" * 50, "e\u0301" * 200, "\u202e" * 90, "\0\ud800"]
)
def test_caption_takes_any_name(size: tuple[int, int], name: str) -> None:
    scale(draw(size, file=name), size)


@pytest.mark.parametrize("layout", ["reference", "apex-up", "RV,RA,LV,LA"])
def test_boxes_carry_the_names_of_the_quadrant_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = dataclasses.replace(CONTRACT, quadrants=parse_layout(layout))
    places: dict[str, tuple[bool, bool]] = {}
    real = ImageDraw.ImageDraw.text

    def text(canvas: ImageDraw.ImageDraw, xy: tuple[float, float], words: str, **rest: Any) -> None:
        if words[:2] in QUADRANTS:
            places[words[:2]] = (xy[1] > 300, xy[0] > 320)  # below the middle, right of the middle
        real(canvas, xy, words, **rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    picture = draw((640, 480), contract=contract)
    expected = [(False, False), (False, True), (True, False), (True, True)]
    assert places == dict(zip(parse_layout(layout), expected, strict=True))
    # The box of a quadrant has the colour of that quadrant's vote: NORM, ASD, ASD, NORM for LA, RA, LV, RV.
    factor, band = scale(picture, (640, 480))
    boxes = quadrant_boxes(640, 480, contract.keep, contract.quadrants)
    for (left, top, right, bottom), colour in zip(boxes, (NORM, ASD, ASD, NORM), strict=True):
        inside = picture[top * factor + band : bottom * factor + band, left * factor : right * factor]
        assert (inside[:4, inside.shape[1] // 2] == colour).all(axis=1).any()


@pytest.mark.parametrize("layout", ["reference", "apex-up", "RV,RA,LV,LA"])
def test_activation_maps_cover_the_quadrant_of_their_name(layout: str) -> None:
    contract = dataclasses.replace(CONTRACT, quadrants=parse_layout(layout))
    maps = np.zeros((4, 2, 3, 3), np.float32)
    maps[QUADRANTS.index("LV"), 1] = 1  # evidence for NORM in LV alone
    plain = np.asarray(draw_overlay(Image.new("L", (640, 480), 90), prediction(), contract))
    mapped = np.asarray(draw_overlay(Image.new("L", (640, 480), 90), prediction(cam=maps), contract))
    factor, band = scale(plain, (640, 480))
    changed = (plain[band:] != mapped[band:]).any(axis=2)
    boxes = quadrant_boxes(640, 480, contract.keep, contract.quadrants)
    shares = {}
    for name, (left, top, right, bottom) in zip(QUADRANTS, boxes, strict=True):
        shares[name] = changed[top * factor : bottom * factor, left * factor : right * factor].mean()
    assert shares["LV"] > 0.9 and shares["LA"] == shares["RA"] == shares["RV"] == 0


def test_headline_has_colour_of_the_decision() -> None:
    for label, colour in (("ASD", ASD), ("NORM", NORM)):
        picture = draw((320, 240), label=label)
        _, band = scale(picture, (320, 240))
        assert (picture[:band] == colour).all(axis=2).sum() > 50


@pytest.mark.parametrize("classes", [("ASD", "NORM"), ("Atrial septal defect, " * 9, "Normal heart, " * 9)])
def test_research_use_footnote_is_always_visible(classes: tuple[str, ...]) -> None:
    contract = Contract(classes=classes)
    changes = {"classes": classes, "label": classes[0], "quadrant_labels": (classes[0],) * 4}
    picture = draw((320, 240), 0, contract, **changes)
    _, band = scale(picture, (320, 240))
    rows, columns = np.nonzero((picture == ImageColor.getrgb("#9AA4AE")).all(axis=2))
    assert len(rows) > 100
    assert rows.max() < band / 2
    assert 320 < columns.min() < columns.max() < 640 - 5
    headline = np.nonzero((picture[: band // 2] == ASD).all(axis=2))[1]
    assert headline.max() < columns.min()


@pytest.mark.parametrize("size", [(320, 240), (1920, 1080)])
def test_border_outside_quadrants_is_unchanged(size: tuple[int, int]) -> None:
    picture = draw(size, 50, **long_names())
    factor, band = scale(picture, size)
    boxes = quadrant_boxes(*size, CONTRACT.keep)
    left, top, right, bottom = boxes[0][0], boxes[0][1], boxes[3][2], boxes[3][3]
    outside = np.ones(picture.shape[:2], bool)
    outside[:band] = False
    outside[top * factor + band : bottom * factor + band, left * factor : right * factor] = False
    assert (picture[outside] == 50).all()


def long_names() -> dict[str, Any]:
    return {"file": "a/" * 200 + "b.png"}


@pytest.mark.parametrize("size", [(320, 240), (1920, 1080), (100, 100)])
def test_long_class_names_are_shortened_and_numbers_stay(size: tuple[int, int]) -> None:
    contract = Contract(classes=("Atrial septal defect, " * 9, "Normal heart, " * 9))
    labels = tuple(contract.classes[index] for index in (1, 0, 0, 1))
    changes = {**long_names(), "classes": contract.classes, "label": contract.classes[0], "quadrant_labels": labels}
    picture = draw(size, 50, contract, **changes)
    factor, band = scale(picture, size)
    for index, (left, top, right, bottom) in enumerate(quadrant_boxes(*size, contract.keep)):
        inside = picture[top * factor + band : bottom * factor + band, left * factor : right * factor]
        other = (NORM, ASD, ASD, NORM)[3 - index - (1 if index % 2 == 0 else -1)]
        assert not (inside == other).all(axis=2).any()
    less = {**changes, "probabilities": (0.11, 0.89), "quadrant_probabilities": ((0.88, 0.12),) * 4}
    assert (draw(size, 50, contract, **less)[:band] != picture[:band]).any()  # the mean is still visible
    assert (draw(size, 50, contract, **less)[band:] != picture[band:]).any()


@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_names_can_be_drawn(size: tuple[int, int]) -> None:
    contract = Contract(classes=tuple(sorted(f"class {index} " + "x" * 80 for index in range(9))))
    changes = {
        "file": "漢字\n\udcff\u202e" * 30,
        "classes": contract.classes,
        "label": contract.classes[8],
        "probabilities": (1 / 9,) * 9,
        "quadrant_labels": contract.classes[:4],
        "quadrant_probabilities": ((1 / 9,) * 9,) * 4,
    }
    scale(draw(size, 50, contract, **changes), size)


@pytest.mark.parametrize(
    "name", ["a\nb.png", "a\r\tb.png", os.fsdecode("\udcff.png".encode("utf-8", "surrogateescape"))]
)
def test_unprintable_names_can_be_drawn(name: str) -> None:
    assert (draw((320, 240), file=name) != draw((320, 240), file="")).any()


def test_detail_line_names_the_vote() -> None:
    pictures = [
        draw((320, 240)),
        draw((320, 240), flags=()),
        draw((320, 240), method="average"),
        draw((320, 240), method="weighted"),
        draw((320, 240), quadrant_labels=("ASD",) * 4),
        draw((320, 240), file="other.png"),
        draw((320, 240), probabilities=(0.55, 0.45)),
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_overlay_is_deterministic() -> None:
    first, second = draw((320, 240)), draw((320, 240))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_all_image_modes_can_be_drawn(mode: str) -> None:
    ramp = Image.linear_gradient("L").resize((64, 64))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(np.asarray(ramp).astype(np.int32) * 257 if mode == "I" else np.float32(ramp) / 255)
    else:
        image = ramp.convert("RGB").convert(mode) if mode != "LA" else ramp.convert(mode)
    assert image.mode == mode
    picture = draw_overlay(image, prediction(), CONTRACT)
    assert picture.mode == "RGB"
    column = np.asarray(picture)[-64 * 8 :, 0].astype(int)
    assert column[-1].mean() > 230
    assert column[0].mean() < 25  # a 16-bit frame is scaled to 8 bits, not clipped


def test_colour_frame_stays_in_colour_and_is_not_modified() -> None:
    image = Image.new("RGB", (64, 64), (10, 200, 30))
    picture = np.asarray(draw_overlay(image, prediction(), CONTRACT))
    assert picture[-1, 0].tolist() == [10, 200, 30]
    assert image.getcolors() == [(64 * 64, (10, 200, 30))]


# ---------------------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.png", "a.png"),
        ("a.jpg", "a.jpg"),
        ("test/ASD/1.png", "test/ASD/1.png"),
        ("Ä 漢 (1).PNG", "Ä 漢 (1).PNG"),
        ("../../x.png", "x.png-HASH"),
        ("a/../x.png", "a/x.png-HASH"),
        ("./a.png", "a.png-HASH"),
        ("/data/x.png", "data/x.png-HASH"),
        ("C:/data/x.png", "C_/data/x.png-HASH"),
        ("..\\x.png", ".._x.png-HASH"),
        ("a.png.overlay.png/b.png", "a.png.overlay.png_/b.png-HASH"),
        ("a-0123456789abcdef", "a-0123456789abcdef-HASH"),
        ("clip#1", "clip#1-HASH"),
        ("", "frame-HASH"),
        ("..", "frame-HASH"),
        ("//", "frame-HASH"),
    ],
)
def test_overlay_path_follows_frame_name(name: str, path: str) -> None:
    found = overlay_path(Path("out"), name).as_posix()
    assert re.fullmatch(re.escape(f"out/{path}.overlay.png").replace("HASH", "[0-9a-f]{16}"), found)


def test_frame_of_a_clip_and_a_file_of_that_name_have_two_overlays() -> None:
    assert overlay_path(Path("out"), "clip.dcm#1", 1).as_posix() == "out/clip.dcm#1.overlay.png"
    for name in ("clip.dcm#1", "a:clip.dcm#1", "x" * 300 + "#1"):
        assert overlay_path(Path("out"), name, 1) != overlay_path(Path("out"), name)


names = st.text(st.sampled_from("ab./\\:#1 ~-_\0"), max_size=10) | st.sampled_from(
    ["a.png", "a.jpg", "x/a.png", "x_a.png", "x:a.png", "x\\a.png", "a#1", "a.overlay.png", "a.overlay.png/a"]
)


@given(st.lists(names, min_size=2, max_size=8, unique=True))
def test_frames_with_different_names_have_different_overlays(frames: list[str]) -> None:
    paths = [overlay_path(Path("out"), name) for name in frames]
    assert len(set(paths)) == len(paths)
    assert not any(one in other.parents for one in paths for other in paths)  # no picture is another's folder
    hashed = overlay_path(Path("out"), frames[0], hashed=True)
    assert hashed not in paths[1:]


def row_on(path: Path) -> str:
    with Image.open(path) as image:
        return str(image.text["EchoQuad row"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("first", "second"), [("A.png", "a.png"), ("e\u0301.png", "é.png"), ("A/x.png", "a/x.png")])
def test_names_that_a_file_system_does_not_distinguish_keep_two_overlays(
    first: str, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = overlay.overlay_path

    def folded(folder: Path, name: str, frame: int | None = None, *, hashed: bool = False) -> Path:
        path = real(folder, name, frame, hashed=hashed)
        return folder / unicodedata.normalize("NFC", path.relative_to(folder).as_posix()).casefold()

    monkeypatch.setattr(overlay, "overlay_path", folded)
    Image.new("L", (64, 48), 90).save(tmp_path / "in.png")

    def save(name: str) -> Path:
        return save_overlay(tmp_path / "out", tmp_path / "in.png", prediction(file=name), CONTRACT)

    paths = [save(first), save(second)]
    assert paths[0] != paths[1]
    assert [row_on(path) for path in paths] == [first, second]
    assert [save(second), save(first)] == paths[::-1]  # as in the first run
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    ("name", "row"), [("a.png", "a.png"), ("=1.png", "./=1.png"), ("漢#2", "漢#2"), ("\udcff.png", "\\udcff.png")]
)
def test_overlay_states_its_row(name: str, row: str, tmp_path: Path) -> None:
    Image.new("L", (64, 48), 90).save(tmp_path / "in.png")
    path = save_overlay(tmp_path / "out", tmp_path / "in.png", prediction(file=name), CONTRACT)
    assert row_on(path) == row
    assert overlay._row_of(path) == row


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"iTXtEchoQuad row\0\0\0\0\0", b"x" * 70000])
def test_picture_of_an_earlier_release_is_overwritten(data: bytes, tmp_path: Path) -> None:
    Image.new("L", (64, 48), 90).save(tmp_path / "in.png")
    write_bytes(make_folder(tmp_path / "out") / "a.png.overlay.png", data)
    path = save_overlay(tmp_path / "out", tmp_path / "in.png", prediction(file="a.png"), CONTRACT)
    assert path == tmp_path / "out" / "a.png.overlay.png" and row_on(path) == "a.png"


@given(st.text(st.sampled_from("ab./\\: ~-"), max_size=12))
def test_overlay_path_never_leaves_the_folder(name: str) -> None:
    folder = Path("out").absolute()
    inside = Path(os.path.normpath(overlay_path(folder, name)))
    assert inside.is_relative_to(folder)
    assert inside != folder


@pytest.mark.parametrize("last", ["x" * 251 + ".png", "漢" * 83 + ".png", "\udcff" * 251 + ".png", "x" * 240 + ".png"])
def test_long_name_is_cut_and_stays_unique(last: str, tmp_path: Path) -> None:
    path = overlay_path(tmp_path, f"a/{last}")
    assert path.parent == tmp_path / "a"
    assert path.name.startswith(last[:40])
    assert path.name.endswith(OVERLAY_SUFFIX)
    if os.name == "posix":
        assert len(os.fsencode(path.name)) <= 255
        write_bytes(make_folder(path.parent) / path.name, b"picture")
    others = {overlay_path(tmp_path, name) for name in (f"a/{last}", f"b/{last}", f"a/y{last}", f"a/{last[:-4]}.jpg")}
    assert len(others) == 4
    assert overlay_path(tmp_path, f"a/{last}") == path


@pytest.mark.skipif(os.name == "nt", reason="a path is shorter there")
def test_long_path_loses_its_folders(tmp_path: Path) -> None:
    deep = [overlay_path(tmp_path, f"{'d/' * depth}frame.png") for depth in (10, 2100, 2101)]
    assert deep[0] == tmp_path / ("d/" * 10) / "frame.png.overlay.png"
    assert [path.parent for path in deep[1:]] == [tmp_path, tmp_path]
    assert deep[1] != deep[2]


def test_threads_save_same_overlays_as_one(tmp_path: Path) -> None:
    source = tmp_path / "in.png"
    Image.new("L", (64, 48), 90).save(source)
    one = save_overlay(tmp_path / "one", source, prediction(), CONTRACT).read_bytes()
    with ThreadPoolExecutor(4) as threads:
        # Some frames occur twice: two threads write the same file.
        jobs = [
            threads.submit(save_overlay, tmp_path / str(index // 8), source, prediction(), CONTRACT)
            for index in range(32)
        ]
        found = [job.result() for job in jobs]
    assert {path.read_bytes() for path in found} == {one}
    assert len(list(tmp_path.rglob("*.overlay.png"))) == 5
    assert list(tmp_path.rglob(".*")) == []


def test_overlay_is_saved_as_png(tmp_path: Path) -> None:
    source = tmp_path / "in.png"
    Image.new("L", (64, 48), 90).save(source)
    out = tmp_path / "out"
    target = save_overlay(out, source, prediction(), CONTRACT)
    assert target == out / "test" / "ASD" / "ASD3-0.png.overlay.png"
    expected = draw_overlay(Image.open(source), prediction(), CONTRACT)
    np.testing.assert_array_equal(np.asarray(Image.open(target)), np.asarray(expected))
    data = target.read_bytes()
    assert save_overlay(out, source, prediction(), CONTRACT).read_bytes() == data
    assert [path.name for path in target.parent.iterdir()] == ["ASD3-0.png.overlay.png"]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (64, 48), 90).save(tmp_path / "in.png", exif=exif)
    target = save_overlay(tmp_path / "out", tmp_path / "in.png", prediction(), CONTRACT)
    picture = np.asarray(Image.open(target))
    assert scale(picture, (48, 64))[0] > 1


def test_unreadable_frame_and_unwritable_folder_raise(tmp_path: Path) -> None:
    with pytest.raises(FrameReadError):
        save_overlay(tmp_path / "out", tmp_path / "gone.png", prediction(), CONTRACT)
    Image.new("L", (64, 48), 90).save(tmp_path / "in.png")
    with pytest.raises(OutputError, match="cannot be written"):
        save_overlay(tmp_path / "in.png", tmp_path / "in.png", prediction(), CONTRACT)
    stream = io.BytesIO((tmp_path / "in.png").read_bytes())
    assert Image.open(stream).size == (64, 48)


def test_transparent_pixels_are_drawn_as_predicted() -> None:
    hidden = Image.new("RGBA", (320, 240), (255, 255, 255, 0))
    picture = np.asarray(draw_overlay(hidden, prediction(), CONTRACT))
    assert (picture[-1, :] == 0).all()
