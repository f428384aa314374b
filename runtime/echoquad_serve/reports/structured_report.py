"""The structured report: a Comprehensive SR with the content of TID 1500, Imaging Measurement Report (DICOM PS3.16).

One object gets one report. Each decision that occurs among its frames is a measurement group (TID 1501), which names
its frames: a still frame has one group, and a clip as many as there are different decisions, that of most frames first.
No group states a decision on the clip as a whole, since the model has none.

- A class with codes: its finding is Present.
- The class that means absence: each finding of the table is Absent, in a group of its own.
- ``INDETERMINATE``: each finding of the table is Undetermined, without a certainty.

The certainty is the calibrated confidence in what the group states, present or absent: the mean over its frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    LanguageOfContentItemAndDescendants,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ComprehensiveSRStorage

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.code_table import ClassCodes, Code, CodeTable
from echoquad_runtime.bundle.manifest import INTENDED_USE
from echoquad_runtime.contract import INDETERMINATE
from echoquad_serve.records import Result
from echoquad_serve.reports.decision_groups import DecisionGroup
from echoquad_serve.reports.dicom_object import MANUFACTURER, bundle_hash, derived_uid, finish_object, new_object
from echoquad_serve.reports.flag_texts import describe_flag
from echoquad_serve.reports.report import Report
from echoquad_serve.reports.source_header import SourceHeader

__all__ = ["MAX_FRAME_NUMBERS", "build_structured_report"]

MAX_FRAME_NUMBERS: Final = 5000
"""Frames that a group refers to by number, at most: a value of Explicit VR has 65,534 bytes."""

SERIES_NUMBER: Final = 9001

_DEVICE: Final = CodedConcept("121007", "DCM", "Device")
_PRESENCE: Final = CodedConcept("121052", "DCM", "Presence of property")
_PRESENT: Final = CodedConcept("52101004", "SCT", "Present")
_ABSENT: Final = CodedConcept("272519000", "SCT", "Absent")
_UNDETERMINED: Final = CodedConcept("373068000", "SCT", "Undetermined")
_CERTAINTY: Final = CodedConcept("111012", "DCM", "Certainty of Finding")
_PERCENT: Final = CodedConcept("%", "UCUM", "Percent")
_MEAN: Final = CodedConcept("373098007", "SCT", "Mean")
_AI: Final = CodedConcept("123110", "DCM", "Artificial Intelligence")
_COMMENT: Final = CodedConcept("121106", "DCM", "Comment")
_TITLE: Final = CodedConcept("126000", "DCM", "Imaging Measurement Report")


def build_structured_report(
    result: Result,
    source: SourceHeader,
    groups: Sequence[DecisionGroup],
    codes: CodeTable,
    previous_versions: Sequence[Report] = (),
) -> Report:
    """Return the structured report of a result.

    Parameters
    ----------
    result, source
        What is reported, and on which object.
    groups
        The result's rows by decision, at least one. Each decision is a class with codes, that of absence, or
        ``INDETERMINATE``.
    codes
        The code table of the bundle that decided.
    previous_versions
        Reports of earlier results of the same object, which this one replaces.
    """
    observer = DeviceObserverIdentifyingAttributes(
        uid=derived_uid("device", bundle_hash(result)),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=_printable(result.bundle.get("name", "")) or MANUFACTURER,
        serial_number=bundle_hash(result),
    )
    content = MeasurementReport(
        title=_TITLE,
        language_of_content_item_and_descendants=LanguageOfContentItemAndDescendants(_concept(codes.language)),
        observation_context=ObservationContext(observer_device_context=ObserverContext(_DEVICE, observer)),
        procedure_reported=_concept(codes.procedure),
        imaging_measurements=[
            measured
            for number, group in enumerate(groups)
            for measured in _measurement_groups(result, source, group, codes, first=number == 0)
        ],
    )
    dataset = new_object(
        result,
        source,
        sop_class_uid=ComprehensiveSRStorage,
        modality="SR",
        series_number=SERIES_NUMBER,
        description="EchoQuad, research use only",
    )
    dataset.CompletionFlag = "COMPLETE"
    dataset.VerificationFlag = "UNVERIFIED"
    dataset.PreliminaryFlag = "PRELIMINARY"
    dataset.ReferencedPerformedProcedureStepSequence = DicomSequence()
    dataset.PerformedProcedureCodeSequence = DicomSequence()
    evidence = _reference(source.sop_class_uid, source.sop_instance_uid)
    dataset.CurrentRequestedProcedureEvidenceSequence = [_in_study(source.study_uid, source.series_uid, [evidence])]
    if previous_versions:
        dataset.PredecessorDocumentsSequence = [
            _in_study(
                report.study_instance_uid,
                report.series_instance_uid,
                [_reference(report.sop_class_uid, report.sop_instance_uid)],
            )
            for report in previous_versions
        ]
    for element in content[0]:
        dataset[element.tag] = element
    return finish_object(dataset, result, source, "sr")


def _measurement_groups(
    result: Result, source: SourceHeader, group: DecisionGroup, codes: CodeTable, *, first: bool
) -> Iterator[Any]:
    """Yield the measurement groups of a decision: one for each finding that it says something about."""
    if group.label in codes.classes:
        findings, evaluation = [codes.classes[group.label]], _PRESENT
    else:
        findings = list(codes.classes.values())
        evaluation = _UNDETERMINED if group.label == INDETERMINATE else _ABSENT
    for finding in findings:
        measured = MeasurementsAndQualitativeEvaluations(
            tracking_identifier=_tracking(result, source, group, finding),
            finding_type=_concept(finding.finding),
            finding_sites=[FindingSite(_concept(finding.site))] if finding.site else None,
            algorithm_id=_algorithm(result, group),
            measurements=None if evaluation is _UNDETERMINED else [_certainty(group)],
            qualitative_evaluations=[QualitativeEvaluation(_PRESENCE, evaluation)],
            source_images=[
                SourceImageForMeasurementGroup(
                    source.sop_class_uid, source.sop_instance_uid, _frame_numbers(source, group) or None
                )
            ],
        )
        measured[0].ContentSequence.extend(
            TextContentItem(_COMMENT, _printable(text), RelationshipTypeValues.CONTAINS)
            for text in _comments(result, source, group, finding, evaluation, first=first)
        )
        yield measured


def _tracking(result: Result, source: SourceHeader, group: DecisionGroup, finding: ClassCodes) -> Any:
    uid = derived_uid("tracking", source.sop_instance_uid, bundle_hash(result), group.label, finding.finding.value)
    return TrackingIdentifier(uid=uid, identifier=f"{MANUFACTURER} {finding.finding.meaning}, decision {group.label}")


def _algorithm(result: Result, group: DecisionGroup) -> Any:
    parameters = [f"bundle_sha256={bundle_hash(result)}"]  # first: some readers read only the first
    if contract := result.bundle.get("contract_hash"):
        parameters.append(f"contract_sha256={contract}")
    for name, key in (("vote", "method"), ("device", "device"), ("precision", "precision"), ("provider", "provider")):
        if found := group.distinct(key):
            parameters.append(f"{name}={', '.join(map(_printable, found))}")
    return AlgorithmIdentification(MANUFACTURER, __version__, parameters, _AI)


def _certainty(group: DecisionGroup) -> Any:
    value = round(100 * group.confidence, 1)
    return Measurement(_CERTAINTY, value, _PERCENT, derivation=_MEAN if len(group.rows) > 1 else None)


def _frame_numbers(source: SourceHeader, group: DecisionGroup) -> list[int]:
    """Return the numbers of the frames that a group is about; empty for an object with one frame."""
    if source.frames == 1:
        return []
    return [number for number in group.frame_numbers if 1 <= number <= source.frames][:MAX_FRAME_NUMBERS]


def _comments(
    result: Result, source: SourceHeader, group: DecisionGroup, finding: ClassCodes, evaluation: Any, *, first: bool
) -> Iterator[str]:
    """Yield what a reader must know, the statement itself first: many viewers show the items without their names."""
    decided, total = len(group.rows), len(result.rows)
    certainty = "" if evaluation is _UNDETERMINED else f", certainty {100 * group.confidence:.1f} %"
    yield f"{finding.finding.meaning}: {evaluation.meaning}{certainty}."
    yield INTENDED_USE
    yield f"Decision of the model: {group.label}."
    if total > 1:
        yield (
            f"{decided} of {total} frames have this decision; a certainty is the mean over them. "
            "The model decides on frames: there is no decision on the clip."
        )
    if source.frames > 1 and len(group.frame_numbers) > MAX_FRAME_NUMBERS:
        yield f"The reference to the source names the first {MAX_FRAME_NUMBERS} of these frames."
    means = ", ".join(f"{name} {value:.3f}" for name, value in group.probabilities.items())
    yield f"Mean probabilities before calibration: {means}."
    if group.label == INDETERMINATE:
        reasons = "; ".join(group.distinct("abstained_because")) or "the confidence is below the limit"
        yield f"The model abstains: {reasons}."
    for smoothed in group.distinct("smoothed_over"):
        yield f"The probabilities are means over {smoothed} consecutive frames."
    for flag, count in group.flags().items():
        share = f" ({count} of {decided} frames)" if decided > 1 else ""
        yield f"Flag {flag}{share}: {describe_flag(flag)}."
    if first and result.failures:
        yield f"Not in this report, since they could not be decided: {len(result.failures)} of the object's frames."


def _concept(code: Code) -> Any:
    return CodedConcept(code.value, code.scheme, code.meaning)


def _reference(sop_class_uid: str, sop_instance_uid: str) -> Any:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class_uid
    item.ReferencedSOPInstanceUID = sop_instance_uid
    return item


def _in_study(study_uid: str, series_uid: str, references: Sequence[Any]) -> Any:
    series = Dataset()
    series.ReferencedSOPSequence = list(references)
    series.SeriesInstanceUID = series_uid
    study = Dataset()
    study.ReferencedSeriesSequence = [series]
    study.StudyInstanceUID = study_uid
    return study


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
