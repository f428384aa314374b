"""JSON logs: their form, and a patient's name planted wherever it could get into them."""

from __future__ import annotations

import ast
import io
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.errors import BundleError, FrameDamagedError
from echoquad_serve import intake
from echoquad_serve.monitoring.json_logging import JsonFormatter, configure_logging

ROOT = Path(__file__).parents[3]
PATIENT = "DOE^JANE"
own = logging.getLogger(intake.__name__)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Return the stream that all logs of the process go to during the test."""
    found = io.StringIO()
    undo = configure_logging(found)
    yield found
    undo()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    assert "DOE" not in stream.getvalue() and "JANE" not in stream.getvalue()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_line_has_time_level_logger_message_and_listed_fields(stream: io.StringIO) -> None:
    own.info("accepted after %d ms", 3, extra={"job": "0" * 32, "origin": "dicom", "free_mb": 12.5})
    own.debug("not shown")
    (line,) = lines(stream)
    assert datetime.fromisoformat(line.pop("time")).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert line.pop("location").startswith("test_json_logging:")
    assert line == {
        **{"level": "INFO", "logger": "echoquad_serve.intake", "message": "accepted after 3 ms"},
        **{"job": "0" * 32, "origin": "dicom", "free_mb": 12.5},
    }


def test_codes_names_of_errors_and_texts_of_the_system_pass_and_no_other_word(stream: io.StringIO) -> None:
    for word in ("E_STORE", "TimeoutError", "No space left on device", "Jane Doe", "DOE", "JaneDoe", "Error of Doe"):
        own.warning("failed: %s", word)
    shown = [line["message"].removeprefix("failed: ") for line in map(json.loads, stream.getvalue().splitlines())]
    assert shown == ["E_STORE", "TimeoutError", "No space left on device", *["[withheld]"] * 4]


def test_fields_and_arguments_of_another_form_are_withheld(stream: io.StringIO) -> None:
    extra: dict[str, Any] = {
        **{"job": PATIENT, "origin": PATIENT, "code": PATIENT, "device": PATIENT, "count": PATIENT, "state": PATIENT},
        **{"file": PATIENT, "sender": PATIENT, "patient": PATIENT, "destination": PATIENT},
    }
    own.warning("file %s of %r", Path(PATIENT), [PATIENT], extra=extra)
    own.warning("file %(name)s", {"name": PATIENT})
    own.warning(PATIENT.encode())
    own.warning("%s %s", FrameDamagedError(f"{PATIENT}.png: truncated"), ValueError(PATIENT))
    first, second, third, fourth = lines(stream)
    assert first["message"] == "file [withheld] of '[withheld]'"
    assert {first[name] for name in ("job", "origin", "code", "device", "count", "state", "destination")} == {
        "[withheld]"
    }
    assert {"file", "sender", "patient"} & first.keys() == set()
    assert (second["message"], third["message"]) == ("file [withheld]", "[withheld]")
    assert fourth["message"] == "E_FRAME_DAMAGED ValueError"


def test_argument_that_does_not_fit_its_place_leaves_the_text_of_the_call() -> None:
    record = logging.makeLogRecord({"name": "echoquad_serve", "msg": "%d of them", "args": (PATIENT,)})
    assert json.loads(JsonFormatter().format(record))["message"] == "%d of them"


def test_exceptions_are_type_and_place(stream: io.StringIO) -> None:
    for error in (OSError(2, "no such file", PATIENT), FrameDamagedError(f"{PATIENT}: cut"), BundleError("no hash")):
        try:
            raise error
        except Exception:
            own.exception("an object failed")
    system, frame, bundle = (line["exception"] for line in lines(stream))
    assert system["type"] == "FileNotFoundError" and system["location"].startswith("test_json_logging:")
    assert (frame["code"], "text" in frame) == ("E_FRAME_DAMAGED", False)
    assert (bundle["code"], bundle["text"]) == ("E_BUNDLE", "no hash")


def test_messages_of_other_packages_are_reduced_to_package_and_level(stream: io.StringIO) -> None:
    for name in ("json.decoder", "uvicorn.access", PATIENT, f"json.{PATIENT}"):
        log = logging.getLogger(name)
        log.setLevel(logging.DEBUG)  # as a library may do to its own
        log.addHandler(logging.NullHandler())
        log.debug(PATIENT)
        log.info("stored %s", PATIENT)
        log.error("failed on %s", PATIENT, extra={"job": PATIENT})
    found = [(line["logger"], line["level"]) for line in lines(stream)]
    assert found[0] == ("json.decoder", "ERROR")
    assert [name for name, _ in found[2:]] == ["other", "json"]
    assert all("another package" in line["message"] for line in lines(stream))


def test_handlers_that_others_installed_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("json.tool")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    undo = configure_logging(io.StringIO())
    try:
        log.error(PATIENT)
    finally:
        undo()
    assert log.handlers == [handler]
    log.removeHandler(handler)
    assert capsys.readouterr() == ("", "")


def test_record_that_cannot_be_written_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    closed = io.StringIO()
    undo = configure_logging(closed)
    try:
        closed.close()
        own.error("failed on %s", PATIENT)
    finally:
        undo()
    assert capsys.readouterr() == ("", "")


def test_exceptions_that_nobody_catches_and_warnings_are_lines(
    stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ValueError(PATIENT)

    thread = threading.Thread(target=fail, name=f"echoquad-{PATIENT}")
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # catch_warnings has replaced it
        warnings.warn(PATIENT, UserWarning, stacklevel=1)
    logging.captureWarnings(False)
    first, second = lines(stream)
    assert (first["level"], first["exception"]["type"]) == ("CRITICAL", "ValueError")
    assert second["logger"] == "other" or second["logger"] == "py"
    assert capsys.readouterr().err == ""


def test_uncaught_exception_of_a_process_prints_no_text() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom echoquad_serve.monitoring.json_logging import configure_logging\n"
        f"configure_logging(sys.stderr)\nclass A:\n    def __del__(self): raise KeyError('{PATIENT}')\n"
        f"A()\nraise ValueError('{PATIENT}')"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    found = lines(io.StringIO(ended.stderr))
    assert [line["exception"]["type"] for line in found] == ["KeyError", "ValueError"]


def test_association_with_a_patients_name_in_every_value_logs_nothing_of_it(
    stream: io.StringIO, tmp_path: Path
) -> None:
    """Store an object with pynetdicom at its most talkative, from an AE with the patient's name, and fail on it."""
    pynetdicom = pytest.importorskip("pynetdicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    from pynetdicom.sop_class import UltrasoundImageStorage

    def store(event: Any) -> int:
        own.info("received %s from %s", event.dataset.PatientName, event.assoc.requestor.ae_title)
        raise RuntimeError(f"cannot store {event.dataset.PatientName}")

    for name in ("pynetdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    server = pynetdicom.AE("ECHOQUAD")
    server.add_supported_context(UltrasoundImageStorage, ExplicitVRLittleEndian)
    listening = server.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(pynetdicom.evt.EVT_C_STORE, store)])
    try:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = UltrasoundImageStorage, generate_uid()
        dataset.PatientName, dataset.PatientID = PATIENT, PATIENT
        client = pynetdicom.AE(PATIENT)
        client.add_requested_context(UltrasoundImageStorage, ExplicitVRLittleEndian)
        association = client.associate("127.0.0.1", listening.server_address[1], ae_title=PATIENT)
        assert association.is_established
        assert association.send_c_store(dataset).Status == 0xC211
        association.release()
    finally:
        listening.shutdown()
    found = lines(stream)
    assert any(line["message"] == "received [withheld] from [withheld]" for line in found)
    assert any(line["logger"].startswith("pynetdicom") and line["level"] == "ERROR" for line in found)
    assert all(line["level"] in ("WARNING", "ERROR") for line in found if line["logger"].startswith("pynetdicom"))


def test_own_log_calls_have_constant_texts() -> None:
    """A message that is built, as by an f-string, would pass with all that is in it."""
    methods = {"debug", "info", "warning", "error", "critical", "exception"}
    found = []
    for folder in ("runtime/echoquad_serve", "runtime/echoquad_runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                target = ast.unparse(node.func.value).lower()
                if node.func.attr in methods and target.rpartition(".")[2].strip("_") in ("logger", "log"):
                    text = node.args[0] if node.args else None
                    if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_undo_restores_what_was_there() -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level, own.level, threading.excepthook
    configure_logging(io.StringIO())()
    assert (list(root.handlers), root.level, own.level, threading.excepthook) == before
