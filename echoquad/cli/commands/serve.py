"""The command ``echoquad serve``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.framework.console import print_status
from echoquad.cli.framework.options import BundleFolder

__all__ = ["serve"]


def serve(
    bundle: BundleFolder,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Configuration, TOML. Default: loopback, port 8770.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="N", min=1, max=65535, help="Port of the page.")] = None,
    store: Annotated[
        Path | None, typer.Option("--store", metavar="DIR", help="Folder of the queue and the results.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="SPEC",
            help="Live source: v4l2:/dev/video0, rtsp://..., lavfi:testsrc, or a clip that is played again and again.",
        ),
    ] = None,
    shadow: Annotated[
        Path | None,
        typer.Option(
            "--shadow",
            metavar="BUNDLE",
            help="Second bundle, which decides the same frames. Its decisions are only compared; see the metrics.",
        ),
    ] = None,
) -> None:
    """Serve a bundle at the bedside: page and API over HTTP, watched folders, DICOM; nothing accepted is lost."""
    from echoquad_serve.config import LiveConfig, load_config
    from echoquad_serve.server import run

    settings = load_config(config)
    if port is not None:
        settings = dataclasses.replace(settings, http=dataclasses.replace(settings.http, port=port))
    if store is not None:
        settings = dataclasses.replace(settings, store=dataclasses.replace(settings.store, folder=store))
    if source is not None:
        live = LiveConfig(source) if settings.live is None else dataclasses.replace(settings.live, source=source)
        settings = dataclasses.replace(settings, live=live)
    if shadow is not None:
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, shadow=shadow))
    run(
        bundle,
        settings,
        lambda address: print_status(f"ready: {address} Research use only, not for diagnosis. Ctrl-C stops it."),
    )
