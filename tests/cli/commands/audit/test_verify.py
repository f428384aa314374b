"""``echoquad audit verify``: exit codes, the line that it prints, and what it imports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.monitoring.audit_log import AuditLog, site_key


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """Return a service's folder with a site key and an audit log of four entries."""
    with AuditLog(tmp_path / "audit", site_key(tmp_path / "site.key")) as log:
        for event in ("service_started", "accepted", "decided", "service_stopped"):
            log.append(event)
    return tmp_path


def test_verification_exits_0_3_and_1(service: Path, many: Callable[..., Any]) -> None:
    folder, other = service / "audit", service / "other.key"
    site_key(other)
    lines = [
        ["audit", "verify", folder],
        ["audit", "verify", folder, "--site-key", service / "site.key"],
        ["audit", "verify", folder / "audit-000001.jsonl"],
        ["audit", "verify", folder, "--site-key", other],
        ["audit", "verify", service],
        ["audit", "verify", folder, "--site-key", service / "none.key"],
        ["audit", "verify", folder, "--site-key", folder / "head.json"],
    ]
    found, modules = many(lines)
    assert [ran.code for ran in found] == [0, 0, 0, 3, 1, 1, 1]
    assert found[0].out.startswith(f"PASS {folder.as_posix()}: 4 entries in 1 file; 20")
    assert "without the site key" in found[0].out and "site key verified" in found[1].out
    assert "this file alone" in found[2].out
    assert all(ran.err == "" and ran.out.count("\n") == 1 for ran in found[:3])
    assert found[3].error[0] == "E_AUDIT_LOG"
    assert "head.json:1: the head file was not written with this site key" in found[3].error[1]
    assert [ran.error[0] for ran in found[4:]] == ["E_INPUT_NOT_FOUND"] * 3
    assert {"numpy", "PIL", "torch", "onnxruntime", "starlette", "prometheus_client", "pynetdicom"} & modules == set()


def test_changed_entry_is_named_by_file_and_line(service: Path, echoquad: Callable[..., Any]) -> None:
    path = service / "audit" / "audit-000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"decided", b"refused"))
    ran = echoquad("audit", "verify", service / "audit", code=3)
    assert ran.out == ""
    code, message = ran.error
    assert code == "E_AUDIT_LOG"
    assert message.startswith(f"{path.as_posix()}:3: the entry does not match its own hash: it was changed")
