"""Structured reports and secondary captures as other programs read them: dciodvfy, dsr2html, dcm2pnm and dcmqi."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom")
DATA = Path(pydicom.__file__).parent / "data"

# What dciodvfy prints about the values of a source that a report must carry as they are.
OF_THE_SOURCE = re.compile(
    "Missing attribute or value that would be needed to build DICOMDIR|Retired Person Name form|"
    "Value dubious for this VR .PN."
)

SCRIPTS = ["Arab", "Fren", "Germ", "Greek", "H31", "H32", "Hbrw", "I2", "JapMulti", "KoreanMulti", "Russ", "X1", "X2"]
SOURCES = [
    "test_files/examples_ybr_color.dcm",  # ultrasound of 30 frames
    "test_files/examples_rgb_color.dcm",  # ultrasound
    "test_files/examples_palette.dcm",  # ultrasound
    "test_files/examples_jpeg2k.dcm",  # ultrasound
    "test_files/CT_small.dcm",
    "test_files/image_dfl.dcm",  # deflated
    "test_files/ExplVR_BigEnd.dcm",
    "test_files/SC_rgb_jpeg_dcmtk.dcm",
    *(f"charset_files/chr{script}.dcm" for script in SCRIPTS),
]


def stored(name: str) -> Path:
    """Return a file of pydicom's package."""
    if not (DATA / name).is_file():
        pytest.skip(f"this pydicom has no {name}")
    return DATA / name


def validated(reports: Any, folder: Path, dciodvfy: Callable[[Path], list[str]]) -> list[str]:
    assert len(reports.reports) == 2 and reports.reason == ""
    messages = []
    for report in reports.reports:
        path = folder / f"{report.sop_class_uid}.dcm"
        path.write_bytes(report.data)
        messages += dciodvfy(path)
    return messages


@pytest.mark.parametrize("label", ["ASD", "NORM", "INDETERMINATE"])
@pytest.mark.parametrize("frames", [1, 5])
def test_dciodvfy_has_no_message(
    kit: SimpleNamespace, tmp_path: Path, dciodvfy: Callable[[Path], list[str]], label: str, frames: int
) -> None:
    source = kit.write_source(
        tmp_path / "source.dcm",
        frames=frames,
        PatientAge="055Y",
        PatientSize=1.71,
        PatientWeight="70.5",
        ReferringPhysicianName="Doe^John",
        StudyDescription="Echo",
        IssuerOfPatientID="Hospital",
        TimezoneOffsetFromUTC="+0100",
        LossyImageCompression="00",
    )
    rows = [kit.make_row(label, file=f"c#{number}", flags=["tie", "screen"]) for number in range(1, frames + 1)]
    assert validated(kit.build(kit.make_result(*rows), source), tmp_path, dciodvfy) == []


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 144", "Люкceмбypг^Б"),
        ("ISO_IR 192", "王^小東"),
        ("GB18030", "王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    ],
)
@pytest.mark.parametrize("in_utf_8", [False, True])
def test_name_of_any_script_stays_what_it_is(
    kit: SimpleNamespace,
    tmp_path: Path,
    dciodvfy: Callable[[Path], list[str]],
    character_set: Any,
    name: str,
    in_utf_8: bool,
) -> None:
    source = kit.write_source(tmp_path / "source.dcm", SpecificCharacterSet=character_set, PatientName=name)
    before = pydicom.dcmread(source)
    bundle = {**kit.make_result().bundle, "name": "bündel" if in_utf_8 else "bundle"}
    reports = kit.build(kit.make_result(bundle=bundle), source)
    assert validated(reports, tmp_path, dciodvfy) == []
    for report, utf_8 in zip(reports.reports, (in_utf_8, False), strict=True):
        found = kit.parse(report)
        assert str(found.PatientName) == name == str(before.PatientName)
        assert found.SpecificCharacterSet == ("ISO_IR 192" if utf_8 else before.SpecificCharacterSet)


@pytest.mark.parametrize("name", SOURCES)
def test_real_source_draws_no_message_but_about_its_own_values(
    kit: SimpleNamespace, tmp_path: Path, dciodvfy: Callable[[Path], list[str]], name: str
) -> None:
    messages = validated(kit.build(kit.make_result(), stored(name)), tmp_path, dciodvfy)
    assert [message for message in messages if not OF_THE_SOURCE.search(message)] == []


def test_minimal_header_leaves_required_elements_empty(
    kit: SimpleNamespace, tmp_path: Path, dciodvfy: Callable[[Path], list[str]]
) -> None:
    absent = dict.fromkeys(
        [
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "PatientSex",
            "StudyDate",
            "StudyTime",
            "StudyID",
            "AccessionNumber",
            "InstanceNumber",
        ]
    )
    source = kit.write_source(tmp_path / "minimal.dcm", **absent)
    reports = kit.build(kit.make_result(), source)
    messages = validated(reports, tmp_path, dciodvfy)
    assert [message for message in messages if not OF_THE_SOURCE.search(message)] == []
    for report in reports.reports:
        found = kit.parse(report)
        assert all(found[keyword].is_empty for keyword in absent if keyword != "InstanceNumber")
        assert found["ReferringPhysicianName"].is_empty and found.InstanceNumber >= 1


def test_dsr2html_shows_the_statement(kit: SimpleNamespace, clip: Path, tmp_path: Path) -> None:
    tool = shutil.which("dsr2html") or pytest.skip("needs Debian's dcmtk")
    rows = [kit.make_row(label, 0.9, f"c#{number}") for number, label in enumerate(["ASD", "ASD", "NORM"], start=1)]
    (report,) = kit.build(kit.make_result(*rows), clip, kinds=("sr",)).reports
    (tmp_path / "sr.dcm").write_bytes(report.data)
    ended = subprocess.run([tool, tmp_path / "sr.dcm"], check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    page = re.sub(r"<[^>]*>", "", ended.stdout)
    for text in (
        "Imaging Measurement Report",
        "Jane Roe (female, *1970-01-31, #P-1)",
        "UNVERIFIED",
        "Procedure reported = Transthoracic echocardiography",
        "Atrial septal defect: Present, certainty 90.0 %.",
        "Atrial septal defect: Absent, certainty 90.0 %.",
        "Research use only. Not a medical device",
        "2 of 3 frames have this decision",
    ):
        assert text in page


def test_other_toolkits_read_the_picture(kit: SimpleNamespace, source: Path, tmp_path: Path) -> None:
    tool = shutil.which("dcm2pnm") or pytest.skip("needs Debian's dcmtk")
    (report,) = kit.build(kit.make_result(), source, kinds=("sc",)).reports
    (tmp_path / "sc.dcm").write_bytes(report.data)
    subprocess.run([tool, "--write-raw-pnm", tmp_path / "sc.dcm", tmp_path / "sc.ppm"], check=True, timeout=60)
    with Image.open(tmp_path / "sc.ppm") as shown, Image.open(io.BytesIO(kit.make_picture())) as drawn:
        assert shown.mode == "RGB" and shown.tobytes() == drawn.tobytes()


def test_dcmqi_reads_finding_evaluation_and_bundle_hash(kit: SimpleNamespace, source: Path, tmp_path: Path) -> None:
    tool = shutil.which("tid1500reader") or pytest.skip("tid1500reader (PyPI: dcmqi) is not installed")
    (report,) = kit.build(kit.make_result(), source, kinds=("sr",)).reports
    (tmp_path / "sr.dcm").write_bytes(report.data)
    command = [tool, "--inputDICOM", tmp_path / "sr.dcm", "--outputMetadata", tmp_path / "sr.json"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (group,) = json.loads((tmp_path / "sr.json").read_text("utf-8"))["Measurements"]
    assert group["Finding"]["CodeValue"] == "70142008"
    assert group["FindingSite"]["CodeValue"] == "58095006"
    parameters = group["measurementAlgorithmIdentification"]["AlgorithmParameters"]
    assert parameters == [f"bundle_sha256={'ab' * 32}"]
    assert group["measurementItems"][0]["value"] == "90.0"
    evaluations = {
        entry["conceptCode"]["CodeValue"]: entry["conceptValue"] for entry in group["qualitativeEvaluations"]
    }
    assert evaluations["121052"]["CodeValue"] == "52101004"
