"""The DICOM files of pydicom and of pydicom-data: each frame equals what an independent decoder reads, or is refused.

pydicom reads the files, with decoders that EchoQuad does not use: Thomas Richter's libjpeg for JPEG and JPEG-LS, GDCM
for JPEG 2000, its own for RLE. Where DCMTK is installed, ``dcm2pnm`` renders them as well.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.quality_flags import REGION_CLAMPED, UNCROPPED
from echoquad_runtime.frames.reader import frames_in, load_grey_and_flags

pydicom = pytest.importorskip("pydicom")

from pydicom.pixels import (  # noqa: E402
    apply_color_lut,
    apply_modality_lut,
    apply_voi_lut,
    apply_windowing,
    pixel_array,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

JPEG_FAMILY = tuple(f"1.2.840.10008.1.2.4.{end}" for end in ("50", "51", "57", "70", "80", "81"))
LOSSY_JPEG, JPEG_LS = JPEG_FAMILY[:2], JPEG_FAMILY[4:]
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")

REFUSED = {
    "JPEG2000-embedded-sequence-delimiter.dcm": "E_FRAME_DAMAGED",  # not an image, but bytes that look like one
    "MR_truncated.dcm": "E_FRAME_DAMAGED",
    "SC_rgb_rle_32bit.dcm": "not supported",
    "SC_rgb_rle_32bit_2frame.dcm": "not supported",
    "SC_rgb_32bit.dcm": "not supported",
    "SC_rgb_32bit_2frame.dcm": "not supported",
    "SC_rgb_expb_32bit.dcm": "not supported",
    "SC_rgb_expb_32bit_2frame.dcm": "not supported",
    # Segmentations and doses.
    **dict.fromkeys(("liver.dcm", "liver_1frame.dcm", "liver_expb.dcm", "liver_expb_1frame.dcm"), "not supported"),
    **dict.fromkeys((f"rtdose{end}.dcm" for end in ("", "_1frame", "_expb", "_expb_1frame")), "not supported"),
    **dict.fromkeys(("rtdose_rle.dcm", "rtdose_rle_1frame.dcm"), "not supported"),
}
"""Code or wording of the refusal of each file whose pixels pydicom reads."""

UNREADABLE = {
    "JPEG-lossy.dcm",  # libjpeg insists on the end of the spectral selection
    "emri_small_jpeg_2k_lossless_too_short.dcm",  # pydicom drops pixels without a delimiter
    *(f"OBXXXX1A_expb{end}.dcm" for end in ("", "_2frame")),  # pydicom does not swap the bytes of the palette
}
"""Files whose pixels pydicom does not read as DCMTK does."""

NOT_BY_DCMTK = {"JPEG-lossy.dcm", "SC_rgb_jpeg.dcm"}  # as libjpeg; implicit VR in an explicit transfer syntax

LUMA = 8
"""Grey levels by which the luma of JPEG and YBR differs from that of RGB, which pydicom rounds and clips."""


def suite(name: str) -> list[Path]:
    """Return the files of a package that could be DICOM."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "data"
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".dcm", ""))


PYDICOM, PYDICOM_DATA = suite("pydicom"), suite("data_store")


def outcomes(path: Path) -> Iterator[tuple[int, np.ndarray | FrameError, tuple[str, ...]]]:
    """Yield index, grey levels or error, and flags of the first, a middle and the last frame of a file."""
    found = list(frames_in(path, path.name, DEFAULT_READ_OPTIONS))
    for index in sorted({0, len(found) // 2, len(found) - 1}):
        frame = found[index]
        if isinstance(frame, Failure):
            assert isinstance(frame.error, FrameError)
            yield index, frame.error, ()
            continue
        try:
            yield index, *load_grey_and_flags(frame)
        except FrameError as error:
            yield index, error, ()


def reference(path: Path, index: int, *, cropped: bool) -> np.ndarray:
    """Return the grey levels that pydicom reads, as floats [H, W]."""
    header = pydicom.dcmread(path, force=True)
    syntax = header.file_meta.get("TransferSyntaxUID") or pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.TransferSyntaxUID = syntax
    if syntax in JPEG_FAMILY:
        pytest.importorskip("libjpeg", reason="pylibjpeg-libjpeg is not installed")
    plugin = "pylibjpeg" if syntax in JPEG_FAMILY else "gdcm" if syntax in JPEG_2000 else ""
    pixels = pixel_array(header, index=index, decoding_plugin=plugin)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(pixels, header)
        pixels = (colours / 257 + 0.5).astype(np.uint8) if colours.dtype == np.uint16 else colours
    elif pixels.ndim == 3 and pixels.dtype.itemsize == 2:
        pixels = (pixels / 257 + 0.5).astype(np.uint8)
    levels = np.asarray(Image.fromarray(pixels).convert("L")) if pixels.ndim == 3 else grey(pixels, header)
    return (crop(levels, header) if cropped else levels).astype(float)


def crop(levels: np.ndarray, header: Any) -> np.ndarray:
    """Return the pixels of the region; slices end at the frame's edge."""
    tissue = [item for item in header.SequenceOfUltrasoundRegions if item.RegionDataType == 1]
    (region,) = [item for item in tissue if item.RegionSpatialFormat == 1]
    return levels[
        region.RegionLocationMinY0 : region.RegionLocationMaxY1 + 1,
        region.RegionLocationMinX0 : region.RegionLocationMaxX1 + 1,
    ]


def grey(pixels: np.ndarray, header: Any) -> np.ndarray:
    """Return monochrome pixels as floats in 0..255, as DICOM PS3.3, C.11 has them shown."""
    bits, signed = header.BitsStored, header.PixelRepresentation == 1
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    values = apply_modality_lut(pixels, header)
    tables = [item for item in header.get("VOILUTSequence", []) if "LUTDescriptor" in item]
    has_modality_lut = bool([item for item in header.get("ModalityLUTSequence", []) if "LUTDescriptor" in item])
    if tables:
        shown = apply_voi_lut(values, header)
        low, high = 0, (1 << tables[0].LUTDescriptor[2]) - 1
    elif header.get("WindowWidth") and float(np.ravel(header.WindowWidth)[0]) >= 1:
        shown = apply_windowing(values, header)
        if has_modality_lut:
            low, high = 0, (1 << header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
        else:
            slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
            low, high = low * slope + intercept, high * slope + intercept
    elif has_modality_lut:
        shown, low, high = values, 0, (1 << header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:
        shown = pixels
    levels = (shown.astype(float) - low) * 255 / (high - low)
    return 255 - levels if header.PhotometricInterpretation == "MONOCHROME1" else levels


@pytest.mark.parametrize("path", PYDICOM + PYDICOM_DATA, ids=lambda path: path.name)
def test_frames_equal_pydicom_or_are_refused(path: Path) -> None:
    for index, found, flags in outcomes(path):
        if isinstance(found, FrameError):
            assert str(found).isprintable()
            if path.name in REFUSED:
                assert REFUSED[path.name] in f"{found.code} {found}"
            else:  # pydicom finds no pixels either
                with pytest.raises((AttributeError, ValueError)):
                    pixel_array(pydicom.dcmread(path, force=True))
            continue
        assert path.name not in REFUSED
        if path.name in UNREADABLE:
            continue
        wanted = reference(path, index, cropped=UNCROPPED not in flags)
        header = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        lossy = (
            header.PhotometricInterpretation.startswith("YBR")
            or header.file_meta.get("TransferSyntaxUID") in LOSSY_JPEG
        )
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= (LUMA if lossy else 0.51)


@pytest.mark.skipif(shutil.which("dcmj2pnm") is None, reason="DCMTK is not installed")
@pytest.mark.parametrize("path", PYDICOM + PYDICOM_DATA, ids=lambda path: path.name)
def test_frames_equal_dcmtk(path: Path, tmp_path: Path) -> None:
    for index, found, flags in outcomes(path):
        if isinstance(found, FrameError):
            continue
        header = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        syntax = header.file_meta.get("TransferSyntaxUID", "")
        palette = header.get("SegmentedRedPaletteColorLookupTableData")
        if syntax in JPEG_2000 or path.name in NOT_BY_DCMTK or palette is not None:
            pytest.skip("DCMTK does not read it")
        options = []
        if any("LUTDescriptor" in item for item in header.get("VOILUTSequence", [])):
            options = ["+Wl", "1"]
        elif header.get("WindowWidth") and float(np.ravel(header.WindowWidth)[0]) >= 1:
            options = ["+Wi", "1"]
        program = "dcml2pnm" if syntax in JPEG_LS else "dcmj2pnm"
        out = tmp_path / f"{index}.pnm"
        line = [program, "-q", "-O", "+F", str(index + 1), *options, path, out]
        ran = subprocess.run(line, check=False, capture_output=True)
        assert ran.returncode == 0, ran.stderr
        wanted = np.asarray(Image.open(out).convert("L")).astype(float)
        wanted = wanted if UNCROPPED in flags else crop(wanted, header)
        lossy = header.PhotometricInterpretation.startswith("YBR") or syntax in LOSSY_JPEG
        assert np.abs(found - wanted).max() <= (LUMA if lossy else 1)


def test_the_suites_have_every_kind() -> None:
    """A file that is refused for another reason than before is no longer compared."""
    pytest.importorskip("data_store", reason="pydicom-data is not installed")
    read = [
        flags for path in PYDICOM + PYDICOM_DATA for _, found, flags in outcomes(path) if isinstance(found, np.ndarray)
    ]
    assert len(read) >= 180
    assert any(REGION_CLAMPED in flags for flags in read) and any(flags == () for flags in read)
