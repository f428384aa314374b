"""The support report: collects its parts and writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from echoquad_deploy.support_report.archive import Member, write_archive
from echoquad_deploy.support_report.bundle_facts import bundle_facts, self_test
from echoquad_deploy.support_report.configuration import Configuration, read_configuration
from echoquad_deploy.support_report.log_lines import LogFilter, read_tail
from echoquad_deploy.support_report.machine import disk_space, package_versions, system_facts
from echoquad_deploy.support_report.program_texts import WITHHELD, ProgramTexts, program_texts
from echoquad_deploy.support_report.pseudonyms import Pseudonyms
from echoquad_deploy.support_report.queue_status import queue_status
from echoquad_deploy.support_report.service_state import installation, journal_lines, ready_status, unit_state
from echoquad_runtime._version import __version__
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.diagnostics import DiagnosticReport
from echoquad_runtime.errors import EchoQuadError

__all__ = ["INSTALLED_BUNDLE", "INSTALLED_CONFIG", "write_support_report"]

INSTALLED_CONFIG: Final = Path("/etc/echoquad/service.toml")
INSTALLED_RELEASES: Final = Path("/opt/echoquad")
INSTALLED_BUNDLE: Final = INSTALLED_RELEASES / "current" / "bundle"
"""Where ``install.sh`` puts them: what a report takes if nothing is named."""


def write_support_report(
    path: Path,
    diagnostics: DiagnosticReport,
    *,
    device: Device = "auto",
    bundle: Path | None = None,
    config: Path | None = None,
    log: Path | None = None,
) -> None:
    """Write a zip file with what support needs to know of this machine, without any value of a patient.

    It is written atomically, and only its owner may read it. Everything in it is on a list of what may be: numbers,
    hashes, versions, and texts of the program itself. A part that cannot be collected states why, and the others are
    written.

    Parameters
    ----------
    path
        The zip file.
    diagnostics
        The report of ``echoquad doctor``.
    device
        Device of the self-test.
    bundle
        The bundle's folder; None takes that of an installation, if there is one.
    config
        The service's configuration; None takes that of an installation, if there is one.
    log
        A file with the service's JSON log; None reads the journal of the unit ``echoquad``.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    names, texts = Pseudonyms(), program_texts()
    bundle = bundle or _existing(INSTALLED_BUNDLE)
    configuration = Configuration({"file": "could not be read"})

    def read() -> dict[str, Any]:
        nonlocal configuration
        configuration = read_configuration(config or _existing(INSTALLED_CONFIG), names)
        return configuration.shown

    parts: list[tuple[str, str, Callable[[], Any]]] = [
        ("configuration.json", "known keys of the service's configuration; names are numbered words", read),
        ("diagnostics.json", "the checks of `echoquad doctor`", lambda: _diagnostics(diagnostics, texts)),
        ("packages.json", "names and versions of the installed packages", package_versions),
        ("system.json", "operating system, processor, memory, limits", system_facts),
        (
            "disks.json",
            "space of the file systems in use",
            lambda: disk_space({"store": configuration.store, "bundle": bundle}),
        ),
        (
            "bundle.json",
            "hashes and numbers of the bundle, and its signature",
            lambda: bundle_facts(bundle, configuration.public_key, names),
        ),
        ("self_test.json", "the bundle's golden frames on this machine", lambda: self_test(bundle, device)),
        (
            "service.json",
            "installed releases, state of the unit, counts of the queue",
            lambda: {
                "installation": installation(INSTALLED_RELEASES),
                "unit": unit_state(),
                "ready": ready_status(configuration.port),
                **queue_status(configuration.store),
            },
        ),
    ]
    members = [Member(name, about, _json(_collect(part))) for name, about, part in parts]
    filtered: list[str] = []
    summary = _collect(lambda: _log(log, LogFilter(texts, names), filtered))
    members += [
        Member("log_summary.json", "where the log came from, and what of it was left out", _json(summary)),
        Member("log.jsonl", "the service's latest log lines: known fields", "".join(f"{line}\n" for line in filtered)),
    ]
    write_archive(path, members, f"EchoQuad {__version__}, {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")


def _existing(path: Path) -> Path | None:
    try:
        return path if path.exists() else None
    except OSError:
        return None


def _collect(part: Callable[[], Any]) -> Any:
    """Return a part; if it fails, only the kind of the error, since its text may quote anything."""
    try:
        return part()
    except EchoQuadError as error:
        return {"failed": error.code}
    except Exception as error:  # the other parts are needed all the more
        kind = type(error).__name__
        return {"failed": kind if kind in program_texts().exceptions else "Exception"}


def _diagnostics(report: DiagnosticReport, texts: ProgramTexts) -> dict[str, Any]:
    """Return the checks; words of their details that are none of the program's are left out."""
    checks = [
        {"name": texts.words(check.name), "status": check.status, "detail": texts.words(check.detail)}
        for check in report.checks
    ]
    return {"device": report.device, "healthy": report.healthy, "checks": checks}


def _log(path: Path | None, log_filter: LogFilter, filtered: list[str]) -> dict[str, Any]:
    if path is None:
        source, lines = "journal", journal_lines()
        if lines is None:
            return {"source": "none: no file was named, and there is no journal that may be read"}
    else:
        source, lines = "file", read_tail(path)
    filtered += log_filter.reduce(lines)
    withheld = sum(line.count(WITHHELD) for line in filtered)
    return {"source": source, **log_filter.counts, "written": len(filtered), "values_withheld": withheld}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
