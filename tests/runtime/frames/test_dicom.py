"""DICOM files: every transfer syntax and photometric interpretation, windows, regions, clips, damage, and privacy."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import (
    FrameDamagedError,
    FrameError,
    FrameExtraError,
    FrameFormatError,
    FrameTooLargeError,
)
from echoquad_runtime.frames.dicom import elements
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.formats import MAX_FILE_BYTES
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.reader import (
    decode_grey,
    decode_grey_and_flags,
    load_grey,
    load_grey_and_flags,
    load_image,
)
from echoquad_runtime.frames.sources import decode_in_memory

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("openjpeg")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402

# pydicom warns about the malformed files that these tests write and read.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NATIVE, IMPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in (".1", "", ".2", ".1.99"))
JPEG, JPEG_2000, RLE = (f"1.2.840.10008.1.2.{end}" for end in ("4.50", "4.90", "5"))
ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
NAME = "PlantedDoe"


def shipped(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


def ultrasound() -> list[Path]:
    """Return the paths of all ultrasound files in the pydicom wheel."""
    found = []
    for path in sorted(Path(pydicom.__file__).parent.joinpath("data", "test_files").rglob("*")):
        if path.is_file():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    header = pydicom.dcmread(path, stop_before_pixels=True)
                except Exception:
                    continue
            if header.get("Modality") == "US":
                found.append(path)
    return found


def make(pixels: bytes, *, syntax: str = NATIVE, **values: Any) -> bytes:
    """Return a DICOM file, by default of 6 x 8 8-bit grey pixels; a value of None omits the element."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _make(pixels, syntax, values)


def _make(pixels: bytes, syntax: str, values: dict[str, Any]) -> bytes:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID, made.file_meta.MediaStorageSOPInstanceUID = syntax, "1.2.3"
    made.SOPClassUID, made.PatientName = ULTRASOUND, NAME
    every = {
        **{"Rows": 6, "Columns": 8, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"},
        **{"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0},
        **values,
    }
    for keyword, value in every.items():
        if value is not None:
            setattr(made, keyword, value)
    made.PixelData = pixels
    made["PixelData"].VR = "OW" if every["BitsAllocated"] == 16 else "OB"
    if syntax not in (NATIVE, IMPLICIT, BIG, DEFLATED):
        made["PixelData"].is_undefined_length = True
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, made, enforce_file_format=True)
    return stream.getvalue()


RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOURS = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 7)], axis=2)
RGB = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


def luma(colours: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(colours).convert("L"))


# ---------------------------------------------------------------------------------------------- real files


def test_pydicom_ships_the_ultrasound_files_used_here() -> None:
    assert {path.name for path in ultrasound()} == {
        *("ExplVR_BigEnd.dcm", "examples_jpeg2k.dcm", "examples_palette.dcm", "examples_rgb_color.dcm"),
        "examples_ybr_color.dcm",
    }


@pytest.mark.parametrize("path", ultrasound(), ids=lambda path: path.name)
def test_real_ultrasound_equals_pydicom(path: Path) -> None:
    from pydicom.pixels import apply_color_lut, pixel_array

    frames = list(find_frames([path]))
    assert all(isinstance(frame, FrameFile) for frame in frames)
    assert len(frames) == (30 if path.name == "examples_ybr_color.dcm" else 1)
    for index in {0, len(frames) // 2, len(frames) - 1}:
        frame = frames[index]
        assert isinstance(frame, FrameFile)
        wanted = pixel_array(path, index=index)  # in RGB
        if wanted.ndim == 2:
            wanted = (apply_color_lut(wanted, pydicom.dcmread(path)) / 257 + 0.5).astype(np.uint8)
        grey, flags = load_grey_and_flags(frame)
        # JPEG's own luma is compared with the luma of clipped RGB.
        assert np.abs(grey.astype(int) - luma(wanted)).max() <= (8 if "ybr" in path.name else 1)
        # None of these files has a region that fits its frame.
        assert flags == (("uncropped", "colour") if path.name == "ExplVR_BigEnd.dcm" else ("uncropped",))
        shown = np.asarray(load_image(frame).convert("RGB")).astype(int)
        assert np.abs(shown - wanted).mean() < 1


def test_echocardiogram_has_thirty_different_frames() -> None:
    frames = [item for item in find_frames([shipped("examples_ybr_color.dcm")]) if isinstance(item, FrameFile)]
    assert [item.name for item in frames] == [f"examples_ybr_color.dcm#{number}" for number in range(1, 31)]
    greys = [load_grey(item) for item in frames]
    from pydicom.encaps import generate_frames

    stored = pydicom.dcmread(shipped("examples_ybr_color.dcm")).PixelData
    assert len({grey.tobytes() for grey in greys}) == len(set(generate_frames(stored, number_of_frames=30))) > 20
    assert {grey.shape for grey in greys} == {(240, 320)}  # its region exceeds the frame, so it is not cropped


@pytest.mark.parametrize(
    "name",
    [
        *(
            "SC_rgb_rle.dcm",
            "SC_rgb_rle_16bit.dcm",
            "SC_rgb_jpeg_gdcm.dcm",
            "SC_rgb_gdcm_KY.dcm",
            "SC_rgb_small_odd.dcm",
        ),
        *("SC_rgb_small_odd_big_endian.dcm", "SC_rgb_jls_lossy_line.dcm", "SC_rgb_jls_lossy_sample.dcm"),
        *("SC_rgb_dcmtk_+eb+cr.dcm", "SC_jpeg_no_color_transform.dcm", "SC_ybr_full_422_uncompressed.dcm"),
        *("SC_rgb_jpeg_dcmd.dcm", "GDCMJ2K_TextGBR.dcm"),
    ],
)
def test_colours_of_every_transfer_syntax_equal_pydicom(name: str) -> None:
    if "jls" in name:
        pytest.importorskip("gdcm")
    from pydicom.pixels import pixel_array

    wanted = pixel_array(shipped(name))
    wanted = (wanted / 257 + 0.5).astype(np.uint8) if wanted.dtype == np.uint16 else wanted
    (frame,) = find_frames([shipped(name)])
    assert isinstance(frame, FrameFile)
    assert np.abs(load_grey(frame).astype(int) - luma(wanted)).max() <= 2


@pytest.mark.parametrize(
    "name",
    [
        *("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_padded.dcm"),
        *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"),
    ],
)
def test_16_bit_pixels_are_equal_in_every_transfer_syntax(name: str) -> None:
    if "jpeg_ls" in name:
        pytest.importorskip("gdcm")
    stored = pydicom.dcmread(shipped("MR_small.dcm")).pixel_array.astype(float)
    center, width = 600, 1600  # its window, by DICOM PS3.3, C.11.2.1.2.1
    wanted = np.clip(((stored - (center - 0.5)) / (width - 1) + 0.5) * 255, 0, 255)
    (frame,) = find_frames([shipped(name)])
    assert isinstance(frame, FrameFile)
    np.testing.assert_allclose(load_grey(frame), wanted, atol=0.51)


# ---------------------------------------------------------------------------------------------- kinds of pixel


@pytest.mark.parametrize("syntax", [NATIVE, IMPLICIT, BIG, DEFLATED])
def test_8_bit_monochrome_is_unchanged(syntax: str) -> None:
    np.testing.assert_array_equal(decode_grey(make(RAMP.tobytes(), syntax=syntax)), RAMP)


def test_monochrome1_is_inverted() -> None:
    data = make(RAMP.tobytes(), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(decode_grey(data), 255 - RAMP)


@pytest.mark.parametrize(("bits", "signed"), [(16, 0), (12, 0), (10, 0), (16, 1), (12, 1)])
def test_without_window_largest_storable_value_is_white(bits: int, signed: int) -> None:
    levels = np.linspace(0, (1 << bits) - 1, 48).astype(np.int64).reshape(6, 8)
    stored = (levels - (1 << bits - 1) if signed else levels).astype("<i4").astype("<u2")
    stored |= np.uint16(0 if bits == 16 else 1 << 15)  # an overlay plane in an unused bit
    data = make(stored.tobytes(), BitsAllocated=16, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=signed)
    np.testing.assert_array_equal(decode_grey(data), np.floor(levels * 255 / ((1 << bits) - 1) + 0.5))


def test_window_maps_values_to_grey() -> None:
    stored = (np.arange(48).reshape(6, 8) * 80).astype("<u2")
    wide = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "RescaleSlope": 2, "RescaleIntercept": -100}
    data = make(stored.tobytes(), **wide, WindowCenter=[1000, 5], WindowWidth=[401, 7])
    value = stored * 2.0 - 100
    wanted = np.clip(((value - 999.5) / 400 + 0.5) * 255, 0, 255)
    np.testing.assert_allclose(decode_grey(data), wanted, atol=0.51)
    exact = make(stored.tobytes(), **wide, WindowCenter=1000, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_allclose(decode_grey(exact), np.clip(((value - 1000) / 400 + 0.5) * 255, 0, 255), atol=0.51)
    curved = make(stored.tobytes(), **wide, WindowCenter=1000, WindowWidth=400, VOILUTFunction="SIGMOID")
    np.testing.assert_allclose(decode_grey(curved), 255 / (1 + np.exp(-4 * (value - 1000) / 400)), atol=0.51)
    usual = make(RAMP.tobytes(), WindowCenter=128, WindowWidth=256)
    np.testing.assert_array_equal(decode_grey(usual), RAMP)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", [NATIVE, BIG])
def test_rgb_becomes_luma(planar: int, syntax: str) -> None:
    stored = np.moveaxis(COLOURS, 2, 0) if planar else COLOURS
    data = make(stored.tobytes(), syntax=syntax, **{**RGB, "PlanarConfiguration": planar})
    grey, flags = decode_grey_and_flags(data)
    np.testing.assert_array_equal(grey, luma(COLOURS))
    assert flags == ("uncropped", "colour")
    np.testing.assert_array_equal(np.asarray(decode_in_memory(data).image()), COLOURS)


def test_ybr_uses_its_own_luma() -> None:
    ybr = np.asarray(Image.fromarray(COLOURS).convert("YCbCr"))
    full = make(ybr.tobytes(), **{**RGB, "PhotometricInterpretation": "YBR_FULL"})
    np.testing.assert_array_equal(decode_grey(full), ybr[..., 0])
    assert np.abs(np.asarray(decode_in_memory(full).image()).astype(int) - COLOURS).max() <= 3
    pairs = np.concatenate([ybr[..., 0].reshape(6, 4, 2), ybr[:, ::2, 1:]], axis=2)
    halved = make(pairs.tobytes(), **{**RGB, "PhotometricInterpretation": "YBR_FULL_422"})
    np.testing.assert_array_equal(decode_grey(halved), ybr[..., 0])
    assert decode_grey_and_flags(halved)[1] == ("uncropped", "colour")


def palette(bits: int, columns: np.ndarray, **other: Any) -> dict[str, Any]:
    kind = np.uint8 if bits == 8 else "<u2"
    values: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, column in zip(("Red", "Green", "Blue"), columns.T, strict=True):
        values[f"{name}PaletteColorLookupTableDescriptor"] = [len(columns), other.get("first", 0), bits]
        values[f"{name}PaletteColorLookupTableData"] = column.astype(kind).tobytes()
    return values


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_maps_values_to_colours(bits: int) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (240, 3))
    data = make(RAMP.tobytes(), **palette(bits, colours * (257 if bits == 16 else 1)))
    wanted = colours[np.minimum(RAMP, 239)].astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(decode_in_memory(data).image()), wanted)
    np.testing.assert_array_equal(decode_grey(data), luma(wanted))


def test_values_outside_palette_take_its_first_or_last_colour() -> None:
    colours = np.array([[10, 10, 10], [90, 90, 90], [200, 200, 200]])
    pixels = np.repeat(np.array([[0, 100, 101, 102, 103, 255, 99, 7]], np.uint8), 6, axis=0)
    data = make(pixels.tobytes(), **palette(16, colours * 257, first=100))
    assert decode_grey(data)[0].tolist() == [10, 10, 90, 200, 200, 200, 10, 10]


def test_segmented_palette_is_expanded() -> None:
    words = [
        0,
        2,
        0,
        257,
        1,
        3,
        4 * 257,
        2,
        1,
        0,
        0,
        0,
        1,
        9 * 257,
    ]  # two values, a line of three, the two again, one value
    segments = struct.pack("<14H", *words)
    values: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        values[f"{name}PaletteColorLookupTableDescriptor"] = [8, 0, 16]
        values[f"Segmented{name}PaletteColorLookupTableData"] = segments
    pixels = np.repeat(np.arange(8, dtype=np.uint8)[None], 6, axis=0)
    assert decode_grey(make(pixels.tobytes(), **values))[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 9]


def jpeg(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def test_jpeg_baseline_equals_jpeg_file() -> None:
    valid = jpeg(Image.fromarray(COLOURS), quality=90)
    data = make(encapsulate([valid]), syntax=JPEG, **{**RGB, "PhotometricInterpretation": "YBR_FULL_422"})
    np.testing.assert_array_equal(decode_grey(data), decode_grey(valid))
    cut = make(
        encapsulate([valid[:-40] + b"\xff\xd9"]), syntax=JPEG, **{**RGB, "PhotometricInterpretation": "YBR_FULL_422"}
    )
    with pytest.raises(FrameDamagedError):
        decode_grey(cut)


def test_rle_runs_may_cross_rows_but_not_the_frame() -> None:
    def packed(plane: bytes) -> bytes:
        return b"".join(bytes([len(part) - 1]) + part for part in (plane[i : i + 100] for i in range(0, 48, 100)))

    segment = packed(RAMP.tobytes())
    header = struct.pack("<16I", 1, 64, *[0] * 14)
    np.testing.assert_array_equal(decode_grey(make(encapsulate([header + segment]), syntax=RLE)), RAMP)
    for wrong in (header + segment[:20], struct.pack("<16I", 2, 64, 70, *[0] * 13) + segment):
        with pytest.raises(FrameDamagedError):
            decode_grey(make(encapsulate([wrong]), syntax=RLE))


# ---------------------------------------------------------------------------------------------- the region


def region(box: tuple[int, int, int, int], kind: int = 1, spatial: int = 1) -> Dataset:
    made = Dataset()
    made.RegionSpatialFormat, made.RegionDataType = spatial, kind
    made.RegionLocationMinX0, made.RegionLocationMinY0, made.RegionLocationMaxX1, made.RegionLocationMaxY1 = box
    return made


INSIDE = (1, 2, 6, 5)


@pytest.mark.parametrize(
    ("regions", "flags"),
    [
        ([region(INSIDE)], ()),
        ([region(INSIDE), region((0, 0, 7, 1), kind=4, spatial=3)], ()),  # the other region is a spectrum
        ([region((0, 0, 7, 5))], ()),
        ([region((1, 2, 8, 5))], ("region-clamped",)),  # the first column and row outside
        ([region((1, 2, 6, 6))], ("region-clamped",)),
        ([region((0, 0, 8, 6))], ("region-clamped",)),
        ([region((1, 2, 9, 5))], ("uncropped",)),
        ([region((8, 2, 8, 5))], ("uncropped",)),
        ([region((6, 2, 1, 5))], ("uncropped",)),
        ([region(INSIDE), region((0, 0, 3, 3))], ("uncropped",)),  # ambiguous
        ([region(INSIDE, kind=2)], ("uncropped",)),
        ([], ("uncropped",)),
    ],
)
@pytest.mark.parametrize("syntax", [NATIVE, BIG, IMPLICIT])
def test_frame_is_cropped_to_region_or_flagged(regions: list[Dataset], flags: tuple[str, ...], syntax: str) -> None:
    data = make(RAMP.tobytes(), syntax=syntax, SequenceOfUltrasoundRegions=regions or None)
    found, raised = decode_grey_and_flags(data)
    assert raised == flags
    if flags == ("uncropped",):
        np.testing.assert_array_equal(found, RAMP)
    else:
        left, top, right, bottom = (regions[0][tag].value for tag in (0x00186018, 0x0018601A, 0x0018601C, 0x0018601E))
        np.testing.assert_array_equal(found, RAMP[top : bottom + 1, left : right + 1])


def test_region_may_leave_a_large_frame_by_a_hundredth_of_its_side() -> None:
    for excess, flags in ((0, ()), (3, ("region-clamped",)), (4, ("uncropped",))):
        regions = [region((10, 20, 299 + excess, 199))]
        data = make(bytes(60_000), Rows=200, Columns=300, SequenceOfUltrasoundRegions=regions)
        grey, raised = decode_grey_and_flags(data)
        assert raised == flags
        assert grey.shape == ((200, 300) if "uncropped" in flags else (180, 290))


def test_colours_carry_the_flags_of_the_region() -> None:
    values = {**RGB, "SequenceOfUltrasoundRegions": [region((1, 2, 8, 5))]}
    assert decode_grey_and_flags(make(COLOURS.tobytes(), **values))[1] == ("region-clamped", "colour")
    compressed = make(
        encapsulate([jpeg(Image.fromarray(RAMP))]), syntax=JPEG, SequenceOfUltrasoundRegions=[region(INSIDE)]
    )
    assert decode_grey_and_flags(compressed)[1] == ()
    assert decode_grey_and_flags(make(encapsulate([jpeg(Image.fromarray(RAMP))]), syntax=JPEG))[1] == ("uncropped",)


# ---------------------------------------------------------------------------------------------- several frames


def clip(frames: int, stated: int | None = None, **values: Any) -> bytes:
    stored = np.stack([RAMP + number for number in range(frames)])
    return make(stored.tobytes(), NumberOfFrames=stated or frames, **values)


def read_all(path: Path) -> list[np.ndarray | str]:
    found = find_frames([path])
    return [f"{item.file}: {item.error}" if isinstance(item, Failure) else load_grey(item) for item in found]


def test_clip_is_read_frame_by_frame(tmp_path: Path) -> None:
    path = tmp_path / "clip.dcm"
    path.write_bytes(clip(12))
    for number, grey in enumerate(read_all(path)):
        np.testing.assert_array_equal(grey, RAMP + number)
    (twelfth,) = find_frames([tmp_path / "clip.dcm#12"])
    assert isinstance(twelfth, FrameFile) and twelfth.name == "clip.dcm#12"
    np.testing.assert_array_equal(load_grey(twelfth), RAMP + 11)
    (beyond,) = find_frames([tmp_path / "clip.dcm#13"])
    with pytest.raises(FrameDamagedError, match=r"frame 13\b.*\b12"):
        load_grey(beyond)  # type: ignore[arg-type]


def test_missing_frames_are_one_failure(tmp_path: Path) -> None:
    path = tmp_path / "clip.dcm"
    path.write_bytes(clip(4, stated=30))
    *frames, last = read_all(path)
    assert len(frames) == 4 and all(isinstance(frame, np.ndarray) for frame in frames)
    assert isinstance(last, str) and last.startswith("clip.dcm: frames 5 to 30 of 30 ")


def test_damaged_frame_does_not_affect_other_frames(tmp_path: Path) -> None:
    valid = jpeg(Image.fromarray(RAMP))
    parts = [valid, valid[:-30] + b"\xff\xd9", valid]
    (tmp_path / "clip.dcm").write_bytes(make(encapsulate(parts), syntax=JPEG, NumberOfFrames=3))
    frames = list(find_frames([tmp_path / "clip.dcm"]))
    assert len(frames) == 3
    for number, frame in enumerate(frames):
        assert isinstance(frame, FrameFile)
        if number == 1:
            with pytest.raises(FrameDamagedError):
                load_grey(frame)
        else:
            np.testing.assert_array_equal(load_grey(frame), decode_grey(valid))


@pytest.mark.parametrize("has_table", [True, False])
def test_fragments_are_assigned_to_frames_by_offset_table_or_markers(tmp_path: Path, has_table: bool) -> None:
    images = [jpeg(Image.fromarray(RAMP + number)) for number in (0, 40)]
    path = tmp_path / "clip.dcm"
    path.write_bytes(make(encapsulate(images, fragments_per_frame=2, has_bot=has_table), syntax=JPEG, NumberOfFrames=2))
    for found, valid in zip(read_all(path), images, strict=True):
        np.testing.assert_array_equal(found, decode_grey(valid))


def test_clip_is_not_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    frames = 200
    path = tmp_path / "clip.dcm"
    with path.open("wb") as stream:
        head = make(b"\0" * 48, Rows=400, Columns=500, NumberOfFrames=frames)
        at = head.rindex(b"\xe0\x7f\x10\x00")
        stream.write(head[: at + 8] + struct.pack("<I", frames * 200_000))
        stream.truncate(at + 12 + frames * 200_000)
    tracemalloc.start()
    try:
        found = [item for item in find_frames([path]) if isinstance(item, FrameFile)]
        assert len(found) == frames
        load_grey(found[150])
        assert tracemalloc.get_traced_memory()[1] < 3_000_000  # the pixels have 40 million bytes
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------- refusals


def without_pixels() -> bytes:
    data = make(RAMP.tobytes())
    return data[: data.rindex(b"\xe0\x7f\x10\x00")]


def bomb(limit: int) -> bytes:
    """Return a small deflated file that inflates to more than `limit` bytes."""
    data = make(RAMP.tobytes(), syntax=DEFLATED)
    begin = data.index(b"1.2.840.10008.1.2.1.99")
    begin = next(at for at in range(begin, len(data)) if _inflates(data[at:]))
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b"".join(deflater.compress(bytes(1 << 20)) for _ in range((limit >> 20) + 2)) + deflater.flush()
    return data[:begin] + body


def _inflates(data: bytes) -> bool:
    try:
        return len(zlib.decompressobj(-15).decompress(data)) > 100
    except zlib.error:
        return False


REFUSED: dict[str, tuple[Callable[[], bytes], type[FrameError], str]] = {
    "no pixels": (without_pixels, FrameFormatError, "not supported: .*no pixels"),
    "a segmentation": (
        lambda: make(RAMP.tobytes(), SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"),
        FrameFormatError,
        "not supported: .*not an image",
    ),
    "truncated": (lambda: make(RAMP.tobytes())[:-10], FrameDamagedError, "truncated"),
    "too many pixels": (
        lambda: make(b"\0" * 48, Rows=60000, Columns=60000),
        FrameTooLargeError,
        "60000x60000 pixels",
    ),
    "too many frames": (
        lambda: make(b"\0" * 48, NumberOfFrames=2_000_000_000),
        FrameTooLargeError,
        "1 to 100000",
    ),
    "no frames": (lambda: make(b"\0" * 48, NumberOfFrames=0), FrameTooLargeError, "1 to 100000"),
    "32 bits": (
        lambda: make(b"\0" * 192, BitsAllocated=32, BitsStored=32, HighBit=31),
        FrameFormatError,
        "not supported: .*8 or 16 bits",
    ),
    "no rows": (lambda: make(RAMP.tobytes(), Rows=None), FrameFormatError, "rows"),
    "an unknown photometric interpretation": (
        lambda: make(RAMP.tobytes(), PhotometricInterpretation="HSV"),
        FrameFormatError,
        "not supported: .*expected MONOCHROME1",
    ),
    "MPEG": (
        lambda: make(encapsulate([b"\0" * 48]), syntax="1.2.840.10008.1.2.4.102"),
        FrameFormatError,
        "not supported: .*transfer syntax",
    ),
    "another size than stated": (
        lambda: make(encapsulate([jpeg(Image.fromarray(RAMP[:4]))]), syntax=JPEG),
        FrameDamagedError,
        "size differs",
    ),
    "JPEG 2000 of another size": (
        lambda: make(encapsulate([b"\xff\x4f\xff\x51" + b"\x7f" * 60 + b"\xff\xd9"]), syntax=JPEG_2000),
        FrameDamagedError,
        "size differs",
    ),
    "a palette too short": (
        lambda: make(
            RAMP.tobytes(), **{**palette(16, np.ones((3, 3)) * 999), "GreenPaletteColorLookupTableData": b"\1\2"}
        ),
        FrameDamagedError,
        "shorter than it states",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusal_is_one_line_without_patient_name(what: str) -> None:
    data, kind, words = REFUSED[what]
    with pytest.raises(kind, match=words) as caught:
        decode_grey(data())
    assert str(caught.value).isprintable()
    assert NAME not in repr(caught.value)


@pytest.mark.usefixtures("without_isolation")
@pytest.mark.parametrize("limit", [1 << 20, pytest.param(MAX_FILE_BYTES, marks=pytest.mark.slow)])
def test_deflated_bomb_is_not_inflated_beyond_limit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements, "MAX_FILE_BYTES", limit)
    data = bomb(limit)
    assert len(data) < limit / 100
    with pytest.raises(FrameTooLargeError, match=str(limit)):
        decode_grey(data)


def test_multi_frame_bytes_are_refused() -> None:
    with pytest.raises(FrameFormatError, match="3 frames; expected one"):
        decode_grey(clip(3))


@pytest.mark.usefixtures("without_isolation")
@pytest.mark.parametrize(
    ("module", "words", "name"),
    [
        ("gdcm", "python-gdcm", "MR_small_jpeg_ls_lossless.dcm"),
        ("openjpeg", "pylibjpeg-openjpeg", "examples_jpeg2k.dcm"),
    ],
)
def test_missing_package_is_named_with_its_extra(
    module: str, words: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from echoquad_runtime.frames.reader import clear_file_cache

    clear_file_cache()
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.dcm").write_bytes(shipped(name).read_bytes())
    (item,) = find_frames([tmp_path / "a.dcm"])
    assert isinstance(item, FrameFile)
    with pytest.raises(FrameExtraError, match=rf'needs? {words}.*pip install "echoquad\[dicom\]"') as caught:
        load_grey(item)
    assert isinstance(caught.value, ImportError)


# ---------------------------------------------------------------------------------------------- privacy


def planted_names() -> dict[str, bytes]:
    """Return files with a patient's name in a value that is read, so that quoting the value reveals it."""
    valid = make(RAMP.tobytes(), NumberOfFrames=1, WindowCenter=128, WindowWidth=256, RescaleSlope=1, StudyID=NAME)
    found: dict[str, bytes] = {}
    for keyword in (
        "NumberOfFrames",
        "WindowCenter",
        "PhotometricInterpretation",
        "Rows",
        "BitsAllocated",
        "RescaleSlope",
    ):
        tag = pydicom.tag.Tag(keyword)
        at = valid.index(struct.pack("<HH", tag.group, tag.element))
        (length,) = struct.unpack_from("<H", valid, at + 6)
        name = NAME.encode() + b" " * (len(NAME) % 2)
        found[keyword] = valid[: at + 6] + struct.pack("<H", len(name)) + name + valid[at + 8 + length :]
        found[f"{keyword} with a wrong VR"] = valid[: at + 4] + b"PN" + found[keyword][at + 6 :]
    found["transfer syntax"] = valid.replace(NATIVE.encode() + b"\0", (NAME * 2).encode()[:20])
    found["character set"] = make(RAMP.tobytes(), SpecificCharacterSet=NAME, NumberOfFrames=NAME[:0] or "1")
    at = valid.index(b"\x28\x00\x10\x00")
    found["instead of a tag"] = valid[:at] + NAME.encode() * 3 + valid[at:]
    found["truncated in the name"] = valid[: valid.index(NAME.encode()) + 4]
    return found


PLANTED = planted_names()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLANTED)
def test_patient_name_in_any_element_appears_in_no_output(
    place: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        decode_grey_and_flags(PLANTED[place])
    except FrameError as error:
        seen: BaseException | None = error
        while seen is not None:
            assert NAME not in f"{seen} {seen.args!r}"
            seen = seen.__cause__ or seen.__context__
        assert str(error).isprintable()
    assert NAME not in caplog.text
    out = capfd.readouterr()
    assert NAME not in out.out + out.err
