"""Which reports are made, and the reason if one is not."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.code_table import CodeTable, default_codes
from echoquad_runtime.errors import FrameReadError
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.reports import report_codes

SR, SC = "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.7"


@pytest.mark.parametrize(("kinds", "classes"), [(("sr",), [SR]), (("sc",), [SC]), (("sr", "sc"), [SR, SC])])
def test_kinds_choose_the_reports(
    kit: SimpleNamespace, source: Path, kinds: tuple[str, ...], classes: list[str]
) -> None:
    found = kit.build(kit.make_result(), source, kinds=kinds)
    assert ([report.sop_class_uid for report in found.reports], found.reason) == (classes, "")


def test_source_that_is_not_dicom_is_a_reason(kit: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "frame.png").write_bytes(kit.make_picture())
    found = kit.build(kit.make_result(), tmp_path / "frame.png")
    assert (found.reports, found.reason) == ((), "")


def test_result_without_rows_is_a_reason(kit: SimpleNamespace, source: Path) -> None:
    failed = dataclasses.replace(kit.make_result(), status="failed", rows=())
    found = kit.build(failed, source)
    assert found.reports == () and "no frame" in found.reason


def test_bundle_without_codes_makes_the_picture_alone_and_says_so(kit: SimpleNamespace, source: Path) -> None:
    found = kit.build(kit.make_result(kit.make_row("ED")), source, None)
    assert [report.sop_class_uid for report in found.reports] == [SC]
    assert found.reason == "no structured report: the bundle has no code table"


def test_class_without_codes_makes_no_structured_report_and_says_so(kit: SimpleNamespace, source: Path) -> None:
    codes = default_codes(("ASD", "POOR"))
    assert isinstance(codes, CodeTable)
    found = kit.build(kit.make_result(kit.make_row("POOR")), source, codes)
    assert [report.sop_class_uid for report in found.reports] == [SC]
    assert found.reason == "no structured report: the code table has no codes for the class POOR"
    assert kit.build(kit.make_result(kit.make_row("ASD")), source, codes).reason == ""


@pytest.mark.parametrize("fault", [FrameReadError("gone"), KeyError(3)])
def test_picture_that_cannot_be_drawn_does_not_stop_the_structured_report(
    kit: SimpleNamespace, source: Path, fault: Exception
) -> None:
    def overlay(_: int) -> bytes:
        raise fault

    found = kit.build(kit.make_result(), source, overlay=overlay)
    assert [report.sop_class_uid for report in found.reports] == [SR]
    assert "no secondary capture" in found.reason


def test_picture_that_the_system_refuses_now_is_tried_again(kit: SimpleNamespace, source: Path) -> None:
    def overlay(_: int) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.raises(DeliveryError, match="Too many open files"):
        kit.build(kit.make_result(), source, overlay=overlay)


def test_clip_has_a_picture_of_the_clearest_frame_of_each_decision(kit: SimpleNamespace, clip: Path) -> None:
    labels = [("ASD", 0.7), ("NORM", 0.8), ("ASD", 0.9), ("ASD", 0.8)]
    rows = [kit.make_row(label, value, f"c#{number}") for number, (label, value) in enumerate(labels, start=2)]
    drawn: list[int] = []

    def overlay(index: int) -> bytes:
        drawn.append(index)
        return bytes(kit.make_picture(index))

    found = [kit.parse(report) for report in kit.build(kit.make_result(*rows), clip, overlay=overlay).reports[1:]]
    assert drawn == [2, 1]
    assert [image.SourceImageSequence[0].ReferencedFrameNumber for image in found] == [4, 3]
    assert [image.InstanceNumber for image in found] == [701, 702]
    assert (
        len({image.SOPInstanceUID for image in found}) == 2 and len({image.SeriesInstanceUID for image in found}) == 1
    )


def test_missing_file_is_tried_again_and_a_damaged_header_is_not(kit: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(DeliveryError) as caught:
        kit.build(kit.make_result(), tmp_path / "none.dcm")
    assert not isinstance(caught.value, DeliveryRefusedError)
    (tmp_path / "bad.dcm").write_bytes(bytes(128) + b"DICM" + bytes(range(256)) * 8)
    with pytest.raises(DeliveryRefusedError):
        kit.build(kit.make_result(), tmp_path / "bad.dcm")


def test_codes_are_those_of_the_bundle_or_the_default_of_asd(tmp_path: Path, make_tiny_bundle: object) -> None:
    assert callable(make_tiny_bundle)
    own = {"class": {"ED": {"finding": {"value": "416190007", "scheme": "SCT", "meaning": "End diastole"}}}}
    assert report_codes(Bundle(make_tiny_bundle(tmp_path / "a"))) == default_codes(("ASD", "NORM"))
    assert report_codes(Bundle(make_tiny_bundle(tmp_path / "b", classes=("ED", "ES")))) is None
    bundle = Bundle(make_tiny_bundle(tmp_path / "c", classes=("ED", "ES"), manifest={"codes": own}))
    found = report_codes(bundle)
    assert found is not None and found.classes["ED"].finding.value == "416190007"
