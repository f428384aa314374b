"""Worker of the format fuzzing: damages DICOM, matrix, TIFF and video files and reads them in its own process.

``test_format_fuzzing.py`` runs it as ``format_worker.py SCRATCH FIRST LAST``. It prints a JSON line before and after
each file.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.reader import load_grey_and_flags, load_image

NAME = "PlantedDoe"
FLAGS = {"colour", "nan", "uncropped", "region-clamped"}

with contextlib.suppress(ImportError):  # Windows
    import resource

    # Of this process alone: a larger allocation fails. Reader processes have limits of their own.
    resource.setrlimit(resource.RLIMIT_AS, (1500 << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))

SHIPPED = (
    *("ExplVR_BigEnd.dcm", "examples_palette.dcm", "MR_small_RLE.dcm", "MR_small_implicit.dcm", "SC_rgb_jpeg_gdcm.dcm"),
    *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPEGLSNearLossless_16.dcm", "image_dfl.dcm"),
    *("SC_rgb_rle_2frame.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_jls_lossy_line.dcm"),
)


def with_planted_name(data: bytes) -> bytes:
    """Return a DICOM file with a name in every element that may hold a patient's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pydicom.dcmread(io.BytesIO(data))
        for keyword in ("PatientName", "PatientID", "ReferringPhysicianName", "StudyDescription", "ImageComments"):
            setattr(found, keyword, NAME)
        found.PatientBirthDate = "19000101"
        found.private_block(0x0029, NAME, create=True).add_new(1, "LO", NAME)
        stream = io.BytesIO()
        found.save_as(stream)
    return stream.getvalue()


def dicom_clip() -> bytes:
    """Return a clip of three frames with the name in its header."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.2.1", "1.2.3"
    made = Dataset()
    made.file_meta = meta
    made.SOPClassUID, made.PatientName = "1.2.840.10008.5.1.4.1.1.3.1", NAME
    made.Rows, made.Columns, made.NumberOfFrames, made.SamplesPerPixel = 20, 30, 3, 1
    made.PhotometricInterpretation, made.BitsAllocated, made.BitsStored, made.HighBit = "MONOCHROME2", 8, 8, 7
    made.PixelRepresentation = 0
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType = 1, 1
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 2, 3
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 27, 17
    made.SequenceOfUltrasoundRegions = [region]
    made.PixelData = bytes(range(200)) * 9
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, made, enforce_file_format=True)
    return stream.getvalue()


def lossless_16_bits() -> bytes:
    """Return a DICOM file with a lossless JPEG of 16 bits; GDCM aborts on some of its damaged variants."""
    import gdcm

    with tempfile.TemporaryDirectory() as folder:
        source, target = gdcm.ImageReader(), Path(folder, "lossless.dcm")
        source.SetFileName(str(get_testdata_file("MR_small.dcm", download=False)))
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        assert source.Read()
        change.SetInput(source.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(target))
        writer.SetFile(source.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return target.read_bytes()


def tiff(compression: str) -> bytes:
    stream = io.BytesIO()
    levels = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    Image.fromarray(np.stack([levels, levels // 2, levels], 2)).save(stream, "TIFF", compression=compression)
    return stream.getvalue()


def stack(file_format: str) -> bytes:
    """Return an image file of three frames."""
    stream = io.BytesIO()
    first, *others = [Image.fromarray(np.full((16, 24), 60 * index, np.uint8)) for index in (1, 2, 3)]
    first.save(stream, file_format, save_all=True, append_images=others)
    return stream.getvalue()


def video(container: str, codec: str, pixels: str) -> bytes:
    """Return a clip of six frames."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream(codec, rate=25)
        track.width, track.height, track.pix_fmt = 48, 32, pixels
        for index in range(6):
            levels = np.full((32, 48, 3), 40 * index, np.uint8)
            levels[: 4 * index] = 255 - 40 * index
            out.mux(track.encode(av.VideoFrame.from_ndarray(levels, "rgb24")))
        out.mux(track.encode())
    return stream.getvalue()


def array(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def text(delimiter: str) -> bytes:
    rows = np.add.outer(np.arange(12), np.arange(16)) / 30
    return "\n".join(["depth of " + NAME, *(delimiter.join(f"{value:.3f}" for value in row) for row in rows)]).encode()


def make_seeds() -> dict[str, bytes]:
    """Return a valid file of each format, by name."""
    seeds = {
        name: with_planted_name(Path(str(get_testdata_file(name, download=False))).read_bytes()) for name in SHIPPED
    }
    seeds["clip.dcm"] = dicom_clip()
    seeds["lossless.dcm"] = with_planted_name(lossless_16_bits())
    seeds |= {"lzw.tif": tiff("tiff_lzw"), "deflate.tif": tiff("tiff_adobe_deflate"), "plain.tif": tiff("raw")}
    seeds |= {"pages.tif": stack("TIFF"), "animated.png": stack("PNG")}
    seeds |= {"comma.csv": text(","), "blank.txt": text(" "), "mixed.txt": text(" ;\t")}
    seeds |= {"grey.npy": array(np.arange(600, dtype=np.uint16).reshape(20, 30)), "clip.npy": array(np.ones((3, 8, 9)))}
    with contextlib.suppress(ImportError):
        seeds |= {"mjpeg.avi": video("avi", "mjpeg", "yuvj420p"), "mpeg4.mp4": video("mp4", "mpeg4", "yuv420p")}
        seeds |= {"mpeg4.avi": video("avi", "mpeg4", "yuv420p"), "deep.mkv": video("matroska", "ffv1", "yuv420p10le")}
        seeds |= {"raw.avi": video("avi", "rawvideo", "bgr24"), "ffv1.mkv": video("matroska", "ffv1", "yuv420p")}
    return seeds


def damage(data: bytes, rng: random.Random) -> bytes:
    """Damage a file, more often at its beginning, where the header is, or in the header of a JPEG in it."""
    at = rng.randrange(len(data)) if rng.random() < 0.4 else rng.randrange(min(len(data), 1500))
    if (jpeg := data.find(b"\xff\xd8\xff")) >= 0 and rng.random() < 0.5:
        at = jpeg + rng.randrange(min(len(data) - jpeg, 200))
    length = rng.choice([1, 1, 2, 4, 8, 40])
    operation = rng.randrange(7)
    if operation == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if operation == 1:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if operation == 2:
        return data[:at]
    if operation == 3:
        return data[:at] + data[at + length :]
    if operation == 4:
        return data[:at] + rng.choice([b"\xff", b"\0", b"\xff\xff\xff\x7f"]) * length + data[at + length :]
    if operation == 5:
        return data[:at] + NAME.encode() + data[at + (len(NAME) if rng.random() < 0.5 else 0) :]
    other = rng.randrange(len(data))
    return data[:at] + data[other : other + 60] + data[at:]


def read(path: Path) -> tuple[list[str], list[str]]:
    """Read a file as a command does; return the outcome of each frame, and the faults."""
    outcomes, faults = [], []
    for item in find_frames([path]):
        error: BaseException
        try:
            if isinstance(item, Failure):
                raise item.error
            grey, flags = load_grey_and_flags(item)
            load_image(item).load()
            outcomes.append("frame")
            if grey.dtype != np.uint8 or grey.ndim != 2 or not set(flags) <= FLAGS:
                faults.append(f"{grey.dtype} {grey.shape} {flags}")
            continue
        except EchoQuadError as found:
            error = found
            outcomes.append(type(found).__name__)
        except BaseException as found:
            error = found
            faults.append(f"{type(found).__name__}: {found}")
        text = str(error)
        if len(text.splitlines()) != 1 or len(text) > 400 or not text.isprintable():
            faults.append(f"the message {text!r}")
        seen: BaseException | None = error
        while seen is not None:
            if NAME[:6] in f"{seen!s} {seen.args!r}":
                faults.append(f"the name, in {type(seen).__name__}")
            seen = seen.__cause__ or seen.__context__
        if len(outcomes) > 2000:
            break
    return outcomes, faults


def print_json(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    scratch, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    seeds = make_seeds()
    names = list(seeds)
    for number in range(first, last):
        rng, name = random.Random(number), names[number % len(names)]
        data = seeds[name]
        for _ in range(rng.choice([0, 1, 1, 1, 2, 4]) if number >= len(names) else 0):
            data = damage(data or b"?", rng)
        path = scratch / f"{number}{Path(name).suffix}"
        path.write_bytes(data)
        print_json({"number": number, "name": name})
        begin = time.monotonic()
        outcomes, faults = read(path)
        result = {"outcomes": outcomes[:40], "faults": faults, "seconds": time.monotonic() - begin}
        print_json(result)
        path.unlink()


if __name__ == "__main__":
    main()
