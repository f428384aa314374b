"""A report of a result, ready to be sent."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Report", "Reports"]


@dataclass(frozen=True, slots=True)
class Report:
    """A DICOM object that reports a result.

    Attributes
    ----------
    sop_instance_uid, sop_class_uid, study_instance_uid, series_instance_uid
        Which object it is.
    data
        The bytes of its file, in Explicit VR Little Endian. Reports with the same `sop_instance_uid` have the same
        bytes, and other content has another `sop_instance_uid`.
    """

    sop_instance_uid: str
    sop_class_uid: str
    study_instance_uid: str
    series_instance_uid: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Reports:
    """The reports of a result.

    Attributes
    ----------
    reports
        One structured report, then a secondary capture for each decision, as far as they were asked for.
    reason
        Why a report that was asked for is missing, in one line; empty if none is.
    """

    reports: tuple[Report, ...]
    reason: str = ""
