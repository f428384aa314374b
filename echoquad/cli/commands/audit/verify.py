"""``echoquad audit verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.framework.console import print_result

__all__ = ["verify"]


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the audit log, or one of its files.")],
    site_key: Annotated[
        Path | None,
        typer.Option(
            "--site-key",
            metavar="FILE",
            help="The service's site key. Without it, a log that somebody has written anew is not found.",
        ),
    ] = None,
) -> None:
    """Verify that no entry of a service's audit log was changed, removed, added or moved.

    Exit code 3 names the first file and line that are wrong. The service may be running.
    """
    from echoquad_serve.monitoring.audit_verification import read_site_key, verify_audit_log

    key = None if site_key is None else read_site_key(site_key)
    print_result(f"PASS {path.as_posix()}: {verify_audit_log(path, key)}")
