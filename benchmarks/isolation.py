"""Cost of isolation: frames per second of `predict` on DICOM that reader processes decode, relative to threads.

    python benchmarks/isolation.py BUNDLE [--frames FOLDER] [--precision fp32,int8] [--results benchmarks/RESULTS.md]

Each round predicts the same folder twice, from the walk to the last row: as it is, and with reader processes disabled,
as in a frozen program. Their ratio within a round is the cost. The extra `dicom` writes the files.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import FRAME_SIZE, arguments, make_frames, paired_ratio, report, time_interleaved
from PIL import Image

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.frames import reader
from echoquad_runtime.predict.predictor import Predictor

AIM = 0.95
SYNTAXES = {
    "uncompressed": "1.2.840.10008.1.2.1",
    "JPEG baseline": "1.2.840.10008.1.2.4.50",
    "JPEG lossless": "1.2.840.10008.1.2.4.70",
}


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--precision", help="comma-separated, such as fp32,int8 (default: those of the bundle)")
    options = parser.parse_args()
    precisions = (options.precision or ",".join(Bundle(options.bundle).precisions)).split(",")
    rows = [["", "frames/s in threads", "frames/s isolated", "share", "aim"]]
    record: dict[str, Any] = {"frames": options.count, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as work:
        pictures = make_frames(Path(work) / "pictures", "l-png", options.count, options.frames)
        folders = {name: write_dicom(Path(work) / name, pictures, name) for name in SYNTAXES}
        for precision in precisions:
            predictor = Predictor(
                options.bundle, device="cpu", precision=precision, threads=options.threads, concurrent=True
            )
            for name, folder in folders.items():
                found = measure(predictor, folder, options.count, options.rounds)
                record[f"{precision}, {name}"] = found
                figures = [f"{found['threads_fps']:.1f}", f"{found['isolated_fps']:.1f}", f"{found['share']:.3f}"]
                rows.append([f"{precision}, {name}", *figures, f"{AIM:.2f}"])
    width, height = FRAME_SIZE
    note = (
        f"Medians of {options.rounds} alternating rounds over {options.count} DICOM files of {width}x{height}, "
        f"{options.threads} threads. The share is the median of the ratios within rounds."
    )
    report("isolation", rows, record, options.results, threads=options.threads, notes=[note])


def measure(predictor: Predictor, folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Time both ways of reading a folder, interleaved."""

    def predict() -> None:
        if sum(1 for _ in predictor.predict(folder)) != count:
            raise SystemExit(f"{folder}: a frame is missing")

    times = time_interleaved({"isolated": predict, "threads": partial(in_threads, predict)}, rounds)
    seconds = {name: float(np.median(found)) / 1e3 for name, found in times.items()}
    return {
        "threads_fps": count / seconds["threads"],
        "isolated_fps": count / seconds["isolated"],
        "share": paired_ratio(times["threads"], times["isolated"]),
    }


def in_threads(predict: Callable[[], None]) -> None:
    """Call `predict` with reader processes disabled."""
    keep, reader.can_isolate = reader.can_isolate, lambda: False
    try:
        predict()
    finally:
        reader.can_isolate = keep


def write_dicom(folder: Path, pictures: Sequence[Path], name: str) -> Path:
    """Write pictures as grey DICOM files of a transfer syntax; return the folder."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    folder.mkdir()
    for path in pictures:
        levels = np.asarray(Image.open(path))
        made = Dataset()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID, made.file_meta.MediaStorageSOPInstanceUID = SYNTAXES[name], "1.2.3"
        made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.6.1"
        made.SOPInstanceUID = "1.2.3"
        made.Rows, made.Columns = levels.shape
        made.SamplesPerPixel, made.PixelRepresentation, made.PhotometricInterpretation = 1, 0, "MONOCHROME2"
        made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
        if name == "JPEG baseline":
            stream = io.BytesIO()
            Image.fromarray(levels).save(stream, "JPEG", quality=90)
            made.PixelData = encapsulate([stream.getvalue()])
        else:
            made.file_meta.TransferSyntaxUID, made.PixelData = SYNTAXES["uncompressed"], levels.tobytes()
        target = folder / f"{path.stem}.dcm"
        pydicom.dcmwrite(target, made, enforce_file_format=True)
        if name == "JPEG lossless":
            compress_lossless(target)
    return folder


def compress_lossless(path: Path) -> None:
    """Compress an uncompressed DICOM file in place."""
    import gdcm

    source = gdcm.ImageReader()
    source.SetFileName(str(path))
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    if source.Read():
        change.SetInput(source.GetImage())
        if change.Change():
            writer = gdcm.ImageWriter()
            writer.SetFileName(str(path))  # empties the file
            writer.SetFile(source.GetFile())
            writer.SetImage(change.GetOutput())
            if writer.Write():
                return
    raise SystemExit(f"{path}: GDCM cannot compress it")


if __name__ == "__main__":
    main()
