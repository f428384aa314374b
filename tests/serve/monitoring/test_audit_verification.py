"""What the verification of an audit log finds: every change of a byte, a line or a file, and its place."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.contract import canonical_json
from echoquad_runtime.errors import InputNotFoundError
from echoquad_serve.errors import AuditLogError
from echoquad_serve.monitoring.audit_entry import encode_entry
from echoquad_serve.monitoring.audit_head import HEAD, Head, encode_head
from echoquad_serve.monitoring.audit_log import AuditLog
from echoquad_serve.monitoring.audit_verification import verify_audit_log

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
JOB = "0123456789abcdef" * 2


def write_log(folder: Path, count: int = 9) -> Path:
    with AuditLog(folder, KEY, max_file_bytes=1600) as log:
        for index in range(count):
            log.append("accepted", job=JOB, origin="http", attempts=index)
    return folder


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a log of nine entries in three files, and its head."""
    folder = write_log(tmp_path_factory.mktemp("log"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 4
    return files


@pytest.fixture
def log(intact: dict[str, bytes], tmp_path: Path) -> Path:
    """Return the folder of a log that a test may change."""
    for name, data in intact.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def fault(folder: Path, key: bytes | None = None) -> str:
    with pytest.raises(AuditLogError) as caught:
        verify_audit_log(folder, key)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"{folder.as_posix()}/")


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 13])
def test_every_change_of_one_byte_is_found_with_and_without_the_key(
    log: Path, intact: dict[str, bytes], step: int
) -> None:
    for name, data in intact.items():
        path = log / name
        for position in range(0, len(data), step):
            for byte in (data[position] ^ 1, ord("\n"), ord("7")):
                if byte == data[position]:
                    continue
                changed = bytearray(data)
                changed[position] = byte
                path.write_bytes(changed)
                key = KEY if position % 2 else None
                line = data.count(b"\n", 0, position) + 1
                assert fault(log, key).startswith(f"{name}:{line}:"), (name, position, byte)
        path.write_bytes(data)
    assert verify_audit_log(log, KEY).entries == 9


@given(data=st.data())
def test_every_other_change_of_a_byte_is_found(
    data: st.DataObject, intact: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    for name, content in intact.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(intact)))
    content = bytearray(intact[name])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte != intact[name][position]))
    (folder / name).write_bytes(content)
    fault(folder)
    shutil.rmtree(folder)


def test_every_removed_repeated_or_exchanged_line_is_found(log: Path, intact: dict[str, bytes]) -> None:
    for name, data in intact.items():
        if name == HEAD:
            continue
        lines = data.splitlines(keepends=True)
        changes = []
        for index in range(len(lines)):
            changes.append(lines[:index] + lines[index + 1 :])
            changes.append([*lines[: index + 1], *lines[index:]])
        changes += [
            [*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]] for index in range(len(lines) - 1)
        ]
        for changed in changes:
            (log / name).write_bytes(b"".join(changed))
            fault(log)
            fault(log, KEY)
        (log / name).write_bytes(data)


def test_every_truncation_is_found(log: Path, intact: dict[str, bytes]) -> None:
    for name, data in intact.items():
        for size in range(0, len(data), 7):
            (log / name).write_bytes(data[:size])
            fault(log)
        (log / name).write_bytes(data)


def test_bytes_behind_the_last_entry_are_found_unless_they_are_an_unfinished_write(log: Path) -> None:
    path = log / "audit-000003.jsonl"
    data = path.read_bytes()
    path.write_bytes(data + b"garbage\n")
    assert fault(log).startswith(f"audit-000003.jsonl:{len(data.splitlines()) + 1}: ")
    path.write_bytes(data + data.splitlines(keepends=True)[-1])
    assert "entry 9 follows entry 9" in fault(log)
    path.write_bytes(data + b"garbage")
    assert verify_audit_log(log).unfinished == 7


def test_every_missing_exchanged_or_renamed_file_is_found(log: Path, intact: dict[str, bytes]) -> None:
    for name, data in intact.items():
        (log / name).unlink()
        assert ":1: " in fault(log)
        (log / name).write_bytes(data)
    first, second, third = (log / f"audit-00000{number}.jsonl" for number in (1, 2, 3))
    first.write_bytes(intact[second.name])
    second.write_bytes(intact[first.name])
    fault(log)
    first.write_bytes(intact[first.name])
    second.write_bytes(intact[second.name])
    third.rename(log / "audit-000004.jsonl")
    assert "audit-000003.jsonl, the file before, is missing" in fault(log)
    (log / "audit-000004.jsonl").rename(third)
    assert verify_audit_log(log, KEY).entries == 9


def forged(count: int, key: bytes) -> tuple[bytes, Head]:
    """Return a log that is consistent in itself."""
    digest, lines = "0" * 64, []
    for seq in range(1, count + 1):
        line, digest = encode_entry(seq, digest, 1e9, "accepted", {"job": JOB}, key)
        lines.append(line)
    data = b"".join(lines)
    return data, Head(count, digest, 1, len(data))


def test_log_that_was_written_anew_is_found_with_the_site_key_alone(tmp_path: Path) -> None:
    data, head = forged(5, OTHER_KEY)
    (tmp_path / "audit-000001.jsonl").write_bytes(data)
    (tmp_path / HEAD).write_bytes(encode_head(head, OTHER_KEY))
    assert "a forged log is not found" in str(verify_audit_log(tmp_path))
    assert fault(tmp_path, KEY).startswith("head.json:1: the head file was not written with this site key")
    (tmp_path / HEAD).write_bytes(encode_head(head, KEY))
    assert fault(tmp_path, KEY).startswith("audit-000001.jsonl:1: the entry was not written with this site key")


def test_entry_without_its_mac_is_found_with_the_key(tmp_path: Path) -> None:
    content = {"seq": 1, "previous": "0" * 64, "time": "2026-11-27T00:00:00Z", "event": "accepted"}
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    path = tmp_path / "audit-000001.jsonl"
    path.write_text(canonical_json({**content, "hash": digest}) + "\n")
    assert verify_audit_log(path).entries == 1
    with pytest.raises(AuditLogError, match="site key"):
        verify_audit_log(path, KEY)


def test_entry_of_another_place_does_not_fit_even_with_a_right_number(tmp_path: Path) -> None:
    """Replace the last entry by one of another log of the same site: number, hash and MAC are right."""
    one, other = write_log(tmp_path / "one"), write_log(tmp_path / "other")
    lines = [(folder / "audit-000003.jsonl").read_bytes().splitlines(keepends=True) for folder in (one, other)]
    (one / "audit-000003.jsonl").write_bytes(b"".join([*lines[0][:-1], lines[1][-1]]))
    assert "does not follow the entry before" in fault(one, KEY)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / HEAD).unlink(), id="no head"),
        pytest.param(lambda folder: (folder / HEAD).write_bytes(b"{}"), id="damaged head"),
        pytest.param(lambda folder: (folder / "audit-000003.jsonl").unlink(), id="no last file"),
        pytest.param(lambda folder: [path.unlink() for path in folder.glob("audit*")], id="no file"),
        pytest.param(lambda folder: drop_last_line(folder / "audit-000003.jsonl"), id="line removed"),
        pytest.param(lambda folder: flip(folder / "audit-000003.jsonl"), id="last line changed"),
        pytest.param(lambda folder: (folder / HEAD).write_bytes(encode_head(Head(), OTHER_KEY)), id="other key"),
    ],
)
def test_start_of_the_service_does_not_hide_a_fault(log: Path, damage: Callable[[Path], object]) -> None:
    damage(log)
    before = {path.name: path.read_bytes() for path in log.glob("audit-*")}
    for _ in range(2):
        with AuditLog(log, KEY) as writer:
            writer.append("accepted", job=JOB)
    events = [json.loads(line)["event"] for line in max(log.glob("audit-*")).read_text().splitlines()]
    assert events == ["log_fault", "accepted", "accepted"]
    assert all((log / name).read_bytes() == data for name, data in before.items()), "the evidence is untouched"
    fault(log)
    fault(log, KEY)


def drop_last_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def test_log_cut_back_together_with_its_old_head_is_not_found_here(tmp_path: Path) -> None:
    """State the limit that the documentation names: an old state is consistent; note its hash elsewhere."""
    write_log(tmp_path, 5)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    noted = verify_audit_log(tmp_path, KEY).hash
    write_log(tmp_path, 5)
    newer = verify_audit_log(tmp_path, KEY).hash
    for path in tmp_path.iterdir():
        path.unlink()
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    assert verify_audit_log(tmp_path, KEY).hash == noted != newer


def test_single_file_is_verified_alone(log: Path) -> None:
    found = verify_audit_log(log / "audit-000002.jsonl", KEY)
    assert not found.whole and "this file alone" in str(found)
    assert 0 < found.entries < 9
    flip(log / "audit-000002.jsonl")
    with pytest.raises(AuditLogError, match=r"audit-000002\.jsonl:4: "):
        verify_audit_log(log / "audit-000002.jsonl")


def test_what_is_no_log_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no audit log here"):
        verify_audit_log(tmp_path)
    with pytest.raises(InputNotFoundError, match="cannot be read"):
        verify_audit_log(tmp_path / "none")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(InputNotFoundError, match="no entry"):
        verify_audit_log(tmp_path / "empty")


@pytest.mark.parametrize("line", [b"[" * 60_000 + b"\n", b"1\n", b"null\n", b'{"seq":1}\n', b"\xff\n", b"NaN\n", b"\n"])
def test_hostile_lines_are_one_line_faults(log: Path, line: bytes) -> None:
    (log / "audit-000001.jsonl").write_bytes(line)
    assert fault(log).startswith("audit-000001.jsonl:1: ")
    (log / HEAD).write_bytes(line)
    assert fault(log).startswith("head.json:1: ")
