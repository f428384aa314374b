"""The archive of a report: its list, its mode, its parts, and the allow lists against the service's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import stat
import types
import typing
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

from echoquad.cli.commands.doctor import doctor
from echoquad_deploy.support_report.archive import Member, write_archive
from echoquad_deploy.support_report.configuration import SCHEMA, show_values
from echoquad_deploy.support_report.log_lines import FIELDS, MAX_LINES, LogFilter, read_tail
from echoquad_deploy.support_report.program_texts import ProgramTexts, program_texts
from echoquad_deploy.support_report.pseudonyms import Pseudonyms
from echoquad_deploy.support_report.service_state import (
    installation,
    journal_lines,
    ready_status,
    unit_state,
)
from echoquad_runtime.devices.cuda_probe import cuda_unavailable_reason
from echoquad_runtime.errors import OutputError, UsageError
from echoquad_serve import config as service_config
from echoquad_serve.monitoring import json_logging

from .conftest import NAME, Site, log_line, members


def test_report_lists_what_is_in_it_and_only_its_owner_may_read_it(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "report.zip"
    target.write_bytes(b"an older report")
    site.log.touch()
    before = os.umask(0)
    try:
        site.write(target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        listing = archive.read("MANIFEST.txt").decode()
        hashes = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names[1:]}
    assert names[0] == "MANIFEST.txt"
    assert listing.splitlines()[0] == "Send this archive to nobody before you have read every file in it."
    for name, digest in hashes.items():
        assert f"{digest}  {name}  (" in listing
    assert list(tmp_path.glob(".*")) == []
    assert {"echoquad", "numpy"} - members(target)["packages"].keys() <= {"echoquad"}  # it may run from a checkout


@pytest.mark.slow
def test_report_without_a_service_still_has_the_machine(tmp_path: Path, site: Site) -> None:
    target = tmp_path / "report.zip"
    site.report(target, "--log", os.devnull)
    parts = members(target)
    if not Path("/etc/echoquad/service.toml").exists():
        assert parts["configuration"] == {"file": "none given or found"}
    assert parts["system"]["python"]["version"]
    assert [check["status"] for check in parts["diagnostics"]["checks"] if check["name"] == "cpu"] == ["ok"]


def test_archive_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    target = tmp_path / "report.zip"
    target.write_bytes(b"older")
    with pytest.raises(UnicodeEncodeError):
        write_archive(target, [Member("a", "b", "\udc80")], "test")
    assert target.read_bytes() == b"older"
    with pytest.raises(OutputError):
        write_archive(tmp_path / "missing" / "report.zip", [], "test")
    assert [path.name for path in tmp_path.iterdir()] == ["report.zip"]


def test_parts_of_a_report_without_report_are_a_usage_error(site: Site) -> None:
    with pytest.raises(UsageError, match="--report"):
        doctor(config=site.config)


def schema_of(kind: Any) -> Any:
    """Return the keys of a table of the service's configuration, nested as `SCHEMA` is; None for a value."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return schema_of(typing.get_args(kind)[0])
    if origin is tuple:
        return schema_of(typing.get_args(kind)[0])
    if dataclasses.is_dataclass(kind):
        return {name: schema_of(hint) for name, hint in typing.get_type_hints(kind).items()}
    return None


def keys_of(rules: Any) -> Any:
    return {name: keys_of(rule) for name, rule in rules.items()} if isinstance(rules, Mapping) else None


def test_every_key_of_the_service_has_a_rule() -> None:
    assert keys_of(SCHEMA) == schema_of(service_config.ServiceConfig)


def test_texts_of_the_configuration_are_never_shown_as_numbers() -> None:
    """A value that the service reads as text or path passes by no rule but that of its kind."""

    def check(kind: Any, rules: Mapping[str, Any]) -> None:
        for name, hint in typing.get_type_hints(kind).items():
            inner = hint
            while typing.get_origin(inner) in (typing.Union, types.UnionType, tuple):
                inner = typing.get_args(inner)[0]
            if dataclasses.is_dataclass(inner):
                check(inner, rules[name])
            elif inner is Path:
                assert rules[name] == "path", name
            elif inner is str or typing.get_origin(inner) is typing.Literal:
                assert rules[name] not in ("number", "path"), name
            else:
                assert rules[name] == "number", name

    check(service_config.ServiceConfig, SCHEMA)


def test_every_field_of_the_log_has_a_form() -> None:
    own = {"time", "level", "logger", "message", "location", "exception"}
    assert FIELDS.keys() == json_logging.FIELDS.keys() | own


@pytest.fixture
def texts(tmp_path: Path) -> ProgramTexts:
    """The texts of a package of one module."""
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text('"""A docstring."""\n', "utf-8")
    (package / "part.py").write_text(
        'import logging\nlog = logging.getLogger("pack")\nSTATE = "ready"\n\n\nclass OddError(Exception):\n'
        '    """It says: Secret words."""\n\n\ndef run(count, error):\n'
        '    log.info("a start")\n    log.log(10, "%d files in %.1f s: %s" if count else "no file at all")\n',
        "utf-8",
    )
    return ProgramTexts((package,))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a start", "a start"),
        ("3 files in 0.5 s: OddError", "3 files in 0.5 s: OddError"),
        ("3 files in 0.5 s: Permission denied", "3 files in 0.5 s: Permission denied"),
        ("3 files in 0.5 s: [withheld]", "3 files in 0.5 s: [withheld]"),
        ("3 files in 0.5 s: Anna", "%d files in %.1f s: %s"),
        ("Anna files in 0.5 s: OddError", "%d files in %.1f s: %s"),
        ("no file at all", "no file at all"),
        ("a start\nAnna", "[withheld]"),
        ("Secret words.", "[withheld]"),
        (None, "[withheld]"),
    ],
)
def test_message_passes_only_as_the_program_writes_it(texts: ProgramTexts, message: Any, shown: str) -> None:
    assert texts.message(message) == shown


def test_words_that_are_not_of_the_program_are_left_out(texts: ProgramTexts) -> None:
    text = "no file at /home/Anna Zwetschge/x, ready: 1.2.3+cu130, libcudnn.so.9 Secret"
    assert texts.words(text) == "no file at [...] ready: 1.2.3+cu130, libcudnn.so.9 [...]"


def test_places_are_those_of_known_modules(texts: ProgramTexts) -> None:
    assert texts.location("part:3 < json:12") == "part:3 < json:12"
    assert texts.location("part:3 < anna:12") == texts.location("part:anna") == texts.location(3) == "[withheld]"


def test_program_has_the_texts_of_the_service() -> None:
    found = program_texts()
    assert "echoquad_serve.service" in found.modules
    assert "/api/v1/predict" in found.constants
    assert {"BundleError", "QueueFullError", "OSError"} <= found.exceptions


def test_jobs_and_destinations_have_the_same_names_everywhere(texts: ProgramTexts) -> None:
    names = Pseudonyms()
    names.replace("destination", "pacs")
    reduced = LogFilter(texts, names)
    lines = reduced.reduce([log_line(job=job, destination="pacs", message="a start").encode() for job in "aba"])
    assert [line.count('"job-1"') for line in lines] == [1, 0, 1]
    assert all('"destination-1"' in line for line in lines)


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"%07d %s\n" % (number, b"x" * 992) for number in range(6000)))
    lines = read_tail(path)
    assert len(lines) == MAX_LINES
    assert lines[-1].startswith(b"0005999")
    path.write_bytes(b"y" * (8 << 20))
    assert read_tail(path) == []


def test_error_that_ended_the_service_is_kept_by_its_code(texts: ProgramTexts) -> None:
    known, unknown = b"error[E_CONFIG]: /home/anna/x.toml: wrong", b"error[E_ANNA]: wrong"
    lines = LogFilter(program_texts(), Pseudonyms()).reduce([known, unknown])
    assert [json.loads(line) for line in lines] == [
        {"code": "E_CONFIG", "message": "[withheld]"},
        {"code": "[withheld]", "message": "[withheld]"},
    ]


@pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
def test_journal_and_unit_are_asked_and_reduced(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stand-ins for journalctl and systemctl print values of patients among what they usually print."""
    programs = {
        "journalctl": f"echo '{log_line(message='a request has ended', route=NAME, ms=2)}'; echo 'started by {NAME}'",
        "systemctl": f"echo ActiveState=active; echo NRestarts=3; echo Description={NAME}; echo SubState='{NAME} x'",
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/calls"\n{script}\n', "utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert unit_state() == {"ActiveState": "active", "NRestarts": "3"}
    reduced = LogFilter(program_texts(), Pseudonyms())
    (line,) = reduced.reduce(journal_lines() or [])
    assert json.loads(line)["route"] == "[withheld]"
    assert json.loads(line)["message"] == "a request has ended"
    assert reduced.counts["other_lines"] == 1
    calls = (tmp_path / "calls").read_text("utf-8")
    assert "--unit echoquad.service" in calls and f"--lines {MAX_LINES}" in calls
    (tmp_path / "journalctl").write_text("#!/bin/sh\nexit 1\n", "utf-8")
    assert journal_lines() is None


def test_service_that_does_not_listen_is_no_failure() -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        assert ready_status(int(taken.getsockname()[1])) == "ConnectionRefusedError"
    assert ready_status(None) == "not asked"


VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-9, 9)
    | strategies.floats(0, 1)
    | strategies.text(max_size=8).map(lambda text: f"{text}{NAME}{text}"),
    lambda inner: (
        strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.just(NAME), inner, max_size=1)
    ),
    max_leaves=5,
)


@given(strategies.dictionaries(strategies.sampled_from([*FIELDS, NAME]), VALUES))
def test_no_text_passes_through_a_log_line(fields: dict[str, Any]) -> None:
    reduced = LogFilter(program_texts(), Pseudonyms())
    (line,) = reduced.reduce([log_line(**fields).encode()])
    assert NAME not in line


def tables(rules: Mapping[str, Any]) -> strategies.SearchStrategy[dict[str, Any]]:
    """Return tables of the service's keys with any values, also of the wrong type, and unknown keys."""
    known = {
        name: VALUES | (tables(rule) if isinstance(rule, Mapping) else strategies.nothing())
        for name, rule in rules.items()
    }
    return strategies.fixed_dictionaries({}, optional={**known, NAME: VALUES})


@given(tables(SCHEMA))
def test_no_text_passes_through_the_configuration(values: dict[str, Any]) -> None:
    shown = json.dumps(show_values(values, Path("folder"), Pseudonyms()))
    assert NAME not in shown


@pytest.mark.slow
def test_report_is_written_even_if_a_device_is_missing(site: Site, tmp_path: Path) -> None:
    if cuda_unavailable_reason() is None:
        pytest.skip("CUDA works here")
    target = tmp_path / "report.zip"
    site.log.touch()
    stderr = site.report(target, "--device", "cuda", "--bundle", site.bundle, code=4)
    assert "E_DEVICE_UNAVAILABLE" in stderr
    assert members(target)["self_test"]["code"] == "E_DEVICE_UNAVAILABLE"


@pytest.mark.skipif(os.name == "nt", reason="install.sh makes links")
def test_installed_releases_are_named_as_far_as_their_form_is_known(tmp_path: Path) -> None:
    releases = tmp_path / "releases"
    current, previous = releases / "0.1.0-0123456789ab", releases / f"0.1.0-{NAME}"
    for folder, link in ((current, "current"), (previous, "previous")):
        folder.mkdir(parents=True)
        (tmp_path / link).symlink_to(folder)
    facts = {"format": 1, "echoquad": "0.1.0", "target": NAME, "python": "3.11", "bundle": NAME, "extras": [NAME]}
    (current / "stick.json").write_text(json.dumps({**facts, "bundle_sha256": "ab" * 32, "created": NAME}), "utf-8")
    assert installation(tmp_path) == {
        "current": current.name,
        "stick": {"echoquad": "0.1.0", "python": "3.11", "bundle_sha256": "ab" * 32},
    }
    (current / "stick.json").write_text(f"[{NAME}", "utf-8")
    assert installation(tmp_path) == {"current": current.name}
    assert installation(tmp_path / "missing") == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_log_that_is_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        read_tail(tmp_path / "pipe")
