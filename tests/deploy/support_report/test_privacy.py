"""A report holds no value of a patient and no secret: planted in every corner of a machine, and looked for."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.bundle.manifest import encode_manifest

from .conftest import (
    ACCESSION,
    AE,
    BIRTH,
    DISEASE,
    HOST,
    IDENTIFIER,
    NAME,
    PASSWORD,
    PLANTED,
    UID,
    Site,
    assert_clean,
    log_line,
    members,
)


def plant_log(site: Site) -> None:
    """Append lines that a service with a fault, or another program, could have written."""
    lines = [
        f"Traceback: {NAME}",
        "{",
        f'"{NAME}"',
        log_line(message=f"decided {NAME}"),
        log_line(message=f"{NAME}: unexpected {IDENTIFIER} at {BIRTH}"),
        log_line(message=NAME, logger=NAME, level=NAME, location=f"{NAME}:1", time="1957-03-14T00:00:00.000Z"),
        log_line(patient=NAME, **{NAME: 1}),
        log_line(job=IDENTIFIER, destination=NAME, route=f"/{UID}", state=NAME, status=NAME, origin=AE),
        log_line(code=f"E_{NAME.upper()}", device=NAME, precision=ACCESSION, provider=HOST, version="1957.03.14.0001"),
        log_line(rows=IDENTIFIER, ms=[NAME], count={NAME: DISEASE}, bytes=ACCESSION),
        log_line(bundle_sha256=NAME, configuration_sha256=UID, object_hash="ab" * 32),
        log_line(exception={"type": f"{NAME}Error", "text": PASSWORD, "location": f"{NAME}:3", "code": DISEASE}),
        log_line(exception=NAME),
    ]
    with site.log.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def assert_useful(parts: dict[str, Any]) -> None:
    """Check that what support needs is there: an empty report would hold no values either."""
    assert parts["service"]["ready"] == "200"
    queue = parts["service"]["queue"]
    assert queue["database"] == "read"
    assert queue["jobs"] >= 2 and queue["results"] >= 2
    assert queue["deliveries_waiting"] >= 2  # the webhook does not answer
    assert parts["service"]["folders"]["spool"]["files"] >= 2
    assert parts["self_test"]["self_test"] == "passed"
    messages = {line["message"] for line in parts["log"]}
    assert len(messages - {"[withheld]"}) >= 2, messages  # the service's own lines are readable
    assert {line["logger"] for line in parts["log"]} >= {"echoquad_serve.outbox", "[withheld]"}
    assert parts["log_summary"]["other_lines"] >= 3


def test_report_of_a_running_service_holds_nothing_of_its_patients(running: Site, tmp_path: Path) -> None:
    """The values are in store, log, configuration, folders, bundle and environment."""
    plant_log(running)
    target = tmp_path / "report.zip"
    stored = b"".join(path.read_bytes() for path in running.folder.rglob("*") if path.is_file())
    assert [value for value in (NAME, IDENTIFIER, UID, PASSWORD) if value.encode() not in stored] == []
    running.write(target)
    assert_clean(target)
    assert_useful(members(target))
    running.stop()
    jobs = members(target)["service"]["queue"]["jobs"]
    running.write(target)
    assert_clean(target)
    assert members(target)["service"]["queue"]["jobs"] == jobs
    assert members(target)["service"]["ready"] == "ConnectionRefusedError"


@pytest.mark.slow
def test_command_writes_the_same_of_a_running_service(running: Site, tmp_path: Path) -> None:
    """Run ``echoquad doctor --report``, which checks the devices too."""
    plant_log(running)
    target = tmp_path / "report.zip"
    stderr = running.report(target, umask=0)
    assert_clean(target)
    assert_useful(members(target))
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert "send it to nobody before you have read" in stderr
    checks = {check["name"]: check["status"] for check in members(target)["diagnostics"]["checks"]}
    assert checks["cpu"] == "ok"


def test_search_finds_what_is_planted(tmp_path: Path) -> None:
    """Break the promise on purpose, in the ways that the search must see."""
    for number, text in enumerate(
        (NAME.lower(), f"x{IDENTIFIER}y", base64.b64encode(f"ab{NAME}c".encode()).decode(), UID.encode().hex())
    ):
        path = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.json", f"many words around {text} and behind")
        with pytest.raises(AssertionError, match=r"a\.json holds"):
            assert_clean(path)


def test_broken_configuration_is_not_quoted(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "report.zip"
    site.config.write_text(f"[http]\nport = 1\nhost = {NAME} # {PASSWORD}\n", "utf-8")
    site.log.touch()
    site.write(target)
    assert_clean(target)
    shown = members(target)["configuration"]
    assert (shown["file"], shown["line"]) == ("is not TOML", 3)


def test_damaged_parts_are_named_by_codes_and_the_others_are_written(site: Site, tmp_path: Path) -> None:
    """Damage everything: the bundle, the database, the configuration; name a log that is a folder."""
    target = tmp_path / "report.zip"
    site.store.mkdir()
    (site.store / "queue.sqlite3").write_bytes(f"{NAME} {UID}".encode() * 1000)
    (site.bundle / "model.fp32.onnx").write_bytes(NAME.encode())
    (site.bundle / f"{NAME}.txt").touch()
    site.config.write_text(f'{NAME} = 1\n["{DISEASE}"]\n[http]\nport = "{IDENTIFIER}"\n"{HOST}" = 1\n', "utf-8")
    with site.config.open("a", encoding="utf-8") as stream:
        stream.write(f'[store]\nfolder = "store of {NAME}"\n[model]\nprecision = "{NAME}"\nthreads = ["{NAME}"]\n')
    site.write(target, log=site.folder)
    assert_clean(target)
    parts = members(target)
    assert parts["configuration"]["unknown_keys"] == 2
    assert parts["configuration"]["http"] == {"port": "[withheld]", "unknown_keys": 1}
    assert parts["bundle"]["files"]["model.fp32.onnx"]["state"] == "E_BUNDLE_TAMPERED"
    assert parts["bundle"]["unlisted_files"] == 1
    assert parts["self_test"]["code"] == "E_BUNDLE_TAMPERED"
    assert parts["service"]["queue"] == {"database": "cannot be read", "reason": "DatabaseError"}
    assert parts["log_summary"] == {"failed": "OSError"}
    assert parts["system"]["machine"]


def test_unknown_names_and_values_of_a_manifest_are_left_out(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "report.zip"
    site.log.touch()
    data = NAME.encode()
    (site.bundle / f"{NAME}.bin").write_bytes(data)
    path = site.bundle / "bundle.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][f"{NAME}.bin"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest |= {"created": NAME, "versions": {"torch": NAME, NAME: "1"}, "intended_use": DISEASE, "codes": {NAME: 1}}
    path.write_bytes(encode_manifest(manifest))
    site.write(target)
    assert_clean(target)
    shown = members(target)["bundle"]
    assert shown["files"]["file-1"]["state"] == "intact"
    assert (shown["created"], shown["versions"], shown["classes"]) == (None, {}, 2)


def test_values_of_a_whole_configuration_are_replaced(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "report.zip"
    site.log.touch()
    site.config.write_text(
        f"""
[http]
host = "{HOST}"
tls = {{certificate = "{NAME}.pem", key = "{PASSWORD}.pem"}}
[model]
device = "cpu"
public_key = "{TOKEN_PATH}"
[dicom]
ae_title = "{AE}"
host = "0.0.0.0"
[[dicom.caller]]
ae_title = "{AE}"
address = "10.1.2.3"
[[destination]]
name = "{NAME}"
type = "dicom"
host = "{HOST}"
ae_title = "{AE}"
reports = ["sr", "{NAME}"]
[live]
source = "rtsp://{NAME}:{PASSWORD}@{HOST}/{UID}"
""",
        "utf-8",
    )
    site.write(target)
    assert_clean(target)
    shown = members(target)["configuration"]
    assert shown["http"]["host"] == shown["destination"][0]["host"] == "host-1"
    assert shown["dicom"]["caller"] == [{"ae_title": "ae-title-1", "address": "host-2"}]
    assert shown["dicom"]["ae_title"] == shown["destination"][0]["ae_title"] == "ae-title-1"
    assert shown["dicom"]["host"] == "0.0.0.0"
    assert shown["destination"][0]["reports"] == ["sr", "[withheld]"]
    assert shown["live"]["source"] == "rtsp: address-1"
    assert "10.1.2.3" not in str(shown)


TOKEN_PATH = f"keys of {NAME}/pub.pem"


def test_planted_values_are_long_enough_to_be_no_chance() -> None:
    assert min(map(len, PLANTED)) >= 8
