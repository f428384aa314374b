"""What every reporting object has in common: patient, study, series, equipment, dates, and reproducible identifiers."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta, timezone
from io import BytesIO
from typing import Any, Final

from pydicom import dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from echoquad_runtime._version import __version__
from echoquad_serve.records import Result
from echoquad_serve.reports.report import Report
from echoquad_serve.reports.source_header import SourceHeader, quiet_pydicom

__all__ = ["MANUFACTURER", "bundle_hash", "derived_uid", "finish_object", "new_object"]

MANUFACTURER: Final = "EchoQuad"

_UTF_8: Final = "ISO_IR 192"
_IMPLEMENTATION: Final = generate_uid(entropy_srcs=["echoquad", "implementation class"])


def bundle_hash(result: Result) -> str:
    """Return the SHA-256 of the bundle that decided."""
    return result.bundle.get("sha256", "")


def derived_uid(*parts: str) -> str:
    """Return a UID that depends on `parts` alone."""
    # A separator, because generate_uid joins its sources without one.
    return str(generate_uid(entropy_srcs=[f"{len(part)}:{part}" for part in parts]))


def new_object(
    result: Result, source: SourceHeader, *, sop_class_uid: str, modality: str, series_number: int, description: str
) -> Any:
    """Return a data set without content, patient and identifier, in the study of the source.

    There is a series for each series of the study, bundle and kind of object, and in it the instance number of the
    source. Dates are those of the result, so that the same result makes the same object at any time.
    """
    dataset = Dataset()
    moment = _local_time(result.finished, source.time_zone)
    date, time = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = date, time
    dataset.ContentDate, dataset.ContentTime = date, time
    if source.time_zone:
        dataset.TimezoneOffsetFromUTC = source.time_zone
    dataset.SOPClassUID = sop_class_uid
    dataset.StudyInstanceUID = source.study_uid
    dataset.SeriesInstanceUID = derived_uid(source.study_uid, source.series_uid, bundle_hash(result), modality)
    dataset.SeriesNumber = series_number
    dataset.SeriesDescription = description
    dataset.InstanceNumber = source.instance_number
    dataset.Modality = modality
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = MANUFACTURER
    dataset.DeviceSerialNumber = bundle_hash(result)[:64]
    dataset.SoftwareVersions = __version__
    return dataset


def finish_object(dataset: Any, result: Result, source: SourceHeader, part: str) -> Report:
    """Add patient and study to a data set, then the identifier of its content, and encode it.

    Parameters
    ----------
    dataset
        As `new_object` returns it, with content.
    part
        Tells the objects of a result apart.
    """
    _add_patient_and_study(dataset, source)
    content = hashlib.sha256(_encode(dataset, "")).hexdigest()
    uid = derived_uid(source.sop_instance_uid, bundle_hash(result), part, content)
    dataset.SOPInstanceUID = uid
    return Report(
        sop_instance_uid=uid,
        sop_class_uid=str(dataset.SOPClassUID),
        study_instance_uid=source.study_uid,
        series_instance_uid=str(dataset.SeriesInstanceUID),
        data=_encode(dataset, uid),
    )


def _add_patient_and_study(dataset: Any, source: SourceHeader) -> None:
    """Copy patient and study byte for byte, in the character set of the source; in UTF-8 if the content needs it."""
    values = source.values
    if not _is_ascii(dataset):
        dataset.SpecificCharacterSet = _UTF_8
        values = source.transcoded()
    elif source.character_set:
        names = source.character_set.decode("ascii").split("\\")
        dataset.SpecificCharacterSet = names if len(names) > 1 else names[0]
    for tag, (vr, value) in values.items():
        padded = value + b" " * (len(value) % 2)
        dataset[tag] = RawDataElement(BaseTag(tag), vr, len(padded), padded, 0, False, True)


def _is_ascii(dataset: Any) -> bool:
    return all(
        str(element.value).isascii() for element in dataset.iterall() if element.VR not in ("SQ", "OB", "OW", "UI")
    )


def _encode(dataset: Any, uid: str) -> bytes:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = UID(uid or "2.25.0")  # some value, while the content is hashed
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _IMPLEMENTATION
    meta.ImplementationVersionName = f"ECHOQUAD_{__version__}"[:16]
    dataset.file_meta = meta
    stream = BytesIO()
    with quiet_pydicom():
        dcmwrite(stream, dataset, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return stream.getvalue()


def _local_time(moment: float, offset: str) -> datetime:
    """Return a Unix time in a time zone such as ``+0100``; empty is that of this machine, as in an object without."""
    if not offset:
        return datetime.fromtimestamp(moment)
    minutes = int(offset[1:3]) * 60 + int(offset[3:])
    return datetime.fromtimestamp(moment, timezone(timedelta(minutes=-minutes if offset[0] == "-" else minutes)))
