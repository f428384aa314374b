"""The audit log on the disk: what it holds, what a kill, a full disk and a second process do to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.errors import ConfigError, OutputError
from echoquad_serve.errors import AuditLogError
from echoquad_serve.monitoring import audit_log
from echoquad_serve.monitoring.audit_entry import hash_uid
from echoquad_serve.monitoring.audit_log import AuditLog, site_key
from echoquad_serve.monitoring.audit_verification import verify_audit_log
from echoquad_serve.records import IncomingObject, Job, Result

KEY = bytes(range(32))
PATIENT = "DOE^JANE"
JOB = "0123456789abcdef" * 2
UID = "1.2.840.113619.2.55.3.1"


def entries(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted(folder.glob("audit-*.jsonl")) for line in path.read_bytes().splitlines()]
    return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]


def result(**changes: Any) -> Result:
    row = {"file": PATIENT, "pred_image": "ASD", "device": "cpu", "provider": "CPU", "precision": "fp32", "flags": []}
    values: dict[str, Any] = {
        **{"id": JOB, "status": "done", "origin": "dicom", "name": PATIENT, "received": 1.0, "finished": 2.0},
        **{"rows": (row, {**row, "pred_image": "INDETERMINATE", "flags": ["blank"]}), "bundle": {"sha256": "ab" * 32}},
        **{"failures": ({"file": PATIENT, "code": "E_FRAME_DAMAGED", "message": PATIENT},), "sender": PATIENT},
    }
    return Result(**values, sop_instance_uid=UID, **changes)


def test_life_of_an_object_is_on_record_without_a_patient_value(tmp_path: Path) -> None:
    with AuditLog(tmp_path, KEY, senders=["ECHO 1"]) as log:
        log.append("service_started", version="0.15.0", configuration="cd" * 32)
        log.append("bundle_loaded", bundle="ab" * 32)
        log.accepted(Job(JOB, tmp_path / PATIENT, 1.0, "dicom", PATIENT, "ECHO 1", "1.2", UID))
        log.decided(result())
        log.delivered(result(), "pacs", attempts=3)
        log.delivery_refused(result(), "pacs", "E_DELIVERY_REFUSED")
        log.refused(IncomingObject(tmp_path, "http", PATIENT, PATIENT, "127.0.0.1"), "E_QUEUE_FULL")
    found = entries(tmp_path)
    assert [entry["event"] for entry in found] == [
        *("service_started", "bundle_loaded", "accepted", "decided", "delivered", "delivery_refused", "refused")
    ]
    assert [entry["seq"] for entry in found] == [1, 2, 3, 4, 5, 6, 7]
    accepted, decided, delivered, _, refused = found[2:]
    assert accepted["object"] == decided["object"] == hash_uid(KEY, UID)
    assert accepted["sender"] == "ECHO 1"
    assert decided["sender"].startswith("unknown-")
    assert decided["decisions"] == {"ASD": 1, "INDETERMINATE": 1}
    assert (decided["flags"], decided["failures"]) == ({"blank": 1}, {"E_FRAME_DAMAGED": 1})
    assert (decided["bundle"], decided["device"], decided["provider"]) == ("ab" * 32, "cpu", "CPU")
    assert (delivered["destination"], delivered["attempts"]) == ("pacs", 3)
    assert (refused["sender"], refused["code"]) == ("127.0.0.1", "E_QUEUE_FULL")
    text = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"DOE" not in text and UID.encode() not in text
    assert verify_audit_log(tmp_path, KEY).entries == 7


@pytest.mark.parametrize(
    "fields",
    [{"patient": "x"}, {"job": PATIENT}, {"code": PATIENT}, {"seq": 7}, {"mac": "x"}, {"decisions": {"ASD": "many"}}],
    ids=str,
)
def test_field_that_is_not_listed_is_refused_and_the_log_goes_on(tmp_path: Path, fields: dict[str, Any]) -> None:
    with AuditLog(tmp_path, KEY) as log:
        with pytest.raises(ValueError, match="field") as caught:
            log.append("accepted", **fields)
        assert PATIENT not in str(caught.value)
        with pytest.raises(ValueError, match="event"):
            log.append("decide")
        log.append("accepted", job=JOB)
    assert verify_audit_log(tmp_path, KEY).entries == 1


def test_chain_continues_over_files_and_starts(tmp_path: Path) -> None:
    for _ in range(3):
        with AuditLog(tmp_path, KEY, max_file_bytes=2000) as log:
            for _ in range(10):
                log.append("accepted", job=JOB)
    found = verify_audit_log(tmp_path, KEY)
    assert (found.entries, found.repaired) == (30, 0)
    assert found.files > 3
    assert all(path.stat().st_size <= 2000 for path in tmp_path.glob("audit-*"))
    assert found.hash == entries(tmp_path)[-1]["hash"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    key = site_key(tmp_path / "site.key")
    assert site_key(tmp_path / "site.key") == key
    assert len(key) == 32
    with AuditLog(tmp_path / "audit", key) as log:
        log.append("service_started")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"site.key": 0o600, "head.json": 0o600, "audit-000001.jsonl": 0o600}


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_site_key_that_others_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    site_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        site_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="32 bytes"):
        site_key(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="link"):
        site_key(tmp_path / "link")


def test_two_processes_that_create_a_site_key_get_the_same(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(site_key(tmp_path / "key"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with AuditLog(tmp_path, KEY) as log:
        with pytest.raises(OutputError, match="another process"):
            AuditLog(tmp_path, KEY)
        log.append("service_started")
    AuditLog(tmp_path, KEY).close()


def test_entries_of_many_threads_share_syncs_and_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    sync = audit_log._sync

    def counted(stream: Any) -> None:
        syncs.append(stream)
        sync(stream)

    monkeypatch.setattr(audit_log, "_sync", counted)
    with AuditLog(tmp_path, KEY, max_file_bytes=20_000) as log:

        def work() -> None:
            for _ in range(25):
                ticket = log.append("accepted", job=JOB)
                assert log.head.entries >= ticket

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verify_audit_log(tmp_path, KEY).entries == 200
    assert len(syncs) < 200


def test_entries_without_waiting_are_written_by_flush(tmp_path: Path) -> None:
    with AuditLog(tmp_path, KEY) as log:
        for _ in range(5):
            log.append_nowait("accepted", job=JOB)
        assert log.head.entries == 0
        log.flush()
        assert log.head.entries == 5
        log.append_nowait("accepted", job=JOB)
    assert verify_audit_log(tmp_path, KEY).entries == 6
    with pytest.raises(OutputError, match="closed"):
        log.append("accepted", job=JOB)


@pytest.mark.parametrize("written", [0, 100, 100_000])
def test_full_disk_loses_no_entry_and_leaves_a_valid_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    write = audit_log.write_all
    with AuditLog(tmp_path, KEY) as log:
        log.append("accepted", job=JOB)

        def full(stream: Any, data: bytes) -> None:
            write(stream, data[:written])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(audit_log, "write_all", full)
        for _ in range(3):
            with pytest.raises(OutputError, match="No space left"):
                log.append("accepted", job=JOB)
        assert verify_audit_log(tmp_path, KEY).entries == 1
        monkeypatch.setattr(audit_log, "write_all", write)
        log.append("accepted", job=JOB)
    found = verify_audit_log(tmp_path, KEY)
    assert (found.entries, found.repaired) == (5, 0)


def test_disk_that_refuses_for_long_stops_the_log_from_growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_PENDING", 3)
    log = AuditLog(tmp_path, KEY)
    for _ in range(3):
        log.append_nowait("accepted", job=JOB)
    with pytest.raises(OutputError, match="3 entries wait"):
        log.append("accepted", job=JOB)
    log.close()


def test_clock_that_jumps_is_on_record(tmp_path: Path) -> None:
    now, steady = [1_000_000.0], [0.0]
    log = AuditLog(tmp_path, KEY, clock=lambda: now[0], steady_clock=lambda: steady[0])
    log.append("accepted", job=JOB)
    now[0], steady[0] = now[0] + 60, steady[0] + 60  # time passes
    log.append("accepted", job=JOB)
    now[0], steady[0] = now[0] - 3600, steady[0] + 1
    log.append("accepted", job=JOB)
    log.close()
    now[0] -= 100
    AuditLog(tmp_path, KEY, clock=lambda: now[0], steady_clock=lambda: steady[0]).close()
    found = [(entry["event"], entry.get("seconds")) for entry in entries(tmp_path)]
    accepted = ("accepted", None)
    assert found == [accepted, accepted, ("clock_jump", -3601.0), accepted, ("clock_jump", -100.0)]
    assert verify_audit_log(tmp_path, KEY).entries == 5


@pytest.mark.parametrize(
    "rest", [b'{"bundle":"ab', b"\0" * 4096, b"x\ny\n", "half"], ids=["line", "zeros", "text", "half"]
)
def test_unfinished_write_is_stated_by_the_next_start(tmp_path: Path, rest: bytes | str) -> None:
    with AuditLog(tmp_path, KEY) as log:
        log.append("accepted", job=JOB)
    path = tmp_path / "audit-000001.jsonl"
    torn = path.read_bytes()[:300] if isinstance(rest, str) else rest
    with path.open("ab") as stream:
        stream.write(torn)
    if not torn.endswith(b"\n"):
        before = verify_audit_log(tmp_path, KEY)  # while nobody has started the service
        assert (before.entries, before.unfinished) == (1, len(torn))
    for _ in range(2):
        with AuditLog(tmp_path, KEY) as log:
            log.append("accepted", job=JOB)
    found = verify_audit_log(tmp_path, KEY)
    assert (found.entries, found.repaired, found.unfinished, found.files) == (4, 1, 0, 2)
    assert path.read_bytes().endswith(torn), "the log is append-only: it changes no file"
    (repair,) = [entry for entry in entries(tmp_path) if "torn" in entry]
    assert repair["torn"][0]["bytes"] == len(torn)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(AuditLogError, match=r"audit-000001\.jsonl:2"):
        verify_audit_log(tmp_path, KEY)


def test_stop_during_the_repair_and_before_the_first_entry_of_a_file(tmp_path: Path) -> None:
    with AuditLog(tmp_path, KEY) as log:
        log.append("accepted", job=JOB)
    with (tmp_path / "audit-000001.jsonl").open("ab") as stream:
        stream.write(b"torn")
    (tmp_path / "audit-000002.jsonl").write_bytes(b'{"torn too')
    (tmp_path / "audit-000003.jsonl").write_bytes(b"")
    AuditLog(tmp_path, KEY).close()
    with AuditLog(tmp_path, KEY) as log:
        log.append("accepted", job=JOB)
    (tmp_path / "audit-000005.jsonl").write_bytes(b"")
    with AuditLog(tmp_path, KEY, max_file_bytes=10) as log:
        log.append("accepted", job=JOB)
        log.append("accepted", job=JOB)
    found = verify_audit_log(tmp_path, KEY)
    assert (found.entries, found.repaired, found.files) == (5, 2, 6)


def test_old_head_after_a_power_cut_is_caught_up_with(tmp_path: Path) -> None:
    with AuditLog(tmp_path, KEY, max_file_bytes=1500) as log:
        log.append("accepted", job=JOB)
        old = (tmp_path / "head.json").read_bytes()
        for _ in range(9):
            log.append("accepted", job=JOB)
    (tmp_path / "head.json").write_bytes(old)
    assert verify_audit_log(tmp_path, KEY).entries == 10
    AuditLog(tmp_path, KEY).close()
    with AuditLog(tmp_path, KEY) as log:
        log.append("accepted", job=JOB)
    assert (verify_audit_log(tmp_path, KEY).entries, verify_audit_log(tmp_path, KEY).repaired) == (11, 0)


WRITER = """
import sys, threading
from pathlib import Path
from echoquad_serve.monitoring.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]), bytes(range(32)), max_file_bytes=20_000)
def work():
    while True:
        ticket = log.append("accepted", job="0" * 32)
        sys.stdout.write(f"{log.head.entries}\\n")
        sys.stdout.flush()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
work()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_killed_writer_leaves_a_log_that_verifies_with_every_acknowledged_entry(tmp_path: Path) -> None:
    acknowledged = 0
    for round_ in range(10):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(20 + 37 * round_ % 100)]
            process.send_signal(signal.SIGKILL)
            complete = [line for line in [*lines, *process.stdout] if line.endswith("\n")]
        acknowledged = max([acknowledged, *map(int, complete)])
        found = verify_audit_log(tmp_path, KEY)
        assert found.entries >= acknowledged > 0
    assert verify_audit_log(tmp_path, KEY).files > 1


def test_verification_beside_a_writer_finds_no_fault(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, KEY, max_file_bytes=10_000)
    log.append("accepted", job=JOB)
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            log.append("accepted", job=JOB)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        counts = [verify_audit_log(tmp_path, KEY).entries for _ in range(20)]
    finally:
        stopped.set()
        thread.join()
        log.close()
    assert counts == sorted(counts)


def test_link_in_place_of_a_file_is_refused(tmp_path: Path, symlink: Callable[[Path, Path], None]) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "audit"
    folder.mkdir()
    symlink(folder / "head.json", victim)
    with pytest.raises(OutputError, match="link"):
        AuditLog(folder, KEY)
    assert victim.read_bytes() == b"precious"


@pytest.fixture
def symlink() -> Callable[[Path, Path], None]:
    def make(link: Path, target: Path) -> None:
        try:
            link.symlink_to(target)
        except OSError:
            pytest.skip("no symbolic links here")

    return make
