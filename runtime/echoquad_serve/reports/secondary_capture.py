"""The secondary capture: a picture of a frame with its decision and evidence, for people."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final

from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from echoquad_serve.records import Result
from echoquad_serve.reports.dicom_object import MANUFACTURER, finish_object, new_object
from echoquad_serve.reports.report import Report
from echoquad_serve.reports.source_header import SourceHeader

__all__ = ["build_secondary_capture"]

SERIES_NUMBER: Final = 9002

_MAX_CAPTURES: Final = 100  # of an object: a capture for each decision that occurs


def build_secondary_capture(
    result: Result,
    source: SourceHeader,
    picture: bytes | Image.Image,
    *,
    number: int = 1,
    frame: int | None = None,
    label: str = "",
) -> Report:
    """Return a secondary capture of a picture.

    Parameters
    ----------
    result, source
        What is reported, and on which object.
    picture
        A PNG or JPEG file, or an image; it becomes RGB of 8 bits.
    number
        Number of the picture among those of the object, from 1.
    frame
        Number of the frame of a multi-frame object that it shows.
    label
        The decision that it shows.

    Raises
    ------
    OSError
        If the bytes are no picture.
    """
    image = picture if isinstance(picture, Image.Image) else Image.open(BytesIO(picture))
    image = image.convert("RGB")
    dataset = new_object(
        result,
        source,
        sop_class_uid=SecondaryCaptureImageStorage,
        modality="OT",
        series_number=SERIES_NUMBER,
        description="EchoQuad pictures, research use only",
    )
    dataset.InstanceNumber = source.instance_number % 10_000_000 * _MAX_CAPTURES + number
    dataset.BodyPartExamined = "HEART"
    dataset.ConversionType = "WSD"
    dataset.SecondaryCaptureDeviceManufacturer = MANUFACTURER
    dataset.SecondaryCaptureDeviceManufacturerModelName = MANUFACTURER
    dataset.DateOfSecondaryCapture = dataset.ContentDate
    dataset.TimeOfSecondaryCapture = dataset.ContentTime
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.PatientOrientation = None
    dataset.BurnedInAnnotation = "YES"
    dataset.DerivationDescription = _ascii(f"Quadrants and evidence of a model, decision {label}. Research use only.")
    if source.lossy:
        dataset.LossyImageCompression = "01"
    dataset.SourceImageSequence = [_source_image(source, frame)]
    dataset.SamplesPerPixel = 3
    dataset.PhotometricInterpretation = "RGB"
    dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = image.height, image.width
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelRepresentation = 0
    pixels = image.tobytes()
    dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
    dataset["PixelData"].VR = "OB"
    return finish_object(dataset, result, source, f"sc {number}")


def _source_image(source: SourceHeader, frame: int | None) -> Any:
    item = Dataset()
    item.ReferencedSOPClassUID = source.sop_class_uid
    item.ReferencedSOPInstanceUID = source.sop_instance_uid
    if frame is not None and source.frames > 1:
        item.ReferencedFrameNumber = frame
    purpose = Dataset()
    purpose.CodeValue = "121322"
    purpose.CodingSchemeDesignator = "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode("ascii")
