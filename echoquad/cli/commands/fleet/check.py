"""``echoquad fleet check``."""

from __future__ import annotations

import io
import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from echoquad.cli.framework.console import EXIT_PARTIAL, Progress, print_error, print_result, print_status
from echoquad_runtime.storage.row_names import display_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echoquad_deploy.fleet.box import Box

__all__ = ["check"]

_HEADER: Final = (
    *("box", "version", "bundle", "self-test", "device", "drift", "waiting", "oldest s", "undelivered", "refused"),
    *("clock s", "state"),
)
_NUMBERS: Final = frozenset({"waiting", "oldest s", "undelivered", "refused", "clock s"})
_UNLIMITED: Final = 10_000  # columns, where no terminal limits them


def check(
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="URL...", help="Services: http://HOST:PORT or https://HOST:PORT.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="TXT", help="File with more URLs, one a line; lines with # are comments."),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect",
            metavar="BUNDLE|SHA256",
            help="Bundle that all should run: its folder, or 12 or more digits of its SHA-256. Default: the bundle of "
            "most services.",
        ),
    ] = None,
    late: Annotated[
        float, typer.Option("--late", metavar="S", min=0, help="Seconds that an object or a result may wait.")
    ] = 60.0,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.1, max=600, help="Seconds for each service.")
    ] = 10.0,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="File with the token of the services, on one line."),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            "--ca", metavar="PEM", help="Authorities of the services' certificates. Default: those of the system."
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", metavar="PEM", help="Certificate of this side, for services that ask for one."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PEM", help="Its key. Default: in the file of the certificate.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in the place of the table.")] = False,
) -> None:
    """Ask services what they run and how they are, and print one table.

    The exit code is 3 if a service runs another bundle than it should, has not passed its self-test, is not ready or is
    late; otherwise 5 if a service does not answer, or 1 if none does.
    """
    from echoquad_deploy.fleet.addresses import parse_addresses, read_token, read_urls, tls_context
    from echoquad_deploy.fleet.assessment import ask_fleet, assess, expected_hash
    from echoquad_deploy.fleet.errors import FleetError
    from echoquad_runtime.errors import UsageError

    if key is not None and certificate is None:
        raise UsageError("--key without --certificate; give the certificate too")
    addresses = parse_addresses([*(urls or []), *(read_urls(file) if file else [])])
    expected = None if expect is None else expected_hash(expect)
    token = None if token_file is None else read_token(token_file)
    tls = tls_context(ca, certificate, key)
    exposed = [one for one in addresses if token and not one.encrypted and not one.is_local]
    if exposed:
        print_status(f"the token is sent without TLS to {len(exposed)} of {len(addresses)} services")

    asked = datetime.now(UTC)
    with Progress("asking services", len(addresses)) as progress:
        answers = ask_fleet(addresses, timeout=timeout, token=token, tls=tls, progress=progress.update)
    boxes = assess(answers, expected, late)
    if as_json:
        print_result(json.dumps(_content(boxes, asked, expected, late), indent=2))
    else:
        print_result(_table(boxes))
    wrong, silent = [box for box in boxes if box.findings], [box for box in boxes if box.error]
    if wrong:
        unreachable = f", and {len(silent)} do not answer" if silent else ""
        raise FleetError(f"{len(wrong)} of {len(boxes)} services need attention{unreachable}; see the report on stdout")
    if silent:
        raise typer.Exit(_report_silent(silent, len(boxes)))


def _report_silent(silent: Sequence[Box], total: int) -> int:
    """Print a line for each service that does not answer; return the exit code."""
    from echoquad_deploy.fleet.errors import NoAnswerError

    for box in silent:
        print_error(NoAnswerError(f"{box.name}: {box.error}"))
    return EXIT_PARTIAL if len(silent) < total else NoAnswerError.exit_code


def _content(boxes: Sequence[Box], asked: datetime, expected: str | None, late: float) -> dict[str, Any]:
    return {
        "asked": asked.isoformat(timespec="seconds"),
        "expected": expected,
        "late_s": late,
        "boxes": [box.to_dict() for box in boxes],
        "summary": {
            "boxes": len(boxes),
            "in_order": sum(not box.findings and not box.error for box in boxes),
            "need_attention": sum(bool(box.findings) for box in boxes),
            "do_not_answer": sum(bool(box.error) for box in boxes),
        },
    }


def _table(boxes: Sequence[Box]) -> str:
    """Lay out the table; on a terminal, long texts are folded into its width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in _HEADER:
        table.add_column(title, justify="right" if title in _NUMBERS else "left", overflow="fold")
    for box in boxes:
        # What a service answers is text: neither markup nor a control character of a terminal.
        table.add_row(*(Text(display_name(cell)) for cell in _row(box)))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def _row(box: Box) -> tuple[str, ...]:
    if box.error:
        return (box.name, *("-" for _ in _HEADER[2:]), f"no answer: {box.error}")
    bundle = f"{box.bundle[:40]} {box.bundle_sha256[:12]}" if box.bundle_sha256 else "-"
    drift = {None: "-", True: "ALERT", False: "ok"}[box.drift]
    return (
        box.name,
        box.version[:20] or "-",
        bundle,
        "passed" if box.self_test else "-",
        f"{box.device} {box.precision}"[:30].strip() or "-",
        drift,
        str(box.waiting),
        f"{box.oldest_s:.0f}",
        str(sum(one.waiting for one in box.destinations)),
        str(sum(one.refused for one in box.destinations)),
        "-" if box.clock_s is None else f"{round(box.clock_s):+d}",
        "; ".join([*box.findings, *box.notes]) or "ok",
    )
