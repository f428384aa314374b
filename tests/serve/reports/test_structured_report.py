"""The structured report: what it states for each decision, and how it is built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from echoquad_runtime.bundle.code_table import CodeTable

ASD, VSD = "70142008", "30288003"
PRESENT, ABSENT, UNDETERMINED = "52101004", "272519000", "373068000"


def three_classes() -> CodeTable:
    def code(value: str, meaning: str) -> dict[str, str]:
        return {"value": value, "scheme": "SCT", "meaning": meaning}

    content = {
        "class": {
            "ASD": {"finding": code(ASD, "Atrial septal defect"), "site": code("58095006", "Interatrial septum")},
            "VSD": {"finding": code(VSD, "Ventricular septal defect")},
        },
        "absent": "NORM",
    }
    return CodeTable.from_dict(content, ("ASD", "NORM", "VSD"), "test")


@pytest.mark.parametrize(
    ("label", "value", "meaning", "percent"),
    [
        ("ASD", PRESENT, "Present", 91.3),
        ("NORM", ABSENT, "Absent", 91.3),
        ("INDETERMINATE", UNDETERMINED, "Undetermined", None),
    ],
)
def test_decision_becomes_an_evaluation_of_the_finding_with_its_certainty(
    kit: SimpleNamespace, source: Path, label: str, value: str, meaning: str, percent: float | None
) -> None:
    (report,) = kit.build(kit.make_result(kit.make_row(label, 0.9127)), source, kinds=("sr",)).reports
    (group,) = kit.groups(report)
    assert kit.evaluation(group) == (ASD, value, meaning)
    assert kit.certainty(group) == percent
    statement = f"Atrial septal defect: {meaning}" + (f", certainty {percent} %." if percent else ".")
    assert kit.comments(group)[0] == statement
    assert f"Decision of the model: {label}." in kit.comments(group)


def test_report_follows_the_recipe(kit: SimpleNamespace, source: Path) -> None:
    row = kit.make_row("ASD", flags=["uncropped", "no-signal-LA"], smoothed_over=5)
    (report,) = kit.build(kit.make_result(row), source, kinds=("sr",)).reports
    found = kit.parse(report)
    assert (found.SOPInstanceUID, found.SOPClassUID) == (report.sop_instance_uid, "1.2.840.10008.5.1.4.1.1.88.33")
    assert found.file_meta.MediaStorageSOPInstanceUID == report.sop_instance_uid
    assert found.ConceptNameCodeSequence[0].CodeValue == "126000"
    assert found.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert (found.CompletionFlag, found.VerificationFlag, found.PreliminaryFlag) == (
        "COMPLETE",
        "UNVERIFIED",
        "PRELIMINARY",
    )
    assert kit.items(found, "Language of Content Item and Descendants")[0].ConceptCodeSequence[0].CodeValue == "en-US"
    assert kit.items(found, "Procedure reported")[0].ConceptCodeSequence[0].CodeValue == "433236007"
    assert kit.items(found, "Device Observer Serial Number")[0].TextValue == "ab" * 32
    parameters = [item.TextValue for item in kit.items(found, "Algorithm Parameters")]
    assert parameters[0] == f"bundle_sha256={'ab' * 32}"
    assert {"device=cpu", "precision=fp32", "provider=CPUExecutionProvider", "vote=majority"} <= set(parameters)
    assert kit.items(found, "Algorithm Family")[0].ConceptCodeSequence[0].CodeValue == "123110"
    assert kit.items(found, "Finding Site")[0].ConceptCodeSequence[0].CodeValue == "58095006"
    reference = kit.items(found, "Source of Measurement")[0].ReferencedSOPSequence[0]
    assert reference.ReferencedSOPInstanceUID == "1.2.3.4" and "ReferencedFrameNumber" not in reference
    (study,) = found.CurrentRequestedProcedureEvidenceSequence
    assert study.StudyInstanceUID == "1.2.3"
    assert study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.4"
    texts = "\n".join(kit.comments(kit.groups(report)[0]))
    assert "Research use only" in texts and "ASD 0.750, NORM 0.250" in texts and "over 5 consecutive" in texts
    assert "Flag uncropped: the header names no ultrasound region" in texts
    assert "Flag no-signal-LA: the quadrant LA has no signal" in texts
    assert (found.StudyInstanceUID, found.PatientID, found.PatientName) == ("1.2.3", "P-1", "Roe^Jane")
    assert found.SeriesInstanceUID not in ("1.2.3.1", "1.2.3") and found.InstanceNumber == 7


def test_clip_has_a_group_for_each_decision_with_its_frames(kit: SimpleNamespace, clip: Path) -> None:
    labels = [("NORM", 0.95), ("ASD", 0.9), ("ASD", 0.8), ("INDETERMINATE", 0.5), ("ASD", 0.7)]
    rows = [kit.make_row(label, value, f"clip.dcm#{number}") for number, (label, value) in enumerate(labels, start=1)]
    failure = {"file": "clip.dcm#6", "code": "E_FRAME_DAMAGED", "message": "m"}
    (report,) = kit.build(kit.make_result(*rows, failures=(failure,)), clip, kinds=("sr",)).reports
    found = kit.groups(report)
    assert [kit.evaluation(group)[1] for group in found] == [PRESENT, ABSENT, UNDETERMINED]
    assert [kit.certainty(group) for group in found] == [80.0, 95.0, None]
    references = [kit.items(group, "Source of Measurement")[0].ReferencedSOPSequence[0] for group in found]
    assert [reference.ReferencedFrameNumber for reference in references] == [[2, 3, 5], 1, 4]
    assert kit.items(found[0], "Derivation")[0].ConceptCodeSequence[0].CodeMeaning == "Mean"
    assert "3 of 5 frames have this decision" in kit.comments(found[0])[3]
    assert kit.comments(found[0])[-1].endswith("could not be decided: 1 of the object's frames.")
    assert len({kit.items(group, "Tracking Unique Identifier")[0].UID for group in found}) == 3


def test_long_clip_names_as_many_frames_as_a_value_holds(kit: SimpleNamespace, tmp_path: Path) -> None:
    source = kit.write_source(tmp_path / "long.dcm", frames=20_000)
    rows = [kit.make_row("ASD", file=f"long.dcm#{number}") for number in range(1, 20_001)]
    (report,) = kit.build(kit.make_result(*rows), source, kinds=("sr",)).reports
    (group,) = kit.groups(report)
    reference = kit.items(group, "Source of Measurement")[0].ReferencedSOPSequence[0]
    assert reference.ReferencedFrameNumber == list(range(1, 5001))
    assert any("names the first 5000 of these frames" in text for text in kit.comments(group))


def test_three_classes_state_no_more_than_the_model_decides(kit: SimpleNamespace, source: Path) -> None:
    def stated(label: str) -> list[tuple[str, str]]:
        result = kit.make_result(kit.make_row(label, prob_VSD=0.1))
        (report,) = kit.build(result, source, three_classes(), kinds=("sr",)).reports
        return [kit.evaluation(group)[:2] for group in kit.groups(report)]

    assert stated("VSD") == [(VSD, PRESENT)]  # not that the other finding is absent
    assert stated("NORM") == [(ASD, ABSENT), (VSD, ABSENT)]
    assert stated("INDETERMINATE") == [(ASD, UNDETERMINED), (VSD, UNDETERMINED)]


def test_table_sets_procedure_and_language(kit: SimpleNamespace, source: Path) -> None:
    content = {
        **three_classes().to_dict(),
        "procedure": {"value": "105376000", "scheme": "SCT", "meaning": "Transösophageale Echokardiographie"},
        "language": {"value": "de-DE", "scheme": "RFC5646", "meaning": "German (Germany)"},
    }
    codes = CodeTable.from_dict(content, ("ASD", "NORM", "VSD"), "test")
    (report,) = kit.build(kit.make_result(), source, codes, kinds=("sr",)).reports
    found = kit.parse(report)
    assert found.SpecificCharacterSet == "ISO_IR 192"
    procedure = kit.items(found, "Procedure reported")[0].ConceptCodeSequence[0]
    assert (procedure.CodeValue, procedure.CodeMeaning) == ("105376000", "Transösophageale Echokardiographie")
    language = kit.items(found, "Language of Content Item and Descendants")[0].ConceptCodeSequence[0]
    assert language.CodeValue == "de-DE"


def test_retry_is_the_same_object_and_new_content_another(kit: SimpleNamespace, source: Path) -> None:
    result = kit.make_result()
    first, second = kit.build(result, source).reports, kit.build(result, source).reports
    assert [report.data for report in first] == [report.data for report in second]
    for changed in (
        kit.make_result(kit.make_row("NORM")),
        kit.make_result(kit.make_row("ASD", 0.5)),
        dataclasses.replace(result, finished=result.finished + 1),
        dataclasses.replace(result, bundle={**result.bundle, "sha256": "cd" * 32}),
    ):
        other = kit.build(changed, source).reports
        assert other[0].sop_instance_uid != first[0].sop_instance_uid
        assert (other[1].sop_instance_uid == first[1].sop_instance_uid) == (other[1].data == first[1].data)
    assert len({report.sop_instance_uid for report in first}) == 2


def test_number_and_identity_of_the_job_are_no_content(kit: SimpleNamespace, source: Path) -> None:
    result = kit.make_result()
    again = dataclasses.replace(result, id="1" * 32, number=99, timings_ms={"queue": 3.0}, name="other")
    assert kit.build(result, source) == kit.build(again, source)


def test_report_names_the_reports_that_it_replaces(kit: SimpleNamespace, source: Path) -> None:
    (first,) = kit.build(kit.make_result(), source, kinds=("sr",)).reports
    later = kit.make_result(kit.make_row("NORM"), finished=1_700_000_100.0)
    (second,) = kit.build(later, source, kinds=("sr",), previous_versions=[first]).reports
    series = kit.parse(second).PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.sop_instance_uid
    assert series.SeriesInstanceUID == first.series_instance_uid


def test_confidence_is_taken_from_the_probabilities_if_a_row_has_none(kit: SimpleNamespace, source: Path) -> None:
    (report,) = kit.build(kit.make_result(kit.make_row("NORM", None)), source, kinds=("sr",)).reports
    assert kit.certainty(kit.groups(report)[0]) == 25.0


def test_times_are_in_the_time_zone_of_the_source(kit: SimpleNamespace, tmp_path: Path) -> None:
    source = kit.write_source(tmp_path / "zone.dcm", TimezoneOffsetFromUTC="-0330")
    (report,) = kit.build(kit.make_result(), source, kinds=("sr",)).reports
    found = kit.parse(report)
    assert (found.TimezoneOffsetFromUTC, found.ContentDate, found.ContentTime) == ("-0330", "20231114", "184323")
